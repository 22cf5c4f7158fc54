"""A killed worker: the state that everyone sees until the next one starts, and the clock that decides when it may."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.api.app import create_app
from registry.client.inprocess import InProcessTransport
from registry.domain.jobs.needs import LEASE
from registry.transfer.resources import Resources
from registry.worker.runner import run_one
from tests.elapsed import let_elapse
from tests.eventually import eventually
from tests.forked import start_command
from tests.scenarios.test_crashes import LATER, Killed, begin, resources_of, watched
from tests.scenarios.world import Cli, own_environment


def shown(cli: Cli, resources: Resources) -> dict[str, Any]:
    """The descriptions of the job in its document, its page, the list, the metrics and the doctor."""
    transport = InProcessTransport(create_app(resources))
    with httpx2.Client(base_url="http://localhost", transport=transport) as http:
        page = http.get("/jobs/1", headers={"Accept": "text/html"}, follow_redirects=True)
        metrics = http.get("/metrics").text
        listed = http.get("/jobs", headers={"Accept": "text/html"})
    assert (page.status_code, listed.status_code) == (200, 200)
    doctor = {check["name"]: check for check in cli("doctor", "--no-contents", "--json").json["checks"]}["workers"]
    document = cli.json("jobs", 1)
    return {
        "since": document["stalled_since"],
        "state": document["state"],
        "page": "The work stands still." in page.text,
        "list": ">stalled<" in listed.text,
        "table": "stalled since" in cli.ok("jobs").out,
        "gauges": {
            state: f'adaptory_jobs{{kind="composition",state="{state}"}} 1.0' in metrics
            for state in ("running", "stalled")
        },
        "doctor": (doctor["state"], "1 stalled" in doctor["detail"]),
    }


def test_a_job_whose_only_worker_was_killed_is_shown_as_stalled_until_the_next_one_takes_it(
    sql_and_support: Cli, tmp_path: Path
) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    with resources_of(cli.environment) as resources:
        worker = start_command(["worker"], own_environment(cli), tmp_path / "worker.log")
        eventually(lambda: cli.json("jobs", 1)["state"] == "running", every_s=0.01)
        worker.kill()
        worker.join()
        beat = datetime.fromisoformat(cli.json("jobs", 1)["heartbeat_at"])
        assert shown(cli, resources) == {
            "since": None, "state": "running", "page": False, "list": False, "table": False,
            "gauges": {"running": True, "stalled": False}, "doctor": ("ok", False),
        }, "its lease lasts"  # fmt: skip
        let_elapse(resources, LATER)
        said = shown(cli, resources)
        assert datetime.fromisoformat(said.pop("since")) == beat - LATER + LEASE
        assert said == {
            "state": "running", "page": True, "list": True, "table": True,
            "gauges": {"running": False, "stalled": True}, "doctor": ("warning", True),
        }  # fmt: skip
        assert run_one(resources, watched([]), "next")
        ended = shown(cli, resources)
    assert (ended["state"], ended["since"], ended["page"], ended["doctor"]) == ("done", None, False, ("ok", False))


@pytest.mark.long
@pytest.mark.parametrize("off", [timedelta(hours=2), timedelta(hours=-2)])
def test_a_worker_whose_clock_is_wrong_neither_takes_jobs_from_others_nor_keeps_them(
    sql_and_support: Cli, tmp_path: Path, off: timedelta
) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    with resources_of(cli.environment) as right:
        wrong = replace(right, clock=lambda: right.clock() + off)

        def others(resources: Resources) -> Callable[[str], None]:
            def beside(name: str) -> None:
                if name == "check":
                    assert not run_one(resources, watched([]), "other"), "the job has its worker"
                    raise Killed

            return beside

        with pytest.raises(Killed):
            run_one(right, watched([], others(wrong)), "right")
        let_elapse(right, LATER)
        with pytest.raises(Killed):
            run_one(wrong, watched([], others(right)), "wrong")
        let_elapse(right, LATER)
        assert run_one(right, watched([]), "next"), "the lease of the wrong one ends as that of any other"
    assert cli.json("jobs", 1)["state"] == "done"
