"""A store that hangs, dies and returns: 503 in time, no partial changes, no restart needed."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.api.http.threads import STORE_THREADS
from registry.client import retries
from registry.client.push import collect, push, send
from registry.client.selection import select_files
from registry.domain.jobs.queue import MAX_ATTEMPTS, PAUSES
from registry.formats.references import parse_repository
from registry.transfer.resources import Resources
from registry.worker.runner import run_one
from tests import services
from tests.doses import further
from tests.elapsed import let_elapse
from tests.eventually import eventually
from tests.s3_server import S3Server
from tests.scenarios.conftest import USER, serving, stock
from tests.scenarios.test_crashes import STEPS, begin, team, watched
from tests.scenarios.traces import api_of, opened, parts_in, s3_of, traces
from tests.scenarios.world import SMALL_PARTS, Cli, World, environment, nothing, server

PATIENCE = {
    "ADAPTORY_STORAGE__CONNECT_TIMEOUT_S": "1",
    "ADAPTORY_STORAGE__READ_TIMEOUT_S": "1",
    "ADAPTORY_STORAGE__ATTEMPTS": "2",
}


def environ(own_s3: S3Server, tmp_path: Path) -> dict[str, str]:
    """A new database, and a prefix of a store that these tests make unavailable."""
    return own_s3.environment(f"{tmp_path.name}/") | {"ADAPTORY_DATABASE_URL": services.new_database(migrated=True)}


@pytest.fixture
def registry(own_s3: S3Server, world: World, tmp_path: Path) -> Generator[Cli]:
    with serving(environ(own_s3, tmp_path) | PATIENCE | SMALL_PARTS, tmp_path) as cli:
        stock(cli, world)
        cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
        yield cli


def hang(s3: S3Server) -> Callable[[], None]:
    s3.freeze()
    return s3.thaw


def crash(s3: S3Server) -> Callable[[], None]:
    port = s3.port
    s3.stop(kill=True)

    def start_again() -> None:
        s3.start()
        assert s3.port == port

    return start_again


@pytest.mark.parametrize("harm", [crash, *further(hang)])
def test_a_store_that_is_away_is_a_503_in_time_and_is_used_again_when_it_is_back(
    registry: Cli,
    own_s3: S3Server,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[S3Server], Callable[[], None]],
) -> None:
    monkeypatch.setattr(retries, "PAUSES_S", (0.1,))
    cli, url = registry, registry.environment["ADAPTORY_URL"]
    files = cli.json("show", "acme/sql")["files"]
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    (adapter / "vocab.txt").write_bytes(os.urandom(100_000))
    new: dict[str, Any] = {"version": "1.1.0", "base": "tiny", "files": files}
    path = f"{url}/v1/adapters/acme/sql/releases"
    release = ("push", adapter, "acme/sql:1.2.0", "--base", "tiny")
    before = traces(cli)

    heal = harm(own_s3)
    try:
        for method, route, body in (
            ("GET", f"{path}/1.0.0/files/{files[0]['path']}", None),
            ("POST", path, new),
            ("POST", f"{url}/v1/uploads", {"namespace": "acme", "files": files}),
        ):
            started = time.monotonic()
            answer = httpx2.request(method, route, json=body, timeout=60)
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable"), route
            assert int(answer.headers["Retry-After"]) > 0
            assert time.monotonic() - started < 10, route
        assert httpx2.get(f"{path}/1.0.0").status_code == 200, "what needs no bytes goes on"
        for command in (release, ("pull", "acme/sql", "-o", tmp_path / "out")):
            refused = cli(*command)
            assert refused.code == 7, refused.err
            assert "Traceback" not in refused.err
    finally:
        heal()

    after = traces(cli)
    assert (after.releases, after.work, after.blobs) == (before.releases, frozenset(), before.blobs)
    cli.ok(*release)
    cli.ok("pull", "acme/sql:1.2.0", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (adapter / "vocab.txt").read_bytes()


def refuse_no_facts(cli: Cli) -> None:
    """Asserts that the release's page, `show` and the hub's `model_info` show the facts in the database."""
    url, shown = cli.environment["ADAPTORY_URL"], cli.json("show", "acme/carded:1.0.0")
    started = time.monotonic()
    page = httpx2.get(f"{url}/acme/carded/1.0.0", timeout=60)
    assert (page.status_code, "The card cannot be shown now" in page.text) == (200, True)
    assert shown["commit"][:12] in page.text
    info = httpx2.get(f"{url}/api/models/acme/carded", params={"blobs": "true"}, timeout=60)
    assert (info.status_code, info.json()["sha"]) == (200, shown["commit"])
    assert shown["base"]["name"] in cli.ok("show", "acme/carded:1.0.0").out
    assert time.monotonic() - started < 5


def carded(cli: Cli, adapter: Path, directory: Path) -> Path:
    """Pushes acme/carded:1.0.0, whose card has not been rendered yet. Returns the card."""
    (shutil.copytree(adapter, directory) / "README.md").write_text("What it is trained for")
    cli.ok("push", directory, "acme/carded:1.0.0", "--base", "tiny")
    return directory / "README.md"


@pytest.mark.long
def test_a_release_is_shown_while_the_store_is_away(
    registry: Cli, own_s3: S3Server, world: World, tmp_path: Path
) -> None:
    carded(registry, world.adapters["sql"], tmp_path / "carded")
    heal = hang(own_s3)
    try:
        for _ in range(6):  # more than the threads that read cards
            refuse_no_facts(registry)
    finally:
        heal()
    page = f"{registry.environment['ADAPTORY_URL']}/acme/carded/1.0.0"
    eventually(lambda: "What it is trained for" in httpx2.get(page, timeout=60).text, every_s=0.2)


def test_a_release_is_shown_although_the_bytes_of_its_card_are_lost(world: World, tmp_path: Path) -> None:
    with serving({}, tmp_path) as cli:
        stock(cli, world)
        readme = carded(cli, world.adapters["sql"], tmp_path / "carded")
        digest = hashlib.sha256(readme.read_bytes()).hexdigest()
        (blob,) = (path for path in (tmp_path / "server").rglob(f"*{digest[4:]}") if path.is_file())
        blob.unlink()
        refuse_no_facts(cli)


@pytest.mark.parametrize("clients", [STORE_THREADS + 8, *further(100)])
def test_many_downloads_from_a_store_that_hangs_do_not_hold_up_resolving_and_searching(
    registry: Cli, own_s3: S3Server, clients: int
) -> None:
    url = registry.environment["ADAPTORY_URL"]
    (file, *_) = registry.json("show", "acme/sql")["files"]
    download = f"{url}/v1/adapters/acme/sql/releases/1.0.0/files/{file['path']}"
    with ThreadPoolExecutor(clients) as pool:
        heal = hang(own_s3)
        try:
            downloads = [pool.submit(httpx2.get, download, timeout=60) for _ in range(clients)]
            while not any(download.done() for download in downloads):
                time.sleep(0.01)
            for path in ("/v1/resolve?ref=acme/sql:1.0.0", "/v1/releases?namespace=acme"):
                started = time.monotonic()
                assert httpx2.get(f"{url}{path}", timeout=60).status_code == 200, path
                assert time.monotonic() - started < 3, "or it has waited for one of those that hang"
            answers = [download.result() for download in downloads]
        finally:
            heal()
    assert {answer.status_code for answer in answers} == {503}
    codes = {answer.json()["code"] for answer in answers}
    assert {"store_unavailable"} <= codes <= {"store_busy", "store_unavailable"}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers)
    # The server itself has its requests to forget first.
    eventually(lambda: httpx2.get(download, timeout=60).status_code == 307, every_s=0.2)


@pytest.mark.long  # a further moment of the next one
def test_a_store_that_crashes_in_the_middle_of_a_push_is_waited_for(
    registry: Cli, own_s3: S3Server, world: World, tmp_path: Path
) -> None:
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    (adapter / "vocab.txt").write_bytes(os.urandom(80 << 20))
    command = [sys.executable, "-m", "registry.cli.start", "push", str(adapter), "acme/sql:1.1.0", "--base", "tiny"]
    with environment(registry.environment, []):
        pushing = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while parts_in(registry) < 3:
        assert pushing.poll() is None, "it crashed too late to mean anything"
        time.sleep(0.01)
    crash(own_s3)()
    _, err = pushing.communicate(timeout=120)
    assert pushing.returncode == 0, err
    registry.ok("pull", "acme/sql:1.1.0", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (adapter / "vocab.txt").read_bytes()
    assert traces(registry).work == frozenset()


@pytest.mark.parametrize("sent", [False, *further(True)], ids=["before its first byte", "before it is published"])
def test_a_push_waits_for_its_store_whenever_that_goes_away(
    registry: Cli, own_s3: S3Server, world: World, tmp_path: Path, sent: bool
) -> None:
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    (adapter / "vocab.txt").write_bytes(os.urandom(1000))
    files, name = collect(select_files(adapter)), parse_repository("acme/sql")
    with api_of(registry) as api, ThreadPoolExecutor(1) as pool:
        if sent:
            send(api, "acme", files, nothing)
        heal = crash(own_s3)
        pushed = pool.submit(push, api, files, name, "adapter", {"version": "1.1.0", "base": "tiny"}, nothing)
        time.sleep(1)
        waited = not pushed.done()
        heal()
        published, _ = pushed.result(timeout=60)
        assert published.created
    assert waited


@dataclass(frozen=True)
class Workshop:
    """A waiting composition in a registry whose only worker is the test; `resources` are the worker's."""

    cli: Cli
    resources: Resources

    def run(self, later: timedelta = timedelta(0), **changes: Any) -> tuple[bool, list[str]]:
        """Whether there was a job, this much later, and which of its steps finished."""
        seen: list[str] = []
        let_elapse(self.resources, later)
        held = replace(self.resources, **changes)
        return run_one(held, watched(seen), "worker"), seen

    @property
    def job(self) -> dict[str, Any]:
        return self.cli.json("jobs", 1)


@pytest.fixture
def workshop(own_s3: S3Server, world: World, tmp_path: Path) -> Generator[Workshop]:
    given = environ(own_s3, tmp_path) | PATIENCE
    cli = stock(Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": USER, **given}), world)
    begin(team(cli, world), tmp_path)
    resources = opened(cli)
    yield Workshop(cli, resources)
    resources.close()


@dataclass
class HarmedStore:
    """The real store, whose server is harmed when the first shard of the model is written."""

    store: Any
    harm: Callable[[], Callable[[], None]]
    heal: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def begin_write(self, size_bytes: int) -> Any:
        if self.heal is None and size_bytes > _OF_ADAPTER_BYTES:
            self.heal = self.harm()
        return self.store.begin_write(size_bytes)


_OF_ADAPTER_BYTES = 15_000
"""The files of the adapter are smaller, and shards are larger."""


SOON = timedelta(seconds=1)


@pytest.mark.long
@pytest.mark.parametrize("harm", [crash, hang])
def test_a_composition_whose_store_goes_away_as_it_merges_is_published_when_it_is_back(
    workshop: Workshop, own_s3: S3Server, harm: Callable[[S3Server], Callable[[], None]]
) -> None:
    away = HarmedStore(workshop.resources.store, lambda: harm(own_s3))
    assert workshop.run(store=away) == (True, STEPS[:-2])
    job = workshop.job
    assert (job["state"], job["error"]["code"], job["finished_at"]) == ("queued", "store_unavailable", None)
    assert workshop.run() == (False, []), "it is not tried without a pause"
    assert away.heal is not None
    away.heal()
    assert not {"acme/both:1.0.0", "acme/merged:1.0.0"} & set(traces(workshop.cli).releases)
    assert workshop.run(PAUSES[0] + SOON) == (True, STEPS[-2:])
    assert (workshop.job["state"], workshop.job["error"]) == ("done", None)
    after = traces(workshop.cli)
    assert set(after.releases) >= {"acme/both:1.0.0", "acme/merged:1.0.0"}
    assert after.work == frozenset()


@pytest.mark.long
def test_a_store_that_stays_away_ends_the_job_after_its_last_attempt(workshop: Workshop, own_s3: S3Server) -> None:
    heal, rest = crash(own_s3), timedelta(seconds=12)  # more than a slow machine needs between two runs
    assert workshop.run() == (True, [])
    for pause in PAUSES:
        assert workshop.job["state"] == "queued"
        assert workshop.run(pause - rest) == (False, []), "each pause is kept, and the second is longer"
        assert workshop.run(rest + SOON) == (True, [])
    assert len(PAUSES) == MAX_ATTEMPTS - 1
    job = workshop.job
    assert (job["state"], job["error"]["code"], job["error"]["exit_code"]) == ("failed", "store_unavailable", 7)
    heal()
    assert traces(workshop.cli).work == frozenset()


@pytest.mark.long
def test_a_job_that_waits_for_its_store_is_cancelled_and_leaves_nothing(workshop: Workshop, own_s3: S3Server) -> None:
    away = HarmedStore(workshop.resources.store, lambda: crash(own_s3))
    assert workshop.run(store=away) == (True, STEPS[:-2])
    workshop.cli.ok("cancel", 1)
    assert workshop.run() == (True, []), "no pause keeps a worker from tidying up"
    assert workshop.job["state"] == "cancelled"
    assert away.heal is not None
    away.heal()
    assert traces(workshop.cli).work == frozenset()


@pytest.mark.long
def test_a_base_that_is_on_another_host_is_no_outage(workshop: Workshop, world: World, tmp_path: Path) -> None:
    moved = world.base.rename(tmp_path / "moved")
    try:
        assert workshop.run() == (True, STEPS[:2])
    finally:
        moved.rename(world.base)
    assert (workshop.job["state"], workshop.job["error"]["code"]) == ("failed", "base_not_here")


@pytest.mark.long
@pytest.mark.parametrize("files", [2, 4])
def test_the_registry_grows_by_nothing_while_weights_go_by_it(
    own_s3: S3Server, world: World, tmp_path: Path, files: int
) -> None:
    given = environ(own_s3, tmp_path) | {"ADAPTORY_USER": USER}
    with server(tmp_path / "server", **given) as (url, process):
        cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": url}, served_with=given)
        stock(cli, world)
        adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
        cli.ok("push", adapter, "acme/sql:1.0.0", "--base", "tiny")
        cli.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "small")
        memory = Path(f"/proc/{process.pid}/status")
        before = peak_bytes(memory)
        for number in range(files):
            (adapter / f"data-{number}").write_bytes(os.urandom(25_000_000))
        cli.ok("push", adapter, "acme/sql:1.1.0", "--base", "tiny", "--include", "data-*")
        cli.ok("pull", "acme/sql:1.1.0", "-o", tmp_path / "large")
        assert peak_bytes(memory) - before < 20_000_000
        written = sum(path.stat().st_size for path in (tmp_path / "server").rglob("*") if path.is_file())
        assert written < 20_000_000, "nor does its disk"
        client, bucket, prefix = s3_of(cli)
        stored = client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
        assert sum(row["Size"] for row in stored) > files * 25_000_000


def peak_bytes(status: Path) -> int:
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
