"""Promotions that wait: what ends them, who may, and that no crash and no race makes a move twice or none."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select

from composer.formats.recipes.elsewhere import parse_content
from composer.formats.recipes.suite import Example, Suite
from registry.api.app import create_app
from registry.client.inprocess import InProcessTransport
from registry.database.tables import Composition, Gate, Job, Move, Promotion, Release, ReleaseInput
from registry.domain.access import namespaces, tokens
from registry.domain.access.audit import Actor, EventQuery, list_oldest_first
from registry.domain.access.roles import Role
from registry.domain.catalog import bases, releases, repositories, suite_registration, suites
from registry.domain.catalog.suites import Measurement
from registry.domain.channels import moves, pending, promotions
from registry.domain.channels.moves import PromotionRequest
from registry.domain.channels.policy import policies
from registry.domain.channels.serving import ChannelMove
from registry.domain.compositions import compositions
from registry.errors import Conflict, NotAllowed, NotFound, Refused, RegistryError
from registry.formats.channel_policy import read_policy
from registry.formats.references import RepositoryName, Version
from registry.transfer import evaluations
from registry.transfer.promotions import settle, settle_due, settle_on_base
from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.access.house import HOST, NOW, OTHER, PRIVATE, House, opened
from tests.forked import start

NAME = RepositoryName(PRIVATE, "sql")
OLD, NEW = Version(1, 0, 0), Version(1, 1, 0)
HOUR = timedelta(hours=1)


def person(house: House, user: str = "releaser", at: datetime = NOW) -> Actor:
    role = "releaser" if user == "publisher" else user
    return Actor(user, at, {PRIVATE: role}, token_id=house.ids[user])


def demand(house: House, channel: str = "prod", **fields: Any) -> None:
    with house.resources.write() as session:
        repository = repositories.find(session, NAME)
        policies.set_policy(
            session, HOST, policies.scope_of(repository, channel), read_policy({"version": 1, **fields}, "policy")
        )


def promote(
    house: House, version: Version = OLD, channel: str = "prod", at: datetime = NOW, **options: Any
) -> ChannelMove | Promotion:
    with house.resources.write() as session:
        wanted = PromotionRequest(NAME, version, channel, **options)
        return promotions.request(session, person(house, at=at), wanted)


def waiting(house: House, *asked: Any, **options: Any) -> int:
    outcome = promote(house, *asked, **options)
    assert isinstance(outcome, Promotion)
    return outcome.id


def seen(house: House, promotion_id: int) -> tuple[str, str]:
    """State and error code of a promotion."""
    with house.resources.read() as session:
        row = session.get_one(Promotion, promotion_id)
        return row.state, (row.error or {}).get("code", "")


def later(house: House, at: datetime) -> Any:
    return replace(house.resources, clock=lambda: at)


def refusal(house: House, *asked: Any, **options: Any) -> list[str]:
    """The detail of each rule that a promotion fails."""
    with pytest.raises(Refused) as caught:
        promote(house, *asked, **options)
    assert caught.value.code == "gate_failed"
    return [f"{finding['rule']}: {finding['detail']}" for finding in caught.value.findings if not finding["passed"]]


def test_a_soak_is_waited_for_unless_it_was_rolled_back_or_takes_too_long(house: House) -> None:
    demand(house, soak=[{"channel": "staging", "hours": 3}])
    assert refusal(house) == ["3 h in staging: staging has never served it"]
    promote(house, OLD, "staging")
    began = waiting(house, at=NOW + HOUR)
    settle_due(later(house, NOW + 2 * HOUR))
    assert seen(house, began)[0] == "pending"
    settle_due(later(house, NOW + 3 * HOUR))
    assert seen(house, began)[0] == "completed"
    promote(house, NEW, "staging", at=NOW + 4 * HOUR)
    promote(house, OLD, at=NOW + 4 * HOUR)  # staging served it long enough before
    with house.resources.write() as session:
        moves.roll_back(session, person(house, at=NOW + 5 * HOUR), repositories.find(session, NAME), "staging")
    assert refusal(house, NEW) == ["3 h in staging: staging was rolled back from it at 2026-01-01 05:00 UTC"]
    demand(house, soak=[{"channel": "staging", "hours": 48}], expires_hours=10)
    (why,) = refusal(house, at=NOW + 9 * HOUR)
    assert why == "48 h in staging: staging has served it for 4 of 48 h; a promotion waits for 10 h at most"


def test_each_rule_is_named_with_its_numbers(house: House) -> None:
    rules = ["exact.nll <= 9", "exact.nll within 0.1 of base", "exact.nll <= 0.1"]
    demand(house, rules=rules, missing="refuse", signature="release", verdict="ok")
    with house.resources.write() as session:
        made = session.scalars(select(Composition)).first()
        assert made is not None
        made.conflicts = {"verdict": "warn"}
        release = releases.find(session, NAME, OLD)
        session.add(ReleaseInput(release_id=release.id, input_id=release.id + 1, composition_id=made.id, weight=1.0))
    assert refusal(house) == [
        "exact.nll within 0.1 of base: 0.5 (n=1), but the base has no nll on the current exact: evaluate it first",
        "exact.nll <= 0.1: 0.5 (n=1)",
        "signature of the release: acme has no signing key",
        "verdict ok: the conflict check of its inputs says warn",
    ]
    assert not [rule for rule in refusal(house, NEW) if rule.startswith("verdict")], "others pass"


def test_a_verdict_of_before_without_default_limits_counts_unless_a_recipe_had_its_own(house: House) -> None:
    demand(house, verdict="ok")
    with house.resources.write() as session:
        made = session.scalars(select(Composition)).first()
        assert made is not None
        made.conflicts, made.recipe = {"verdict": "ok"}, {**made.recipe, "policy": {"probe_loss": "ignore"}}
        release = releases.find(session, NAME, OLD)
        session.add(ReleaseInput(release_id=release.id, input_id=release.id + 1, composition_id=made.id, weight=1.0))
    (why,) = refusal(house)
    assert "the default limits were not recorded with it: compose it again" in why
    with house.resources.write() as session:
        session.get_one(Composition, made.id).recipe = {**made.recipe, "policy": {"require": "ok"}}
    assert isinstance(promote(house), ChannelMove)


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize(
    ("namespace", "why"),
    [
        (PRIVATE, "the conflict check of its inputs says warn"),
        (OTHER, "it is in a private namespace, and its verdict is not shown"),
    ],
)
def test_a_composition_of_a_composition_has_no_better_verdict_than_that_one(
    house: House, namespace: str, why: str
) -> None:
    """Composed alone, an adapter has no conflict with anything."""
    demand(house, verdict="ok")
    with house.resources.write() as session:
        alone, both, *_ = session.scalars(select(Composition).order_by(Composition.id))
        alone.conflicts, both.conflicts = {"verdict": "ok"}, {"verdict": "warn"}
        old, new = (
            releases.find(session, NAME, OLD).id,
            releases.find(session, RepositoryName(namespace, "sql"), NEW).id,
        )
        session.add(ReleaseInput(release_id=old, input_id=new, composition_id=alone.id, weight=1.0))
        session.add(ReleaseInput(release_id=new, input_id=new + 1, composition_id=both.id, weight=1.0))
    assert refusal(house) == [f"verdict ok: for an input that was composed before: {why}"]


def test_a_refusal_does_not_count_what_may_still_come_as_failed(house: House) -> None:
    demand(house, rules=["exact.nll <= 0.1"], approval={"role": "releaser", "count": 1}, verdict="ok")
    with pytest.raises(Refused, match=r"fails 1 of 3 gates of acme/sql@prod"):
        promote(house)


def test_a_reported_score_does_not_count_where_a_measured_one_is_asked_for(house: House) -> None:
    demand(house, rules=["exact.accuracy >= 0.5"], measured=True)
    with house.resources.write() as session:
        release, suite = releases.find(session, NAME, OLD), suites.find(session, "exact")
        reported = Measurement(suite.digest, "accuracy", 0.9, None, 1, True, reported=True)
        suites.record(session, person(house), release, [reported])
    began = waiting(house)
    with house.resources.write() as session:
        suites.record(session, person(house), session.get_one(Release, release.id), [replace(reported, reported=False)])
    settle_on_base(house.resources, release.base_digest)
    assert seen(house, began)[0] == "completed"
    with house.resources.read() as session:
        (job,) = session.scalars(select(Job).where(Job.kind == "evaluation"))
        assert job.state == "queued"
    with house.resources.write() as session, pytest.raises(Conflict, match="is measured"):
        suites.record(session, person(house), session.get_one(Release, release.id), [reported])


def test_a_move_that_comes_first_ends_it_as_a_conflict_and_a_rollback_is_never_blocked(house: House) -> None:
    demand(house, rules=["exact.accuracy >= 0.5"])
    first = waiting(house)
    with house.resources.write() as session:
        moves.roll_back(session, person(house), repositories.find(session, NAME), "prod")
    assert seen(house, first) == ("conflict", "channel_moved")
    second = waiting(house, NEW)
    promote(house, NEW, force=True, reason="now")
    assert seen(house, second) == ("conflict", "channel_moved")
    with house.resources.read() as session:
        rows = list_oldest_first(session, EventQuery(subject=f"{NAME}@prod", act="promotion:end"))
        assert [(row.actor, row.after) for row in rows] == [("releaser", {"state": "conflict"})] * 2


def test_a_newer_request_replaces_it_and_it_can_be_cancelled_and_expires(house: House) -> None:
    demand(house, rules=["exact.accuracy >= 0.5"])
    first, second = waiting(house), waiting(house)
    assert (seen(house, first), seen(house, second)) == (("replaced", "promotion_replaced"), ("pending", ""))
    with house.resources.write() as session:
        job_id = session.get_one(Promotion, second).job_id
        assert session.get_one(Promotion, first).job_id == job_id, "what is being measured is not queued again"
        promotions.cancel(session, person(house), session.get_one(Promotion, second))
        with pytest.raises(RegistryError) as caught:
            promotions.cancel(session, person(house), session.get_one(Promotion, second))
        assert (caught.value.code, session.get_one(Job, job_id).state) == ("promotion_ended", "cancelled")
    assert seen(house, second) == ("cancelled", "promotion_cancelled")
    third = waiting(house)
    settle_due(later(house, NOW + 23 * HOUR))
    assert seen(house, third)[0] == "pending"
    settle_due(later(house, NOW + 24 * HOUR))
    assert seen(house, third) == ("expired", "promotion_expired")


@pytest.mark.parametrize("shown", ["/v1/adapters/acme/sql/channels/prod/promotions", "/acme/sql@prod"])
def test_a_look_at_one_that_has_expired_ends_it_though_no_worker_runs(house: House, shown: str) -> None:
    demand(house, rules=["exact.accuracy >= 0.5"])
    promotion_id = waiting(house)
    for at, state in ((NOW + 23 * HOUR, "pending"), (NOW + 24 * HOUR, "expired")):
        with InProcessTransport(create_app(later(house, at))) as transport:
            http = httpx2.Client(base_url="http://localhost", transport=transport)
            answer = http.get(shown, headers={"Accept": "text/html" if "@" in shown else "application/json"})
            assert answer.status_code == 200
            waits = '"state":"pending"' in answer.text or "It is promoted by itself" in answer.text
            assert (waits, seen(house, promotion_id)[0]) == (state == "pending", state)
            one = http.get(f"/v1/adapters/{NAME}/channels/prod/promotions/{promotion_id}").json()
            assert one["state"] == state
    assert one["error"]["code"] == "promotion_expired"
    with house.resources.read() as session:
        (row,) = list_oldest_first(session, EventQuery(subject=f"{NAME}@prod", act="promotion:end"))
        assert (row.actor, row.after) == ("releaser", {"state": "expired"})


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize("how", ["expired", "conflict", "replaced"])
def test_what_a_promotion_queued_to_be_measured_ends_with_it(house: House, how: str) -> None:
    demand(house, rules=["exact.accuracy >= 0.5"])
    began = waiting(house)
    if how == "expired":
        settle_due(later(house, NOW + 24 * HOUR))
    elif how == "conflict":
        promote(house, force=True, reason="now")
    else:
        demand(house, approval={})
        waiting(house)
    assert seen(house, began)[0] == how
    with house.resources.read() as session:
        job_id = session.get_one(Promotion, began).job_id
        assert session.get_one(Job, job_id).state == "cancelled"


def test_cancelling_a_promotion_leaves_the_evaluation_that_somebody_else_asked_for(house: House) -> None:
    demand(house, rules=["exact.accuracy >= 0.5"])
    asked = evaluations.request(
        later(house, NOW - HOUR), person(house, at=NOW - HOUR), [f"{NAME}:{OLD}"], [], ["exact"]
    )
    began = waiting(house)
    with house.resources.write() as session:
        promotion = session.get_one(Promotion, began)
        assert promotion.job_id == asked["job"]
        promotions.cancel(session, person(house), promotion)
        assert session.get_one(Job, asked["job"]).state == "queued"


@pytest.mark.on("PostgreSQL")
def test_rights_and_the_policy_are_judged_again_when_it_completes(house: House) -> None:
    demand(house, approval={"role": "releaser"})
    first = waiting(house)
    with house.resources.write() as session:
        release = releases.find(session, NAME, OLD)
        with pytest.raises(NotAllowed, match="someone else"):
            promotions.approve(session, person(house), release, "prod", "")
        promotions.approve(session, person(house, "admin", NOW + HOUR), release, "prod", "")
        namespaces.set_member(session, HOST, PRIVATE, "admin", Role.PUBLISHER)
    settle(house.resources, first)
    with house.resources.read() as session:
        (result,) = session.get_one(Promotion, first).gates
        assert (result["waiting"], result["detail"]) == (True, "0 of 1; admin no longer has the role")
    demand(house, rules=["exact.nll <= 0.1"])
    settle(house.resources, first)
    assert seen(house, first) == ("refused", "gate_failed")
    demand(house, approval={"role": "publisher"})
    with house.resources.write() as session:
        tokens.revoke(session, replace(HOST, name="operator"), house.ids["releaser"])
        wanted = PromotionRequest(NAME, OLD, "edge")
        scope = policies.scope_of(repositories.find(session, NAME), "edge")
        policies.set_policy(session, HOST, scope, read_policy({"version": 1, "approval": {}}, "p"))
        second = promotions.request(session, person(house), wanted)
    settle(house.resources, second.id)
    assert seen(house, second.id) == ("refused", "role_lost")


def test_rules_that_a_gate_had_before_policies_refuse_what_lacks_a_score(house: House) -> None:
    with house.resources.write() as session:
        repository = repositories.find(session, NAME)
        session.add(Gate(repository_id=repository.id, channel="prod", rules=["exact.accuracy >= 0.5"], policy=None))
    assert refusal(house) == [
        "exact.accuracy >= 0.5: no accuracy on the current exact: run `adaptory eval REF --suite exact`"
    ]
    with house.resources.write() as session:
        policies.set_rules(session, HOST, policies.scope_of(repository, "prod"), ["exact.nll <= 9"])
        assert policies.find(session, policies.scope_of(repository, "prod")).policy.missing == "refuse"
    assert isinstance(promote(house), ChannelMove)
    demand(house, rules=["exact.accuracy >= 0.5"], approval={})
    with house.resources.write() as session:
        policies.set_rules(session, HOST, policies.scope_of(repository, "prod"), [])
        stored = policies.find(session, policies.scope_of(repository, "prod"))
        assert (stored.policy.rules, stored.policy.approval is not None, stored.revision) == ((), True, 4)


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize(
    ("force", "advice"), [("releaser", "a releaser may"), ("admin", "an admin may"), ("never", "allows nobody to")]
)
def test_a_refusal_advises_a_force_that_the_policy_allows(house: House, force: str, advice: str) -> None:
    demand(house, rules=["exact.nll <= 0.1"], force=force)
    with pytest.raises(Refused) as caught:
        promote(house)
    assert advice in caught.value.next_step


@pytest.mark.on("PostgreSQL")
def test_a_repeated_request_gets_the_promotion_that_it_began(house: House) -> None:
    demand(house, approval={})
    path = f"/v1/adapters/{NAME}/channels/prod"
    sent = {"json": {"version": str(OLD)}, "headers": {"Idempotency-Key": "k1"}}
    first, again = (house.ask("releaser", "PUT", path, **sent) for _ in range(2))
    assert (first.status_code, again.status_code, first.json()) == (202, 202, again.json())
    cancelled = house.ask("releaser", "POST", f"{path}/promotions/{first.json()['id']}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert house.ask("releaser", "PUT", path, **sent).json()["state"] == "cancelled"
    (row,) = house.ask("reader", "GET", f"{path}/promotions").json()["items"]
    assert row["error"]["code"] == "promotion_cancelled"


@pytest.mark.on("PostgreSQL")
def test_an_evaluation_that_fails_ends_the_promotion_with_its_reason(house: House) -> None:
    demand(house, rules=["exact.accuracy >= 0.5"])
    began = waiting(house)
    assert run_one(house.resources, KINDS, "worker")
    settle(house.resources, began)
    assert seen(house, began) == ("refused", "gate_failed")
    with house.resources.read() as session:
        (result,) = session.get_one(Promotion, began).gates
        assert "job" in result["detail"]
        assert "cannot find the base" in result["detail"]


@pytest.mark.on("PostgreSQL")
def test_the_evaluation_of_an_input_of_another_namespace_is_shown_to_its_requester_alone(house: House) -> None:
    with house.resources.write() as session:
        release, made = releases.find(session, NAME, OLD), session.scalars(select(Composition)).first()
        used = releases.find(session, RepositoryName(OTHER, "sql"), OLD)
        assert made is not None
        session.add(ReleaseInput(release_id=release.id, input_id=used.id, composition_id=made.id, weight=1.0))
    demand(house, rules=["exact.accuracy within 1 of inputs"])
    both = replace(person(house), grants={PRIVATE: "releaser", OTHER: "publisher"})
    with house.resources.write() as session:
        began = promotions.request(session, both, PromotionRequest(NAME, OLD, "prod"))
        assert isinstance(began, Promotion)
        job = session.get_one(Job, began.job_id)
        assert (job.kind, job.namespace) == ("evaluation", None)
        job.state, job.error = "failed", {"detail": f"a role in {OTHER} was lost"}
        with pytest.raises(NotFound):
            compositions.permit_job(session, replace(person(house), name="colleague"), job)
        compositions.permit_job(session, both, job)
    settle(house.resources, began.id)
    with house.resources.read() as session:
        gates = session.get_one(Promotion, began.id).gates
        assert gates
        assert not [gate for gate in gates if OTHER in str(list(gate.values()))]


def test_a_promotion_does_not_fail_with_an_evaluation_that_somebody_else_asked_for_and_cancels(house: House) -> None:
    demand(house, rules=["exact.accuracy >= 0.5"])
    asked = evaluations.request(house.resources, person(house, "admin"), [f"{NAME}:{OLD}"], [], ["exact"])["job"]
    began = waiting(house)
    with house.resources.write() as session:
        assert session.get_one(Promotion, began).job_id == asked
        compositions.cancel_job(session, person(house, "admin"), session.get_one(Job, asked))
    settle(house.resources, began)
    with house.resources.read() as session:
        promotion = session.get_one(Promotion, began)
        assert (promotion.state, promotion.job_id) == ("pending", asked + 1)
        assert session.get_one(Job, asked + 1).created_by == "releaser"


@pytest.mark.on("PostgreSQL")
def test_a_metric_that_workers_do_not_measure_is_waited_for_without_a_job(house: House) -> None:
    with house.resources.write() as session:
        release, suite = releases.find(session, NAME, OLD), suites.find(session, "exact")
        score = Measurement(suite.digest, "rouge_l", 0.4, None, 1, True)
        suites.record(session, HOST, releases.find(session, NAME, NEW), [score])
    demand(house, rules=["exact.rouge_l >= 0.5"])
    began = waiting(house)
    with house.resources.write() as session:
        assert session.get_one(Promotion, began).job_id is None
        suites.record(session, person(house), session.get_one(Release, release.id), [replace(score, value=0.3)])
        digest = bases.find(session, "tiny").digest
    settle_on_base(house.resources, digest)
    assert seen(house, began) == ("refused", "gate_failed")


def test_a_task_of_a_harness_is_waited_for_without_a_job_that_could_not_run_it(house: House) -> None:
    harness = {"name": "lm-eval", "version": "0.4.13"}
    documents = {"count": 10, "sha256": "0" * 64}
    task = parse_content({"name": "arc", "task": "harness", "harness": harness, "config": {}, "documents": documents})
    with house.resources.write() as session:
        suite_registration.add(session, HOST, task)
        older = releases.find(session, NAME, OLD).id
        score = Measurement(task.digest, "accuracy", 0.6, None, 10, True, source="lm-eval 0.4.13")
    demand(house, rules=["arc.accuracy >= 0.5"], min_n=10)
    began = waiting(house)
    with house.resources.write() as session:
        assert session.get_one(Promotion, began).job_id is None
        suites.record(session, person(house), session.get_one(Release, older), [score])
        digest = bases.find(session, "tiny").digest
        with pytest.raises(Conflict, match="arc is a task of an evaluation harness"):
            suite_registration.add(
                session, HOST, Suite(name="arc", kind="target", chat=False, examples=(Example("a", "b"),))
            )
    settle_on_base(house.resources, digest)
    assert seen(house, began) == ("completed", "")


def test_of_many_that_complete_it_one_does_and_a_rollback_beside_them_ends_it_or_follows(house: House) -> None:
    for turn in range(8):
        demand(house)
        promote(house, NEW)
        demand(house, approval={})
        began = waiting(house, OLD)
        demand(house)  # no rule is left: the next to judge it completes it

        def roll_back(turn: int = turn) -> None:
            with house.resources.write() as session:
                moves.roll_back(session, person(house), repositories.find(session, NAME), "prod", reason=f"{turn}")

        with ThreadPoolExecutor(5) as pool:
            jobs = [pool.submit(settle, house.resources, began) for _ in range(4)]
            jobs.insert(turn % 4, pool.submit(roll_back))
            for job in jobs:
                job.result()
        with house.resources.read() as session:
            row = session.get_one(Promotion, began)
            back = session.scalars(select(Move).where(Move.reason == f"{turn}")).one()
            newer = (Move.channel_id == row.channel_id, Move.id > row.expected_move)
            made = session.scalars(select(Move).where(*newer).order_by(Move.id)).all()
            if row.state == "completed":
                assert [move.id for move in made] == [row.move_id, back.id]
                assert (made[0].to_release_id, made[0].below_id) == (row.release_id, row.expected_move)
            else:
                assert (row.state, row.move_id, [move.id for move in made]) == ("conflict", None, [back.id])


def _settle_and_die(environ: dict[str, str], promotion_id: int) -> None:
    resources = opened(environ)
    with resources.write() as session:
        row = promotions.settle(session, promotion_id, NOW)
        assert (row.state, row.move_id is not None) == ("completed", True)
        os._exit(9)


def test_a_process_that_dies_while_it_completes_one_leaves_it_waiting_for_the_next(house: House) -> None:
    demand(house, approval={})
    began = waiting(house)
    demand(house)
    with house.resources.read() as session:
        before = session.scalar(select(func.count()).select_from(Move))
    process = start(_settle_and_die, house.environ, dict(house.environ), began)
    process.join(60)
    assert process.exitcode == 9
    with house.resources.read() as session:
        assert (session.scalar(select(func.count()).select_from(Move)), seen(house, began)[0]) == (before, "pending")
    settle(house.resources, began)
    settle(house.resources, began)
    with house.resources.read() as session:
        assert session.scalar(select(func.count()).select_from(Move)) == (before or 0) + 1
        assert pending.list_page(session, repositories.find(session, NAME), "prod", before=0, limit=9)[0].id == began
    assert seen(house, began)[0] == "completed"
