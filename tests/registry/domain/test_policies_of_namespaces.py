"""A namespace's policy holds for the channels of one name in all of its repositories, beside each repository's own."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from registry.domain.access.audit import Actor, EventQuery, list_oldest_first
from registry.domain.catalog import releases, repositories
from registry.domain.channels import moves, promotions
from registry.domain.channels.policy import policies
from registry.domain.channels.policy.judging import PromotionRequest
from registry.domain.channels.serving import ChannelMove, due_move, find_channel
from registry.errors import Invalid, NotAllowed, NotFound, Refused, RegistryError, Stale, Usage
from registry.formats.channel_policy import read_policy
from registry.formats.references import PolicyScope, RepositoryName, Version, parse_policy_scope
from tests.access.house import HOST, NOW, OTHER, PRIVATE, House

NAME = RepositoryName(PRIVATE, "sql")
OLD, NEW = Version(1, 0, 0), Version(1, 1, 0)
SHARED = parse_policy_scope(f"{PRIVATE}/*@prod")
OWN = PolicyScope(PRIVATE, "sql", "prod")
DAY = timedelta(days=1)


def demand(house: House, scope: PolicyScope = SHARED, **fields: Any) -> None:
    with house.resources.write() as session:
        policies.set_policy(session, HOST, scope, read_policy({"version": 1, **fields}, "policy"))


def attempt(house: House, actor: Actor = HOST, version: Version = OLD, **options: Any) -> object:
    with house.resources.write() as session:
        return promotions.request(session, actor, PromotionRequest(NAME, version, "prod", **options))


def failed(house: House, **options: Any) -> list[tuple[str, str | None]]:
    """The rules that a promotion fails, each with the namespace's policy that it is from."""
    with pytest.raises(Refused) as caught:
        attempt(house, **options)
    return [(row["rule"], row.get("policy")) for row in caught.value.findings if not row["passed"]]


@pytest.mark.on("SQLite", "PostgreSQL")
def test_a_release_must_meet_its_namespaces_policy_and_its_repositorys(house: House) -> None:
    demand(house, rules=["exact.nll <= 0.1"], missing="refuse")
    demand(house, OWN, rules=["exact.nll <= 0.2"], missing="refuse")
    assert failed(house) == [("exact.nll <= 0.2", None), ("exact.nll <= 0.1", str(SHARED))]
    demand(house, rules=["exact.nll <= 9"])
    assert failed(house) == [("exact.nll <= 0.2", None)]
    demand(house, OWN)
    assert isinstance(attempt(house), ChannelMove)


def test_a_repository_that_is_made_later_is_held_by_it(house: House) -> None:
    demand(house, signature="release")
    later = RepositoryName(PRIVATE, "new")
    with house.resources.write() as session:
        source = releases.find(session, NAME, OLD)
        made = repositories.find_or_create(session, HOST, later, repositories.Kind.ADAPTER)
        assert policies.in_force(session, made, "prod", NOW)[SHARED].signature == "release"
        assert SHARED not in policies.in_force(session, made, "staging", NOW)
        assert source.repository_id != made.id


@pytest.mark.on("PostgreSQL")
def test_the_strictest_policy_that_fails_says_who_may_force(house: House) -> None:
    releaser = Actor("releaser", NOW, {PRIVATE: "releaser"}, token_id=house.ids["releaser"])
    demand(house, rules=["exact.nll <= 0.1"], force="never")
    demand(house, OWN, rules=["exact.nll <= 0.2"], force="releaser")
    with pytest.raises(NotAllowed, match=r"The policy of .*/\*@prod allows nobody to force a promotion"):
        attempt(house, releaser, force=True, reason="urgent")
    demand(house, rules=["exact.nll <= 9"], approval={})
    # an approval is missing, so nobody may go past the namespace's policy either
    with pytest.raises(NotAllowed):
        attempt(house, releaser, force=True, reason="urgent")
    demand(house, rules=["exact.nll <= 9"])
    assert isinstance(attempt(house, releaser, force=True, reason="urgent"), ChannelMove)


@pytest.mark.on("SQLite", "PostgreSQL")
def test_an_exception_lifts_it_for_one_repository_until_its_end(house: House) -> None:
    demand(house, rules=["exact.nll <= 0.1"], missing="refuse")
    with house.resources.write() as session:
        repository = repositories.find(session, NAME)
        policies.grant_exception(session, HOST, repository, "prod", NOW + DAY, "the model is being retrained")
        other = repositories.find_or_create(session, HOST, RepositoryName(PRIVATE, "new"), repositories.Kind.ADAPTER)
        assert SHARED in policies.in_force(session, other, "prod", NOW)
        [(scope, row)] = policies.exceptions_of_namespace(session, PRIVATE, NOW)
        assert (str(scope), row.reason) == (str(OWN), "the model is being retrained")
    assert failed(house, actor=replace(HOST, at=NOW + 2 * DAY)) == [("exact.nll <= 0.1", str(SHARED))]
    assert isinstance(attempt(house), ChannelMove)
    with house.resources.write() as session:
        policies.end_exception(session, HOST, repositories.find(session, NAME), "prod")
    assert failed(house, version=NEW) == [("exact.nll <= 0.1", str(SHARED))]
    with house.resources.read() as session:
        acts = list_oldest_first(session, EventQuery(act="policy:except"))
    assert [(row.subject, bool(row.after), bool(row.before)) for row in acts] == [
        (str(OWN), True, False),
        (str(OWN), False, True),
    ]


@pytest.mark.parametrize(
    ("until", "reason", "error"),
    [(NOW - DAY, "because", Usage), (NOW + 400 * DAY, "because", Usage), (NOW + DAY, "  ", Usage)],
)
def test_an_exception_needs_a_reason_and_an_end_within_a_year(
    house: House, until: Any, reason: str, error: type[RegistryError]
) -> None:
    demand(house)
    with house.resources.write() as session, pytest.raises(error):
        policies.grant_exception(session, HOST, repositories.find(session, NAME), "prod", until, reason)


def test_an_exception_from_no_policy_is_refused(house: House) -> None:
    with house.resources.write() as session, pytest.raises(NotFound, match="no policy for channels named prod"):
        policies.grant_exception(session, HOST, repositories.find(session, NAME), "prod", NOW + DAY, "because")


@pytest.mark.on("PostgreSQL")
def test_an_approval_that_only_the_namespace_requires_counts(house: House) -> None:
    demand(house, approval={"role": "releaser"})
    promotion = attempt(house)
    assert isinstance(promotion, promotions.Promotion)
    releaser = Actor("releaser", NOW, {PRIVATE: "releaser"}, token_id=house.ids["releaser"])
    with house.resources.write() as session:
        promotions.approve(session, releaser, releases.find(session, NAME, OLD), "prod", "checked")
        assert promotions.settle(session, promotion.id, NOW).state == "completed"


def test_a_yanked_release_stays_where_the_namespace_says_keep_and_the_repository_says_nothing(house: House) -> None:
    demand(house, on_yank="keep")
    with house.resources.write() as session:
        repository = repositories.find(session, NAME)
        channel = find_channel(session, repository, "prod")
        release = releases.find(session, NAME, NEW)
        release.yanked = True
        session.flush()
        kept = due_move(session, channel)
        assert kept is not None
        assert kept.to_release_id == release.id
    demand(house, OWN, on_yank="fall_back")
    with house.resources.read() as session:
        fallen = due_move(session, find_channel(session, repositories.find(session, NAME), "prod"))
        assert fallen is not None
        assert fallen.to_release.version == str(OLD)


def test_a_policy_of_a_namespace_that_does_not_exist_is_refused(house: House) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        demand(house, PolicyScope("nowhere", "*", "prod"))
    with pytest.raises(Invalid):
        demand(house, rules=["exact.nll <= 9"], no_such_field=1)


@pytest.mark.on("PostgreSQL")
def test_no_promotion_is_logged_after_the_stricter_policy_that_it_was_not_judged_by(house: House) -> None:
    """A promotion that was judged by the old policy has the earlier row, however the two race."""
    demand(house)
    for scope in (SHARED, OWN):
        promoted = [_race(house, scope, ahead=number % 2 == 0) for number in range(6)]
        while not any(promoted) and len(promoted) < 60:  # a busy machine may let the policy win each time
            promoted.append(_race(house, scope, ahead=True))
    with house.resources.read() as session:
        rows = list_oldest_first(session, EventQuery(), limit=1000)
    strict: dict[str, bool] = {}
    moved = 0
    for row in rows:
        if row.act == "policy:set":
            strict[row.subject] = bool((row.after or {}).get("rules"))
        elif row.act == "channel:promote" and strict:
            moved += 1
            assert not any(strict.values()), f"row {row.id} promotes although {strict}"
    assert moved


def _race(house: House, scope: PolicyScope, *, ahead: bool) -> bool:
    """Promotes while the policy becomes stricter; returns whether the promotion came first. The thread that comes last
    to the barrier goes on first: with `ahead`, that is most often the promotion's."""
    demand(house, scope)
    with house.resources.write() as session:
        channel = find_channel(session, repositories.find(session, NAME), "prod")
        served = moves.current_move(session, channel).to_release.version
    version = OLD if served == str(NEW) else NEW
    start = threading.Barrier(2)

    def promote() -> bool:
        start.wait()
        with suppress(Refused, Stale):
            attempt(house, version=version)
            return True
        return False

    def tighten() -> bool:
        start.wait()
        demand(house, scope, rules=["exact.nll <= 0.1"], missing="refuse")
        return False

    with ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(each) for each in ((tighten, promote) if ahead else (promote, tighten))]
        results = [each.result() for each in begun]
    demand(house, scope)
    return any(results)


def _put(house: House, caller: str, path: str, body: Mapping[str, Any]) -> int:
    return house.ask(caller, "PUT", path, json=body).status_code


def test_only_admins_of_the_namespace_set_it_and_its_readers_see_it_with_each_channel(house: House) -> None:
    path = f"/v1/namespaces/{PRIVATE}/policies/prod"
    assert [_put(house, caller, path, {"version": 1, "approval": {}}) for caller in ("releaser", "admin")] == [403, 200]
    shown = house.ask("reader", "GET", f"/v1/adapters/{NAME}/channels/prod/policy").json()["shared"]
    assert (shown["namespace"], shown["channel"], shown["policy"]) == (PRIVATE, "prod", {"version": 1, "approval": {}})
    until = {"until": (datetime.now(UTC) + DAY).isoformat(), "reason": "because"}
    exception = f"/v1/adapters/{NAME}/channels/prod/policy/exception"
    assert [_put(house, caller, exception, until) for caller in ("releaser", "admin")] == [403, 200]
    [listed] = house.ask("reader", "GET", f"/v1/namespaces/{PRIVATE}/policies").json()["policies"]
    assert [row["repository"] for row in listed["exceptions"]] == [str(NAME)]
    assert house.ask("reader", "GET", f"/v1/namespaces/{OTHER}/policies").status_code == 404
