"""A prefix of the real S3 server, for tests of direct uploads."""

import hashlib
import socket
import threading
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx2

from registry.environment.settings import S3Storage
from registry.formats.references import Digest
from registry.storage.blobs import IncomingUpload, Part, Put
from registry.storage.s3.bucket import open_bucket
from registry.storage.s3.store import S3Store
from registry.storage.s3.uploads import S3Arrivals
from tests.s3_server import BUCKET, S3Server

PART_BYTES = 5 << 20
LARGE_BYTES = 2 * PART_BYTES + 1000
TOMORROW = datetime.now(UTC) + timedelta(days=1)


class Corner:
    """A prefix in the real server, accessible through our store and directly."""

    def __init__(
        self, s3: S3Server, *, hash_arrivals: bool = False, endpoint: str | None = None, direct: Any = "auto"
    ) -> None:
        self.prefix = f"{uuid.uuid4().hex}/"
        self.client = s3.client()
        storage = S3Storage(
            kind="s3",
            bucket=BUCKET,
            prefix=self.prefix,
            endpoint_url=endpoint or s3.endpoint,
            multipart_bytes=LARGE_BYTES,
            part_bytes=PART_BYTES,
            hash_arrivals=hash_arrivals,
            direct=direct,
        )
        self.storage = storage
        self.store = S3Store(storage)
        self.seconds = 0.0
        self.arrivals = S3Arrivals(
            open_bucket(storage),
            storage,
            now=lambda: datetime.now(UTC) + timedelta(seconds=self.seconds),
        )

    def announced(self, content: bytes) -> IncomingUpload:
        """An upload that the store has not heard of."""
        part_bytes = self.arrivals.part_bytes(len(content))
        return IncomingUpload(
            uuid.uuid4().hex, Digest(hashlib.sha256(content).hexdigest()), len(content), None, part_bytes
        )

    def announce(self, content: bytes) -> IncomingUpload:
        """Announces a file like the registry, for a blob that does not exist yet."""
        arrival = self.announced(content)
        if arrival.part_bytes is None:
            return arrival
        multipart_id = self.arrivals.begin(arrival)
        return replace(arrival, multipart_id=multipart_id)

    def sign_object(self, arrival: IncomingUpload, *, known: bool = False) -> Put:
        put = self.arrivals.sign_object(arrival, 600, sent_before=False, known=known)
        assert put is not None
        return put

    def missing_parts(self, arrival: IncomingUpload) -> list[Part]:
        parts = self.arrivals.parts(arrival)
        assert parts is not None
        return [part for part in parts if not part.present]

    def part(self, arrival: IncomingUpload, number: int, content: bytes) -> Put:
        """The request that sends the part with this content."""
        return self.arrivals.sign_part(arrival, number, Digest(hashlib.sha256(content).hexdigest()), 600)

    def key(self, arrival: IncomingUpload) -> str:
        return f"{self.prefix}blobs/sha256/{arrival.sha256[:2]}/{arrival.sha256}"

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


NO_CHANGES: Mapping[bytes, bytes] = {}


@contextmanager
def relay(
    endpoint: str, changes: Mapping[bytes, bytes], only: bytes = b"", answers: Mapping[bytes, bytes] = NO_CHANGES
) -> Generator[str]:
    """The server at another address, where words are replaced by others of the same length: in requests that contain
    `only`, and in `answers`."""
    target = urlsplit(endpoint)

    def pass_on(source: socket.socket, sink: socket.socket, changes: Mapping[bytes, bytes]) -> None:
        with suppress(OSError):  # either side hung up
            while data := source.recv(1 << 16):
                for before, after in changes.items() if only in data or changes is answers else ():
                    data = data.replace(before, after)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def take(listener: socket.socket) -> None:
        with suppress(OSError):  # closed: the test is over
            while True:
                near = listener.accept()[0]
                far = socket.create_connection((target.hostname, target.port))
                threading.Thread(target=pass_on, args=(near, far, changes), daemon=True).start()
                threading.Thread(target=pass_on, args=(far, near, answers), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=take, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
