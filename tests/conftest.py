"""What every test may ask for: a tiny real model with adapters, databases, and a registry driven as its users do."""

import os
from collections.abc import Generator

import pytest

from tests import services

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, hint in services.missing().items():
        terminalreporter.write_line(f"NOT TESTED: {name} ({hint})", yellow=True)


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with services.postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url
