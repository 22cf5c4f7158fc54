"""A cluster at PostgreSQL's default of 100 connections, and processes that share it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest
from sqlalchemy import create_engine, text

from registry.database import postgres
from registry.database.engine import Database, DatabaseTimeouts
from registry.database.migrate import migrate
from registry.errors import Unavailable
from tests import services
from tests.ports import free_ports

PROCESSES = 4


@pytest.fixture
def url() -> Generator[str]:
    """The URL of a database in its own cluster with the default settings, outside pytest's directory, which another
    session of pytest closes to the user that runs the cluster."""
    if services.postgres_binaries() is None:
        services.unavailable("PostgreSQL", "apt-get install postgresql")
    with TemporaryDirectory() as directory, services.postgres(Path(directory), max_connections=100) as made:
        yield made


def count(url: str) -> int:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        mine = connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"))
    engine.dispose()
    return int(mine or 0) - 1


@pytest.mark.long
def test_a_process_that_gets_no_further_connection_waits_for_one_of_its_own(url: str) -> None:
    others = [Database(url, pool_size=90), Database(url, DatabaseTimeouts(connect_s=2), pool_size=20)]
    taken = [others[0].engine.connect() for _ in range(90)]
    assert all(connection.scalar(text("SELECT 1")) == 1 for connection in taken)

    def ask(_number: int) -> int:
        with others[1].read() as session:
            session.execute(text("SELECT pg_sleep(0.05)"))
            return int(session.scalar(text("SELECT 1")) or 0)

    with ThreadPoolExecutor(20) as pool:  # the cluster has room for ten of them
        assert list(pool.map(ask, range(100))) == [1] * 100
    others[1].close()
    more = Database(url, pool_size=20)
    rest = [more.engine.connect() for _ in range(10)]  # a superuser has the reserved ones too
    third = Database(url, DatabaseTimeouts(connect_s=2))
    with pytest.raises(Unavailable, match="max_connections") as raised, third.read():
        pass
    assert "ADAPTORY_DATABASE_POOL_SIZE" in raised.value.next_step
    for connection in (*taken, *rest):
        connection.close()
    for database in (others[0], more, third):
        database.close()


def test_idle_connections_are_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "IDLE_S", 0.4)
    database = Database(url)
    together = threading.Barrier(8)

    def ask(_number: int) -> None:
        with database.read() as session:
            session.scalar(text("SELECT 1"))
            together.wait()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert count(url) >= 8
    deadline = time.monotonic() + 10
    while count(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert count(url) == 0
    with database.read() as session:
        assert session.scalar(text("SELECT 1")) == 1
    database.close()


@pytest.mark.long
def test_what_four_processes_open_at_most_leaves_connections_to_others(url: str, tmp_path: Path) -> None:
    databases = [Database(url, DatabaseTimeouts(connect_s=1)) for _ in range(PROCESSES)]
    taken = [database.engine.connect() for database in databases for _ in range(20)]
    with pytest.raises(Unavailable), databases[0].read():
        pass
    assert count(url) == len(taken)
    dump = [str(services.postgres_binaries()) + "/pg_dump", "--file", str(tmp_path / "dump"), url]
    assert subprocess.run(dump, check=False, capture_output=True, timeout=60).returncode == 0
    for connection in taken:
        connection.close()
    for database in databases:
        database.close()


@pytest.mark.long
def test_pg_dump_and_the_command_line_get_in_while_four_processes_are_loaded(url: str, tmp_path: Path) -> None:
    """At PostgreSQL's default limit, with Adaptory's default settings."""
    database = Database(url)
    migrate(database)
    database.close()
    environ = {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url, "ADAPTORY_ACCESS_LOG": "off"}
    environ["ADAPTORY_LOOPBACK_OPEN"] = "true"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")} | environ
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "registry.cli.start", "serve", "--processes", str(PROCESSES), "--port", str(port)]
    serving = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ended = threading.Event()
    statuses: list[int] = []

    def load(_number: int) -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            while not ended.is_set():
                statuses.append(http.get("/v1/suites").status_code)
                ended.wait(4)  # the connections stay open meanwhile, and a small machine has time for the others

    try:
        _wait_until_ready(port)
        with ThreadPoolExecutor(160) as pool:
            with locked(url, "suites"):  # requests wait, so that each process opens as many connections as it may
                loads = [pool.submit(load, number) for number in range(160)]
                most = _count_at_rest(url)
            listing = [sys.executable, "-m", "registry.cli.start", "list", "--json"]
            listed = subprocess.run(listing, env=environment, check=False, capture_output=True, timeout=120)
            dump = [str(services.postgres_binaries()) + "/pg_dump", "--file", str(tmp_path / "dump"), url]
            dumped = subprocess.run(dump, check=False, capture_output=True, timeout=60)
            ended.set()
            for load in loads:
                load.result()
    finally:
        ended.set()
        serving.terminate()
        serving.wait(30)
    assert (listed.returncode, dumped.returncode) == (0, 0), (listed.stderr, dumped.stderr)
    assert 20 < most <= PROCESSES * 20 + 10
    assert set(statuses) == {200}, {status: statuses.count(status) for status in set(statuses)}


@contextmanager
def locked(url: str, table: str) -> Generator[None]:
    """Until the end of the block, statements that read the table wait."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection, connection.begin():
        connection.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
        yield
    engine.dispose()


def _count_at_rest(url: str) -> int:
    """The connections, once their number has not grown for a second."""
    most, grown = 0, time.monotonic()
    while time.monotonic() < grown + 1:
        if (now := count(url)) > most:
            most, grown = now, time.monotonic()
        time.sleep(0.05)
    return most


def _wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail("the server did not start")
