"""Gate rules keep their meaning from when they were set, whatever the author of a suite changes later."""

from typing import Any

import pytest

from composer.formats.recipes.suite import Suite
from registry.database.tables import Evaluation, Promotion
from registry.domain.access.audit import Actor, EventQuery, list_oldest_first
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.catalog import bases, releases, suite_registration, suites
from registry.domain.catalog.suites import Measurement
from registry.domain.channels.serving import ChannelMove
from registry.errors import RegistryError
from registry.formats.references import Version
from registry.transfer.promotions import settle_on_base
from tests.access.house import HOST, NOW, House
from tests.registry.domain.test_waiting_promotions import (
    NAME,
    NEW,
    OLD,
    demand,
    promote,
    refusal,
    seen,
    waiting,
)

AUTHOR = Actor("eve", NOW, {EVERYWHERE: Role.PUBLISHER.value})
"""An author whom no admin of the namespace chose."""
CHANNEL = f"/v1/adapters/{NAME}/channels/prod"


def publish(house: House, completion: str = "b", better: str = "higher", **fields: Any) -> str:
    """The author's suite; returns the digest of its content."""
    examples = [{"prompt": "a", "completion": completion}]
    document = {"name": "theirs", "kind": "target", "chat": False, "examples": examples, "metrics": {"rouge": better}}
    with house.resources.write() as session:
        return suite_registration.add(session, AUTHOR, Suite.from_json({**document, **fields}))[0].digest


def record(house: House, version: Version, digest: str, value: float, better: bool = True) -> None:
    with house.resources.write() as session:
        score = Measurement(digest, "rouge", value, None, 1, better)
        suites.record(session, HOST, releases.find(session, NAME, version), [score])


def repin(house: House) -> int:
    answer = house.ask("admin", "PUT", f"/v1/adapters/{NAME}/gates", json={"channel": "prod", "repin": True})
    return answer.status_code


def test_who_flips_a_metric_does_not_let_a_worse_release_pass(house: House) -> None:
    digest = publish(house)
    record(house, NEW, digest, 0.9)
    record(house, OLD, digest, 0.1)
    demand(house, rules=["theirs.rouge within 0.1 of served"])
    (before,) = refusal(house)
    publish(house, better="lower")
    (after,) = refusal(house)
    assert after.startswith(before)
    assert "pinned to higher rouge being better, which is now lower" in after
    assert f"`adaptory gate {NAME}@prod --repin` accepts the change" in after
    shown = house.ask("reader", "GET", f"{CHANNEL}/policy").json()["pins"]["theirs"]
    assert (shown["digest"], shown["higher_is_better"]) == (digest, {"rouge": True})
    assert "is now lower" in shown["changed"]
    demand(house, rules=["theirs.rouge within 0.1 of served"], min_n=1)
    assert refusal(house) == [after], "another change of the policy keeps the pins"
    assert repin(house) == 200
    assert isinstance(promote(house), ChannelMove)


def test_whose_suite_is_no_longer_a_guard_does_not_spare_the_first_release_the_comparison_with_the_base(
    house: House,
) -> None:
    digest = publish(house, kind="guard")
    with house.resources.write() as session:
        for subject, value in ((releases.find(session, NAME, OLD), 9.0), (bases.find(session, "tiny"), 1.0)):
            suites.record(session, HOST, subject, [Measurement(digest, "nll", value, None, 1, False)])
    demand(house, "fresh", rules=["theirs.nll within 0.1 of served"])
    (before,) = refusal(house, OLD, "fresh")
    publish(house, "c", kind="target")
    (after,) = refusal(house, OLD, "fresh")
    assert after.startswith(before)
    assert "the base counts" in after


def test_scores_on_the_pinned_content_count_after_the_suite_has_moved_on_until_the_rule_is_pinned_again(
    house: House,
) -> None:
    old = publish(house)
    record(house, OLD, old, 0.9)
    demand(house, rules=["theirs.rouge >= 0.5"])
    new = publish(house, "c", version="2.0.0")
    record(house, NEW, new, 0.9)
    moved = promote(house)
    assert isinstance(moved, ChannelMove)
    assert f"pinned to theirs {old[:12]}, which is now 2.0.0" in moved.gates[0]["detail"]
    began = waiting(house, NEW)
    with house.resources.read() as session:
        (result,) = session.get_one(Promotion, began).gates
        assert f"on theirs {old[:12]} is missing" in result["detail"]
        base = bases.find(session, "tiny").digest
    assert repin(house) == 200
    settle_on_base(house.resources, base)
    assert seen(house, began)[0] == "completed"
    assert house.ask("reader", "GET", f"{CHANNEL}/policy").json()["pins"]["theirs"]["digest"] == new
    with house.resources.read() as session:
        rows = list_oldest_first(session, EventQuery(subject=f"{NAME}@prod", act="gate:set"))
        assert [row.detail["pins"]["theirs"]["digest"] for row in rows] == [new]


def test_a_missing_score_is_measured_on_the_pinned_content(house: House) -> None:
    old = publish(house)
    demand(house, rules=["theirs.nll <= 9", "theirs.nll within 1 of base"])
    publish(house, "c")
    began = waiting(house)
    with house.resources.read() as session:
        job = session.get_one(Promotion, began).job_id
        wanted = session.get_one(Evaluation, job).wanted
    assert {row["suite"] for row in wanted} == {old}
    assert len(wanted) == 2


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("DIGEST.nll <= 9", "a digest is not a name"),
        ("exact.accuracy >= 1.01", "accuracy is from 0 to 1"),
        ("exact.nll <= -0.1", "nll is from 0 to inf"),
        ({"rule": "exact.nll <= 9", "min_n": 5}, "5 examples are needed, and exact has 1"),
    ],
)
def test_a_rule_that_can_never_pass_is_refused(house: House, rule: Any, why: str) -> None:
    with house.resources.read() as session:
        digest = suites.find(session, "exact").digest
    named = rule.replace("DIGEST", digest) if isinstance(rule, str) else rule
    answer = house.ask("admin", "PUT", f"{CHANNEL}/policy", json={"version": 1, "rules": [named]})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_rule"), answer.text
    assert f"can never pass: {why}" in answer.json()["detail"]
    demand(house, rules=["exact.accuracy >= 1", "exact.nll <= 0"])


def test_rules_that_say_nothing_are_not_a_change(house: House) -> None:
    answer = house.ask("admin", "PUT", f"/v1/adapters/{NAME}/gates", json={"channel": "prod"})
    assert 400 <= answer.status_code < 500
    with pytest.raises(RegistryError, match="theirs"):
        demand(house, rules=["theirs.rouge >= 0.5"])
