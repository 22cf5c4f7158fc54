"""A pull delivers the published files, whatever is in the store, in the cache or left by an earlier attempt."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir

import pytest
from sqlalchemy import text

from registry.client.cache import BlobCache
from registry.client.partial_files import PIECE_BYTES
from registry.client.pull import pull
from registry.client.retries import PAUSES_S
from registry.errors import Refused, Unavailable
from registry.wire.catalog import ReleaseOut
from tests.scenarios import stored
from tests.scenarios.test_bad_input import small_disk
from tests.scenarios.traces import api_of, hashes, opened, traces
from tests.scenarios.world import Cli, World, nothing

WEIGHTS = "adapter_model.safetensors"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (another file system)


def pushed(cli: Cli, world: World, version: str = "1.0.0") -> dict[str, str]:
    """sha256 of each file of the release."""
    release = cli.json("push", world.adapters["sql"], f"acme/sql:{version}", "--base", "tiny")["release"]
    return {file["path"]: file["sha256"] for file in release["files"]}


def damage(path: Path) -> None:
    """Flips one bit, as a disk would: length, name and read-only mode stay."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    mode = path.stat().st_mode
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(data)
    path.chmod(mode)


@pytest.mark.long
def test_a_blob_damaged_in_the_store_is_named_and_never_delivered_nor_published(
    stocked: Cli, world: World, tmp_path: Path
) -> None:
    digest = pushed(stocked, world)[WEIGHTS]
    stored.damage(stocked, digest)
    refused = stocked("pull", "acme/sql", "-o", tmp_path / "out")
    assert (refused.code, WEIGHTS in refused.err) == (7, True), refused.err
    assert not (tmp_path / "out").exists()
    assert not list((Path(stocked.environment["ADAPTORY_HOME"]) / "cache" / "blobs").glob(digest))
    refused = stocked("push", world.adapters["sql"], "acme/other:1.0.0", "--base", "tiny")
    assert (refused.code, WEIGHTS in refused.err) == (7, True), refused.err
    assert traces(stocked).releases == ("acme/sql:1.0.0",)


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize(
    "harm",
    [lambda content: content[:100], lambda content: b"", lambda content: content + b"more"],
    ids=["cut off", "empty", "longer"],
)
def test_a_blob_of_another_size_is_named_as_damaged_at_once(
    stocked: Cli, world: World, tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    digest = pushed(stocked, world)[WEIGHTS]
    stored.overwrite(stocked, digest, harm(stored.read(stocked, digest)))
    started = time.monotonic()
    refused = stocked("pull", "acme/sql", "-o", tmp_path / "out")
    assert time.monotonic() - started < sum(PAUSES_S), "nobody waits for bytes that are not there"
    assert (refused.code, f"{WEIGHTS} of acme/sql:1.0.0 is damaged" in refused.err) == (7, True), refused.err
    assert not (tmp_path / "out").exists()
    with api_of(stocked) as api, pytest.raises(Unavailable, match="is damaged"):
        api.get(f"/v1/blobs/{digest}")


def test_a_file_that_the_database_says_is_another_is_named_as_damaged(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    digests, held = pushed(stocked_embedded, world), opened(stocked_embedded)
    with held.write() as session:
        rows = session.execute(
            text("UPDATE revision_files SET sha256 = :small WHERE path = :path"),
            {"small": digests["adapter_config.json"], "path": WEIGHTS},
        )
        assert rows.rowcount == 1  # pyright: ignore[reportAttributeAccessIssue]
    held.close()
    refused = stocked_embedded("pull", "acme/sql", "-o", tmp_path / "out")
    assert (refused.code, f"{WEIGHTS} of acme/sql:1.0.0 is damaged" in refused.err) == (7, True), refused.err


def test_files_of_two_pulls_are_the_same_read_only_files(stocked: Cli, world: World, tmp_path: Path) -> None:
    digests = pushed(stocked, world)
    for name in ("first", "second"):
        stocked.ok("pull", "acme/sql", "-o", tmp_path / name)
    cache = Path(stocked.environment["ADAPTORY_HOME"]) / "cache" / "blobs"
    for path, digest in digests.items():
        first, second, entry = tmp_path / "first" / path, tmp_path / "second" / path, cache / digest
        assert first.stat().st_ino == second.stat().st_ino == entry.stat().st_ino
        assert first.stat().st_mode & 0o222 == 0
    shutil.rmtree(tmp_path / "first")
    assert hashes(tmp_path / "second") == digests


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_to_the_same_bytes(path: Path) -> None:
    elsewhere = path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "harm",
    [damage, lambda path: path.write_bytes(b"short"), Path.unlink, pipe, link_to_the_same_bytes],
    ids=["bit", "short", "gone", "pipe", "link"],
)
def test_a_damaged_cache_is_noticed_and_repaired(
    stocked_embedded: Cli, world: World, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    cli = stocked_embedded
    digests = pushed(cli, world)
    cli.ok("pull", "acme/sql", "-o", tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    entry = Path(cli.environment["ADAPTORY_HOME"]) / "cache" / "blobs" / digests[WEIGHTS]
    entry.chmod(0o644)
    harm(entry)
    cli.ok("pull", "acme/sql", "-o", tmp_path / "second")
    assert hashes(tmp_path / "second") == digests
    assert (hashes(entry.parent)[digests[WEIGHTS]]) == digests[WEIGHTS]
    assert not any(path.is_symlink() for path in (entry, tmp_path / "second" / WEIGHTS))


def test_writing_to_a_pulled_file_harms_no_later_pull(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    """Root may write to read-only files, and the cache has the same file."""
    cli = stocked_embedded
    digests = pushed(cli, world)
    cli.ok("pull", "acme/sql", "-o", tmp_path / "first")
    damage(tmp_path / "first" / WEIGHTS)
    cli.ok("pull", "acme/sql", "-o", tmp_path / "second")
    assert hashes(tmp_path / "second") == digests


def more_of_it(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


def another_config(directory: Path) -> None:
    config = directory / "adapter_config.json"
    config.unlink()
    config.write_text((directory / "README.md").read_text())


@pytest.mark.parametrize(
    "harm",
    [
        lambda directory: damage(directory / WEIGHTS),
        lambda directory: (directory / WEIGHTS).unlink(),
        another_config,
        more_of_it,
        lambda directory: pipe(directory / WEIGHTS),
        lambda directory: link_to_the_same_bytes(directory / WEIGHTS),
        shutil.rmtree,
    ],
    ids=["bit", "gone", "another", "more", "pipe", "link", "all gone"],
)
def test_a_release_that_was_changed_on_this_machine_is_pulled_anew_by_who_uses_it(
    stocked_embedded: Cli, world: World, harm: Callable[[Path], object]
) -> None:
    cli = stocked_embedded
    digests = pushed(cli, world)
    before = cli.json("inspect", "acme/sql")
    (directory,) = (Path(cli.environment["ADAPTORY_HOME"]) / "cache").glob("*/acme--sql")
    harm(directory)
    assert cli.json("inspect", "acme/sql") == before
    assert hashes(directory) == digests
    assert not any(path.is_symlink() for path in directory.iterdir())
    assert {path.name for path in directory.parents[1].iterdir()} == {directory.parent.name, "blobs"}


def test_a_release_that_is_as_it_was_pulled_is_not_pulled_again(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    digests = pushed(cli, world)
    cli.ok("inspect", "acme/sql")
    stored.overwrite(cli, digests[WEIGHTS], b"lost")
    shutil.rmtree(Path(cli.environment["ADAPTORY_HOME"]) / "cache" / "blobs")
    cli.ok("inspect", "acme/sql")


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="there is one file system only")
def test_a_cache_on_another_file_system_is_copied_from(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    others = (path for path in (SHARED_MEMORY, Path(gettempdir())) if path.stat().st_dev != tmp_path.stat().st_dev)
    if (other := next(others, None)) is None:
        pytest.skip("there is one file system only")
    digests = pushed(stocked_embedded, world)
    cache = other / f"adaptory-{os.getpid()}"
    try:
        with api_of(stocked_embedded) as api:
            release = ReleaseOut.read(stocked_embedded.json("show", "acme/sql"))
            for name in ("first", "second"):
                pull(api, release, tmp_path / name, nothing, BlobCache(cache))
                assert hashes(tmp_path / name) == digests
        assert hashes(cache) == {digest: digest for digest in digests.values()}
        damage(cache / digests[WEIGHTS])
        with api_of(stocked_embedded) as api:
            pull(api, release, tmp_path / "third", nothing, BlobCache(cache))
        assert hashes(tmp_path / "third") == digests
    finally:
        shutil.rmtree(cache)


def test_a_cache_on_a_full_disk_keeps_nothing_and_holds_up_nothing(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    digests = pushed(stocked_embedded, world)
    with small_disk(tmp_path / "small", "8k") as disk, api_of(stocked_embedded) as api:
        pull(
            api,
            ReleaseOut.read(stocked_embedded.json("show", "acme/sql")),
            tmp_path / "pulled",
            nothing,
            BlobCache(disk / "cache"),
        )
        assert hashes(disk / "cache").keys() < set(digests.values()), "what has no room is not kept, nor a part of it"
    assert hashes(tmp_path / "pulled") == digests


def test_a_file_of_several_pieces_arrives_whole_and_a_wrong_piece_found_on_disk_is_fetched_again(
    stocked: Cli, world: World, tmp_path: Path
) -> None:
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    size = 2 * PIECE_BYTES + 12345
    (adapter / "data.txt").write_bytes(os.urandom(size))
    release = stocked.json("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "data.txt")["release"]
    number = [file["path"] for file in release["files"]].index("data.txt")
    counted: list[int] = []
    with api_of(stocked) as api:
        pull(api, ReleaseOut.read(release), tmp_path / "out", counted.append)
        assert hashes(tmp_path / "out") == hashes(adapter)
        assert sum(counted) == sum(file["size_bytes"] for file in release["files"])
        partial = tmp_path / f".again.{release['commit'][:12]}.partial"
        (partial / "files").mkdir(parents=True)
        (partial / "pieces").mkdir()
        shutil.copy(adapter / "data.txt", partial / "files" / "data.txt")
        damage(partial / "files" / "data.txt")
        for journal in ("0\n1\n2\n", "0\n2\n", "nonsense\n-1\n99\n2"):
            (partial / "pieces" / str(number)).write_text(journal)
        counted.clear()
        pull(api, ReleaseOut.read(release), tmp_path / "again", counted.append)
    assert hashes(tmp_path / "again") == hashes(adapter)
    assert sum(counted) == sum(file["size_bytes"] for file in release["files"])


def test_files_that_a_check_refuses_never_appear(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    pushed(stocked_embedded, world)

    def refuse(directory: Path) -> None:
        assert (directory / WEIGHTS).exists()
        raise Refused("not_signed", "Nobody signed this.")

    with api_of(stocked_embedded) as api, pytest.raises(Refused):
        pull(api, ReleaseOut.read(stocked_embedded.json("show", "acme/sql")), tmp_path / "out", nothing, None, refuse)
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.on("SQLite")
def test_a_lost_blob_is_reported_by_the_registry(stocked: Cli, world: World, tmp_path: Path) -> None:
    digest = pushed(stocked, world)[WEIGHTS]
    with api_of(stocked) as api:
        release = ReleaseOut.read(stocked.json("show", "acme/sql"))
        stored.lose(stocked, digest)
        with pytest.raises(Unavailable) as raised:
            pull(api, release, tmp_path / "out", nothing)
    assert raised.value.code == "blob_lost"
    assert f"{WEIGHTS} of acme/sql:1.0.0 ({digest})" in raised.value.detail
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    stocked.ok("pull", "acme/sql", "-o", tmp_path / "out")


def test_a_pull_into_the_same_directory_again_verifies_it_and_another_release_needs_force(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    cli, out = stocked_on_disk, tmp_path / "out"
    pushed(cli, world)
    cli.ok("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny")
    pull_it = ("pull", "acme/sql:1.0.0", "-o", out)
    out.mkdir()
    first = cli.ok(*pull_it)
    assert first.out == f"{out}\n", "the directory is stdout's only line"
    assert cli.json("show", "acme/sql:1.0.0")["commit"] in first.err
    before = {path: path.stat().st_ino for path in out.iterdir()}
    assert cli.ok(*pull_it).out == f"{out}\n"
    assert {path: path.stat().st_ino for path in out.iterdir()} == before, "verified, not written again"

    refused = cli("pull", "acme/sql:1.1.0", "-o", out)
    assert (refused.code, "--force" in refused.err) == (4, True), refused.err
    damage(out / WEIGHTS)
    assert cli(*pull_it).code == 4, "damaged since: it is not that release any more"
    cli.ok("pull", "acme/sql:1.1.0", "-o", out, "--force")
    assert hashes(out) == hashes(world.adapters["other-sql"])
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_force_replaces_no_directory_that_holds_anything_else(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    pushed(stocked_on_disk, world)
    home, link, file = tmp_path / "home-of-somebody", tmp_path / "link", tmp_path / "file"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    link.symlink_to(home)
    file.write_text("a file")
    for path in (home, link, file):
        refused = stocked_on_disk("pull", "acme/sql", "-o", path, "--force")
        assert (refused.code, "--force" in refused.err) == (4, False), refused.err
    assert (home / "thesis.tex").read_text() == "years"


def test_a_pull_without_a_directory_prints_the_one_in_the_cache(stocked_on_disk: Cli, world: World) -> None:
    cli = stocked_on_disk
    pushed(cli, world)
    cli.ok("promote", "acme/sql", "--to", "prod")
    first = cli.ok("pull", "acme/sql@prod")
    (line,) = first.out.splitlines()
    assert hashes(Path(line)) == hashes(world.adapters["sql"])
    again = cli.ok("pull", "acme/sql:1.0.0")
    assert again.out == first.out
    damage(Path(line) / WEIGHTS)
    assert cli.ok("pull", "acme/sql").out == first.out
    assert hashes(Path(line)) == hashes(world.adapters["sql"]), "what is damaged in the cache is pulled anew"
