"""The wheel alone, in an empty environment: the result of `pip install adaptory`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from registry.database.migrate import head_revision

ROOT = Path(__file__).parents[2]


TYPED = """# pyright: strict
from composer.conflicts.report import ConflictReport
from registry.sdk import Move, Registry, Release

with Registry() as registry:
    released: {} = registry.resolve("acme/sql@prod")
    report: ConflictReport = registry.conflicts("acme/sql", "acme/terraform", weights=[1.0, 0.5])
    names: list[str] = [str(release) for release in registry.search(base="smollm2", max_rank=16)]
    _ = Move, Release
"""


def errors_of_types(installed: Path, directory: Path) -> list[dict[str, Any]]:
    """Type-checks two programs that use the installed package, one of them wrongly, and returns the errors. The type
    checker ignores the source of packages that do not declare themselves typed."""
    directory.mkdir()
    (directory / "pyrightconfig.json").write_text('{"useLibraryCodeForTypes": false}')
    for name, kind in (("right", "Release"), ("wrong", "Move")):
        (directory / f"{name}.py").write_text(TYPED.format(kind))
    pyright = Path(sys.executable).with_name("pyright")
    command = [pyright, "--pythonpath", installed / "python", "--project", directory, "--outputjson"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(checked.stdout)["generalDiagnostics"]


def installed_wheel(directory: Path) -> Path:
    """The bin directory of an environment with only the wheel and its dependencies."""
    directory.mkdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", directory, ROOT]
    subprocess.run(pip, check=True)
    # This environment's pip installs into the other one: a separate pip would take as long as all the rest.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory / "venv"], check=True)
    binaries = directory / "venv" / "bin"
    (wheel,) = directory.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", binaries / "python"]
    install = ["install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run([*pip, *install], check=True)
    return binaries


def run(installed: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "ADAPTORY_HOME": str(home), "HOME": str(home)}
    return subprocess.run(
        [installed / "adaptory", *arguments], env=environment, cwd=home, capture_output=True, text=True, check=False
    )


@pytest.mark.long
def test_the_wheel_brings_command_packages_and_migrations_and_says_which_extra_is_missing(tmp_path: Path) -> None:
    installed = installed_wheel(tmp_path / "wheel")
    migrated = run(installed, tmp_path, "migrate")
    assert (migrated.returncode, migrated.stderr) == (0, "")
    assert f"schema none -> {head_revision()}" in migrated.stdout
    subprocess.run([installed / "python", "-c", "import registry, composer"], cwd=tmp_path, check=True)
    assert run(installed, tmp_path, "list").returncode == 0
    errors = errors_of_types(installed, tmp_path / "typed")
    assert [(Path(error["file"]).name, error["rule"]) for error in errors] == [("wrong.py", "reportAssignmentType")], (
        errors
    )
    refused = run(installed, tmp_path, "merge", "--base", "x", "--adapter", "y", "-o", "z")
    assert refused.returncode == 7
    assert "Install adaptory with its extra `composer`." in refused.stderr
