"""A store is not asked again for a blob that it has just said to have."""

from pathlib import Path

from composer.formats.checkpoints.hashing import hash_file
from registry.formats.references import parse_digest
from registry.storage.local import LocalStore
from registry.storage.recent import REMEMBERED_S, RecentStats


def test_that_a_blob_is_there_is_remembered_for_seconds_and_that_it_is_not_never(tmp_path: Path) -> None:
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
