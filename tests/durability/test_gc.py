"""Unreferenced data is removed after the grace period and not before; referenced data is never removed."""

import hashlib
import random
import threading
import time
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import func, select, update

from registry.client.api import Api, line_path
from registry.client.push import PushedFile, collect, push, send
from registry.client.selection import select_files
from registry.database.locks import exclusive_collection
from registry.database.tables import Blob, Upload
from registry.domain.access.audit import Act, EventQuery, list_oldest_first
from registry.errors import Conflict
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.transfer import fsck
from registry.transfer.collect import Collected
from registry.transfer.collect import collect as collect_garbage
from registry.transfer.resources import Resources
from registry.transfer.sealing import seal_all
from registry.wire.transfer import PutOut
from tests import services
from tests.durability.conftest import broken_promises, opened
from tests.durability.processes import NAME, collect_forever, kill, serve, wait_for_port
from tests.durability.small import adapter_files
from tests.forked import start
from tests.scenarios.world import SMALL_PARTS, Cli

DAY = timedelta(days=1)
NONE = timedelta(0)


@pytest.fixture
def url(environ: dict[str, str]) -> Generator[str]:
    port = services.free_port()
    server = start(
        serve,
        environ | SMALL_PARTS if "AWS_ACCESS_KEY_ID" in environ else environ,
        port,
    )
    wait_for_port(port)
    yield f"http://127.0.0.1:{port}"
    kill(server)


@pytest.fixture
def api(url: str) -> Generator[Api]:
    opened_api = Api(url)
    yield opened_api
    opened_api.close()


@pytest.fixture
def held(environ: dict[str, str]) -> Generator[Resources]:
    resources = opened(environ)
    yield resources
    resources.close()


def after(held: Resources, wait: timedelta) -> Resources:
    """The same registry, so much later."""
    return replace(held, clock=lambda: datetime.now(UTC) + wait)


def notes(directory: Path, seed: int, size_bytes: int = 1_000) -> list[PushedFile]:
    """A file whose bytes no other file has."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "notes.txt").write_bytes(random.Random(seed).randbytes(size_bytes))
    return collect(select_files(directory, "model"))


def digests(held: Resources) -> set[str]:
    """The blobs in the rows, which must equal those in the store."""
    with held.read() as session:
        rows = set(session.scalars(select(Blob.sha256)))
    assert rows == {stat.sha256 for stat in held.store.iterate()}
    return rows


def release(api: Api, directory: Path, version: str, seed: int) -> set[str]:
    files = adapter_files(directory / version, seed)
    push(api, files, NAME, "adapter", {"version": version, "base": "tiny"}, lambda _count: None)
    return {file.manifest.sha256 for file in files}


def test_an_unused_blob_goes_after_the_grace_and_not_before_and_a_release_keeps_its_own(
    api: Api, held: Resources, tmp_path: Path
) -> None:
    kept = release(api, tmp_path, "1.0.0", 1)
    unused = notes(tmp_path / "unused", 2)
    send(api, "acme", unused, lambda _count: None)
    everything = kept | {unused[0].manifest.sha256}
    assert digests(held) == everything
    assert collect_garbage(held, grace=NONE).blobs == 0, "its upload is still waited for"
    assert collect_garbage(after(held, 1.5 * DAY), grace=2 * DAY).blobs == 0
    assert digests(held) == everything
    removed = collect_garbage(after(held, 2.5 * DAY), grace=2 * DAY)
    assert (removed.blobs, removed.size_bytes) == (1, 1_000)
    assert digests(held) == kept
    with held.read() as session:
        (event,) = list_oldest_first(session, EventQuery(act=Act.BLOB_COLLECT))
    assert (event.subject, event.namespace, event.before) == (unused[0].manifest.sha256, None, {"size_bytes": 1_000})
    assert collect_garbage(after(held, 3650 * DAY), grace=NONE).blobs == 0, "what a release names never goes"
    assert fsck.check(held, read_bytes=True) == []
    send(api, "acme", unused, lambda _count: None)
    assert digests(held) == everything, "and it can come again"


@pytest.mark.on("PostgreSQL")
def test_an_upload_that_expires_before_its_bytes_come_is_in_its_namespaces_audit_and_one_that_came_is_not(
    api: Api, held: Resources, tmp_path: Path
) -> None:
    send(api, "acme", notes(tmp_path / "sent", 2), lambda _count: None)
    sha256 = notes(tmp_path / "announced", 3)[0].manifest.sha256
    body = {"namespace": "acme", "files": [{"path": "notes.txt", "size_bytes": 1_000, "sha256": sha256}]}
    api.post("/v1/uploads", body)
    asked = EventQuery(namespace="acme", act=Act.UPLOAD_EXPIRE)
    collect_garbage(held, grace=NONE)
    with held.read() as session:
        assert list_oldest_first(session, asked) == [], "it is still waited for"
    for _ in range(2):
        collect_garbage(after(held, 2 * DAY), grace=NONE)
    with held.read() as session:
        (event,) = list_oldest_first(session, asked)
    gone = {"size_bytes": 1_000, "created_by": "mia"}
    assert (event.subject, event.namespace, event.actor, event.before) == (sha256, "acme", "mia", gone)


def test_a_yanked_release_keeps_its_blobs(api: Api, held: Resources, tmp_path: Path) -> None:
    kept = release(api, tmp_path, "1.0.0", 1)
    api.post(f"{line_path(NAME)}/releases/1.0.0/yank", {"reason": "wrong data"})
    assert collect_garbage(after(held, 30 * DAY), grace=NONE) == Collected()
    assert digests(held) == kept


@pytest.mark.on("PostgreSQL")
def test_a_dry_run_counts_what_would_go_and_removes_nothing(api: Api, held: Resources, tmp_path: Path) -> None:
    send(api, "acme", notes(tmp_path / "unused", 2), lambda _count: None)
    orphan(held, tmp_path, b"left by a crash")
    later = after(held, 2 * DAY)
    before = {stat.sha256 for stat in held.store.iterate()}
    planned = collect_garbage(later, grace=NONE, dry_run=True)
    assert {stat.sha256 for stat in held.store.iterate()} == before
    done = collect_garbage(later, grace=NONE)
    assert (planned.blobs, planned.size_bytes) == (done.blobs, done.size_bytes) == (2, 1_015)
    assert digests(held) == set()


def orphan(held: Resources, directory: Path, content: bytes) -> Digest:
    """Bytes in the store without a row, as a crash between the two leaves them."""
    path = directory / "orphan"
    path.write_bytes(content)
    sha256 = collect_one(path).sha256
    held.store.put(sha256, path)
    return sha256


def collect_one(path: Path) -> ManifestFile:
    alone = path.parent / f"{path.name}-alone"
    alone.mkdir(exist_ok=True)
    (alone / path.name).write_bytes(path.read_bytes())
    return collect(select_files(alone, "model"))[0].manifest


@pytest.mark.on("PostgreSQL")
def test_bytes_without_a_row_are_reported_by_fsck_and_go_after_the_grace(
    environ: dict[str, str], held: Resources, tmp_path: Path
) -> None:
    sha256 = orphan(held, tmp_path, b"left by a crash")
    (finding,) = fsck.check(held)
    assert (finding.code, finding.severity) == ("orphans", "notice")
    assert collect_garbage(held, grace=DAY).blobs == 0
    assert held.store.stat(sha256) is not None
    assert collect_garbage(after(held, 2 * DAY), grace=DAY).blobs == 1
    assert held.store.stat(sha256) is None
    assert broken_promises(environ) == []


@pytest.mark.on("PostgreSQL")
def test_bytes_that_are_announced_wait_for_that_and_fsck_and_a_dry_run_say_so(
    api: Api, held: Resources, tmp_path: Path
) -> None:
    """As after a restore: the database is from a time when they were being sent, the store from a later time."""
    sha256 = orphan(held, tmp_path, b"on its way then")
    orphan(held, tmp_path, b"left by a crash")
    row = {"path": "notes.txt", "size_bytes": 15, "sha256": sha256}
    api.post("/v1/uploads", {"namespace": "acme", "files": [row]})
    with held.read() as session:
        until = session.scalars(select(Upload.expires_at)).one()
    seal_all(held)
    (finding,) = fsck.check(held)
    assert "2 blobs (30 bytes)" in finding.message
    assert f"the 1 that uploads have announced not before {until:%Y-%m-%d %H:%M} UTC" in finding.message
    soon = after(held, timedelta(hours=1))
    assert collect_garbage(soon, grace=NONE, dry_run=True).blobs == 1
    assert collect_garbage(soon, grace=NONE).blobs == 1
    assert held.store.stat(sha256) is not None
    seal_all(held)
    later = after(held, 1.5 * DAY)
    (finding,) = fsck.check(later)
    assert "announced" not in finding.message
    assert collect_garbage(later, grace=NONE).blobs == 1
    assert fsck.check(held) == []


@pytest.mark.on("PostgreSQL")
def test_pushes_arrive_whole_while_a_collection_without_any_grace_runs(
    environ: dict[str, str], url: str, api: Api, tmp_path: Path
) -> None:
    release(api, tmp_path, "0.1.0", 1)  # or the first of them would race for the namespace
    collectors = [start(collect_forever, environ) for _ in range(2)]
    pushes = 6

    def push_some(worker: int) -> None:
        mine = Api(url)
        for number in range(pushes):
            files = adapter_files(tmp_path / f"{worker}-{number}", 100 * worker + number)
            request = {"version": f"{worker}.{number}.0", "base": "tiny"}
            push(mine, files, NAME, "adapter", request, lambda _count: None)
        mine.close()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(push_some, worker) for worker in (1, 2)]:
            done.result()
    for collector in collectors:
        kill(collector)
    assert len(list(api.pages(f"{line_path(NAME)}/releases"))) == 1 + 2 * pushes
    assert broken_promises(environ, read_bytes=True) == []


def test_a_blob_that_a_dead_run_was_removing_cannot_be_relied_on_until_the_next_run_has_finished(
    environ: dict[str, str], api: Api, held: Resources, tmp_path: Path
) -> None:
    files = notes(tmp_path / "unused", 2)
    sha256 = files[0].manifest.sha256
    send(api, "acme", files, lambda _count: None)
    with held.write() as session:
        session.execute(update(Blob).values(removing_at=datetime.now(UTC), removing_by="dead"))
    body = {"namespace": "acme", "files": [{"path": "notes.txt", "size_bytes": 1_000, "sha256": sha256}]}
    refused = httpx2.post(f"{api.url}/v1/uploads", json=body)
    assert (refused.status_code, refused.json()["code"]) == (503, "blob_leaving")
    assert int(refused.headers["Retry-After"]) > 0
    assert "adaptory gc" in refused.json()["next"]
    assert "adaptory gc` finishes that" in Cli(environ).ok("fsck").out
    with exclusive_collection(held.database), pytest.raises(Conflict, match="Another collection"):
        collect_garbage(held, grace=DAY)  # the run may be at work still
    assert collect_garbage(held, grace=DAY).blobs == 1
    assert digests(held) == set()
    send(api, "acme", files, lambda _count: None)
    assert digests(held) == {sha256}


def test_several_collections_at_once_remove_everything_once(api: Api, held: Resources, tmp_path: Path) -> None:
    for number in range(12):
        send(api, "acme", notes(tmp_path / str(number), number), lambda _count: None)
    later = after(held, 2 * DAY)
    together = threading.Barrier(4)

    def run(_number: int) -> int:
        together.wait()
        try:
            return collect_garbage(later, grace=timedelta(hours=1)).blobs
        except Conflict:
            return 0

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(run, range(4)))
    assert sum(counts) == 12, counts
    assert digests(held) == set()


@pytest.mark.parametrize("pairing", ["PostgreSQL and S3"], indirect=True)
def test_an_upload_in_parts_that_nobody_goes_on_with_leaves_nothing(
    environ: dict[str, str], api: Api, held: Resources, tmp_path: Path
) -> None:
    (file,) = notes(tmp_path / "large", 3, size_bytes=12 << 20)
    row = {"path": "notes.txt", "size_bytes": file.manifest.size_bytes, "sha256": file.manifest.sha256}
    (planned,) = api.post("/v1/uploads", {"namespace": "acme", "files": [row]})["files"]
    first = file.source.read_bytes()[: planned["parts"][0]["size_bytes"]]
    part = f"/v1/uploads/{planned['upload']}/parts/1"
    api.send(api.post(part, {"sha256": hashlib.sha256(first).hexdigest()}, PutOut), [first])
    assert unfinished(environ) == 1
    assert collect_garbage(held, grace=NONE).unfinished == 0, "it may go on"
    assert unfinished(environ) == 1
    assert collect_garbage(after(held, 2 * DAY), grace=NONE) == Collected(unfinished=1, leftovers=1)
    assert unfinished(environ) == 0
    with held.read() as session:
        assert session.scalar(select(func.count()).select_from(Upload)) == 0
    send(api, "acme", [file], lambda _count: None)
    assert digests(held) == {file.manifest.sha256}


def unfinished(environ: Mapping[str, str]) -> int:
    client = services.shared_s3().client()
    listed = client.list_multipart_uploads(
        Bucket=environ["ADAPTORY_STORAGE__BUCKET"], Prefix=environ["ADAPTORY_STORAGE__PREFIX"]
    )
    return len(listed.get("Uploads", ()))


def test_scratch_files_of_processes_that_died_go_and_those_of_the_living_stay(held: Resources) -> None:
    left = held.work_directory / "upload-dead"
    left.mkdir()
    (left / "blob").write_bytes(b"half of it")
    assert collect_garbage(held, grace=NONE).leftovers == 0
    assert left.exists()
    assert collect_garbage(after(held, 2 * DAY), grace=NONE) == Collected(leftovers=1)
    assert not left.exists()


@pytest.mark.parametrize("command", ["gc", "fsck", "migrate", "serve", "worker"])
def test_running_a_registry_needs_the_registry_itself_and_not_its_address(tmp_path: Path, command: str) -> None:
    refused = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": "http://127.0.0.1:1"})(command)
    assert refused.code == 2
    assert "ADAPTORY_URL" in refused.err
    assert not (tmp_path / "home").exists()


def test_the_command_tells_what_it_removed(environ: dict[str, str], api: Api, tmp_path: Path) -> None:
    send(api, "acme", notes(tmp_path / "unused", 2), lambda _count: None)
    shortly = Cli(environ | {"ADAPTORY_UPLOAD_EXPIRES_S": "1"})
    planned = shortly.json("gc", "--grace-hours", "0", "--dry-run")
    assert planned == {
        "releases": 0,
        "loaded": 0,
        "jobs": 0,
        "commits": 0,
        "blobs": 0,
        "size_bytes": 0,
        "unfinished": 0,
        "leftovers": 0,
        "dry_run": True,
    }
    resources = opened(environ)
    with resources.write() as session:
        session.execute(update(Upload).values(expires_at=datetime.now(UTC)))
    resources.close()
    time.sleep(0.01)
    assert shortly.json("gc", "--grace-hours", "0") == {
        "releases": 0,
        "loaded": 0,
        "jobs": 0,
        "commits": 0,
        "blobs": 1,
        "size_bytes": 1_000,
        "unfinished": 0,
        "leftovers": 0,
        "dry_run": False,
    }


@pytest.mark.on("PostgreSQL")
def test_uploads_that_expired_are_counted_however_many_there_are_and_each_is_audited(
    environ: dict[str, str], api: Api, held: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.transfer.collect._UPLOADS_BATCH", 3)
    rows = [{"path": f"{n}.txt", "size_bytes": 1, "sha256": f"{n:064x}"} for n in range(7)]
    api.post("/v1/uploads", {"namespace": "acme", "files": rows})
    later = after(held, 2 * DAY)
    assert collect_garbage(held, grace=NONE, dry_run=True) == Collected()
    assert collect_garbage(later, grace=NONE, dry_run=True) == Collected(unfinished=7)
    assert collect_garbage(later, grace=NONE) == Collected(unfinished=7)
    assert collect_garbage(later, grace=NONE) == Collected()
    events = Cli(environ).json("audit", "--act", "upload:expire")["items"]
    assert sorted(event["subject"] for event in events) == [row["sha256"] for row in rows]
