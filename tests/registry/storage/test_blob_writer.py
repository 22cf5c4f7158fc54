"""Files that become blobs once their digest is known: the contract of writers, and ranges that S3 copies itself."""

import hashlib
import os
import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from composer.errors import RefusedOutput
from registry.errors import Unavailable
from registry.formats.references import Digest
from registry.storage.blobs import BlobStore
from registry.storage.local import LocalStore
from registry.storage.s3 import objects
from registry.storage.s3.bucket import Bucket
from registry.storage.s3.objects import S3File, list_files, open_file
from registry.storage.s3.writer import LEAST_BYTES
from tests.registry.storage.corner import TOMORROW, Corner
from tests.s3_server import BUCKET, S3Server

MIB = 1 << 20


@pytest.fixture
def corner(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Corner:
    for name, value in s3.credentials.items():
        monkeypatch.setenv(name, value)
    return Corner(s3)


@pytest.fixture(params=["local", "S3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return LocalStore(tmp_path / "store") if request.param == "local" else request.getfixturevalue("corner").store


def digest(content: bytes) -> Digest:
    return Digest(hashlib.sha256(content).hexdigest())


def read(store: BlobStore, sha256: Digest) -> bytes:
    with store.open(sha256) as reader:
        return reader.read()


def left(corner: Corner) -> list[str]:
    """Keys that are not blobs, and uploads in parts."""
    objects_ = corner.client.list_objects_v2(Bucket=BUCKET, Prefix=corner.prefix).get("Contents", [])
    uploads = corner.client.list_multipart_uploads(Bucket=BUCKET, Prefix=corner.prefix).get("Uploads", [])
    return [row["Key"] for row in (*objects_, *uploads) if "/blobs/" not in row["Key"] and "/base/" not in row["Key"]]


def base_file(corner: Corner, content: bytes) -> S3File:
    bucket = Bucket(corner.store._bucket.client, BUCKET, f"{corner.prefix}base/")
    corner.client.put_object(Bucket=BUCKET, Key=f"{bucket.prefix}model.safetensors", Body=content)
    opened = open_file(bucket, "model.safetensors")
    assert opened is not None
    assert list_files(bucket) == {"model.safetensors": len(content)}
    return opened


def blocks(content: bytes, size: int) -> Iterator[memoryview]:
    for begin in range(0, len(content), size):
        yield memoryview(content)[begin : begin + size]


@pytest.mark.parametrize("size", [0, 1, 1000, 17 * MIB + 3])
def test_what_is_written_becomes_a_blob(store: BlobStore, size: int) -> None:
    content = os.urandom(size)
    for _ in range(2):  # the second one is a blob already
        writer = store.begin_write(size)
        for block in blocks(content, 3 * MIB + 1):
            writer.write(block)
        assert writer.finish(digest(content)).size_bytes == size
    assert read(store, digest(content)) == content
    assert [stat.sha256 for stat in store.iterate()] == [digest(content)]
    assert store.sweep(TOMORROW, ()) == 0


def test_what_is_aborted_leaves_nothing(store: BlobStore) -> None:
    writer = store.begin_write(40 * MIB)
    for block in blocks(bytes(20 * MIB), 8 * MIB):
        writer.write(block)
    writer.abort()
    assert list(store.iterate()) == []
    assert store.sweep(TOMORROW, ()) == 0


def test_what_a_killed_writer_leaves_is_swept(store: BlobStore) -> None:
    writer = store.begin_write(40 * MIB)
    for block in blocks(bytes(20 * MIB), 8 * MIB):
        writer.write(block)
    assert list(store.iterate()) == []
    assert store.sweep(TOMORROW - timedelta(days=2), ()) == 0, "it may be writing still"
    assert store.sweep(TOMORROW, ()) == 1
    assert store.sweep(TOMORROW, ()) == 0


def test_ranges_of_a_file_in_the_store_are_copied_by_it(corner: Corner) -> None:
    """A head, a copied range, computed bytes, a range that is too short, and a long one at the end."""
    source = os.urandom(40 * MIB)
    file = base_file(corner, source)
    made = os.urandom(2 * MIB)
    plan = [(None, made[:100]), (0, source[: 14 * MIB]), (None, made), (14 * MIB, source[14 * MIB : 15 * MIB])]
    plan += [(None, made), (20 * MIB + 5, source[20 * MIB + 5 :])]
    content = b"".join(part for _, part in plan)
    writer = corner.store.begin_write(len(content))
    for offset, part in plan:
        for number, block in enumerate(blocks(part, 3 * MIB)):
            if offset is None:
                writer.write(block)
            else:
                writer.write(block, file, offset + number * 3 * MIB)
    sha256 = digest(content)
    writer.finish(sha256)
    assert read(corner.store, sha256) == content
    lead = LEAST_BYTES - 100, LEAST_BYTES - (len(made) * 2 + MIB)
    assert writer.copied_bytes == 14 * MIB - lead[0] + (20 * MIB - 5) - lead[1]
    assert left(corner) == []


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 12))])
def test_any_order_of_copied_and_computed_bytes_gives_the_file(corner: Corner, seed: int) -> None:
    chance = random.Random(seed)
    source = os.urandom(24 * MIB)
    file = base_file(corner, source)
    content = bytearray()
    writer = corner.store.begin_write(60 * MIB)
    while len(content) < 50 * MIB:
        size = chance.choice([1, 1000, MIB, 6 * MIB, 11 * MIB]) + chance.randrange(1000)
        offset = chance.randrange(len(source) - size)
        copied = chance.random() < 0.6
        for block in blocks(source[offset : offset + size], 4 * MIB):
            writer.write(block, file if copied else None, offset)
            content += block
            offset += block.nbytes
    writer.finish(digest(content))
    assert read(corner.store, digest(content)) == content


def test_a_store_that_copies_no_ranges_gets_the_bytes(corner: Corner, caplog: pytest.LogCaptureFixture) -> None:
    source = os.urandom(12 * MIB)
    file = base_file(corner, source)
    refusals = _refusing(corner, "upload_part_copy")
    for _ in range(2):
        writer = corner.store.begin_write(len(source))
        writer.write(memoryview(source), file, 0)
        writer.finish(digest(source))
        assert writer.copied_bytes == 0
        assert read(corner.store, digest(source)) == source
        corner.store.delete(digest(source))
    assert len(refusals) == 1, "it is not asked again"
    assert "does not copy ranges" in caplog.text


def _refusing(corner: Corner, operation: str) -> list[str]:
    """The real client, answered as by a store that does not implement the operation."""
    client: Any = corner.store._client
    seen: list[str] = []

    def refuse(**_: object) -> None:
        seen.append(operation)
        answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
        raise ClientError(answer, operation)  # pyright: ignore[reportArgumentType]

    setattr(client, operation, refuse)
    corner.store._copying.works = True
    return seen


def test_a_file_that_changed_is_neither_copied_nor_read(corner: Corner) -> None:
    source = os.urandom(8 * MIB)
    file = base_file(corner, source)
    again = base_file(corner, source[:-1] + b"x")
    assert again != file
    with pytest.raises(RefusedOutput, match="changed in its bucket"):
        file.read_into(memoryview(bytearray(10)), 0)
    _refuses_changed(corner, file, source)


def _refuses_changed(corner: Corner, file: S3File, source: bytes) -> None:
    """A blob copied from a file that has changed since it was opened does not appear and leaves nothing."""
    writer = corner.store.begin_write(len(source))
    writer.write(memoryview(source), file, 0)
    with pytest.raises(RefusedOutput, match="changed in its bucket"):
        writer.finish(digest(source))
    writer.abort()
    assert corner.store.stat(digest(source)) is None
    assert left(corner) == []


def test_a_store_that_copies_parts_whatever_the_condition_makes_no_wrong_blob(corner: Corner) -> None:
    source = os.urandom(8 * MIB)
    file = base_file(corner, source)
    _without(corner, "UploadPartCopy", "CopySourceIfMatch")
    base_file(corner, source[:-1] + b"x")
    _refuses_changed(corner, file, source)


def _without(corner: Corner, operation: str, parameter: str) -> None:
    """The real store, without support for one parameter of an operation."""

    def leave_out(params: dict[str, Any], **_: object) -> None:
        params.pop(parameter, None)

    corner.store._client.meta.events.register(f"provide-client-params.s3.{operation}", leave_out)


def test_a_store_that_does_not_know_ranges_is_named(corner: Corner) -> None:
    file = base_file(corner, os.urandom(1000))
    _without(corner, "GetObject", "Range")
    file.read_into(memoryview(bytearray(1000)), 0)
    with pytest.raises(Unavailable) as refused:
        file.read_into(memoryview(bytearray(10)), 5)
    assert refused.value.code == "store_unfit"


def test_a_file_is_read_by_range(corner: Corner) -> None:
    source = os.urandom(3 * MIB)
    file = base_file(corner, source)
    for begin, end in ((0, 1), (0, 3 * MIB), (MIB + 7, 2 * MIB), (5, 5)):
        buffer = bytearray(end - begin)
        file.read_into(memoryview(buffer), begin)
        assert buffer == source[begin:end]
    with pytest.raises(RefusedOutput, match="changed in its bucket"):
        file.read_into(memoryview(bytearray(10)), 3 * MIB - 5)
    assert open_file(file.bucket, "another") is None


def test_a_read_that_breaks_off_goes_on_where_it_was(corner: Corner, monkeypatch: pytest.MonkeyPatch) -> None:
    source = os.urandom(3 * MIB)
    file = base_file(corner, source)
    monkeypatch.setattr(objects, "_PAUSES_S", (0.0, 0.0, 0.0))
    read_, breaks = S3File._read, iter([1, 1, 0])

    def breaking(self: S3File, buffer: memoryview, offset: int) -> Iterator[int]:
        wanted = buffer[: MIB + 11] if (broken := next(breaks)) else buffer
        yield from read_(self, wanted, offset)
        if broken:
            raise objects.IncompleteReadError(actual_bytes=1, expected_bytes=2)

    monkeypatch.setattr(S3File, "_read", breaking)
    buffer = bytearray(len(source))
    file.read_into(memoryview(buffer), 0)
    assert buffer == source
