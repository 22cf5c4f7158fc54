"""A channel's policy: a release that lacks only a score or an approval waits for it, and then completes or fails
automatically."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.domain.jobs import evaluations
from registry.worker.runner import run_one, run_worker
from registry.worker.steps import KINDS
from tests.eventually import eventually
from tests.scenarios.test_a_company_with_tokens import Company, company
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli, World

__all__ = ["company"]


def policy(directory: Path, **fields: Any) -> Path:
    path = directory / "policy.yaml"
    path.write_text(yaml.safe_dump({"version": 1, **fields}))
    return path


@contextmanager
def working(cli: Cli) -> Generator[None]:
    """A worker of the embedded registry, as `adaptory worker` runs it."""
    resources, stop = opened(cli), threading.Event()
    worker = threading.Thread(target=partial(run_worker, resources, KINDS, stop))
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()
        resources.close()


@pytest.mark.on("PostgreSQL")
def test_a_promotion_waits_for_the_scores_that_it_lacks_and_then_completes_or_fails_by_itself(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    for version, name in (("1.0.0", "sql"), ("1.1.0", "other-sql")):
        cli.ok("push", world.adapters[name], f"acme/sql:{version}", "--base", "tiny")
    rules = ["sql-exact.nll <= 99", {"rule": "guard-exact.nll within 5 of base", "min_n": 6, "measured": True}]
    cli.ok("policy", "set", "acme/sql@prod", policy(tmp_path, rules=rules))
    move = cli.json("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "ready")
    assert (move["to_version"], [gate["passed"] for gate in move["gates"]]) == ("1.0.0", [True, True])
    assert "of base (n >= 6, measured)" in move["gates"][1]["rule"]
    measured = {(score["suite"], score["n"]) for score in cli.json("show", "acme/sql:1.0.0")["scores"]}
    assert measured == {("sql-exact", 6), ("guard-exact", 6)}
    assert cli.json("base", "show", "tiny")["scores"][0]["suite"] == "guard-exact"

    cli.ok("policy", "set", "acme/sql@prod", policy(tmp_path, rules=["sql-exact.accuracy >= 0.99"]))
    waiting = cli.json("promote", "acme/sql:1.1.0", "--to", "prod", "--no-wait")
    assert (waiting["state"], waiting["gates"][0]["waiting"], waiting["expected_move"]) == ("pending", True, move["id"])
    assert cli.json("jobs", waiting["job"])["kind"] == "evaluation"
    shown = [row["state"] for row in cli.json("promotion", "list", "acme/sql@prod")["items"]]
    with working(cli):
        eventually(lambda: cli.json("promotion", "list", "acme/sql@prod")["items"][0]["state"] != "pending")
    ended, completed = cli.json("promotion", "list", "acme/sql@prod")["items"]
    assert shown == ["pending", "completed"]
    assert (completed["state"], completed["move"]) == ("completed", move["id"])
    assert (ended["state"], ended["error"]["code"]) == ("refused", "gate_failed")
    assert "(n=6)" in ended["gates"][0]["detail"]
    compared = {row["suite"]: row["paired"] for row in cli.json("diff", "acme/sql:1.0.0", "acme/sql:1.1.0")["scores"]}
    assert compared["sql-exact"]["n"] == 6, "workers keep the result of each example too"
    assert cli.json("show", "acme/sql@prod")["version"] == "1.0.0"
    refused = cli("promote", "acme/sql:1.1.0", "--to", "prod")
    assert (refused.code, "FAIL  sql-exact.accuracy >= 0.99: 0 [0, 0.39] (n=6)" in refused.err) == (1, True), (
        refused.err
    )
    acts = [row["act"] for row in cli.json("audit", "--subject", "acme/sql@prod")["items"]]
    assert acts == [
        "promotion:end", "promotion:request", "policy:set", "promotion:end", "channel:promote", "promotion:request",
        "policy:set",
    ]  # fmt: skip


def test_a_promotion_that_another_person_must_approve_waits_for_it(
    company: Company, world: World, tmp_path: Path
) -> None:
    olga = company.person("olga")
    olga.ok("namespace", "set", "acme")
    for user, role in {"pia": "publisher", "rolf": "releaser", "rosa": "releaser"}.items():
        olga.ok("namespace", "grant", "acme", user, role)
    pia, rolf, rosa = (company.person(user) for user in ("pia", "rolf", "rosa"))
    pia.ok("base", "add", world.base, "--name", "tiny")
    pia.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    nothing_asked = rosa("approve", "acme/sql:1.0.0", "--to", "prod")
    assert (nothing_asked.code, "requires no approval" in nothing_asked.err) == (1, True)
    olga.ok("policy", "set", "acme/sql@prod", policy(tmp_path, approval={"role": "releaser"}, force="admin"))
    waiting = rolf.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "ready", "--no-wait")
    assert "wait  approval by another person with the role releaser: 0 of 1" in waiting.out
    forced = rolf("promote", "acme/sql:1.0.0", "--to", "prod", "--force", "--reason", "now")
    assert (forced.code, "only the role admin" in forced.err) == (5, True)
    own, unentitled = (
        rolf("approve", "acme/sql:1.0.0", "--to", "prod"),
        pia("approve", "acme/sql:1.0.0", "--to", "prod"),
    )
    assert (own.code, unentitled.code) == (5, 5)
    approved = rosa.json("approve", "acme/sql:1.0.0", "--to", "prod", "--reason", "looked at it")
    assert approved["promotion"]["state"] == "completed"
    (move,) = rolf.json("history", "acme/sql@prod")["items"]
    assert (move["actor"], move["gates"][0]["detail"]) == ("rolf", "1 of 1: rosa")
    rolf.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    acts = {row["act"]: row["actor"] for row in olga.json("audit", "--subject", "acme/sql@prod")["items"]}
    assert acts["promotion:approve"] == "rosa"


@pytest.mark.long
def test_an_evaluation_that_is_stopped_goes_on_with_what_is_not_measured(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    rules = ["sql-exact.nll <= 99", "guard-exact.nll within 5 of base"]
    cli.ok("policy", "set", "acme/sql@prod", policy(tmp_path, rules=rules))
    job = cli.json("promote", "acme/sql:1.0.0", "--to", "prod", "--no-wait")["job"]
    resources = opened(cli)

    def results() -> list[tuple[int | None, str]]:
        with resources.read() as session:
            return [(row["release"], row["suite"]) for row in evaluations.find(session, job).results]

    class OnceOneIsMeasured(threading.Event):
        def is_set(self) -> bool:
            return bool(results())

    assert run_one(resources, KINDS, "first", OnceOneIsMeasured())
    begun = results()
    assert (len(begun), cli.json("jobs", job)["state"]) == (1, "queued")
    assert run_one(resources, KINDS, "second")
    assert results()[:1] == begun
    assert len(set(results())) == len(results()) == 3, "the candidate on both suites, and the base on one"
    (promotion,) = cli.json("promotion", "list", "acme/sql@prod")["items"]
    assert (promotion["state"], cli.json("jobs", job)["state"]) == ("completed", "done")
    resources.close()


@pytest.mark.long
def test_what_a_recipe_ignores_does_not_count_as_ok_on_a_channel(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    """Two adapters of one task: their sum overshoots, which the recipe's policy ignores."""
    cli = stocked_embedded
    for name in ("sql", "again"):
        cli.ok("push", world.adapters["sql"], f"acme/{name}:1.0.0", "--base", "tiny")
    recipe = tmp_path / "recipe.yaml"
    content = {"inputs": ["acme/sql:1.0.0", "acme/again:1.0.0"], "method": "stack", "probe": 0, "gates": []}
    loose = {"near_duplicate": "ignore", "weak_evidence": "ignore"}
    for name, ignored in (("loose", loose), ("plain", {})):
        recipe.write_text(yaml.safe_dump({**content, "adapter": f"acme/{name}:1.0.0", "policy": ignored}))
        made = cli.json("compose", recipe)["conflicts"]
        assert (made["verdict"], made["by_default"]["verdict"]) == ("warn" if name == "plain" else "unmeasured", "warn")
        cli.ok("policy", "set", f"acme/{name}@prod", policy(tmp_path, verdict="unmeasured"))
        refused = cli("promote", f"acme/{name}:1.0.0", "--to", "prod")
        assert (refused.code, "says warn (near_duplicate)" in refused.err) == (1, True), refused.err
    assert "unmeasured by its recipe's policy" not in refused.err
    cli.ok("policy", "set", "acme/loose@prod", policy(tmp_path, verdict="warn"))
    cli.ok("promote", "acme/loose:1.0.0", "--to", "prod")


@pytest.mark.on("SQLite")
def test_a_namespaces_policy_holds_for_every_repository_and_its_exceptions_are_listed(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    for name in ("sql", "tf"):
        cli.ok("push", world.adapters["sql"], f"acme/{name}:1.0.0", "--base", "tiny")
    shown = cli.ok("policy", "set", "acme/*@prod", policy(tmp_path, signature="release")).out
    assert shown.startswith("# acme/*@prod, revision 1\n")
    refused = cli("promote", "acme/tf:1.0.0", "--to", "prod")
    assert (refused.code, "FAIL  signature of the release (acme/*@prod): " in refused.err) == (1, True), refused.err
    assert "# and acme/*@prod, revision 1:\n#   version: 1\n" in cli.ok("policy", "show", "acme/tf@prod").out
    assert cli("policy", "except", "acme/tf@prod", "--reason", "x").code == 2
    until = f"{datetime.now(UTC) + timedelta(days=3):%Y-%m-%d}"
    cli.ok("policy", "except", "acme/tf@prod", "--until", until, "--reason", "the key is being replaced")
    assert f"acme/tf@prod  exempt until  {until}" in cli.ok("policy", "list", "acme").out
    assert "does not apply until" in cli.ok("policy", "show", "acme/tf@prod").out
    cli.ok("promote", "acme/tf:1.0.0", "--to", "prod")
    assert cli("promote", "acme/sql:1.0.0", "--to", "prod").code == 1
    cli.ok("policy", "except", "acme/tf@prod", "--end")
    assert "acme/tf" not in cli.ok("policy", "list", "acme").out
    cli.ok("policy", "set", "acme/*@prod", "--clear")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod")
