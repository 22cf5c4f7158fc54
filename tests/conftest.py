"""What every test may ask for: a tiny real model with adapters, databases, and a registry driven as its users do."""

import os
from collections.abc import Generator
from typing import Any

import pytest

from tests import services

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Brings what a test process did not find to the process that prints the summary."""
    services.add_missing(getattr(node, "workeroutput", {}).get("missing", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["missing"] = services.missing()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, hint in services.missing().items():
        terminalreporter.write_line(f"NOT TESTED: {name} ({hint})", yellow=True)


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with services.postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url
