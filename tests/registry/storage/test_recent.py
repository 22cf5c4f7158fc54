"""A store is not queried again for a blob that it has just reported."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from composer.formats.checkpoints.hashing import hash_file
from registry.formats.references import Digest, parse_digest
from registry.storage.blobs import REMEMBERED_S, BlobStat, RecentStats
from registry.storage.local import LocalStore


def test_that_a_blob_is_there_is_remembered_for_a_while_and_that_it_is_not_never(tmp_path: Path) -> None:
    now = 100.0
    store, recent = LocalStore(tmp_path / "store"), RecentStats(lambda: now)
    source = tmp_path / "blob"
    source.write_bytes(b"bytes")
    digest = parse_digest(hash_file(source))
    assert recent.stat(store, digest) is None
    put = store.put(digest, source)
    assert recent.stat(store, digest) == put, "its absence was not remembered"
    store.delete(digest)
    now += REMEMBERED_S - 0.1
    assert recent.stat(store, digest) == put
    now += 0.2
    assert recent.stat(store, digest) is None
    assert recent.stat(store, digest) is None


def test_while_one_caller_asks_again_the_others_do_not_wait_for_the_store(tmp_path: Path) -> None:
    now = 100.0
    store, recent = LocalStore(tmp_path / "store"), RecentStats(lambda: now)
    source = tmp_path / "blob"
    source.write_bytes(b"bytes")
    put = store.put(parse_digest(hash_file(source)), source)
    assert recent.stat(store, put.sha256) == put
    asked, go_on = Event(), Event()

    class SlowStore(LocalStore):
        def stat(self, sha256: Digest) -> BlobStat | None:
            asked.set()
            assert go_on.wait(60)
            return super().stat(sha256)

    slow = SlowStore(tmp_path / "store")
    now += REMEMBERED_S
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(recent.stat, slow, put.sha256)
        assert asked.wait(60)
        assert recent.stat(slow, put.sha256) == put
        go_on.set()
        assert first.result(60) == put
