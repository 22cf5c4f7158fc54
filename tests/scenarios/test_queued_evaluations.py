"""Evaluations by a worker on request, and the remains of abandoned ones."""

import os
import shutil
import threading
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from registry.database.tables import Release
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Reach
from registry.domain.jobs import queue
from registry.domain.jobs.evaluations import find
from registry.errors import NotAllowed, NotFound, Usage
from registry.transfer import evaluations, upgrades
from registry.transfer.resources import Resources
from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.eventually import eventually
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli, World


def scaled(base: Path, directory: Path) -> Path:
    """A base with other weights."""
    shutil.copytree(base, directory)
    for shard in directory.glob("*.safetensors"):
        tensors = {name: tensor * 1.01 for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    return directory


def test_a_worker_measures_several_releases_and_their_base_on_several_suites_in_one_job(team: Cli) -> None:
    asked = ("eval", "acme/sql", "acme/terraform:1.0.0", "tiny", "--suite", "sql-exact", "--suite", "guard-exact")
    waiting = team.json(*asked, "--queue", "--no-wait")
    assert (waiting["state"], len(waiting["items"])) == ("queued", 6)
    assert all(item["scores"] is None for item in waiting["items"])
    team.ok("cancel", waiting["job"])
    done = team.json(*asked, "--queue")
    assert (done["state"], [item["error"] for item in done["items"]]) == ("done", [None] * 6)
    assert [step["name"] for step in done["steps"]] == ["measure"]
    assert [row["id"] for row in team.json("jobs")["items"]] == [done["job"], waiting["job"]], "one job for all"
    for name, subject in (("acme/sql", "acme/sql"), ("tiny", None)):
        item = next(row for row in done["items"] if (row["repository"], row["suite"]) == (subject, "guard-exact"))
        shown = team.json("show", name) if subject else team.json("base", "show", name)
        recorded = {row["metric"]: row["value"] for row in shown["scores"] if row["suite"] == "guard-exact"}
        assert recorded == {row["metric"]: row["value"] for row in item["scores"]}
    assert "acme/terraform:1.0.0" in team.ok(*asked, "--queue").out
    event = team.json("audit", "--event", "evaluation:request")["items"][0]
    assert (event["namespace"], event["after"]["suites"]) == ("acme", ["sql-exact", "guard-exact"])
    assert event["after"]["subjects"] == ["acme/sql:1.0.0", "acme/terraform:1.0.0", "tiny"]
    idle = team(*asked, "--queue", "--limit", "2")
    assert (idle.code, "--limit has no effect with --queue" in idle.err) == (2, True)
    assert team("eval", "acme/sql", "--suite", "none", "--queue").code == 3


def test_an_evaluation_needs_what_recording_its_scores_needs_and_is_bounded(team: Cli) -> None:
    now = datetime.now(UTC)
    team.ok("namespace", "grant", "acme", "pia", "publisher")
    team.ok("token", "create", "--user", "pia")
    token = team.json("token", "list")["items"][0]["id"]
    publisher = Actor("pia", now, {"acme": "publisher"}, token_id=token)
    reader, stranger = Actor("rita", now, {"acme": "reader"}), Actor("sven", now, {"elsewhere": "admin"})
    with closing(opened(team)) as resources:

        def ask(actor: Actor, releases: list[str], bases: list[str], suites: int = 1) -> int:
            return evaluations.request(resources, actor, releases, bases, ["sql-exact"] * suites)["job"]

        with pytest.raises(NotAllowed, match="publisher"):
            ask(reader, ["acme/sql:1.0.0"], [])
        with pytest.raises(NotFound, match="acme"):
            ask(stranger, ["acme/sql:1.0.0"], [])
        with pytest.raises(NotAllowed, match="belongs to mia"):
            ask(publisher, ["acme/sql:1.0.0"], ["tiny"])
        for releases, suites in (([], 1), (["acme/sql:1.0.0"], 51), ([f"acme/a{n}" for n in range(101)], 1)):
            with pytest.raises(Usage, match="an evaluation has"):
                ask(publisher, releases, [], suites)
        job = ask(publisher, ["acme/sql:1.0.0"], [])
        with resources.read() as session:
            assert evaluations.report(session, publisher, job)["state"] == "queued"
            with pytest.raises(NotFound, match="is not yours"):
                evaluations.report(session, reader, job)
        team.ok("namespace", "revoke", "acme", "pia")
        assert run_one(resources, KINDS, "worker")
        with resources.read() as session:
            report = evaluations.report(session, publisher, job)
    assert (report["state"], report["error"]["code"]) == ("failed", "role_lost")
    assert team.json("show", "acme/sql:1.0.0")["scores"] == []


@pytest.mark.on("PostgreSQL")
def test_an_upgrade_measures_the_new_base_for_its_owner_alone(team: Cli, world: World, tmp_path: Path) -> None:
    following = scaled(world.base, tmp_path / "following")
    team.ok("base", "add", following, "--name", "following")
    with closing(opened(team)) as resources:
        for name, measured in (("pia", {"acme/sql", "acme/terraform"}), ("mia", {"acme/sql", "acme/terraform", None})):
            actor = Actor(name, datetime.now(UTC), {"acme": "publisher"})
            job = upgrades.begin(resources, actor, "tiny", "following", ["sql-exact"], evaluate=True)["job"]
            with resources.read() as session:
                wanted = [
                    wanted_score["release"] and session.get(Release, wanted_score["release"])
                    for wanted_score in find(session, job).wanted
                ]
                assert {release and f"acme/{release.repository.name}" for release in wanted} == measured


@pytest.mark.long
def test_an_upgrade_whose_job_is_cancelled_exits_as_an_evaluation_does(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_on_disk
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    following = scaled(world.base, tmp_path / "following")
    cli.ok("base", "add", following, "--name", "following")
    examples = [{"prompt": f"say {number}", "completion": "0"} for number in range(960)]
    cli.ok("suite", "add", write_suite(tmp_path, "long", task="generation", examples=examples))
    for command in (("base", "upgrade", "tiny", "following"), ("eval", "acme/sql", "--queue")):
        with closing(opened(cli)) as resources:
            cancelling = threading.Thread(target=_cancel_the_next_job, args=(resources,))
            cancelling.start()
            ended = cli(*command, "--suite", "long")
            cancelling.join()
        assert (ended.code, "was cancelled. Request it again" in ended.err.replace("\nnext:", "")) == (1, True)


def _cancel_the_next_job(resources: Resources) -> None:
    def cancelled() -> bool:
        with resources.write() as session:
            jobs = queue.list_page(session, Reach(None), before=0, limit=1)
            if not jobs or jobs[0].state in queue.FINISHED:
                return False
            queue.request_cancel(session, jobs[0].id, resources.clock())
            return True

    eventually(cancelled, within_s=60)


@pytest.mark.parametrize("command", [("gc",), ("eval", "tiny", "--suite", "sql-exact")], ids=["gc", "eval"])
def test_a_journal_that_nobody_goes_on_with_is_removed_as_other_leftovers_are(
    stocked_on_disk: Cli, command: tuple[str, ...]
) -> None:
    journals = Path(stocked_on_disk.environment["ADAPTORY_HOME"]) / "cache" / "eval"
    journals.mkdir(parents=True)
    abandoned, recent = journals / "a.jsonl", journals / "b.jsonl"
    for path, age_s in ((abandoned, 25 * 3600), (recent, 3600)):
        path.write_text("{}\n")
        written = datetime.now(UTC).timestamp() - age_s
        os.utime(path, (written, written))
    done = stocked_on_disk.json(*command)
    assert (abandoned.exists(), recent.exists()) == (False, True)
    assert command != ("gc",) or done["leftovers"] == 1
