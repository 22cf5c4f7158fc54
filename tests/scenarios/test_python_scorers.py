"""Suites with Python scorers: one that fails, hangs or is not enabled somewhere."""

from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from registry.worker.host import Host
from registry.worker.runner import end_unmet, run_one
from registry.worker.steps import KINDS
from tests.composer.scorers import install_scorer
from tests.elapsed import let_elapse
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli

ENABLED = {"ADAPTORY_SCORERS": "obedient", "ADAPTORY_SCORER_TIMEOUT_S": "0.5"}


@pytest.fixture
def scored(team: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A team with suites whose scorer scores, raises and never ends."""
    site = tmp_path / "site"
    site.mkdir()
    install_scorer(site)
    monkeypatch.syspath_prepend(site)
    for name, does in (("fine", ""), ("broken", "raises"), ("endless", "loops")):
        settings = {"marker": str(tmp_path / "pid"), "does": does}
        asked = {"generation": {"max_new_tokens": 2}, "scorer": {"name": "obedient", "settings": settings}}
        team.ok("suite", "add", write_suite(tmp_path, name, task="generation", **asked))
    return Cli(team.environment | ENABLED, team.served_with)


def recorded(cli: Cli, reference: str) -> set[str]:
    return {row["suite"] for row in cli.json("show", reference)["scores"]}


@pytest.mark.long
@pytest.mark.parametrize("queued", [True, False], ids=["worker", "command"])
def test_a_scorer_that_fails_or_never_ends_costs_no_score_of_another_suite(scored: Cli, queued: bool) -> None:
    suites = [word for name in ("broken", "endless", "fine", "sql-exact") for word in ("--suite", name)]
    ran = scored("eval", "acme/sql:1.0.0", "acme/terraform:1.0.0", *suites, *(["--queue"] if queued else []))
    said = " ".join(ran.err.split())
    assert ran.code == 1
    assert "acme/sql:1.0.0 on broken: The scorer obedient failed on example " in said
    assert "of broken ('say " in said
    assert "RuntimeError: no database. 4 of 8 could not be measured" in said
    for reference in ("acme/sql:1.0.0", "acme/terraform:1.0.0"):
        assert recorded(scored, reference) == {"fine", "sql-exact"}
    if queued:
        job = scored.json("jobs")["items"][0]
        assert (job["state"], job["error"]["code"]) == ("refused", "scorer_failed")
    one = scored("eval", "acme/sql:1.0.0", "--suite", "endless", *(["--queue"] if queued else []))
    assert (one.code, "of endless" in one.err) == (1, True)
    assert "no score within 0.5 s" in " ".join(one.err.split())


def test_a_suite_whose_scorer_the_server_has_not_enabled_is_refused_before_it_is_queued(team: Cli, scored: Cli) -> None:
    refused = team("eval", "acme/sql", "--suite", "fine", "--queue")
    assert (refused.code, "ADAPTORY_SCORERS=obedient" in refused.err) == (1, True)
    assert team.json("jobs")["items"] == []


def test_a_worker_without_a_scorer_leaves_its_suites_to_others_for_ten_minutes(team: Cli, scored: Cli) -> None:
    asked = ("eval", "acme/sql:1.0.0", "--suite", "fine", "--suite", "sql-exact", "--queue", "--no-wait")
    job, other = (scored.json(*asked)["job"] for _ in range(2))
    with closing(opened(scored)) as resources:
        assert run_one(resources, KINDS, "enabled", host=Host(resources, KINDS))
    assert team.json("jobs", job)["state"] == "done"
    assert recorded(team, "acme/sql:1.0.0") == {"fine", "sql-exact"}
    with closing(opened(team)) as lacking:
        assert not run_one(lacking, KINDS, "lacking", host=Host(lacking, KINDS))
        assert team.json("jobs", other)["state"] == "queued"
        let_elapse(lacking, timedelta(minutes=20))
        assert not run_one(lacking, KINDS, "lacking", host=Host(lacking, KINDS))
        assert team.json("jobs", other)["needs"][1:] == ["scorer:obedient"]
        end_unmet(lacking)
    ended = team.json("jobs", other)
    assert (ended["state"], ended["error"]["code"]) == ("refused", "scorer_disabled")
    assert "The scorer obedient is not installed and enabled where workers run." in ended["error"]["detail"]
