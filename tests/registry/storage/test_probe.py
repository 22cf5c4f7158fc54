"""Sending straight to the place of a blob, which a store must be seen to be fit for; trying that leaves nothing."""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from urllib.parse import urlsplit

import httpx2
import pytest

from registry.environment.settings import S3Storage
from registry.errors import Unavailable
from registry.formats.references import Digest
from registry.storage.blobs import IncomingUpload, Put
from registry.storage.s3.bucket import open_bucket
from registry.storage.s3.probe import NEVER, PROBE, STALE_S
from registry.storage.s3.uploads import S3Arrivals
from tests.registry.storage.corner import LARGE_BYTES, PART_BYTES, TOMORROW, Corner, relay, send
from tests.s3_server import BUCKET, S3Server


def is_direct(corner: Corner) -> bool:
    """Whether the next file would be written under the key of its blob."""
    path = urlsplit(corner.sign_object(corner.announce(os.urandom(100))).url).path
    assert ("/blobs/sha256/" in path) != ("/incoming/" in path)
    return "/blobs/sha256/" in path


def sent(corner: Corner) -> None:
    """Sends a file according to its plan; it is a blob afterwards."""
    content = os.urandom(1000)
    arrival = corner.announce(content)
    assert send(corner.sign_object(arrival), content) == 200
    assert corner.arrivals.finish(arrival).size_bytes == 1000
    assert corner.read(arrival.sha256) == content


def test_a_store_that_holds_to_what_is_signed_gets_files_in_place_from_the_first_on(
    s3: S3Server, credentials: None
) -> None:
    corner = Corner(s3)
    assert is_direct(corner)
    sent(corner)
    assert corner.left() == set()


PARTS = b"partNumber="
Rows = list[tuple[str, str]]
SOON = [("X-Delete-After", "1")]
ATTACKS: Mapping[str, Callable[[Rows], Rows]] = {
    "another end": lambda rows: [row for row in rows if row[0] not in NEVER] + SOON,
    "another one after it": lambda rows: rows + SOON,
    "another one before it": lambda rows: SOON + rows,
    "in small letters": lambda rows: [*rows, ("x-delete-after", "1")],
    "another spelling": lambda rows: [*rows, ("X_Delete_After", "1")],
    "a moment": lambda rows: [*rows, ("X-Delete-At", str(int(time.time()) + 2))],
    "no end": lambda rows: [row for row in rows if row[0] not in NEVER],
    "a list of other objects": lambda rows: [*rows, ("X-Object-Manifest", f"{BUCKET}/")],
    "a link": lambda rows: [*rows, ("X-Symlink-Target", f"{BUCKET}/other")],
    "a copy": lambda rows: [*rows, ("X-Copy-From", f"{BUCKET}/other")],
    "a copy, in the words of S3": lambda rows: [*rows, ("x-amz-copy-source", f"{BUCKET}/other")],
    "an encoding": lambda rows: [*rows, ("Content-Encoding", "gzip")],
}


@pytest.mark.long
def test_who_sends_a_blob_once_more_with_headers_of_his_own_neither_ends_nor_changes_it(corner: Corner) -> None:
    content = os.urandom(1000)
    arrival = corner.announce(content)
    put = corner.sign_object(arrival)
    assert send(put, content) == 200
    corner.arrivals.finish(arrival)
    corner.client.put_object(Bucket=BUCKET, Key="other", Body=b"what another blob would become")
    for name, attack in ATTACKS.items():
        refused = _send_as(put, content, attack(list(put.headers.items())))
        assert refused in (200, 403), name
    time.sleep(4)
    assert corner.read(arrival.sha256) == content
    address = corner.store.url(arrival.sha256, 60)
    assert address is not None
    assert httpx2.get(address).content == content


def _send_as(put: Put, content: bytes, rows: Rows) -> int:
    return httpx2.put(put.url, content=content, headers=rows, timeout=60).status_code


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({b"X-Delete-After": b"X-Nothing-Else"}, id="takes the signed end away"),
        pytest.param(
            {b"X-Delete-After: 60": b"X-Nothing-Else: 60", b"X-Delete-At: 60": b"X-Nothing-x: 60"},
            id="takes another end as well",
        ),
    ],
)
def test_where_the_end_could_be_another_than_the_signed_one_files_are_copied(
    s3: S3Server, credentials: None, changes: dict[bytes, bytes]
) -> None:
    """The real server behind a relay that changes headers, since no test server does so by itself."""
    with relay(s3.endpoint, changes) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        assert not is_direct(corner)
        sent(corner)


def test_those_who_wait_for_a_trial_that_the_store_does_not_answer_fail_with_it(credentials: None) -> None:
    """Retrying one after the other would take as long again for each, and occupy the server's threads."""
    tried = 0

    def take(listener: socket.socket) -> None:
        nonlocal tried
        held: list[socket.socket] = []
        with suppress(OSError):  # closed: the test is over
            while True:
                held.append(listener.accept()[0])
                tried += 1

    def announced(arrivals: S3Arrivals) -> str:
        arrival = IncomingUpload("an-upload", Digest("0" * 64), 1)
        with pytest.raises(Unavailable) as raised:
            arrivals.sign_object(arrival, 600, sent_before=False, known=False)
        return raised.value.code

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=take, args=(listener,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        storage = S3Storage(bucket=BUCKET, endpoint_url=endpoint, read_timeout_s=0.5, attempts=1)
        arrivals = S3Arrivals(open_bucket(storage), storage)
        with ThreadPoolExecutor(12) as pool:
            assert set(pool.map(announced, [arrivals] * 12)) == {"store_unavailable"}
        listener.shutdown(socket.SHUT_RDWR)
    assert tried <= 3, "the requests of one trial, not of twelve"


def test_a_sweep_removes_what_a_killed_process_left_of_a_trial_and_nothing_of_one_under_way(corner: Corner) -> None:
    corner.client.put_object(Bucket=BUCKET, Key=f"{corner.prefix}incoming/{PROBE}1", Body=b"right")
    yesterday = TOMORROW - timedelta(days=2)
    assert corner.arrivals.sweep(yesterday, set()) == 0
    corner.seconds += STALE_S + 2
    assert corner.arrivals.sweep(yesterday, set()) == 1
    assert corner.left() == set()


def test_where_the_sha256_of_parts_cannot_be_signed_their_length_alone_is(s3: S3Server, credentials: None) -> None:
    """The relay removes the sha256, so that parts signed with theirs would all be refused."""
    content = os.urandom(LARGE_BYTES)
    with relay(s3.endpoint, {b"x-amz-checksum-sha256: ": b"x-nothing-of-interest: "}, PARTS) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        arrival = corner.announce(content)
        put = corner.part(arrival, 1, content[:PART_BYTES])
        assert set(put.headers) == {"Content-Length"}
        for number in (1, 2, 3):
            part = content[(number - 1) * PART_BYTES : number * PART_BYTES]
            assert send(corner.part(arrival, number, part), part) == 200
        assert corner.arrivals.finish(arrival).size_bytes == LARGE_BYTES


def test_an_upload_goes_on_as_it_was_begun_whatever_another_process_found(s3: S3Server, credentials: None) -> None:
    """AWS accepts parts either with or without a sha256, as the upload was begun."""
    content = os.urandom(LARGE_BYTES)
    with relay(s3.endpoint, {b"x-amz-checksum-sha256: ": b"x-nothing-of-interest: "}, PARTS) as endpoint:
        doubting = Corner(s3, endpoint=endpoint)
        unchecked = doubting.announce(content)
    corner = Corner(s3)
    assert set(corner.part(unchecked, 1, content[:PART_BYTES]).headers) == {"Content-Length"}
    assert "x-amz-checksum-sha256" in corner.part(corner.announce(content), 1, content[:PART_BYTES]).headers


def test_nothing_is_concluded_from_a_store_that_takes_no_part_at_all(s3: S3Server, credentials: None) -> None:
    with relay(s3.endpoint, {b"partNumber=": b"partnumber="}) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        with pytest.raises(Unavailable) as raised:
            corner.announce(os.urandom(LARGE_BYTES))
    assert raised.value.code == "store_unavailable"
    assert corner.left() == set()


def test_a_store_without_etags_is_refused_before_anything_is_sent(s3: S3Server, credentials: None) -> None:
    """A file could be replaced after it was hashed: JuiceFS allows this unless it is started with --keep-etag."""
    with relay(s3.endpoint, {}, answers={b"ETag: ": b"Nope: ", b"Etag: ": b"Nope: ", b"etag: ": b"nope: "}) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        with pytest.raises(Unavailable, match="ETag") as raised:
            sent(corner)
    assert raised.value.code == "store_unfit"
    assert corner.left() == set()


def test_trying_parts_leaves_nothing(corner: Corner) -> None:
    arrival = corner.announce(os.urandom(LARGE_BYTES))
    assert "x-amz-checksum-sha256" in corner.part(arrival, 1, b"").headers
    corner.arrivals.discard(arrival)
    assert corner.left() == set()


@pytest.mark.parametrize("direct", [True, False])
def test_an_operator_may_know_better(s3: S3Server, credentials: None, direct: bool) -> None:
    assert is_direct(Corner(s3, direct=direct)) is direct
