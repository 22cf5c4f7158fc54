"""What README.md, docs/ and deploy/ tell people to type."""

import re
import shlex
from pathlib import Path

import typer

from registry.cli.main import app
from registry.settings import STORAGES, Settings, SignInSettings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "adaptory.service"


def test_the_unit_starts_the_server_and_runs_nothing_before_it() -> None:
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("Exec")]
    assert line.startswith("ExecStart=/opt/adaptory/bin/adaptory ")
    name, *options = shlex.split(line)[1:]
    adaptory = typer.main.get_command(app)
    # Below its parent, as on a command line: commands are built once a process, and keep how their help was asked for.
    parent = adaptory.make_context("adaptory", [name])
    assert name == "serve"
    assert adaptory.commands[name].make_context(name, options, parent).params["port"] == 8470  # type: ignore[attr-defined]


def test_the_commands_from_training_to_serving_are_commands_of_ours() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    lines = re.findall(r"(?:^|\$\(|`)adaptory ([^`)\n]+)", text, re.MULTILINE)
    adaptory = typer.main.get_command(app)
    for name, *words in (shlex.split(line.partition(" #")[0]) for line in lines):
        command = adaptory.commands[name]  # type: ignore[attr-defined]
        if words:
            command.make_context(name, words, adaptory.make_context("adaptory", [name]))
    assert len(lines) > 15


def test_the_commands_of_the_tour_write_where_git_does_not_look() -> None:
    targets = re.findall(r"(?:adaptory|openssl) .* -(?:o|out) ([^\s)]+)", (ROOT / "docs" / "tour.md").read_text())
    assert len(targets) >= 4
    assert [target for target in targets if not target.startswith((".demo/", "~/.config/adaptory/"))] == []
    assert "/.demo/" in (ROOT / ".gitignore").read_text().splitlines()


def test_operators_can_read_of_every_setting_and_no_document_names_one_that_does_not_exist() -> None:
    settings = {f"ADAPTORY_{name}".upper() for name in Settings.model_fields}
    for storage in STORAGES:
        settings |= {f"ADAPTORY_STORAGE__{name}".upper() for name in storage.model_fields}
    settings |= {f"ADAPTORY_SIGN_IN__{name}".upper() for name in SignInSettings.model_fields}
    named = {
        path.name: set(re.findall(r"ADAPTORY_[A-Z_0-9]*[A-Z0-9]", path.read_text()))
        for path in (UNIT, *(ROOT / "docs").glob("*.md"))
    }
    assert named["operating.md"] - settings == set()
    assert {name for name in settings if "STORAGE__" not in name} - named["operating.md"] == {
        "ADAPTORY_STORAGE",
        "ADAPTORY_SIGN_IN",
    }
    of_stores = "".join((ROOT / "docs" / name).read_text() for name in ("operating.md", "storage.md"))
    described = set(re.findall(r"([A-Z_]+)[`=]", of_stores.replace("ADAPTORY_STORAGE__", "")))
    assert {name.upper() for storage in STORAGES for name in storage.model_fields} - described == set()
    for names in named.values():
        assert {name for name in names if not name.startswith("ADAPTORY_TEST_")} - settings <= {
            "ADAPTORY_REQUIRE_SERVICES"
        }


def test_the_recipes_for_contributors_name_files_and_names_that_are_there() -> None:
    recipes = (ROOT / "docs" / "contributing.md").read_text().split("\n## ")[1:]
    missing = [f"{recipe.splitlines()[0]}: {name}" for recipe in recipes for name in _missing(recipe)]
    assert (missing, len(recipes)) == ([], 10)


def _missing(recipe: str) -> list[str]:
    quoted = re.findall(r"`([\w./]+)`", recipe.replace("\n", " "))
    paths = [ROOT / name for name in quoted if "/" in name and "NAME" not in name]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]) if file.is_file()]
    text = "".join(file.read_text() for file in files)
    known = {file.name for file in files} | set(re.findall(r"\w+", text))
    absent = [str(path.relative_to(ROOT)) for path in paths if not path.exists()]
    return absent + [name for name in quoted if "/" not in name and name not in known and name not in text]
