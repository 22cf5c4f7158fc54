"""A hanging store: its routes answer 503 in time, and all other routes are unaffected."""

import gc
import threading
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.api.app import create_app
from registry.api.http.threads import PATIENCE_S, STORE_ROOM, STORE_THREADS
from registry.client.inprocess import InProcessTransport
from registry.wire.transfer import UploadIn
from tests import services
from tests.access.house import PRIVATE, House, new_house

RELEASES = f"/v1/adapters/{PRIVATE}/sql/releases"
FILE = f"{RELEASES}/1.0.0/files/weights.safetensors"
MANY = STORE_THREADS + STORE_ROOM + 50
SOON_S = 5.0
"""Far longer than an answer takes that waits for nothing, even on a busy machine; the store is released much later."""
WITHOUT_STORE = (f"/v1/resolve?ref={PRIVATE}/sql@prod", f"/v1/releases?namespace={PRIVATE}", RELEASES, "/v1/whoami")


@dataclass
class HangingStore:
    """The real store, except that one method, or reading from it, hangs until released."""

    store: Any
    where: str
    go_on: threading.Event = field(default_factory=threading.Event)
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __getattr__(self, name: str) -> Any:
        return self._hanging(getattr(self.store, name)) if name == self.where else getattr(self.store, name)

    def open(self, *which: Any) -> Any:
        reader = self.store.open(*which)
        if self.where == "read":
            reader.read = self._hanging(reader.read)
        return reader

    def _hanging(self, method: Any) -> Any:
        def wait_and_call(*arguments: Any) -> Any:
            self.asked.release()
            assert self.go_on.wait(120)
            return method(*arguments)

        return wait_and_call


@dataclass
class Hung:
    house: House
    store: HangingStore
    pool: ThreadPoolExecutor

    def ask(self, caller: str, method: str, path: str, **request: object) -> "Future[httpx2.Response]":
        return self.pool.submit(self.house.ask, caller, method, path, **request)

    def fill(self, count: int) -> list["Future[httpx2.Response]"]:
        """Starts this many downloads; as many as there are threads hang in the store afterwards."""
        asked = [self.ask("reader", "GET", FILE) for _ in range(count)]
        for _ in range(STORE_THREADS):
            assert self.store.asked.acquire(timeout=60)
        return asked

    def assert_others_do_not_wait(self) -> None:
        for path in WITHOUT_STORE:
            assert self.ask("reader", "GET", path).result(SOON_S).status_code == 200, path


@contextmanager
def hung(house: House, where: str) -> Generator[Hung]:
    store = HangingStore(house.resources.store, where)
    resources = replace(house.resources, store=store)
    behind = replace(house, resources=resources, transport=InProcessTransport(create_app(resources, tokens=True)))
    with closing(behind.transport), ThreadPoolExecutor(MANY + 10) as pool:
        try:
            yield Hung(behind, store, pool)
        finally:
            store.go_on.set()


@pytest.fixture(params=services.PAIRINGS)
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[House]:
    built = new_house(request.param, tmp_path)
    yield built
    built.close()


@pytest.mark.long
def test_what_needs_no_store_does_not_wait_while_more_than_all_threads_ask_one_that_hangs(house: House) -> None:
    with hung(house, "stat") as there:
        downloads = there.fill(MANY)
        there.assert_others_do_not_wait()
        refused, waiting = wait(downloads, timeout=PATIENCE_S + SOON_S)
        assert len(waiting) == STORE_THREADS, "all were refused but those that hang in the store"
        assert {(answer.result().status_code, answer.result().json()["code"]) for answer in refused} == {
            (503, "store_busy")
        }
        assert all(int(answer.result().headers["Retry-After"]) > 0 for answer in refused)
        there.store.go_on.set()
        assert {answer.result(60).status_code for answer in waiting} <= {200, 307}
        assert there.house.ask("reader", "GET", FILE).status_code in (200, 307), "the threads are free again"


@pytest.mark.long
def test_every_route_that_asks_the_store_answers_503_when_its_threads_are_taken(house: House) -> None:
    things = house.things[PRIVATE]
    file = {"path": "weights.safetensors", "size_bytes": 15, "sha256": things.sha256}
    with hung(house, "stat") as there:
        there.fill(STORE_THREADS)
        asked = {
            (method, path): there.ask("publisher", method, path, **({"json": body} if body else {}))
            for method, path, body in (
                ("GET", "/readyz", None),
                ("GET", FILE, None),
                ("GET", f"/v1/blobs/{things.sha256}", None),
                ("HEAD", f"/v1/blobs/{things.sha256}", None),
                ("POST", "/v1/uploads", {"namespace": PRIVATE, "files": [file]}),
                ("POST", f"/v1/uploads/{things.upload_id}/parts/1", {"sha256": things.announced}),
                ("POST", f"/v1/uploads/{things.upload_id}/complete", None),
                ("POST", RELEASES, {"version": "3.0.0", "base": "tiny", "files": [file]}),
            )
        }
        for route, one in asked.items():
            answer = one.result(PATIENCE_S + SOON_S)
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True), route


@pytest.mark.long
def test_a_request_that_finds_all_threads_taken_gets_one_when_it_is_soon_free(house: House) -> None:
    with hung(house, "stat") as there:
        there.fill(STORE_THREADS)
        late = there.ask("reader", "GET", FILE)
        _, waiting = wait([late], timeout=PATIENCE_S / 4)
        assert waiting
        there.store.go_on.set()
        assert late.result(60).status_code in (200, 307)


@pytest.mark.long
@pytest.mark.parametrize("house", services.PAIRINGS[:1], indirect=True)
def test_what_a_request_sent_that_found_no_thread_is_kept_no_longer(house: House) -> None:
    """The threads' own queue drops abandoned requests only when a thread is free, possibly hours later."""
    files = [{"path": "weights.safetensors", "size_bytes": 15, "sha256": house.things[PRIVATE].announced}]
    with hung(house, "stat") as there:
        there.fill(STORE_THREADS)
        late = [
            there.ask("publisher", "POST", "/v1/uploads", json={"namespace": PRIVATE, "files": files}) for _ in range(8)
        ]
        assert {answer.result(PATIENCE_S + SOON_S).status_code for answer in late} == {503}
        gc.collect()
        assert not [object_ for object_ in gc.get_objects() if type(object_) is UploadIn]


@pytest.mark.long
@pytest.mark.parametrize("house", services.PAIRINGS[:1], indirect=True)
def test_a_directory_that_hangs_in_the_middle_of_downloads_holds_up_no_one_else(house: House) -> None:
    """With S3, the bytes do not pass the server."""
    with hung(house, "read") as there:
        downloads = there.fill(MANY)
        there.assert_others_do_not_wait()
        for path in ("/readyz", f"/v1/blobs/{house.things[PRIVATE].sha256}"):
            assert there.ask("reader", "HEAD" if "blobs" in path else "GET", path).result(SOON_S).status_code == 200
        there.store.go_on.set()
        answers = [download.result(60) for download in downloads]
        bodies = {answer.content for answer in answers if answer.status_code == 200}
        assert bodies == {f"weights of {PRIVATE}".encode()}
