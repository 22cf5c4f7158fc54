"""The wheel alone, in an empty environment: what `pip install adaptory` gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from registry.db import head_revision

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment that has the wheel and what it depends on, nothing else."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", place, ROOT]
    subprocess.run(pip, check=True)
    subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
    binaries = place / "venv" / "bin"
    (wheel,) = place.glob("*.whl")
    constraints = ROOT / "constraints.txt"
    subprocess.run([binaries / "python", "-m", "pip", "install", "--quiet", "-c", constraints, wheel], check=True)
    return binaries


def run(installed: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "ADAPTORY_HOME": str(home), "HOME": str(home)}
    return subprocess.run(
        [installed / "adaptory", *arguments], env=environment, cwd=home, capture_output=True, text=True, check=False
    )


def test_the_wheel_brings_the_command_the_packages_and_the_migrations(installed: Path, tmp_path: Path) -> None:
    migrated = run(installed, tmp_path, "migrate")
    assert (migrated.returncode, migrated.stderr) == (0, "")
    assert f"schema none -> {head_revision()}" in migrated.stdout
    subprocess.run([installed / "python", "-c", "import registry, composer"], cwd=tmp_path, check=True)
    assert run(installed, tmp_path, "list").returncode == 0


def test_a_command_that_needs_an_extra_says_which(installed: Path, tmp_path: Path) -> None:
    refused = run(installed, tmp_path, "merge", "--base", "x", "--adapter", "y", "-o", "z")
    assert refused.returncode == 7
    assert "Install adaptory with its extra `composer`." in refused.stderr
