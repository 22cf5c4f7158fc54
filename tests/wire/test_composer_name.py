"""Another package is also called `composer`: wherever it hides ours, one sentence explains this, with a next step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import registry

SENTENCE = "is another one, such as MosaicML's: adaptory has one of the same name."
ADVICE = "Install adaptory in an environment of its own: `pipx install adaptory` or `uv tool install adaptory`."
COMMAND = "from registry.cli.start import main; main()"


def ran(path: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with `path` before everything else."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, check=False)


def test_a_package_of_that_name_before_ours_on_the_path_is_refused_unread(tmp_path: Path) -> None:
    other = tmp_path / "composer"
    other.mkdir()
    (other / "__init__.py").write_text("raise SystemExit('it was imported')")
    command = ran(tmp_path, COMMAND, "list")
    assert command.returncode == 7
    assert command.stderr == f"error: The package `composer` in {other} {SENTENCE}\nnext: {ADVICE}\n"
    imported = ran(tmp_path, "import registry.sdk")
    assert imported.returncode == 1
    assert imported.stderr.splitlines()[-1].endswith(f"in {other} {SENTENCE} {ADVICE}")


def test_a_package_of_that_name_installed_over_ours_is_refused(tmp_path: Path) -> None:
    """pip lets a second package write into the same directory."""
    ours = Path(registry.__file__).parent
    for name in (
        "__init__.py",
        "environment/__init__.py",
        "environment/composer_name.py",
        "errors/__init__.py",
        *(f"errors/{name}.py" for name in ("families", "codes", "input_codes")),
    ):
        (tmp_path / "registry" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ours / name, tmp_path / "registry" / name)
    shutil.copytree(ours.parent / "composer" / "formats", tmp_path / "composer" / "formats")
    (tmp_path / "composer" / "__init__.py").touch()
    check = "from registry.environment.composer_name import refuse_other_composer; refuse_other_composer()"
    assert ran(tmp_path, check).returncode == 0
    (tmp_path / "composer" / "trainer").mkdir()
    assert SENTENCE in ran(tmp_path, check).stderr
