"""Repeating a push changes nothing if all is well, and restores blobs that the store has lost."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.transfer.fsck import check, discard
from tests.doses import further
from tests.scenarios import stored
from tests.scenarios.test_signatures import Keys
from tests.scenarios.traces import hashes, home_of, opened, traces
from tests.scenarios.world import Cli, World

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(world: World, tmp_path: Path) -> Path:
    directory = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    (directory / "data.txt").write_text("a file that nobody reads when it is published")
    return directory


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path, "team")


def beside(cli: Cli) -> Cli:
    """The command line on the machine of the registry itself, which needs its database and its store."""
    return Cli({**cli.environment, **cli.served_with, "ADAPTORY_HOME": str(home_of(cli)), "ADAPTORY_URL": ""})


@pytest.mark.long
def test_the_same_signed_push_again_changes_nothing(stocked: Cli, adapter: Path, keys: Keys, tmp_path: Path) -> None:
    signed = ("--base", "tiny", "--include", "data.txt", "--sign", keys.private)
    first = stocked.json("push", adapter, "acme/sql:1.0.0", *signed)
    before = traces(stocked)
    for target, bump in (("acme/sql:1.0.0", ()), ("acme/sql", ("--bump", "auto")), ("acme/sql", ("--bump", "patch"))):
        again = stocked.json("push", adapter, target, *signed, *bump)
        assert (again["created"], again["release"]["commit"]) == (False, first["release"]["commit"]), bump
    assert traces(stocked) == before
    (adapter / "README.md").write_text("better")
    assert stocked.json("push", adapter, "acme/sql", *signed, "--bump", "auto")["release"]["version"] == "1.0.1"
    stocked.ok("pull", "acme/sql:1.0.1", "-o", tmp_path / "out", "--verify", keys.public)


def test_a_signature_of_another_key_is_not_taken_over(
    stocked_embedded: Cli, adapter: Path, keys: Keys, tmp_path: Path
) -> None:
    cli, stranger = stocked_embedded, Keys(tmp_path, "stranger")
    cli.ok("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "data.txt", "--sign", stranger.private)
    refused = cli("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "data.txt", "--sign", keys.private)
    assert "a release never changes" in refused.err
    mine = (
        "push",
        adapter,
        "acme/sql",
        "--base",
        "tiny",
        "--include",
        "data.txt",
        "--sign",
        keys.private,
        "--bump",
        "auto",
    )
    assert cli.json(*mine)["release"]["version"] == "1.0.1"
    cli.ok("pull", "acme/sql:1.0.1", "-o", tmp_path / "out", "--verify", keys.public)
    (adapter / "model.sig").write_text("no signature at all")
    cli.ok("push", adapter, "acme/sql:2.0.0", "--base", "tiny", "--include", "data.txt")
    (adapter / "model.sig").unlink()
    again = cli.json(*mine)
    assert (again["created"], again["release"]["version"]) == (True, "2.0.1"), "above one that nobody signed"


@pytest.mark.parametrize("file", ["data.txt", *further(WEIGHTS)])
def test_a_damaged_blob_is_healed_by_fsck_and_the_same_push_again(
    stocked: Cli, adapter: Path, file: str, tmp_path: Path
) -> None:
    push = ("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "data.txt")
    stocked.ok(*push)
    sha256 = hashlib.sha256((adapter / file).read_bytes()).hexdigest()
    stored.overwrite(stocked, sha256, os.urandom((adapter / file).stat().st_size))
    if file == WEIGHTS:
        refused = stocked(*push)
        assert refused.code != 0
        assert "adaptory fsck --full --discard" in refused.err
    checked = beside(stocked)("fsck", "--full", "--discard", "--json")
    assert (checked.code, checked.json["discarded"]) == (1, [sha256])
    (event,) = beside(stocked).json("audit", "--act", "blob:discard")["items"]
    assert (event["subject"], event["reason"]) == (sha256, "damaged")
    mended = stocked.ok(*push).out
    assert mended.startswith("already published, its lost files sent again: acme/sql:1.0.0 "), mended
    assert stocked.ok(*push).out.startswith("already published, nothing to do: acme/sql:1.0.0 ")
    healed = beside(stocked).json("fsck", "--full", "--discard")
    assert (healed["clean"], healed["findings"], healed["discarded"]) == (True, [], [])
    stocked.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(adapter)


def test_what_was_restored_after_it_was_found_damaged_is_not_deleted(stocked_embedded: Cli, adapter: Path) -> None:
    cli = stocked_embedded
    cli.ok("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "data.txt")
    content = (adapter / WEIGHTS).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    stored.overwrite(cli, sha256, bytes(len(content)))
    held = opened(cli)
    findings = check(held, read_bytes=True)
    assert [finding.subject for finding in findings] == [sha256]
    stored.overwrite(cli, sha256, content)
    assert list(discard(held, findings)) == []
    held.close()
    cli.ok("fsck", "--full")


def link_to_a_directory(adapter: Path) -> None:
    (adapter / "real").mkdir()
    (adapter / "real" / "file.txt").write_text("it would be missing")
    (adapter / "odd").symlink_to("real")


def link_to_a_directory_outside(adapter: Path) -> None:
    (adapter.parent / "outside").mkdir()
    (adapter / "odd").symlink_to("../outside")


UNFIT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link to a directory": (link_to_a_directory, "odd is a link to a directory"),
    "a link to a directory outside": (link_to_a_directory_outside, "odd leads out of"),
    "a pipe": (lambda adapter: os.mkfifo(adapter / "odd"), "odd is not a regular file"),
    "a link to nothing": (lambda adapter: (adapter / "odd").symlink_to("nowhere"), "odd is not a regular file"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_can_be_no_file_of_a_release_is_refused_by_name(stocked_embedded: Cli, adapter: Path, what: str) -> None:
    make, message = UNFIT[what]
    make(adapter)
    refused = stocked_embedded("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "odd*")
    assert refused.code == 6
    assert message in refused.err
    assert traces(stocked_embedded).releases == ()
