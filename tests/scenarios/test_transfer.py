"""Push and pull as people use them: nothing is sent or fetched twice, nothing wrong is kept, a kill costs little."""

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry.client import partial_files
from registry.client.api import Api, Stream
from registry.client.cache import BlobCache
from registry.client.pull import pull
from registry.client.push import collect, send
from registry.client.selection import select_files
from registry.errors import Invalid
from registry.formats.references import Digest
from registry.storage.blobs import BlobStore
from registry.wire.catalog import ReleaseOut
from registry.wire.transfer import PutOut
from tests import services
from tests.forked import start_command
from tests.scenarios.conftest import serving, stock
from tests.scenarios.traces import api_of, hashes, home_of, opened, parts_in, traces
from tests.scenarios.world import SMALL_PARTS, Cli, World, nothing, own_environment

BIG_BYTES = 400_000_000
"""More pieces than are fetched at a time, so that a transfer can be killed in the middle."""


class CountingApi(Api):
    """The real API, recording the bytes that it moved."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sent: list[int] = []
        self.fetched: list[tuple[int, int | None]] = []

    def send(self, put: PutOut, chunks: Iterable[bytes]) -> None:
        super().send(put, chunks)
        self.sent.append(int(put.headers["Content-Length"]))

    @contextmanager
    def stream(self, url: str, start: int = 0, length: int | None = None) -> Generator[Stream]:
        with super().stream(url, start, length) as stream:
            self.fetched.append((start, length))
            yield stream


@pytest.fixture
def on_s3(world: World, tmp_path: Path) -> Generator[Cli]:
    """A server whose blobs are in S3, with parts so small that there are many."""
    with serving(services.pairing("PostgreSQL and S3") | SMALL_PARTS, tmp_path) as cli:
        yield stock(cli, world)


def store_of(cli: Cli) -> BlobStore:
    home = {"ADAPTORY_HOME": str(home_of(cli))}
    return opened(Cli({**cli.environment, **cli.served_with, **home})).store


def test_a_new_version_with_one_changed_file_sends_that_file_alone(stocked: Cli, world: World, tmp_path: Path) -> None:
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    (adapter / "data.txt").write_bytes(os.urandom(100_000))
    stocked.ok("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "data.txt")
    store, before = store_of(stocked), traces(stocked).blobs
    written = {digest: store.stat(Digest(digest)) for digest in before}
    (adapter / "README.md").write_text("better\n")
    with api_of(stocked) as api:
        counting = CountingApi(api.url) if stocked.environment.get("ADAPTORY_URL") else None
        if counting is not None:
            send(counting, "acme", collect(select_files(adapter, "model")), nothing)
            assert counting.sent == [len("better\n")]
    stocked.ok("push", adapter, "acme/sql:1.0.1", "--base", "tiny", "--include", "data.txt")
    assert traces(stocked).blobs - before == {hashlib.sha256(b"better\n").hexdigest()}
    assert {digest: store.stat(Digest(digest)) for digest in before} == written, "the others were left alone"


@pytest.mark.on("SQLite")
def test_a_file_that_changes_while_it_is_sent_is_named_and_nothing_of_it_kept(
    stocked: Cli, world: World, tmp_path: Path
) -> None:
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    for size in (100_000, 12 << 20):
        (adapter / "data.txt").write_bytes(os.urandom(size))
        files = collect(select_files(adapter, "model"))
        (adapter / "data.txt").write_bytes(os.urandom(size))
        with api_of(stocked) as api, pytest.raises(Invalid) as raised:
            send(api, "acme", files, nothing)
        assert (raised.value.code, raised.value.subject) == ("digest_differs", "data.txt")
    promised = {file.manifest.sha256 for file in files if file.manifest.path == "data.txt"}
    assert not traces(stocked).blobs & promised


@pytest.mark.long
def test_two_who_push_the_same_bytes_at_once_both_succeed(stocked: Cli, world: World, tmp_path: Path) -> None:
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    (adapter / "data.txt").write_bytes(os.urandom(12 << 20))
    pushes = [
        start_command(
            ["push", adapter, f"acme/sql-{number}:1.0.0", "--base", "tiny", "--include", "data.txt"],
            own_environment(stocked),
            tmp_path / f"push-{number}.log",
        )
        for number in range(3)
    ]
    for number, push in enumerate(pushes):
        push.join(120)
        assert push.exitcode == 0, (tmp_path / f"push-{number}.log").read_text()
    assert traces(stocked).work == frozenset()


def killed_when(cli: Cli, arguments: list[object], far_enough: Callable[[], bool]) -> None:
    """`adaptory …` in its own process, killed as soon as it has reached this point."""
    log = Path(cli.environment["ADAPTORY_HOME"]).with_name("killed.log")
    process = start_command(arguments, own_environment(cli), log)
    while process.is_alive() and not far_enough():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"it was not killed in the middle: {log.read_text()}"


@pytest.mark.long
def test_a_killed_push_and_a_killed_pull_go_on_where_they_stopped(on_s3: Cli, world: World, tmp_path: Path) -> None:
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    with (adapter / "data.txt").open("wb") as data:
        data.write(os.urandom(1000))
        data.truncate(BIG_BYTES)
    push: list[object] = ["push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "data.txt"]
    killed_when(on_s3, push, lambda: parts_in(on_s3) >= 5)
    there = parts_in(on_s3)
    api = CountingApi(on_s3.environment["ADAPTORY_URL"])
    send(api, "acme", collect(select_files(adapter, "model")), nothing)
    assert 5 <= there < 77, "it was killed in the middle"
    assert sum(api.sent) <= BIG_BYTES + 1_000_000 - there * (5 << 20), "parts that were there are not sent again"
    release = on_s3.json(*push)["release"]
    assert traces(on_s3).work == frozenset()

    out = tmp_path / "out"
    partial = tmp_path / f".out.{release['commit'][:12]}.partial"
    journal = partial / "pieces" / str([row["path"] for row in release["files"]].index("data.txt"))
    killed_when(on_s3, ["pull", "acme/sql", "-o", out], lambda: journal.exists() and journal.read_text() != "")
    done = len(journal.read_text().split())
    api.fetched.clear()
    pull(api, ReleaseOut.read(release), out, nothing, BlobCache(tmp_path / "cache"))
    spans = [(start, length) for start, length in api.fetched if length == partial_files.PIECE_BYTES]
    assert 1 <= done < 11
    assert len(spans) == 11 - done, "pieces that were there are not fetched again"
    assert hashes(out) == hashes(adapter)
    assert not partial.exists()
    api.close()


def test_a_cache_without_a_file_leaves_the_begun_one_alone(tmp_path: Path) -> None:
    cache, begun = BlobCache(tmp_path / "cache"), tmp_path / "begun"
    begun.write_bytes(b"half of it")
    assert not cache.take("0" * 64, begun)
    assert begun.read_bytes() == b"half of it"
    complete = tmp_path / "complete"
    complete.write_bytes(b"all of it")
    cache.keep(hashlib.sha256(b"all of it").hexdigest(), complete)
    assert cache.take(hashlib.sha256(b"all of it").hexdigest(), begun)
    assert begun.read_bytes() == b"all of it"
    assert not list((tmp_path / "cache").glob(".*")), "no staging file is left"
