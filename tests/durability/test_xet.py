"""Pushes by clients with `hf_xet` that are cut off: by kill -9 of server or client, or by the end of a token."""

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select

from registry.database.tables import Blob, XetUpload, XetXorb
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.catalog import commits
from registry.transfer.collect import collect
from registry.transfer.xet import PERMIT_S
from tests import services
from tests.durability.conftest import broken_promises, opened
from tests.durability.processes import NAME, kill, resources, serve, wait_for_port
from tests.forked import start
from tests.scenarios.test_hub_clients import client
from tests.xet_wire import PLAIN, Segment, chunk, name_of, shard

CHUNK = 64 << 10
SCRIPT = Path(__file__).parents[1] / "scenarios" / "hub_large.py"


def serve_with_short_tokens(port: int) -> None:
    """A server whose clock is slow: for the client, its tokens end after two seconds."""
    import uvicorn

    from registry.api.app import create_app

    lag = timedelta(seconds=PERMIT_S - 2)
    late = replace(resources(), clock=lambda: datetime.now(UTC) - lag)
    uvicorn.run(create_app(late), host="127.0.0.1", port=port, log_level="error")


@dataclass
class Server:
    environ: Mapping[str, str]
    port: int = field(default_factory=services.free_port)
    process: BaseProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begin(self, work: Callable[[int], None] = serve) -> None:
        self.process = start(work, self.environ, self.port)
        wait_for_port(self.port)

    def kill(self) -> None:
        assert self.process is not None
        kill(self.process)
        self.process = None


@pytest.fixture
def server(environ: dict[str, str]) -> Generator[Server]:
    held = opened(environ)
    with held.write() as session:
        commits.create_repository(session, Actor("mia", held.clock(), {EVERYWHERE: Role.ADMIN.value}), NAME)
    held.close()
    server = Server(environ)
    yield server
    if server.process is not None:
        server.kill()


@dataclass(frozen=True)
class Push:
    token: str
    address: str

    @classmethod
    def begin(cls, server: Server) -> "Push":
        answer = httpx2.get(f"{server.url}/api/models/{NAME}/xet-write-token/main").raise_for_status().json()
        return cls(answer["accessToken"], answer["casUrl"])

    def post(self, path: str, content: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx2.post(f"{self.address}/{path}", content=content, headers=headers, timeout=60)


@pytest.mark.long
def test_a_push_survives_kills_of_the_server_and_leaves_nothing_behind(server: Server) -> None:
    chance = random.Random(os.environ.get("ADAPTORY_TEST_SEED", "xet"))
    xorbs = [b"".join(chunk(chance.randbytes(CHUNK), PLAIN) for _ in range(20)) for _ in range(2)]
    segments = [Segment(name_of(xorb), 0, 20, 20 * CHUNK) for xorb in xorbs]
    document = shard(*[(segments * count, None) for count in (1, 5, 15)])
    server.begin()
    push = Push.begin(server)
    push.post(f"v1/xorbs/default/{name_of(xorbs[0])}", xorbs[0]).raise_for_status()
    _kill_amid(server, lambda: push.post(f"v1/xorbs/default/{name_of(xorbs[1])}", _slowly(xorbs[1])), 0.3)
    server.begin()
    push.post(f"v1/xorbs/default/{name_of(xorbs[1])}", xorbs[1]).raise_for_status()
    for delay_s in (0.05, 0.2, chance.uniform(0.1, 0.6)):
        _kill_amid(server, lambda: push.post("v1/shards", document), delay_s)
        server.begin()
    push.post("v1/shards", document).raise_for_status()
    assert broken_promises(server.environ, read_bytes=True) == []
    _assert_nothing_is_left(server)


def _kill_amid(server: Server, request: Callable[[], object], delay_s: float) -> None:
    def ask() -> None:
        try:
            request()
        except httpx2.TransportError:
            return  # the server has been killed

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(delay_s)
    server.kill()
    asking.join()


def _slowly(content: bytes) -> Generator[bytes]:
    for start_at in range(0, len(content), CHUNK):
        yield content[start_at : start_at + CHUNK]
        time.sleep(0.05)


def _assert_nothing_is_left(server: Server) -> None:
    """One day later, if nothing was committed."""
    held = opened(server.environ)
    try:
        work = held.work_directory
        assert list(work.glob("upload-*")), "some server was killed while it wrote"
        later = replace(held, clock=lambda: datetime.now(UTC) + timedelta(days=1, minutes=1))
        collected = collect(later, grace=timedelta(0))
        assert collected.leftovers > 0
        assert not list(work.glob("upload-*"))
        with held.read() as session:
            counts = [session.scalar(select(func.count()).select_from(table)) for table in (XetUpload, XetXorb, Blob)]
        assert counts == [0, 0, 0]
    finally:
        held.close()


def client_process(server: Server, directory: Path) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ADAPTORY_"))}
    environment |= {
        "HF_ENDPOINT": server.url, "HF_TOKEN": "adp_any", "HF_HOME": str(directory / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip
    command = [str(client("2.4.0")), str(SCRIPT), str(directory), str(NAME)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _written(directory: Path, size: int) -> str:
    content = random.Random(size).randbytes(size)
    (directory / "large.dat").write_bytes(content)
    return name_of(content)


def _pushed(process: "subprocess.Popen[str]") -> Any:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(out)


def _count(server: Server, what: Any) -> int:
    held = opened(server.environ)
    try:
        with held.read() as session:
            return session.scalar(select(func.count(what.distinct()))) or 0
    finally:
        held.close()


@pytest.mark.long
@pytest.mark.parametrize("pairing", [services.PAIRINGS[0]], indirect=True)
def test_a_client_whose_token_ends_in_the_middle_goes_on_with_another(server: Server, tmp_path: Path) -> None:
    server.begin(serve_with_short_tokens)
    size = 90 << 20
    sha256 = _written(tmp_path, size)
    assert _pushed(client_process(server, tmp_path)) == {"large.dat": [size, sha256]}
    assert _count(server, XetUpload.id) > 1, "it has asked again"
    assert _count(server, XetXorb.upload_id) == 1, "and has stayed at the first address"


@pytest.mark.long
@pytest.mark.parametrize("pairing", [services.PAIRINGS[0]], indirect=True)
def test_a_push_that_was_killed_is_repeated(server: Server, tmp_path: Path) -> None:
    """The client records on its disk which parts it sent to which address: with a new address it sends everything
    again."""
    server.begin()
    size = 90 << 20
    sha256 = _written(tmp_path, size)
    killed = client_process(server, tmp_path)
    deadline = time.monotonic() + 60
    while _count(server, XetXorb.hash) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    for _ in range(2):
        assert _pushed(client_process(server, tmp_path)) == {"large.dat": [size, sha256]}
