"""Opens the engine of some settings in a process of its own, since a process can be the driver of one cluster."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping

from tests.engine.cluster import REPOSITORY

CODE = """
import json
from registry.errors import RegistryError
from registry.settings import Settings
from registry.worker.engine.opened import open_engine
from registry.worker.engine.units import open_node

try:
    settings = Settings()
    open_engine(settings, open_node(settings)).close()
    print(json.dumps(["", ""]))
except RegistryError as error:
    print(json.dumps([error.code, error.detail]))
"""


def refusal(environ: Mapping[str, str]) -> tuple[str, str]:
    """Code and detail of the error; both empty if the engine opens."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTORY_", "RAY_"))}
    answer = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**own, **environ},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.stdout, answer.stderr
    code, detail = json.loads(answer.stdout.splitlines()[-1])
    return code, detail
