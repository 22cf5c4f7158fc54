"""The contract of a store that receives bytes from clients, on S3 with digests checked by the store and by us."""

import os
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from registry.errors import Conflict, Invalid
from registry.formats.references import Digest
from registry.storage.blobs import IncomingUpload, Part
from tests.registry.storage.corner import LARGE_BYTES, PART_BYTES, TOMORROW, Corner, send
from tests.s3_server import BUCKET, S3Server


def send_parts(corner: Corner, arrival: IncomingUpload, parts: list[Part], content: bytes) -> None:
    for part in parts:
        mine = of_part(part.number, content)
        assert send(corner.part(arrival, part.number, mine), mine) == 200


def of_part(number: int, content: bytes) -> bytes:
    return content[(number - 1) * PART_BYTES : number * PART_BYTES]


def test_what_is_sent_whole_becomes_a_blob_and_nothing_else_stays(corner: Corner) -> None:
    for content in (os.urandom(300_000), b""):
        arrival = corner.announce(content)
        assert send(corner.sign_object(arrival), content) == 200
        stat = corner.arrivals.finish(arrival)
        assert (stat.sha256, stat.size_bytes) == (arrival.sha256, len(content))
        corner.arrivals.discard(arrival)
        assert corner.read(arrival.sha256) == content
    assert corner.left() == set()


def test_length_digest_and_upload_are_part_of_the_signature(corner: Corner) -> None:
    arrival = corner.announce(b"0123456789")
    put = corner.sign_object(arrival)
    signed = parse_qs(urlsplit(put.url).query)["X-Amz-SignedHeaders"][0].split(";")
    assert set(signed) == {"host", *(name.lower() for name in put.headers)}
    assert {"content-length", "x-amz-checksum-sha256", "x-amz-meta-upload"} <= set(signed)
    assert send(put, b"01234567890", **{"Content-Length": "11"}) == 403
    assert send(put, b"0123456789", **{"x-amz-meta-upload": "another"}) == 403
    assert httpx2.put(put.url, content=b"0123456789").status_code == 403
    with pytest.raises(Conflict):
        corner.arrivals.finish(arrival)
    large = corner.announce(os.urandom(LARGE_BYTES))
    part = corner.part(large, 3, b"x" * 1000)
    signed = parse_qs(urlsplit(part.url).query)["X-Amz-SignedHeaders"][0].split(";")
    assert signed == ["content-length", "host", "x-amz-checksum-sha256"]
    assert send(part, b"x" * 999, **{"Content-Length": "999"}) == 403
    assert send(part, b"y" * 1000) == 400, "a wrong part is refused when it comes"
    assert [missing_part.number for missing_part in corner.missing_parts(large)] == [1, 2, 3]
    assert send(part, b"x" * 1000) == 200


def test_other_bytes_of_the_same_length_never_become_a_blob(corner: Corner) -> None:
    arrival = corner.announce(b"what was promised")
    assert send(corner.sign_object(arrival), b"what was smuggled") == 400
    with pytest.raises(Conflict):
        corner.arrivals.finish(arrival)
    assert corner.store.stat(arrival.sha256) is None
    assert corner.left() == set()


@pytest.mark.parametrize("content", [b"what was smuggled", b"short"])
def test_bytes_that_a_lax_store_let_through_are_found_when_they_are_read_back(
    s3: S3Server, credentials: None, content: bytes
) -> None:
    """Bypassing the signature, the wrong bytes are written where a store that ignores checksums would have put them."""
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
            send_parts(corner, arrival, corner.missing_parts(arrival), content)
        else:
            assert send(corner.sign_object(arrival), content) == 200
        corner.arrivals.finish(arrival)
        assert corner.arrivals.finish(arrival).size_bytes == len(content)
        corner.arrivals.discard(arrival)
        assert corner.arrivals.finish(arrival).size_bytes == len(content)
        assert corner.read(arrival.sha256) == content


def test_what_another_sent_does_not_finish_an_arrival(corner: Corner) -> None:
    """Knowing a digest does not prove possession of the bytes."""
    content = os.urandom(1000)
    mine, theirs = corner.announce(content), corner.announce(content)
    assert send(corner.sign_object(theirs), content) == 200
    corner.arrivals.finish(theirs)
    corner.arrivals.discard(theirs)
    with pytest.raises(Conflict):
        corner.arrivals.finish(mine)
    written = corner.store.stat(mine.sha256)
    assert send(corner.sign_object(mine, known=True), content) == 200
    assert corner.arrivals.finish(mine) == written, "the blob that was there has not been touched"
    corner.arrivals.discard(mine)
    assert corner.left() == set()


def test_whether_a_file_has_arrived_is_known_before_it_is_finished(corner: Corner) -> None:
    arrival = corner.announce(b"0123456789")
    assert corner.arrivals.sign_object(arrival, 600, sent_before=True, known=False) is not None
    assert send(corner.sign_object(arrival), b"0123456789") == 200
    assert corner.arrivals.sign_object(arrival, 600, sent_before=True, known=False) is None


def test_a_large_file_comes_in_parts_in_any_order_and_only_the_missing_ones_are_asked_for(corner: Corner) -> None:
    content = os.urandom(LARGE_BYTES)
    arrival = corner.announce(content)
    assert arrival.part_sizes == [PART_BYTES, PART_BYTES, 1000]
    last, first = corner.missing_parts(arrival)[2], corner.missing_parts(arrival)[0]
    send_parts(corner, arrival, [last, first], content)
    assert [part.number for part in corner.missing_parts(arrival)] == [2]
    with pytest.raises(Conflict):
        corner.arrivals.finish(arrival)
    send_parts(corner, arrival, corner.missing_parts(arrival), content)
    assert corner.missing_parts(arrival) == []
    assert corner.arrivals.finish(arrival).size_bytes == LARGE_BYTES
    assert corner.missing_parts(arrival) == []
    corner.arrivals.discard(arrival)
    assert corner.read(arrival.sha256) == content, "the parts may go, the blob stays"
    assert corner.left() == set()


def test_parts_of_another_file_never_become_a_blob(corner: Corner) -> None:
    content = os.urandom(LARGE_BYTES)
    arrival = corner.announce(content)
    send_parts(corner, arrival, corner.missing_parts(arrival), content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Invalid) as raised:
        corner.arrivals.finish(arrival)
    assert (raised.value.code, raised.value.subject) == ("digest_differs", arrival.sha256)
    assert corner.store.stat(arrival.sha256) is None
    assert corner.left() == set()


def test_an_upload_that_the_store_forgot_is_begun_again(corner: Corner) -> None:
    content = os.urandom(LARGE_BYTES)
    arrival = corner.announce(content)
    send_parts(corner, arrival, corner.missing_parts(arrival)[:1], content)
    corner.arrivals.discard(arrival)
    corner.arrivals.discard(arrival)
    assert corner.arrivals.parts(arrival) is None
    assert corner.left() == set()


def test_a_sweep_removes_what_is_old_and_not_to_be_kept(corner: Corner) -> None:
    single, parts, kept = (corner.announce(os.urandom(size)) for size in (1000, LARGE_BYTES, LARGE_BYTES))
    blob = corner.announce(b"a blob")
    assert send(corner.sign_object(blob), b"a blob") == 200
    corner.arrivals.finish(blob)
    corner.arrivals.discard(blob)
    corner.client.put_object(Bucket=BUCKET, Key=f"{corner.prefix}incoming/{single.upload_id}", Body=b"x")
    before = corner.left()
    assert {key.rpartition("/")[2] for key in before} == {single.upload_id, parts.upload_id, kept.upload_id}
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
        assert len(IncomingUpload("", Digest(""), size, None, part_bytes).part_sizes) <= 10_000
        assert sum(IncomingUpload("", Digest(""), size, None, part_bytes).part_sizes) == size


def test_a_false_encoding_that_was_sent_with_a_blob_is_not_passed_on(s3: S3Server, credentials: None) -> None:
    corner = Corner(s3, direct=True)
    arrival = corner.announce(b"no gzip at all")
    assert send(corner.sign_object(arrival), b"no gzip at all", **{"Content-Encoding": "gzip"}) == 200
    corner.arrivals.finish(arrival)
    assert corner.client.head_object(Bucket=BUCKET, Key=corner.key(arrival))["ContentEncoding"] == "gzip"
    url = corner.store.url(arrival.sha256, 60)
    assert url is not None
    assert httpx2.get(url).content == b"no gzip at all"
