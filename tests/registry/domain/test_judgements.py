"""A judgement shows the outcome of a promotion, and changes nothing; the promotion that follows agrees."""

from typing import Any

import pytest
from sqlalchemy import func, select

from registry.database.tables import AuditRow, Channel, Job, Move, Namespace, Promotion, ReleaseInput
from registry.domain.catalog import releases, suites
from registry.domain.catalog.suites import Measurement
from registry.domain.channels import withdrawals
from registry.domain.channels.policy import policies
from registry.domain.channels.serving import ChannelMove
from registry.errors import Refused
from registry.formats.channel_policy import read_policy
from registry.formats.references import RepositoryName, Version
from tests.access.house import HOST, PRIVATE, PUBLIC, House
from tests.registry.domain.test_waiting_promotions import NAME, NEW, OLD, demand, promote

WRITTEN = (AuditRow, Channel, Move, Promotion, Job)


def judged(house: House, version: Version = OLD, channel: str = "prod", caller: str = "reader") -> dict[str, Any]:
    """The judgement that a caller gets; it must not write anything."""
    before = written(house)
    path = f"/v1/adapters/{NAME}/channels/{channel}/judgement"
    answer = house.ask(caller, "GET", path, params={"version": str(version)})
    assert answer.status_code == 200, answer.text
    assert written(house) == before
    assert answer.headers["ETag"] == f'"{answer.json()["move"]}-{answer.json()["served"] or "none"}"'
    return answer.json()


def written(house: House) -> list[int]:
    with house.resources.read() as session:
        return [session.scalar(select(func.count()).select_from(table)) or 0 for table in WRITTEN]


@pytest.mark.parametrize(
    ("policy", "verdict"),
    [
        ({}, "passes"),
        ({"rules": ["exact.nll <= 9"]}, "passes"),
        ({"rules": ["exact.nll <= 0.1", "exact.nll within 0.1 of served"]}, "refused"),
        ({"rules": ["exact.accuracy >= 0.5"]}, "waits"),
        ({"rules": ["exact.accuracy >= 0.5"], "missing": "refuse"}, "refused"),
        ({"approval": {"role": "releaser", "count": 1}}, "waits"),
        ({"soak": [{"channel": "prod", "hours": 1}]}, "refused"),
        ({"soak": [{"channel": "nightly", "hours": 1}]}, "refused"),
    ],
)
def test_the_promotion_that_follows_does_what_was_judged(house: House, policy: dict[str, Any], verdict: str) -> None:
    demand(house, **policy)
    before = judged(house)
    assert (before["verdict"], before["served"], before["error"]) == (verdict, "1.1.0", None)
    assert before["move"] == house.ask("reader", "GET", f"/v1/adapters/{NAME}/channels/prod").json()["move"]
    if verdict == "refused":
        with pytest.raises(Refused) as caught:
            promote(house)
        assert [dict(finding) for finding in caught.value.findings] == before["gates"]
    else:
        outcome = promote(house)
        assert isinstance(outcome, ChannelMove) is (verdict == "passes")
        assert [gate["rule"] for gate in outcome.gates] == [gate["rule"] for gate in before["gates"]]
        assert [gate["passed"] for gate in outcome.gates] == [gate["passed"] for gate in before["gates"]]


def test_what_the_channel_serves_waits_for_nothing(house: House) -> None:
    demand(house, rules=["exact.accuracy >= 0.5"])
    assert (judged(house, NEW)["verdict"], judged(house, OLD)["verdict"]) == ("passes", "waits")


def test_a_channel_that_does_not_exist_is_judged_as_an_empty_one(house: House) -> None:
    demand(house, "canary", rules=["exact.nll within 0.1 of served", "exact.nll <= 9"])
    seen = judged(house, channel="canary")
    assert (seen["verdict"], seen["served"], seen["move"]) == ("passes", None, 0)
    assert "serves nothing yet" in seen["gates"][0]["detail"]
    assert (seen["gates"][1]["value"], seen["gates"][1]["limit"], seen["gates"][1]["at_least"]) == (0.5, 9.0, False)


@pytest.mark.on("PostgreSQL")
def test_a_yank_and_a_missing_signature_refuse_whatever_the_rules_say(house: House) -> None:
    demand(house, rules=["exact.nll <= 9"])
    with house.resources.write() as session:
        withdrawals.yank(session, HOST, releases.find(session, NAME, OLD), "leaks names")
    seen = judged(house)
    assert (seen["verdict"], seen["gates"][0]["passed"], seen["error"]["code"]) == ("refused", True, "release_yanked")
    with house.resources.write() as session:
        session.get_one(Namespace, PRIVATE).require_signature = True
    for version in (OLD, NEW):
        assert judged(house, version)["error"]["code"] == "unsigned"
        with pytest.raises(Refused, match="none of them has signed"):
            promote(house, version)


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize(
    ("channel", "version", "status", "code"),
    [
        ("prod", "9.9.9", 404, "release_unknown"),
        ("c0ffee0", "1.0.0", 400, "bad_name"),
        ("No Such", "1.0.0", 400, "bad_name"),
        ("prod", "one", 400, "bad_version"),
    ],
)
def test_what_no_promotion_could_name_is_an_error(
    house: House, channel: str, version: str, status: int, code: str
) -> None:
    path = f"/v1/adapters/{NAME}/channels/{channel}/judgement"
    answer = house.ask("reader", "GET", path, params={"version": version})
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.on("PostgreSQL")
def test_the_scores_of_hidden_inputs_are_in_no_field(house: House) -> None:
    """PUBLIC's release is composed from one in PRIVATE, whose scores a stranger may not read."""
    composed, source = RepositoryName(PUBLIC, "sql"), RepositoryName(PRIVATE, "sql")
    with house.resources.write() as session:
        made, used = releases.find(session, composed, OLD), releases.find(session, source, OLD)
        session.add(ReleaseInput(release_id=made.id, input_id=used.id, composition_id=None, weight=1.0))
        suite = suites.find(session, "exact")
        secret = Measurement(suite.digest, "nll", 0.4375, 0.03125, 1, False)
        suites.record(session, HOST, used, [secret])
        policy = read_policy({"version": 1, "rules": ["exact.nll within 0.25 of inputs"]}, "policy")
        policies.set_policy(session, HOST, policies.scope_of(made.repository, "prod"), policy)
    path = f"/v1/adapters/{composed}/channels/prod/judgement"
    answer = house.ask("nobody", "GET", path, params={"version": "1.0.0"})
    gate = answer.json()["gates"][0]
    assert gate["passed"], answer.text
    assert (gate["value"], gate["limit"], gate["at_least"], gate["other"], gate["sure"]) == (
        0.5,
        None,
        None,
        None,
        None,
    )
    for number in ("0.4375", "0.6875", "0.0312"):
        assert number not in answer.text
