"""The contract of BlobStore, tested on each available backend."""

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest

from registry.environment.settings import S3Storage
from registry.errors import NotFound, Unavailable
from registry.formats.references import Digest
from registry.storage.blobs import BlobStore, blob_key
from registry.storage.local import LocalStore, unwritable
from registry.storage.s3.store import S3Store
from tests.s3_server import BUCKET, S3Server
from tests.small_disk import small_disk

ABSENT = Digest("0" * 64)


@pytest.fixture(params=["local", "S3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlobStore:
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    s3: S3Server = request.getfixturevalue("s3")
    for name, value in s3.credentials.items():
        monkeypatch.setenv(name, value)
    prefix = f"{uuid.uuid4().hex}/"
    return S3Store(S3Storage(kind="s3", bucket=BUCKET, prefix=prefix, endpoint_url=s3.endpoint))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


def write(path: Path, content: bytes) -> Digest:
    path.write_bytes(content)
    return Digest(hashlib.sha256(content).hexdigest())


def read(store: BlobStore, sha256: Digest, start: int = 0, length: int | None = None) -> bytes:
    with store.open(sha256, start, length) as reader:
        return reader.read()


def test_what_was_put_is_read_back(store: BlobStore, source: Path) -> None:
    content = os.urandom(300_000)
    sha256 = write(source, content)
    put = store.put(sha256, source)
    assert (put.sha256, put.size_bytes) == (sha256, len(content))
    assert abs(datetime.now(UTC) - put.written_at) < timedelta(minutes=5)
    assert source.read_bytes() == content, "without `move` the source stays"
    assert read(store, sha256) == content
    stat = store.stat(sha256)
    assert stat is not None
    assert (stat.sha256, stat.size_bytes) == (sha256, len(content))


def test_an_empty_blob_is_a_blob(store: BlobStore, source: Path) -> None:
    sha256 = write(source, b"")
    assert store.put(sha256, source).size_bytes == 0
    assert read(store, sha256) == b""


def test_putting_twice_is_putting_once(store: BlobStore, source: Path) -> None:
    sha256 = write(source, b"the same")
    store.put(sha256, source)
    again = store.put(sha256, source)
    assert again.size_bytes == 8
    assert [blob.sha256 for blob in store.iterate()] == [sha256]
    assert read(store, sha256) == b"the same"


def test_moving_consumes_the_source_also_when_the_blob_is_there_already(store: BlobStore, source: Path) -> None:
    sha256 = write(source, b"moved")
    store.put(sha256, source, move=True)
    assert not source.exists()
    write(source, b"moved")
    store.put(sha256, source, move=True)
    assert not source.exists()
    assert read(store, sha256) == b"moved"


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, b"0123456789"), (3, None, b"3456789"), (0, 4, b"0123"), (3, 4, b"3456"), (3, 0, b""),
        (9, 1, b"9"), (3, 100, b"3456789"), (0, 10, b"0123456789"),
    ],
)  # fmt: skip
def test_a_window_is_read_and_nothing_beside_it(
    store: BlobStore, source: Path, start: int, length: int | None, expected: bytes
) -> None:
    sha256 = write(source, b"0123456789")
    store.put(sha256, source)
    assert read(store, sha256, start, length) == expected


def test_a_window_ends_where_it_should_however_it_is_read(store: BlobStore, source: Path) -> None:
    sha256 = write(source, b"0123456789")
    store.put(sha256, source)
    with store.open(sha256, 2, 5) as reader:
        blocks = list(iter(lambda: reader.read(2), b""))
        assert b"".join(blocks) == b"23456"
        assert reader.read(2) == b""
        assert reader.read() == b""


def test_a_window_from_the_end_on_is_empty(store: BlobStore, source: Path) -> None:
    sha256 = write(source, b"0123456789")
    store.put(sha256, source)
    assert read(store, sha256, 10, 5) == b""


def test_who_reads_while_somebody_deletes_gets_the_right_bytes(store: BlobStore, source: Path) -> None:
    content = os.urandom(200_000)
    sha256 = write(source, content)
    store.put(sha256, source)
    with store.open(sha256) as reader:
        first = reader.read(1000)
        store.delete(sha256)
        assert first + reader.read() == content
    assert store.stat(sha256) is None


def test_what_is_absent_is_said_to_be(store: BlobStore) -> None:
    assert store.stat(ABSENT) is None
    with pytest.raises(NotFound):
        read(store, ABSENT)
    with pytest.raises(NotFound):
        read(store, ABSENT, 2, 3)


def test_deleting_what_is_absent_is_fine(store: BlobStore, source: Path) -> None:
    store.delete(ABSENT)
    sha256 = write(source, b"short lived")
    store.put(sha256, source)
    store.delete(sha256)
    store.delete(sha256)
    assert store.stat(sha256) is None
    store.put(sha256, source)
    assert read(store, sha256) == b"short lived"


def test_every_blob_is_iterated_once(store: BlobStore, source: Path) -> None:
    expected = {}
    for number in range(12):
        sha256 = write(source, b"x" * number)
        store.put(sha256, source)
        expected[sha256] = number
    listed = list(store.iterate())
    assert {blob.sha256: blob.size_bytes for blob in listed} == expected
    assert len(listed) == 12


def test_iterating_survives_what_is_deleted_meanwhile(store: BlobStore, source: Path) -> None:
    digests = []
    for number in range(4):
        digests.append(write(source, b"y" * number))
        store.put(digests[-1], source)
    blobs = store.iterate()
    first = next(blobs)
    gone = next(digest for digest in digests if digest != first.sha256)
    store.delete(gone)
    rest = {blob.sha256 for blob in blobs}
    assert set(digests) - {first.sha256, gone} <= rest


def test_a_put_that_fails_leaves_nothing(store: BlobStore, source: Path) -> None:
    missing = source.with_name("never written")
    with pytest.raises((OSError, Unavailable)):
        store.put(ABSENT, missing)
    assert store.stat(ABSENT) is None
    assert list(store.iterate()) == []


def test_a_url_gives_the_bytes_or_there_is_none(store: BlobStore, source: Path) -> None:
    sha256 = write(source, b"0123456789")
    store.put(sha256, source)
    url = store.url(sha256, 60)
    if url is None:
        assert store.arrivals is None, "a store that clients send to is one that they read from"
        return
    assert httpx2.get(url).content == b"0123456789"
    assert httpx2.get(url, headers={"Range": "bytes=2-4"}).content == b"234"
    named = httpx2.get(str(store.url(sha256, 60, "attachment; filename*=UTF-8''a.bin")))
    assert named.headers["content-disposition"] == "attachment; filename*=UTF-8''a.bin"


def test_a_full_disk_is_unavailable_and_nothing_of_the_blob_stays(tmp_path: Path, source: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        full = LocalStore(disk / "store")
        small, large = b"fits", os.urandom(3 << 20)
        kept = write(source, small)
        full.put(kept, source)
        sha256 = write(source, large)
        for move in (False, True):
            with pytest.raises(Unavailable) as raised:
                full.put(sha256, source, move=move)
            assert raised.value.exit_code == 7
            assert full.stat(sha256) is None
            assert files_below(disk) == {disk / "store" / blob_key(kept)}
            assert source.read_bytes() == large, "the source of a failed move is still there"
        assert read(full, kept) == small


@pytest.mark.parametrize(
    ("number", "code", "advice"),
    [
        (errno.ENOSPC, "store_full", "Free some space"),
        (errno.EDQUOT, "store_full", "Free some space"),
        (errno.EACCES, "store_unavailable", "is writable"),
        (errno.EROFS, "store_unavailable", "is writable"),
        (errno.EIO, "store_unavailable", "disk is sound"),
    ],
)
def test_only_a_full_disk_asks_for_space(number: int, code: str, advice: str) -> None:
    error = unwritable("The upload", "x", OSError(number, os.strerror(number)))
    assert (error.code, advice in error.next_step, os.strerror(number) in error.detail) == (code, True, True)


def test_a_directory_that_cannot_be_written_is_unavailable_and_not_full(tmp_path: Path, source: Path) -> None:
    store = LocalStore(tmp_path / "store")
    sha256 = write(source, b"acme")
    store.incoming.rmdir()
    with pytest.raises(Unavailable, match="cannot be written") as raised:
        store.put(sha256, source)
    assert raised.value.code == "store_unavailable"


def files_below(directory: Path) -> set[Path]:
    paths: Iterator[Path] = directory.rglob("*")
    return {path for path in paths if path.is_file()}
