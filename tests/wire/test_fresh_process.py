"""Modules that a process loads before it knows its task: the start of every command, and of every server."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement

HEAVY = ("torch", "transformers", "boto3", "botocore", "alembic")
SERVER = ("fastapi", "starlette", "sqlalchemy", "httpx2", "uvicorn", "numpy", "rich")


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(ran.stdout.splitlines()[-1]))


@pytest.mark.long
def test_importing_the_web_application_loads_neither_torch_nor_boto3() -> None:
    loaded = loaded_by("import registry.api.app")
    assert "fastapi" in loaded
    assert not loaded & set(HEAVY)


def test_help_loads_nothing_that_it_does_not_print() -> None:
    loaded = loaded_by(
        "import sys\nsys.argv = ['adaptory', '--help']\nfrom registry.cli.start import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert "typer" in loaded
    assert not loaded & {*HEAVY, *SERVER}


def test_the_trainers_client_loads_no_server_and_no_database() -> None:
    loaded = loaded_by("import registry.client.push, registry.client.pull")
    assert not loaded & {*HEAVY, "fastapi", "sqlalchemy", "uvicorn"}


def test_a_remote_registry_in_python_loads_no_server_and_no_database_and_no_torch() -> None:
    loaded = loaded_by(
        "from registry.sdk import Composition, Move, Promotion, Registry, Release, Score\n"
        "with Registry('http://127.0.0.1:9', token='adp_x'):\n    pass"
    )
    assert "httpx2" in loaded
    assert not loaded & {*HEAVY, "fastapi", "sqlalchemy", "starlette", "uvicorn"}


def test_a_server_with_its_worker_starts_without_any_extra() -> None:
    wanted = [Requirement(text) for text in requires("adaptory") or ()]
    core = {row.name for row in wanted if row.marker is None or row.marker.evaluate({"extra": ""})}
    extras = {row.name for row in wanted} - core
    assert {"torch", "transformers", "boto3"} <= extras
    loaded = loaded_by("import registry.cli.operations.operations, registry.worker.runner, registry.worker.steps")
    assert not {module for module, names in packages_distributions().items() if extras & set(names)} & loaded
