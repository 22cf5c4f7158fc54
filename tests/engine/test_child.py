"""The process that runs the units of a job on this host: what it has, what it may read, and how it ends."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from registry.environment.settings import EngineSettings, S3Storage, Settings
from registry.errors import Invalid, NotAllowed, Unavailable
from registry.formats.references import Digest
from registry.worker.engine import template
from registry.worker.engine.local import LocalEngine
from registry.worker.engine.protocol import MAX_DEATHS, Needs
from registry.worker.engine.template import launch
from registry.worker.engine.units import HostNode, Result, Task, Unit, open_node
from tests.engine import counted, prying
from tests.eventually import eventually
from tests.s3_server import BUCKET, S3Server

WITHIN_S = 5.0
MARK = "swordfish-of-the-worker"


class Stopped(Exception):
    """What a check raises."""


def go_on(_done: int) -> None:
    """The check of a map that nobody stops."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> HostNode:
    return open_node(Settings(home=tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def shared(node: HostNode) -> Iterator[LocalEngine]:
    engine = LocalEngine(node)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: LocalEngine) -> Iterator[LocalEngine]:
    yield shared
    shared.release()


def run(engine: LocalEngine, task: Task, unit: Unit, check: Callable[[int], None] = go_on) -> Result:
    ((_, result),) = engine.map(task, [unit], Needs(), check)
    return result


def blob(node: HostNode, tmp_path: Path, content: bytes) -> Digest:
    path = tmp_path / "blob"
    path.write_bytes(content)
    return node.store.put(path)


def test_it_has_no_secret_and_no_open_file_of_its_worker(
    node: HostNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "launch", launch)  # as workers start it
    for name in (
        "ADAPTORY_DATABASE_URL", "ADAPTORY_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PGPASSWORD", "SMTP_LOGIN",
    ):  # fmt: skip
        monkeypatch.setenv(name, MARK)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{MARK}@proxy.example")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = LocalEngine(node)
    with (tmp_path / "database").open("w") as file, socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(file.fileno(), True)
        os.set_inheritable(listener.fileno(), True)
        listening = str(Path(f"/proc/self/fd/{listener.fileno()}").readlink())
        seen = run(engine, prying.LOOK, Unit(name="look", content={"at": "own"}))
    engine.close()
    assert MARK not in json.dumps(seen)
    assert seen["environment"]["OMP_NUM_THREADS"] == "1"
    assert not [name for name in seen["environment"] if name.startswith(("ADAPTORY", "AWS"))]
    assert listening not in seen["files"].values()
    assert seen["files"].pop("0") == "/dev/null"
    assert seen["files"].pop("1") == seen["files"].pop("2"), "the worker's stderr"
    assert {name.partition(":")[0] for name in seen["files"].values()} <= {"socket", "anon_inode", "/dev/urandom"}


def test_each_job_has_a_process_of_its_own_and_its_units_share_it(engine: LocalEngine) -> None:
    first, second = (run(engine, prying.LOOK, Unit(name=name, content={"job": name})) for name in ("one", "two"))
    engine.release()
    third = run(engine, prying.LOOK, Unit(name="three", content={"job": "three"}))
    assert first["process"] == second["process"] != third["process"]
    assert first["template"] == third["template"]
    eventually(lambda: not Path(f"/proc/{first['process']}").exists())


def test_it_reads_what_its_units_name_and_nothing_else(engine: LocalEngine, node: HostNode, tmp_path: Path) -> None:
    digest = blob(node, tmp_path, b"of the job")
    named = Unit(name="named", content={"files": [["a", 10, digest]]}, hints={"sha256": digest})
    assert run(engine, prying.READ, named) == {"sha256": digest}
    shared = node.share(json.dumps({"files": [digest]}).encode())
    other = blob(node, tmp_path, b"of another job")
    for hint, content in ((other, {"names": digest}), (other, {"document": shared})):
        with pytest.raises(NotAllowed) as caught:
            run(engine, prying.READ, Unit(name="curious", content=content, hints={"sha256": hint}))
        assert caught.value.code == "not_of_this_job"


def test_a_result_that_names_bytes_of_others_is_refused(engine: LocalEngine, node: HostNode, tmp_path: Path) -> None:
    """They would be published as its own."""
    other = blob(node, tmp_path, b"of another job")
    unit = Unit(name="thief", content={"theft": 1}, hints={"sha256": other, "size_bytes": 14})
    for _ in range(2):  # nothing is kept
        with pytest.raises(NotAllowed, match="its job does not have"):
            run(engine, prying.CLAIM, unit)


def test_what_it_makes_is_stored_by_its_worker_and_progress_is_counted(engine: LocalEngine, node: HostNode) -> None:
    counts = list[int]()
    result = run(engine, prying.MAKE, Unit(name="make", content={"seed": "ab"}), counts.append)
    ((path, size_bytes, sha256),) = result["files"]
    made = b"ab" * (1 << 20)
    assert (path, size_bytes, sha256) == ("made", len(made), hashlib.sha256(made).hexdigest())
    with node.store.open(sha256) as source:
        assert source.read() == made
    assert sum(counts) == 5
    assert run(engine, prying.READ, Unit(name="again", content={}, hints={"sha256": sha256})) == {"sha256": sha256}


def test_it_uses_a_store_in_s3_without_its_credentials(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.credentials.items():
        monkeypatch.setenv(name, value)
    storage = S3Storage(bucket=BUCKET, prefix=f"child/{os.getpid()}/", endpoint_url=s3.endpoint)
    node = open_node(Settings(home=tmp_path, storage=storage))
    engine = LocalEngine(node)
    result = run(engine, prying.MAKE, Unit(name="make", content={"seed": "s3"}))
    ((_, _, sha256),) = result["files"]
    assert run(engine, prying.READ, Unit(name="read", content={}, hints={"sha256": sha256})) == {"sha256": sha256}
    seen = run(engine, prying.LOOK, Unit(name="look", content={}))
    engine.close()
    assert s3.secret_key not in json.dumps(seen)


def ended(pids: list[int]) -> bool:
    """Whether none runs; an orphan that init has not reaped yet does not."""
    return not any(runs(pid) for pid in pids)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stuck(journal: Path) -> list[int]:
    """The processes of a unit that is inside one operation: its own, its template, and one that it started."""
    eventually(journal.exists)
    return [int(word) for word in journal.read_text().split()[:3]]


def test_a_cancelled_job_ends_it_inside_one_long_operation(engine: LocalEngine, node: HostNode, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    began_s: list[float] = []

    def check(_done: int) -> None:
        if journal.exists():
            began_s.append(time.monotonic())
            raise Stopped

    with pytest.raises(Stopped):
        run(engine, prying.STICK, Unit(name="stuck", content={}, hints={"journal": str(journal)}), check)
    child, _, started = stuck(journal)
    assert time.monotonic() - began_s[0] < WITHIN_S
    eventually(lambda: ended([child, started]), within_s=1)
    assert not list(node.work_directory.glob("unit-*"))


def test_a_process_that_has_left_its_group_and_its_parent_ends_with_its_job(
    engine: LocalEngine, tmp_path: Path
) -> None:
    hints = {"journal": str(tmp_path / "orphan")}
    orphan = run(engine, prying.DETACH, Unit(name="detach", content={}, hints=hints))["orphan"]
    assert not ended([orphan])
    engine.release()
    eventually(lambda: ended([orphan]), within_s=WITHIN_S)


def test_what_a_child_sends_cannot_hang_or_exhaust_its_worker(engine: LocalEngine) -> None:
    run(engine, prying.LOOK, Unit(name="look", content={}))  # its template stays, with its descriptors
    engine.release()
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for how in (*prying.MALFORMED, "not a socket", "many"):
        unit = Unit(name="confuse", content={"how": how})
        with pytest.raises(Unavailable, match="died") if how in prying.MALFORMED else nullcontext():
            assert run(engine, prying.CONFUSE, unit) == {"sent": how}
        assert threading.active_count() < before[0] + 80
        engine.release()
        eventually(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before[1], within_s=WITHIN_S)


def test_a_malformed_request_of_a_child_is_refused(engine: LocalEngine) -> None:
    malformed = [{"do": "base", "digest": "a", "verified": 5}, {"do": "size", "sha256": 5}, {"do": "finish", "more": 1}]
    numbers = [{"do": "range", "origin": origin, "size_bytes": 1} for origin in (5, {"location": "", "name": ""})]
    messages = [*malformed, *numbers, {"do": "read", "size_bytes": "5"}, {"do": "read", "size_bytes": -1}, {"do": []}]
    result = run(engine, prying.ASK, Unit(name="ask", content={"messages": messages}))
    assert [reply["error"]["code"] for reply in result["replies"]] == ["unit_failed"] * len(messages)
    assert {reply["error"]["detail"].split()[0] for reply in result["replies"]} == {"ValidationError", "TypeError"}


WORKER = """
import sys
import threading
from pathlib import Path
from registry.environment.settings import Settings
from registry.worker.engine.local import LocalEngine
from registry.worker.engine.protocol import Needs
from registry.worker.engine.units import Unit, open_node
from tests.engine import prying
engine = LocalEngine(open_node(Settings(home=Path(sys.argv[1]))))
unit = Unit(name="stuck", content={}, hints={"journal": sys.argv[2]})
print(list(engine.map(prying.STICK, [unit], Needs(), lambda _done: None)))
"""


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_worker(how: signal.Signals, tmp_path: Path) -> None:
    journal, home = tmp_path / "journal", tmp_path / "home"
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(home), str(journal)], env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    pids = stuck(journal)
    worker.send_signal(how)
    worker.wait()
    eventually(lambda: ended(pids), within_s=WITHIN_S)
    eventually(lambda: not list((home / "work").glob("unit-*")), within_s=WITHIN_S)


def limited(tmp_path: Path, **limits: Any) -> LocalEngine:
    return LocalEngine(open_node(Settings(home=tmp_path / "home", engine=EngineSettings(**limits))))


def test_a_job_that_takes_too_long_ends_with_the_limit_and_its_setting(tmp_path: Path) -> None:
    engine, journal = limited(tmp_path, job_seconds=1.5), tmp_path / "journal"
    with pytest.raises(Unavailable, match=r"longer than 1\.5 seconds.*ADAPTORY_ENGINE__JOB_SECONDS") as caught:
        run(engine, prying.STICK, Unit(name="stuck", content={}, hints={"journal": str(journal)}))
    assert caught.value.code == "job_time_limit"
    assert not journal.exists() or ended(stuck(journal)[:1])
    engine.release()
    assert run(engine, counted.DOUBLE, counted.units(1, tmp_path / "next")[0])["number"] == 0, (
        "the next job has its own"
    )
    engine.close()


def test_a_job_that_takes_too_much_memory_ends_with_the_limit_and_its_setting(tmp_path: Path) -> None:
    engine = limited(tmp_path, job_memory_bytes=900 << 20)
    with pytest.raises(Unavailable, match=r"more than 943,718,400 bytes.*ADAPTORY_ENGINE__JOB_MEMORY_BYTES") as caught:
        run(engine, prying.EAT, Unit(name="eat", content={"megabytes": 4000}))
    engine.close()
    assert caught.value.code == "job_memory_limit"


def test_a_crash_in_c_is_tried_again_and_then_said(engine: LocalEngine, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with pytest.raises(Unavailable, match=f"crash died {MAX_DEATHS} times.* ended by SIGSEGV") as caught:
        run(engine, prying.CRASH, Unit(name="crash", content={}, hints={"journal": str(journal)}))
    assert caught.value.code == "unit_lost"
    assert counted.events(journal)["begun crash"] == MAX_DEATHS
    assert run(engine, counted.DOUBLE, counted.units(1, journal)[0])["number"] == 0, "the worker goes on"


def test_a_template_that_was_killed_is_started_again(engine: LocalEngine, tmp_path: Path) -> None:
    seen = run(engine, prying.LOOK, Unit(name="look", content={"template": "first"}))
    os.kill(seen["template"], signal.SIGKILL)
    eventually(lambda: ended([seen["process"]]), within_s=WITHIN_S)
    again = run(engine, prying.LOOK, Unit(name="look", content={"template": "second"}))
    assert again["template"] != seen["template"]


@pytest.mark.parametrize(("how", "code"), [("refused", "pickle"), ("defect", "unit_failed")])
def test_an_error_comes_with_its_code_and_the_last_lines_of_the_log(
    how: str, code: str, engine: LocalEngine, tmp_path: Path
) -> None:
    unit = Unit(name="bad unit", content={"how": how}, hints={"journal": str(tmp_path / "journal")})
    with pytest.raises((Invalid, Unavailable)) as caught:
        run(engine, counted.FAIL, unit)
    assert caught.value.code == code
    assert any("line 299" in line for line in caught.value.log_lines)
