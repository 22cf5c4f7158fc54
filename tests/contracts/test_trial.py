"""Sending straight to the place of a blob, which a store must be seen to be fit for; trying that leaves nothing."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from registry.names import Digest
from registry.settings import S3Storage
from registry.storage import s3_trial
from registry.storage.blobs import Arrival
from registry.storage.s3_arrivals import S3Arrivals
from registry.storage.s3_bucket import open_bucket
from registry.storage.s3_trial import PROBE, SETTLED_S, STALE_S
from tests.contracts.corner import TOMORROW, Corner, relay, send
from tests.s3_server import BUCKET, S3Server


def in_place(corner: Corner) -> bool:
    """Whether the next file would be written under the key of its blob."""
    path = urlsplit(corner.whole(corner.announce(os.urandom(100))).url).path
    assert ("/blobs/sha256/" in path) != ("/incoming/" in path)
    return "/blobs/sha256/" in path


def test_a_store_that_obeys_a_header_which_was_not_signed_gets_nothing_in_place(
    s3: S3Server, credentials: None
) -> None:
    corner = Corner(s3)
    assert not in_place(corner)
    assert corner.left() == set(), "a process that ends soon asks nothing"
    corner.seconds += SETTLED_S
    assert not in_place(corner)
    time.sleep(3)  # the object should end after one
    for _ in range(3):
        corner.seconds += SETTLED_S
        assert not in_place(corner)
    assert corner.left() == set()


def test_a_store_that_never_sees_such_a_header_gets_files_in_place_once_that_is_known(
    s3: S3Server, credentials: None
) -> None:
    """The real server behind a relay that takes the header away, since no server for tests does so by itself."""
    with relay(s3.endpoint, {b"X-Delete-After": b"X-Nothing-Else"}) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        corner.seconds += SETTLED_S
        assert not in_place(corner)
        assert len(corner.left()) == 1
        time.sleep(3)
        assert not in_place(corner), "too early to tell"
        corner.seconds += SETTLED_S
        content = os.urandom(1000)
        arrival = corner.announce(content)
        put = corner.whole(arrival)
        assert "/blobs/sha256/" in put.url
        assert corner.left() == set()
        assert send(put, content) == 200
        assert corner.arrivals.finish(arrival).size_bytes == 1000
        assert corner.read(arrival.sha256) == content


def test_a_trial_ends_by_itself_and_leaves_nothing(
    s3: S3Server, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_trial, "SETTLED_S", 1.0)
    with relay(s3.endpoint, {b"X-Delete-After": b"X-Nothing-Else"}) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        corner.seconds += SETTLED_S
        assert not in_place(corner)
        assert len(corner.left()) == 1
        deadline = time.monotonic() + 20
        while corner.left():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert in_place(corner), "and what it found is known"


def begin_a_trial_and_end(prefix: str, endpoint: str) -> None:
    """For a process of its own; says how many objects it has in the store."""
    storage = S3Storage(bucket=BUCKET, prefix=prefix, endpoint_url=endpoint)
    seconds = iter((0.0, SETTLED_S, SETTLED_S))
    arrivals = S3Arrivals(open_bucket(storage), storage, clock=lambda: next(seconds))
    arrivals.whole(Arrival("an-upload", Digest("0" * 64), 1), 600, sent_before=False, known=False)
    sys.stdout.write(str(len(list(open_bucket(storage).listed("incoming/")))))


def test_a_process_that_ends_before_its_trial_leaves_nothing(s3: S3Server, credentials: None) -> None:
    with relay(s3.endpoint, {b"X-Delete-After": b"X-Nothing-Else"}) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        call = f"begin_a_trial_and_end({corner.prefix!r}, {endpoint!r})"
        program = [sys.executable, "-c", f"from tests.contracts.test_trial import *; {call}"]
        ran = subprocess.run(program, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "1", "")
    assert corner.left() == set()


def test_a_sweep_removes_what_a_killed_process_left_of_a_trial_and_nothing_of_one_under_way(corner: Corner) -> None:
    corner.client.put_object(Bucket=BUCKET, Key=f"{corner.prefix}incoming/{PROBE}1", Body=b"right")
    yesterday = TOMORROW - timedelta(days=2)
    assert corner.arrivals.sweep(yesterday, set()) == 0
    corner.seconds += STALE_S + 2
    assert corner.arrivals.sweep(yesterday, set()) == 1
    assert corner.left() == set()


@pytest.mark.parametrize("direct", [True, False])
def test_an_operator_may_know_better(s3: S3Server, credentials: None, direct: bool) -> None:
    corner = Corner(s3, direct=direct)
    assert in_place(corner) is direct
    corner.seconds += 10 * SETTLED_S
    assert in_place(corner) is direct
