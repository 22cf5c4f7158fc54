"""`--follow` on a terminal, on a pipe and through an outage; and the trace of a failed unit in its step."""

import io
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import pytest

from registry.api.app import create_app
from registry.cli.console import following
from registry.client.inprocess import InProcessTransport
from registry.domain.jobs.queue import LOG_CHARS, LOG_LINES, Amount
from registry.errors import Unavailable
from registry.formats.priority import Priority
from registry.wire.work import JobOut, StepOut
from registry.worker.runner import JobKind, JobRun, run_one
from registry.worker.steps import KINDS
from tests import services
from tests.scenarios.terminal import on_terminal
from tests.scenarios.test_crashes import begin, resources_of, team
from tests.scenarios.test_interrupts import START
from tests.scenarios.test_interrupts import begin as begin_command
from tests.scenarios.test_terminal import Terminal
from tests.scenarios.world import Cli, World


def test_the_log_of_a_unit_that_failed_and_what_was_redone_are_shown_by_rest_the_command_and_the_page(
    sql_and_support: Cli, tmp_path: Path
) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)

    def poisoned(held: JobRun) -> None:
        held.progress(Amount(12, 40, "units", redone=3))
        lines = [*(f"line {number}" for number in range(300)), "y" * 1000, "\x1b[31m<b>red</b>"]
        error = Unavailable("unit_failed", "unit 13: a poison unit", next_step="Look at its log.")
        error.log_lines = lines
        raise error

    kind = KINDS["composition"]
    with resources_of(cli.environment) as resources:
        assert run_one(resources, {"composition": JobKind({**kind.steps, "check": poisoned}, kind.clean)}, "worker")
        job = cli.json("jobs", 1)
        step = job["steps"][0]
        assert (job["state"], job["error"]["detail"]) == ("failed", "unit 13: a poison unit")
        done = tuple(step[name] for name in ("state", "done", "total", "unit", "redone"))
        assert done == ("failed", 12, 40, "units", 3)
        assert (len(step["log"]), step["log"][-3]) == (LOG_LINES, "line 299")
        assert step["log"][-2] == "y" * LOG_CHARS
        assert cli.json("jobs")["items"][0]["steps"][0]["log"] == [], "a list would be megabytes"
        shown = cli.ok("jobs", 1).out
        assert "check: failed at 12 of 40 units, 3 redone" in " ".join(shown.split())
        assert "the last lines of a unit of check that failed" in shown
        assert "  \\x1b[31m<b>red</b>" in shown
        application = InProcessTransport(create_app(resources, tokens=False))
        with httpx2.Client(base_url="http://localhost", transport=application) as client:
            page = client.get("/compositions/1").text
        assert "12 of 40 units, 3 redone" in page
        assert "line 299" in page
        assert "&lt;b&gt;red" in page


@pytest.mark.parametrize("on_a_terminal", [True, False], ids=["terminal", "pipe"])
def test_steps_are_shown_as_bars_within_80_columns_or_as_one_line_for_each_change(
    on_a_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if on_a_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    names = ("optimize", "a-step-with-a-very-long-name")
    first, second = (StepOut(name=name, state="waiting", progress=0.0) for name in names)
    job = JobOut(
        id=7, kind="composition", namespace=None, state="queued", cancel_requested=False, heartbeat_at=None, error=None,
        created_at=datetime.now(UTC), created_by="ann", finished_at=None, priority=Priority.NORMAL, needs=[],
        memory_bytes=None, stalled_since=None, waits_for=f"a worker that has the base {'tiny' * 30}",
        steps=[first, second],
    )  # fmt: skip
    with following.shown_steps("job 7", lines=True) as shown:
        shown.show(job)
        for done in (0, 1, 40):
            amount = {"state": "running", "progress": done / 40, "done": done, "total": 40, "unit": "units"}
            first = first.model_copy(update=amount | {"redone": 3 if done == 40 else 0})
            job = job.model_copy(update={"state": "running", "waits_for": None, "steps": [first, second]})
            shown.show(job)
        shown.show(job.model_copy(update={"state": "refused"}))
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", stream.getvalue())
    if on_a_terminal:
        assert max(map(len, re.split(r"[\r\n]+", text))) <= 80
        assert re.search(r"1/2 optimize +\S+ 40 of 40 units, 3 redone", text)
        assert re.search(r"2/2 a-\S+ +\S+ waiting", text)
        return
    lines = text.splitlines()
    assert lines[0].startswith("job 7: queued, waits for a worker that has the base tiny")
    rest = ["job 7: running", "1/2 optimize: running", "1/2 optimize: running, 3 units redone", "job 7: refused"]
    assert lines[-4:] == rest


@pytest.mark.long
def test_following_a_job_on_a_terminal_shows_a_bar_for_each_step_within_80_columns(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    cli = team(stocked_on_disk, world)
    begin(cli, tmp_path)
    shown = on_terminal(cli, "jobs", 1, "--follow")
    assert shown.end() == 0, shown.text
    for number, name in enumerate(("check", "combine", "evaluate", "gate", "merge", "publish"), start=1):
        assert re.search(rf"{number}/6 {name} .*(waiting|running|done|of \d+)", shown.text), name
    assert max(len(line.rstrip()) for line in shown.lines) <= 80
    assert cli.json("jobs", 1)["state"] == "done"
    assert cli.ok("jobs", 1, "--follow").code == 0, "it has ended"


def served(home: Cli, port: int) -> subprocess.Popen[str]:
    process = begin_command(
        Cli({**home.environment, "ADAPTORY_LOOPBACK_OPEN": "true"}), START, "serve", "--no-worker", "--port", port
    )
    assert process.stderr is not None
    assert "listening" in process.stderr.readline()
    return process


@pytest.mark.long
def test_following_goes_on_after_an_outage_says_what_changes_on_a_pipe_and_an_interrupt_leaves_the_job(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    home, port = team(stocked_on_disk, world), services.free_port()
    begin(home, tmp_path)
    serving = served(home, port)
    remote = Cli({"ADAPTORY_HOME": str(tmp_path / "client"), "ADAPTORY_URL": f"http://127.0.0.1:{port}"})
    left = begin_command(remote, START, "jobs", "1", "--follow")
    assert left.stderr is not None
    assert left.stderr.readline() == "job 1: queued, waits for a worker: none is running\n"
    left.send_signal(signal.SIGINT)
    said = left.communicate(timeout=30)[1]
    assert (left.returncode, home.json("jobs", 1)["state"]) == (130, "queued")
    assert said.startswith("interrupted: job 1 continues; `adaptory jobs 1 --follow` follows it")

    again = begin_command(remote, START, "jobs", "1", "--follow")
    assert again.stderr is not None
    assert "waits for a worker" in again.stderr.readline()
    with httpx2.stream("GET", f"http://127.0.0.1:{port}/v1/jobs/1/events") as stream:
        assert stream.status_code == 200
        serving.terminate()
        serving.communicate(timeout=30)  # a stream of events does not keep the server
    assert "Trying again every 2 s" in again.stderr.readline()
    with resources_of(home.environment) as resources:
        assert run_one(resources, KINDS, "worker")
    serving = served(home, port)
    out, err = again.communicate(timeout=60)
    serving.terminate()
    serving.communicate(timeout=30)
    assert (again.returncode, "composition" in out) == (0, True)
    lines = err.splitlines()
    assert f"connected to http://127.0.0.1:{port} again" in lines
    assert [line for line in lines if line.startswith("job 1")] == ["job 1: done"]
    assert "6/6 publish: done" in lines
    assert max(map(len, lines)) <= 80
