"""Input that ends in one clear error: names that Windows cannot store, a text file as the database, no reason."""

import stat
from pathlib import Path

import pytest

from registry.errors import Invalid
from registry.formats.manifest import refuse_unportable
from tests.scenarios.world import Cli, World


@pytest.mark.parametrize(
    "name", ["nul", "CON.txt", "com1.json", "dir/aux.tar.gz", "a<b", "a|b", "what?", "all*", 'say"']
)
def test_a_name_that_windows_cannot_store_is_refused(name: str) -> None:
    with pytest.raises(Invalid, match="Windows"):
        refuse_unportable(name)


@pytest.mark.parametrize("name", ["nul1", "console.txt", "com10", "a/b-c_d.json", "auxiliary", ".eval_results/x.yaml"])
def test_other_names_are_not(name: str) -> None:
    refuse_unportable(name)


def test_a_push_names_the_file_that_windows_cannot_store(cli: Cli, world: World, tmp_path: Path) -> None:
    cli.ok("base", "add", world.base, "--name", "tiny")
    (world.adapters["sql"] / "nul.txt").write_text("x")
    try:
        refused = cli("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--include", "nul.txt")
    finally:
        (world.adapters["sql"] / "nul.txt").unlink()
    assert refused.code != 0
    assert "nul.txt" in refused.err
    assert "Windows" in refused.err


def test_a_text_file_as_the_database_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("This is a text, and no database at all.")
    environment = {"ADAPTORY_HOME": str(tmp_path), "ADAPTORY_DATABASE_URL": f"sqlite:///{tmp_path}/notes.txt"}
    for command in ("list", "migrate"):
        refused = Cli(environment)(command)
        assert "not a SQLite database" in refused.err
        assert "Traceback" not in refused.err
        assert refused.code != 0


def test_an_unyank_without_a_reason_says_that_it_needs_one(tmp_path: Path) -> None:
    refused = Cli({"ADAPTORY_HOME": str(tmp_path)})("unyank", "acme/sql:1.0.0")
    assert refused.code == 2
    assert "An unyank needs a reason." in refused.err
    assert "--reason" in refused.err


def test_the_bundle_of_the_doctor_is_its_owners_alone(tmp_path: Path) -> None:
    bundle = tmp_path / "report.zip"
    Cli({"ADAPTORY_HOME": str(tmp_path / "home")})("doctor", "--bundle", bundle)
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600
