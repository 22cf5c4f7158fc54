"""What README.md, docs/ and deploy/ tell people to type."""

import re
import shlex
from pathlib import Path

import typer

from registry.cli.main import app
from registry.settings import LocalStorage, S3Storage, Settings

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


def test_the_commands_of_the_tour_write_where_git_does_not_look() -> None:
    targets = re.findall(r"(?:adaptory|openssl) .* -(?:o|out) ([^\s)]+)", (ROOT / "docs" / "tour.md").read_text())
    assert len(targets) >= 4
    assert [target for target in targets if not target.startswith((".demo/", "~/.config/adaptory/"))] == []
    assert "/.demo/" in (ROOT / ".gitignore").read_text().splitlines()


def test_operators_can_read_of_every_setting_and_no_document_names_one_that_does_not_exist() -> None:
    settings = {f"ADAPTORY_{name}".upper() for name in Settings.model_fields}
    for storage in (LocalStorage, S3Storage):
        settings |= {f"ADAPTORY_STORAGE__{name}".upper() for name in storage.model_fields}
    named = {
        path.name: set(re.findall(r"ADAPTORY_[A-Z_0-9]*[A-Z0-9]", path.read_text()))
        for path in (UNIT, *(ROOT / "docs").glob("*.md"))
    }
    assert named["operating.md"] - settings == set()
    assert {name for name in settings if "STORAGE__" not in name} - named["operating.md"] == {"ADAPTORY_STORAGE"}
    for names in named.values():
        assert {name for name in names if not name.startswith("ADAPTORY_TEST_")} - settings <= {
            "ADAPTORY_REQUIRE_SERVICES"
        }
