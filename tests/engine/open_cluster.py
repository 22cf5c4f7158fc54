"""Opens the engine of some settings in a process of its own, since a process can be the driver of one cluster."""

import json
from collections.abc import Mapping
from pathlib import Path

from registry.environment.settings import Settings
from registry.errors import RegistryError
from registry.worker.engine.opened import open_engine
from registry.worker.engine.units import open_node
from tests.engine.cluster import others_environ
from tests.forked import start


def refusal(environ: Mapping[str, str], directory: Path) -> tuple[str, str]:
    """Code and detail of the error; both empty if the engine opens. The answer is passed through a file in the
    directory."""
    answer = directory / "answer.json"
    answer.unlink(missing_ok=True)
    process = start(_open, {**others_environ(), **environ}, answer)
    process.join(120)
    assert process.exitcode == 0
    code, detail = json.loads(answer.read_text())
    return code, detail


def _open(answer: Path) -> None:
    code, detail = "", ""
    settings = Settings()
    try:
        open_engine(settings, open_node(settings)).close()
    except RegistryError as error:
        code, detail = error.code, error.detail
    answer.write_text(json.dumps([code, detail]))
