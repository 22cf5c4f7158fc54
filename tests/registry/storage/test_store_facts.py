"""A store is probed once, for all processes that share a database."""

import os
import threading
from datetime import UTC, datetime

import pytest

from registry.database.engine import Database
from registry.database.locks import exclusive_probe
from registry.errors import Unavailable
from registry.storage.s3.store import S3Store
from registry.transfer.store_facts import DatabaseRecord
from tests.registry.storage.corner import LARGE_BYTES, Corner, relay
from tests.s3_server import S3Server


def recorded(corner: Corner, database: Database) -> S3Store:
    """The store as a new process opens it."""
    return S3Store(corner.storage, DatabaseRecord(database, corner.storage, lambda: datetime.now(UTC)))


def test_the_next_process_signs_uploads_without_asking_the_store(
    s3: S3Server, credentials: None, migrated: Database
) -> None:
    with relay(s3.endpoint, {}) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        assert recorded(corner, migrated).arrivals.probe.allows_in_place()
    arrival = corner.announced(os.urandom(1000))
    put = recorded(corner, migrated).arrivals.sign_object(arrival, 600, sent_before=False, known=False)
    assert put is not None
    assert "/blobs/sha256/" in put.url


def test_a_new_probe_replaces_what_is_recorded(s3: S3Server, credentials: None, migrated: Database) -> None:
    changes: dict[bytes, bytes] = {}
    with relay(s3.endpoint, changes) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        assert recorded(corner, migrated).arrivals.probe.facts().signed_end
        changes[b"X-Delete-After"] = b"X-Nothing-Else"  # as a proxy does that was put before the store
        assert recorded(corner, migrated).arrivals.probe.facts().signed_end
        assert not recorded(corner, migrated).arrivals.probe.probe().signed_end
        assert not recorded(corner, migrated).arrivals.probe.facts().signed_end


def test_a_store_that_takes_no_parts_is_not_recorded(s3: S3Server, credentials: None, migrated: Database) -> None:
    with relay(s3.endpoint, {b"partNumber=": b"partnumber="}) as endpoint:
        corner = Corner(s3, endpoint=endpoint)
        store = recorded(corner, migrated)
        with pytest.raises(Unavailable, match="multipart"):
            store.arrivals.begin(corner.announced(os.urandom(LARGE_BYTES)))
        assert store.arrivals.probe.allows_in_place(), "files that need no parts are taken"
        assert DatabaseRecord(migrated, corner.storage, lambda: datetime.now(UTC)).load() is None


def test_processes_probe_one_after_the_other(migrated: Database) -> None:
    begun, ended = threading.Event(), threading.Event()

    def second() -> None:
        begun.set()
        with exclusive_probe(migrated):
            ended.set()

    with exclusive_probe(migrated):
        threading.Thread(target=second).start()
        assert begun.wait(10)
        assert not ended.wait(0.5)
    assert ended.wait(10)
