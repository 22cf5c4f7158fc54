"""What a store promises that takes bytes from clients by itself, asked of S3 whether it checks digests or we do."""

import hashlib
import os
import uuid
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from registry.errors import Conflict, Invalid
from registry.names import Digest
from registry.settings import S3Storage
from registry.storage.blobs import Arrival, Part, Put
from registry.storage.s3 import S3Store
from registry.storage.s3_arrivals import S3Arrivals
from tests.s3_server import BUCKET, S3Server

PART_BYTES = 5 << 20
LARGE_BYTES = 2 * PART_BYTES + 1000
TOMORROW = datetime.now(UTC) + timedelta(days=1)


class Corner:
    """A prefix of its own in the real server, seen by our store and past it."""

    def __init__(self, s3: S3Server, *, hash_arrivals: bool) -> None:
        self.prefix = f"{uuid.uuid4().hex}/"
        self.client = s3.client()
        self.store = S3Store(
            S3Storage(
                kind="s3",
                bucket=BUCKET,
                prefix=self.prefix,
                endpoint_url=s3.endpoint,
                multipart_bytes=LARGE_BYTES,
                part_bytes=PART_BYTES,
                hash_arrivals=hash_arrivals,
            )
        )
        self.arrivals: S3Arrivals = self.store.arrivals

    def announce(self, content: bytes) -> Arrival:
        """As the registry would, for a blob that nobody has yet."""
        part_bytes = self.arrivals.part_bytes(len(content))
        digest = Digest(hashlib.sha256(content).hexdigest())
        arrival = Arrival(uuid.uuid4().hex, digest, len(content), None, part_bytes)
        if part_bytes is None:
            return arrival
        multipart_id = self.arrivals.begin(arrival)
        return Arrival(arrival.upload_id, digest, len(content), multipart_id, part_bytes)

    def whole(self, arrival: Arrival, *, known: bool = False) -> Put:
        put = self.arrivals.whole(arrival, 600, sent_before=False, known=known)
        assert put is not None
        return put

    def missing_parts(self, arrival: Arrival) -> list[Part]:
        parts = self.arrivals.parts(arrival, 600)
        assert parts is not None
        return [part for part in parts if part.put is not None]

    def read(self, sha256: Digest) -> bytes:
        with self.store.open(sha256) as reader:
            return reader.read()

    def left(self) -> set[str]:
        """Keys of everything but blobs, finished or not."""
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=self.prefix).get("Contents", ())
        begun = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=self.prefix).get("Uploads", ())
        keys = {row["Key"].removeprefix(self.prefix) for row in (*listed, *begun)}
        return {key for key in keys if not key.startswith("blobs/")}


def send(put: Put | None, content: bytes, **other_headers: str) -> int:
    assert put is not None
    return httpx2.put(
        put.url, content=iter([content]), headers={**put.headers, **other_headers}, timeout=60
    ).status_code


def send_parts(parts: list[Part], content: bytes) -> None:
    for part in parts:
        start = (part.number - 1) * PART_BYTES
        assert send(part.put, content[start : start + part.size_bytes]) == 200


@pytest.fixture(params=["the store checks", "we check"])
def corner(request: pytest.FixtureRequest, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Corner:
    for name, value in s3.credentials.items():
        monkeypatch.setenv(name, value)
    return Corner(s3, hash_arrivals=request.param == "we check")


def test_what_is_sent_whole_becomes_a_blob_and_nothing_else_stays(corner: Corner) -> None:
    for content in (os.urandom(300_000), b""):
        arrival = corner.announce(content)
        assert send(corner.whole(arrival), content) == 200
        stat = corner.arrivals.finish(arrival)
        assert (stat.sha256, stat.size_bytes) == (arrival.sha256, len(content))
        corner.arrivals.discard(arrival)
        assert corner.read(arrival.sha256) == content
    assert corner.left() == set()


def test_length_digest_and_upload_are_part_of_the_signature(corner: Corner) -> None:
    arrival = corner.announce(b"0123456789")
    put = corner.whole(arrival)
    signed = parse_qs(urlsplit(put.url).query)["X-Amz-SignedHeaders"][0].split(";")
    assert signed == ["content-length", "host", "x-amz-checksum-sha256", "x-amz-meta-upload"]
    assert send(put, b"01234567890", **{"Content-Length": "11"}) == 403
    assert send(put, b"0123456789", **{"x-amz-meta-upload": "another"}) == 403
    assert httpx2.put(put.url, content=b"0123456789").status_code == 403
    with pytest.raises(Conflict):
        corner.arrivals.finish(arrival)
    large = corner.announce(os.urandom(LARGE_BYTES))
    part = corner.missing_parts(large)[-1].put
    assert part is not None
    assert parse_qs(urlsplit(part.url).query)["X-Amz-SignedHeaders"][0].split(";") == ["content-length", "host"]
    assert send(part, b"x" * 999, **{"Content-Length": "999"}) == 403


def test_other_bytes_of_the_same_length_never_become_a_blob(corner: Corner) -> None:
    arrival = corner.announce(b"what was promised")
    assert send(corner.whole(arrival), b"what was smuggled") == 400
    with pytest.raises(Conflict):
        corner.arrivals.finish(arrival)
    assert corner.store.stat(arrival.sha256) is None
    assert corner.left() == set()


@pytest.mark.parametrize("content", [b"what was smuggled", b"short"])
def test_bytes_that_a_lax_store_let_through_are_found_when_they_are_read_back(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """Past the signature, the wrong bytes lie where a store that ignores checksums would have put them."""
    for name, value in s3.credentials.items():
        monkeypatch.setenv(name, value)
    corner = Corner(s3, hash_arrivals=True)
    arrival = corner.announce(b"what was promised")
    corner.client.put_object(Bucket=BUCKET, Key=f"{corner.prefix}incoming/{arrival.upload_id}", Body=content)
    with pytest.raises(Invalid) as raised:
        corner.arrivals.finish(arrival)
    assert raised.value.code == "digest_differs"
    assert corner.store.stat(arrival.sha256) is None
    assert corner.left() == set()


def test_finishing_twice_is_finishing_once(corner: Corner) -> None:
    for content in (b"0123456789", os.urandom(LARGE_BYTES)):
        arrival = corner.announce(content)
        if arrival.multipart_id:
            send_parts(corner.missing_parts(arrival), content)
        else:
            assert send(corner.whole(arrival), content) == 200
        corner.arrivals.finish(arrival)
        assert corner.arrivals.finish(arrival).size_bytes == len(content)
        corner.arrivals.discard(arrival)
        assert corner.arrivals.finish(arrival).size_bytes == len(content)
        assert corner.read(arrival.sha256) == content


def test_what_another_sent_does_not_finish_an_arrival(corner: Corner) -> None:
    """Who knows a digest has not shown that it has the bytes."""
    content = os.urandom(1000)
    mine, theirs = corner.announce(content), corner.announce(content)
    assert send(corner.whole(theirs), content) == 200
    corner.arrivals.finish(theirs)
    corner.arrivals.discard(theirs)
    with pytest.raises(Conflict):
        corner.arrivals.finish(mine)
    written = corner.store.stat(mine.sha256)
    assert send(corner.whole(mine, known=True), content) == 200
    assert corner.arrivals.finish(mine) == written, "the blob that was there has not been touched"
    corner.arrivals.discard(mine)
    assert corner.left() == set()


def test_whether_a_file_has_arrived_is_known_before_it_is_finished(corner: Corner) -> None:
    arrival = corner.announce(b"0123456789")
    assert corner.arrivals.whole(arrival, 600, sent_before=True, known=False) is not None
    assert send(corner.whole(arrival), b"0123456789") == 200
    assert corner.arrivals.whole(arrival, 600, sent_before=True, known=False) is None


def test_a_large_file_comes_in_parts_in_any_order_and_only_the_missing_ones_are_asked_for(corner: Corner) -> None:
    content = os.urandom(LARGE_BYTES)
    arrival = corner.announce(content)
    assert arrival.part_sizes == [PART_BYTES, PART_BYTES, 1000]
    last, first = corner.missing_parts(arrival)[2], corner.missing_parts(arrival)[0]
    send_parts([last, first], content)
    assert [part.number for part in corner.missing_parts(arrival)] == [2]
    with pytest.raises(Conflict):
        corner.arrivals.finish(arrival)
    send_parts(corner.missing_parts(arrival), content)
    assert corner.missing_parts(arrival) == []
    assert corner.arrivals.finish(arrival).size_bytes == LARGE_BYTES
    assert corner.missing_parts(arrival) == []
    corner.arrivals.discard(arrival)
    assert corner.read(arrival.sha256) == content, "the parts may go, the blob stays"
    assert corner.left() == set()


def test_parts_of_another_file_never_become_a_blob(corner: Corner) -> None:
    content = os.urandom(LARGE_BYTES)
    arrival = corner.announce(content)
    send_parts(corner.missing_parts(arrival), content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Invalid) as raised:
        corner.arrivals.finish(arrival)
    assert (raised.value.code, raised.value.subject) == ("digest_differs", arrival.sha256)
    assert corner.store.stat(arrival.sha256) is None
    assert corner.left() == set()


def test_an_upload_that_the_store_forgot_is_begun_again(corner: Corner) -> None:
    content = os.urandom(LARGE_BYTES)
    arrival = corner.announce(content)
    send_parts(corner.missing_parts(arrival)[:1], content)
    corner.arrivals.discard(arrival)
    corner.arrivals.discard(arrival)
    assert corner.arrivals.parts(arrival, 600) is None
    assert corner.left() == set()


def test_a_sweep_removes_what_is_old_and_not_to_be_kept(corner: Corner) -> None:
    whole, parts, kept = (corner.announce(os.urandom(size)) for size in (1000, LARGE_BYTES, LARGE_BYTES))
    blob = corner.announce(b"a blob")
    assert send(corner.whole(blob), b"a blob") == 200
    corner.arrivals.finish(blob)
    corner.arrivals.discard(blob)
    corner.client.put_object(Bucket=BUCKET, Key=f"{corner.prefix}incoming/{whole.upload_id}", Body=b"x")
    before = corner.left()
    assert {key.rpartition("/")[2] for key in before} == {whole.upload_id, parts.upload_id, kept.upload_id}
    assert corner.store.sweep(datetime.now(UTC) - timedelta(minutes=1), {kept.upload_id}) == 0
    assert corner.left() == before
    assert corner.store.sweep(TOMORROW, {kept.upload_id}) == 2
    assert {key.rpartition("/")[2] for key in corner.left()} == {kept.upload_id}
    assert corner.read(blob.sha256) == b"a blob"


def test_parts_grow_with_the_file_so_that_there_are_never_more_than_10_000(corner: Corner) -> None:
    assert corner.arrivals.part_bytes(LARGE_BYTES - 1) is None
    assert corner.arrivals.part_bytes(LARGE_BYTES) == PART_BYTES
    for size in (64 << 30, (64 << 30) + 1, 5 << 40):
        part_bytes = corner.arrivals.part_bytes(size)
        assert part_bytes is not None
        assert len(Arrival("", Digest(""), size, None, part_bytes).part_sizes) <= 10_000
        assert sum(Arrival("", Digest(""), size, None, part_bytes).part_sizes) == size
