"""Databases, disks and stores that are down, hang or are full: 503 in time, no partial changes, no restart needed."""

import hashlib
import random
import sqlite3
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from psycopg import sql
from sqlalchemy import text

from registry.api.http.file_origin import FILES_PATH
from registry.client.api import Api, Json, line_path
from registry.client.pull import pull
from registry.client.push import push, send
from registry.environment.settings import S3Storage
from registry.errors import Unavailable
from registry.formats.references import Digest
from registry.storage.s3.store import S3Store
from registry.transfer import collect
from registry.wire.catalog import ReleaseOut
from registry.worker.runner import run_one
from tests import services
from tests.durability.breakable import WITHOUT_DATABASE, Disk, Postgres, Stock, ask, do_jobs, furnish
from tests.durability.conftest import broken_promises, opened
from tests.durability.processes import CHANNEL, NAME, kill, serve, wait_for_port
from tests.durability.small import adapter_files, write_adapter, write_base
from tests.elapsed import let_elapse
from tests.forked import start
from tests.s3_server import S3Server
from tests.scenarios.test_crashes import LATER, watched
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, environment

PATIENCE = {"ADAPTORY_DATABASE_TIMEOUT_S": "2", "ADAPTORY_DATABASE_CONNECT_TIMEOUT_S": "2"}
IMPATIENT_STORE = {"ADAPTORY_STORAGE__CONNECT_TIMEOUT_S": "1", "ADAPTORY_STORAGE__READ_TIMEOUT_S": "1"}
# Waits for each to end: a connection that is still about to end looks usable to the pool that holds it.
DROP_OTHERS = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname IS NOT NULL AND pid <> pg_backend_pid()"
)


@dataclass(frozen=True)
class Registry:
    """A server and a worker, each in its own process. `environ` lacks their short timeouts, for later checks.
    `directory` holds the client's files."""

    environ: Mapping[str, str]
    url: str
    directory: Path
    stock: Stock

    def push(self, version: str, seed: int) -> None:
        api = Api(self.url)
        files = adapter_files(self.directory / version, seed)
        push(api, files, NAME, "adapter", {"version": version, "base": "tiny"}, lambda _count: None)
        api.close()

    def versions(self) -> list[str]:
        return [row["version"] for row in httpx2.get(f"{self.url}{line_path(NAME)}/releases").json()["items"]]

    def pull(self, version: str) -> bytes:
        target = self.directory / f"pulled-{version}-{time.monotonic_ns()}"
        api = Api(self.url)
        pull(api, api.get(f"{line_path(NAME)}/releases/{version}", ReleaseOut), target, lambda _count: None)
        api.close()
        return (target / "adapter_model.safetensors").read_bytes()

    def plan(self, *adapters: str) -> Json:
        """The plan of a composition, for the worker to make."""
        body = {"recipe": {"inputs": list(adapters), "method": "stack"}, "plan": True}
        return httpx2.post(f"{self.url}/v1/compositions", json=body).raise_for_status().json()

    def watch(self, made: Json, enough: Callable[[Json], bool]) -> Json:
        deadline = time.monotonic() + 60
        while not enough(made):
            assert time.monotonic() < deadline, made
            time.sleep(0.1)
            made = httpx2.get(f"{self.url}/v1/compositions/{made['id']}").raise_for_status().json()
        return made

    def assert_well(self) -> None:
        """Everything works again, by the same processes."""
        assert httpx2.get(f"{self.url}/readyz", timeout=30).status_code == 200
        self.push("1.1.0", 11)
        httpx2.put(f"{self.url}{CHANNEL}", json={"version": "1.1.0"}).raise_for_status()
        assert self.versions() == ["1.1.0", "1.0.0"]
        assert self.pull("1.1.0") == (self.directory / "1.1.0" / "adapter_model.safetensors").read_bytes()
        made = self.plan("acme/sql:1.0.0", "acme/sql:1.1.0")
        assert self.watch(made, has_ended)["state"] == "done"
        assert broken_promises(self.environ, read_bytes=True) == []


def has_ended(made: Json) -> bool:
    return made["state"] not in ("queued", "running")


@contextmanager
def running(environ: dict[str, str], directory: Path) -> Generator[Registry]:
    environ = environ | {"ADAPTORY_USER": "mia"}
    Cli(environ).ok("base", "add", write_base(directory / "base"), "--name", "tiny")
    port = services.free_port()
    server = start(serve, environ, port)
    wait_for_port(port)
    url = f"http://127.0.0.1:{port}"
    stock = furnish(url, directory / "1.0.0")
    worker = start(do_jobs, environ, str(directory / "worker"))
    while not (directory / "worker").exists():
        assert worker.is_alive()
        time.sleep(0.05)
    patient = {name: value for name, value in environ.items() if name not in PATIENCE}
    yield Registry(patient, url, directory, stock)
    kill(worker)  # which fails when it has died before
    kill(server)


def assert_refused(answer: httpx2.Response, what: object, *codes: str) -> None:
    assert answer.status_code == 503, (what, answer.status_code, answer.text)
    assert int(answer.headers["Retry-After"]) > 0, what
    if answer.request.method != "HEAD":
        assert answer.json()["code"] in codes, (what, answer.text)


@pytest.fixture
def environment_on_postgres(own_postgres: Postgres, tmp_path: Path) -> dict[str, str]:
    url = services._create_database(own_postgres.start(), f"t{time.monotonic_ns()}")
    environ = {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url, **PATIENCE}
    Cli(environ).ok("migrate")
    return environ


@pytest.fixture
def on_postgres(environment_on_postgres: dict[str, str], tmp_path: Path) -> Generator[Registry]:
    with running(environment_on_postgres, tmp_path) as registry:
        yield registry


def crash(postgres: Postgres) -> Callable[[], object]:
    postgres.stop()
    return postgres.start


def hang(postgres: Postgres) -> Callable[[], object]:
    postgres.freeze()
    return postgres.thaw


@pytest.mark.long
@pytest.mark.parametrize("harm", [hang, crash])
def test_a_database_that_is_away_is_a_503_on_every_route_and_is_used_again_when_it_is_back(
    on_postgres: Registry, own_postgres: Postgres, harm: Callable[[Postgres], Callable[[], object]]
) -> None:
    url = on_postgres.url
    requests = [
        request
        for request in on_postgres.stock.requests()
        if request[:2] not in WITHOUT_DATABASE
        and not request[1].startswith(FILES_PATH)  # signed: they need the store alone
    ]
    assert len(requests) > 60
    heal = harm(own_postgres)
    try:
        with ThreadPoolExecutor(50) as pool:
            asked = [pool.submit(ask, url, request) for request in requests]
            for _ in range(5):
                assert httpx2.get(f"{url}/healthz", timeout=2).status_code == 200, "it answers while others wait"
                time.sleep(0.1)
            for request, answer in zip(requests, asked, strict=True):
                assert_refused(answer.result(), request, "database_unavailable", "database_busy")
    finally:
        heal()
    on_postgres.assert_well()


@pytest.mark.long
def test_connections_that_drop_in_the_middle_of_moves_lose_none_that_was_accepted(
    on_postgres: Registry, own_postgres: Postgres
) -> None:
    on_postgres.push("1.1.0", 11)
    until = time.monotonic() + 4

    def move(number: int) -> list[int]:
        api, accepted = Api(on_postgres.url), list[int]()
        while time.monotonic() < until:
            try:
                accepted.append(api.put(CHANNEL, {"version": f"1.{number % 2}.0"})["id"])
            except Unavailable as error:
                refused.append(error.code)
        api.close()
        return accepted

    refused: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        movers = [pool.submit(move, number) for number in range(4)]
        with services._administration(own_postgres.start()) as administrator:
            while time.monotonic() < until:
                administrator.execute(DROP_OTHERS)
                time.sleep(0.1)
        accepted = [moved for mover in movers for moved in mover.result()]
    assert set(refused) == {"database_unavailable"}, "clients see dropped connections and nothing else"
    assert len(accepted) > 20
    history = list(Api(on_postgres.url).pages(f"{CHANNEL}/history", limit=500))
    assert set(accepted) <= {row["id"] for row in history}
    assert broken_promises(on_postgres.environ) == []


@pytest.mark.long
def test_a_job_whose_database_crashes_is_ended_well_when_it_is_back(
    environment_on_postgres: dict[str, str], own_postgres: Postgres, tmp_path: Path
) -> None:
    cli = Cli(environment_on_postgres)
    cli.ok("base", "add", write_base(tmp_path / "base"), "--name", "tiny")
    cli.ok("push", write_adapter(tmp_path / "adapter", 1), NAME, "--bump", "minor", "--base", "tiny")
    with api_of(cli) as api:
        recipe = {"inputs": [str(NAME)], "method": "stack", "adapter": "acme/both:1.0.0"}
        api.post("/v1/compositions", {"recipe": recipe})

    def crash_then(name: str) -> None:
        if name == "combine":
            own_postgres.stop()

    held = opened(environment_on_postgres)
    with pytest.raises(Unavailable):  # which the loop of a worker waits out
        run_one(held, watched([], crash_then), "first")
    own_postgres.start()
    assert not run_one(held, watched([]), "too early"), "it is the first one's until its lease runs out"
    seen: list[str] = []
    let_elapse(held, LATER)
    assert run_one(held, watched(seen), "second")
    held.close()
    assert seen == ["combine", "evaluate", "gate", "merge", "publish"]
    assert cli.json("jobs", 1)["state"] == "done"
    assert cli.json("log", "acme/both")["items"][0]["version"] == "1.0.0"


@pytest.mark.long
def test_a_database_that_may_not_be_written_refuses_changes_and_still_answers_questions(
    on_postgres: Registry, own_postgres: Postgres
) -> None:
    name = on_postgres.environ["ADAPTORY_DATABASE_URL"].rpartition("/")[2]

    def forbid(what: str) -> None:
        with services._administration(own_postgres.start()) as administrator:
            changed = sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}")
            administrator.execute(changed.format(sql.Identifier(name), sql.Literal(what)))
            administrator.execute(DROP_OTHERS)

    forbid("on")
    answer = httpx2.put(f"{on_postgres.url}{CHANNEL}", json={"version": "1.0.0"})
    assert_refused(answer, "promote", "database_unavailable")
    assert on_postgres.versions() == ["1.0.0"]
    forbid("off")
    on_postgres.assert_well()


@pytest.mark.long
def test_a_statement_that_waits_for_a_lock_too_long_is_a_503(on_postgres: Registry, own_postgres: Postgres) -> None:
    held = opened(on_postgres.environ)
    with held.write() as session:
        session.execute(text("LOCK TABLE channels IN ACCESS EXCLUSIVE MODE"))
        started = time.monotonic()
        answer = httpx2.get(f"{on_postgres.url}{CHANNEL}", timeout=60)
        assert_refused(answer, "show", "database_unavailable")
        assert time.monotonic() - started < 5
    held.close()
    assert httpx2.get(f"{on_postgres.url}{CHANNEL}").json()["version"] == "1.0.0"


def test_a_sqlite_database_that_another_process_keeps_locked_is_a_503_and_read_meanwhile(tmp_path: Path) -> None:
    with running({"ADAPTORY_HOME": str(tmp_path / "home"), **PATIENCE}, tmp_path) as registry:
        other = sqlite3.connect(tmp_path / "home" / "registry.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            asked = [
                pool.submit(httpx2.put, f"{registry.url}{CHANNEL}", json={"version": "1.0.0"}, timeout=60)
                for _ in range(8)
            ]
            assert registry.versions() == ["1.0.0"], "readers do not wait for writers"
            for answer in asked:
                assert_refused(answer.result(), "promote", "database_unavailable", "database_busy")
        assert time.monotonic() - started < 10
        other.execute("ROLLBACK")
        other.close()
        registry.assert_well()


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Disk]:
    small = Disk(tmp_path / "disk")
    try:
        small.mount()
    except subprocess.CalledProcessError:  # not root, or in a container that may not
        hint = "root with the right to mount a tmpfs"
        services.add_missing({"a full disk": hint})
        pytest.skip(f"a small disk needs {hint}")
    yield small
    small.unmount()


def send_a_megabyte(url: str, seed: int) -> httpx2.Response:
    content = random.Random(seed).randbytes(1 << 20)
    row = {"path": "notes.txt", "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    planned = httpx2.post(f"{url}/v1/uploads", json={"namespace": "acme", "files": [row]})
    if planned.status_code != 200:
        return planned
    return httpx2.put(f"{url}{planned.json()['files'][0]['put']['url']}", content=content)


@pytest.mark.long
def test_a_full_blob_store_is_a_503_and_is_used_again_when_there_is_space(disk: Disk, tmp_path: Path) -> None:
    store = {"ADAPTORY_STORAGE__KIND": "local", "ADAPTORY_STORAGE__DIRECTORY": str(disk.directory / "store")}
    with running({"ADAPTORY_HOME": str(tmp_path / "home"), **store, **PATIENCE}, tmp_path) as registry:
        disk.fill()
        for seed in range(3):
            assert_refused(send_a_megabyte(registry.url, seed), "upload", "store_full")
        with pytest.raises(Unavailable, match="No space left"):
            registry.push("1.1.0", 11)
        assert registry.versions() == ["1.0.0"]
        assert registry.pull("1.0.0"), "reading needs no space"
        assert broken_promises(registry.environ, read_bytes=True) == []
        assert list((disk.directory / "store" / "incoming").iterdir()) == []
        disk.free()
        assert send_a_megabyte(registry.url, 0).status_code == 201
        registry.assert_well()


def test_a_full_disk_under_the_database_is_a_503_and_is_used_again_when_there_is_space(
    disk: Disk, tmp_path: Path
) -> None:
    home = disk.directory / "home"
    with running({"ADAPTORY_HOME": str(home), **PATIENCE}, tmp_path) as registry:
        registry.push("1.1.0", 11)
        disk.fill()
        for accepted in range(1, 500):  # its journal may have some space left
            move = {"version": f"1.{accepted % 2}.0", "reason": "x" * 500}
            answer = httpx2.put(f"{registry.url}{CHANNEL}", json=move)
            if answer.status_code == 503:
                break
        assert_refused(answer, "promote", "database_unavailable")
        assert_refused(send_a_megabyte(registry.url, 1), "upload", "database_unavailable", "store_full", "disk_error")
        history = httpx2.get(f"{registry.url}{CHANNEL}/history", params={"limit": 500}).json()["items"]
        assert len(history) == accepted, "what was answered with 503 was not done"
        disk.free()
        assert broken_promises(registry.environ) == []
        registry.assert_well()


@pytest.fixture
def on_s3(own_s3: S3Server, tmp_path: Path) -> Generator[Registry]:
    environ = {"ADAPTORY_HOME": str(tmp_path / "home"), **own_s3.environment(f"{tmp_path.name}/"), **IMPATIENT_STORE}
    with running(environ, tmp_path) as registry:
        yield registry


@pytest.mark.long
def test_a_store_that_goes_away_between_upload_and_publication_leaves_no_release(
    on_s3: Registry, own_s3: S3Server
) -> None:
    api = Api(on_s3.url)
    files = adapter_files(on_s3.directory / "1.1.0", 11)
    send(api, "acme", files, lambda _count: None)
    own_s3.stop(kill=True)
    rows = [{"path": f.manifest.path, "size_bytes": f.manifest.size_bytes, "sha256": f.manifest.sha256} for f in files]
    body = {"version": "1.1.0", "base": "tiny", "files": rows}
    assert_refused(httpx2.post(f"{on_s3.url}{line_path(NAME)}/releases", json=body), "publish", "store_unavailable")
    assert_refused(httpx2.get(f"{on_s3.url}/readyz"), "readyz", "store_unavailable")
    assert httpx2.get(f"{on_s3.url}/healthz").status_code == 200
    assert on_s3.versions() == ["1.0.0"]
    waiting = on_s3.watch(on_s3.plan("acme/sql:1.0.0"), lambda made: made["error"] is not None)
    assert (waiting["state"], waiting["error"]["code"]) == ("queued", "store_unavailable")
    for command in ("gc", "fsck"):
        ran = Cli(dict(on_s3.environ))(command)
        assert (ran.code, "store" in ran.err) == (7, True), ran.err
    own_s3.start()
    on_s3.assert_well()
    assert on_s3.watch(waiting, has_ended)["state"] == "done", "the worker tries again by itself"


class _DiesOfADelete(S3Store):
    """A store whose server crashes when it receives a delete."""

    server: S3Server

    def delete(self, sha256: Digest) -> None:
        self.server.stop(kill=True)
        super().delete(sha256)


@pytest.mark.long
def test_a_collection_whose_store_goes_away_is_finished_by_the_next_one(on_s3: Registry, own_s3: S3Server) -> None:
    api = Api(on_s3.url)
    unused = adapter_files(on_s3.directory / "unused", 12)
    send(api, "acme", unused, lambda _count: None)
    held = opened(on_s3.environ)
    assert isinstance(held.settings.storage, S3Storage)
    with environment(on_s3.environ, []):  # which has the credentials
        dying = _DiesOfADelete(held.settings.storage)
    dying.server = own_s3
    later = replace(held, clock=lambda: datetime.now(UTC) + timedelta(days=2))
    with pytest.raises(Unavailable):
        collect.collect(replace(later, store=dying), grace=timedelta(0))
    own_s3.start()
    assert broken_promises(on_s3.environ, read_bytes=True) == []
    output = Cli(dict(on_s3.environ)).ok("fsck").out
    assert "being removed" in output
    with pytest.raises(Unavailable) as leaving:
        send(api, "acme", unused, lambda _count: None)
    assert leaving.value.code == "blob_leaving"
    assert collect.collect(later, grace=timedelta(0)).blobs == 1  # the other file of the adapter is a release's too
    held.close()
    assert "being removed" not in Cli(dict(on_s3.environ)).ok("fsck").out
    send(api, "acme", unused, lambda _count: None)
    on_s3.assert_well()
