"""A namespace may require a second admin for changes of its rules, its powerful members, its keys and its files."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from pydantic import TypeAdapter

from registry.database.tables import ChangeRequest
from registry.domain.access import namespaces, quotas, users
from registry.domain.access.audit import Actor, EventQuery, list_oldest_first
from registry.domain.access.namespaces import NamespaceChange
from registry.domain.access.quotas import RetentionPolicy
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.catalog import releases, repositories
from registry.domain.changes import requests
from registry.domain.channels import withdrawals
from registry.domain.channels.policy import policies
from registry.errors import Conflict, NotAllowed, NotFound, Refused, RegistryError, Usage
from registry.formats.channel_policy import read_policy
from registry.formats.references import RepositoryName, Version, parse_policy_scope
from registry.wire.changes import Change
from tests.access.house import HOST, NOW, OTHER, PRIVATE, PUBLIC, House

NAME, VERSION = RepositoryName(PRIVATE, "sql"), Version(1, 0, 0)
SHARED = f"{PRIVATE}/*@prod"
READ: TypeAdapter[Change] = TypeAdapter(Change)
POLICY = {"kind": "policy", "scope": SHARED, "policy": {"version": 1, "signature": "release"}}


def admin(house: House, name: str = "admin", days: float = 0) -> Actor:
    return Actor(name, NOW + timedelta(days=days), {PRIVATE: "admin"}, token_id=house.ids.get(name), mints=True)


SECOND = Actor("second", NOW, {PRIVATE: "admin"})


@pytest.fixture
def two(house: House) -> House:
    """A house whose private namespace requires a second admin; its admins are `admin` and `second`."""
    with house.resources.write() as session:
        namespaces.set_member(session, HOST, PRIVATE, "second", Role.ADMIN)
        namespaces.change(session, HOST, PRIVATE, NamespaceChange(changes="two"))
    return house


def without_registry_admins(house: House) -> None:
    """They are admins of every namespace too."""
    with house.resources.write() as session:
        for user in namespaces.members(session, EVERYWHERE):
            namespaces.set_member(session, HOST, EVERYWHERE, user, None)


def request(house: House, document: dict[str, Any], actor: Actor | None = None) -> int:
    with house.resources.write() as session:
        change = READ.validate_python(document)
        return requests.request(session, actor or admin(house), PRIVATE, change).id


def approve(house: House, request_id: int, actor: Actor = SECOND) -> str:
    with house.resources.write() as session:
        return requests.approve(session, actor, requests.find(session, PRIVATE, request_id)).state


def error_of(house: House, request_id: int) -> str:
    with house.resources.read() as session:
        error = requests.find(session, PRIVATE, request_id).error
        assert error is not None
        return error["code"]


def revision(house: House) -> int:
    with house.resources.read() as session:
        return policies.find(session, parse_policy_scope(SHARED)).revision


def set_alone(house: House, actor: Actor | None = None) -> None:
    with house.resources.write() as session:
        policy = read_policy(POLICY["policy"], "policy")
        policies.set_policy(session, actor or admin(house), parse_policy_scope(SHARED), policy)


def alone(house: House, act: Callable[[Any, Actor], object]) -> str:
    """The error of an admin who acts alone."""
    with pytest.raises(RegistryError) as caught, house.resources.write() as session:
        act(session, admin(house))
    return caught.value.code


@pytest.mark.on("SQLite", "PostgreSQL")
def test_one_admin_alone_changes_no_rule_no_powerful_member_no_key_and_no_file(two: House) -> None:
    def sql(session: Any) -> Any:
        return repositories.find(session, NAME)

    acts: dict[str, Callable[[Any, Actor], object]] = {
        "policy of the namespace": lambda session, actor: policies.set_policy(
            session, actor, parse_policy_scope(SHARED), read_policy({"version": 1}, "policy")
        ),
        "policy of a channel": lambda session, actor: policies.set_policy(
            session, actor, parse_policy_scope(f"{NAME}@prod"), read_policy({"version": 1}, "policy")
        ),
        "gates": lambda session, actor: policies.set_rules(session, actor, parse_policy_scope(f"{NAME}@prod"), []),
        "pins": lambda session, actor: policies.set_rules(
            session, actor, parse_policy_scope(f"{NAME}@prod"), None, repin=True
        ),
        "end of an exception": lambda session, actor: policies.end_exception(session, actor, sql(session), "prod"),
        "a new admin": lambda session, actor: namespaces.set_member(session, actor, PRIVATE, "mate", Role.ADMIN),
        "a new releaser": lambda session, actor: namespaces.set_member(session, actor, PRIVATE, "mate", Role.RELEASER),
        "a releaser's end": lambda session, actor: namespaces.set_member(session, actor, PRIVATE, "releaser", None),
        "a releaser's demotion": lambda session, actor: namespaces.set_member(
            session, actor, PRIVATE, "releaser", Role.READER
        ),
        "an admin's end": lambda session, actor: namespaces.set_member(session, actor, PRIVATE, "second", None),
        "signing keys": lambda session, actor: namespaces.change(
            session, actor, PRIVATE, NamespaceChange(require_signature=True)
        ),
        "what signatures cover": lambda session, actor: namespaces.change(
            session, actor, PRIVATE, NamespaceChange(signature_covers="files")
        ),
        "the requirement itself": lambda session, actor: namespaces.change(
            session, actor, PRIVATE, NamespaceChange(changes="one")
        ),
        "retention": lambda session, actor: quotas.set_limits(
            session, actor, namespaces.find(session, PRIVATE), RetentionPolicy(1, 1)
        ),
        "takedown": lambda session, actor: withdrawals.take_down(
            session, actor, releases.find(session, NAME, VERSION), "leak"
        ),
    }
    assert {what: alone(two, act) for what, act in acts.items()} == dict.fromkeys(acts, "second_admin_needed")
    with two.resources.write() as session:  # an exception needs a policy first
        seconded = replace(admin(two), seconded_by="second")
        policies.set_policy(session, seconded, parse_policy_scope(SHARED), read_policy({"version": 1}, "policy"))
    until = NOW + timedelta(days=1)
    code = alone(two, lambda session, actor: policies.grant_exception(session, actor, sql(session), "prod", until, "x"))
    assert code == "second_admin_needed"


def test_what_is_no_rule_needs_no_second_admin(two: House) -> None:
    with two.resources.write() as session:
        namespaces.set_member(session, admin(two), PRIVATE, "mate", Role.PUBLISHER)
        namespaces.set_member(session, admin(two), PRIVATE, "mate", None)
        namespaces.change(session, admin(two), PRIVATE, NamespaceChange(public=True, changes="two"))
        release = releases.find(session, NAME, VERSION)
        trial = withdrawals.preview(
            session, lambda: withdrawals.remove_files(session, admin(two), release, "would it go?")
        )
        assert trial.releases


@pytest.mark.on("SQLite", "PostgreSQL")
@pytest.mark.parametrize("kind", ["policy", "gates", "exception", "member", "settings", "retention", "takedown"])
def test_each_kind_of_change_is_made_when_a_second_admin_approves_it(two: House, kind: str) -> None:
    documents = {
        "policy": POLICY,
        "gates": {"kind": "gates", "scope": f"{NAME}@prod", "rules": ["exact.nll <= 9"]},
        "exception": {
            "kind": "exception", "scope": f"{NAME}@prod", "until": "2026-02-01T00:00:00Z", "reason": "urgent",
        },
        "member": {"kind": "member", "user": "mate", "role": "releaser"},
        "settings": {"kind": "settings", "settings": {"signature_covers": "files"}},
        "retention": {"kind": "retention", "retention": {"keep_yanked_days": 9, "keep_prerelease_days": None}},
        "takedown": {"kind": "takedown", "release": f"{NAME}:{VERSION}", "reason": "leak"},
    }  # fmt: skip
    if kind == "exception":
        approve(two, request(two, POLICY))
    waiting = request(two, documents[kind])
    with two.resources.read() as session:
        row = requests.find(session, PRIVATE, waiting)
        before, after = row.before, row.after
        assert before != after
        assert requests.kinds.replaced(session, PRIVATE, requests.change_of(row)) == before  # a request changes nothing
    assert approve(two, waiting) == "applied"
    with two.resources.read() as session:
        row = requests.find(session, PRIVATE, waiting)
        assert requests.kinds.replaced(session, PRIVATE, requests.change_of(row)) == after
        acts = list_oldest_first(session, EventQuery(namespace=PRIVATE), limit=1000)[-3:]
        made = [act for act in acts if act.detail.get("seconded_by") == "second"]
        assert {act.actor for act in made} == {"admin"}
        assert (acts[-1].act, acts[-1].actor) == ("change:end", "second")


def test_nobody_approves_an_own_request_not_even_with_another_token(two: House) -> None:
    waiting = request(two, POLICY)
    for own in (admin(two), Actor("admin", NOW, {"*": "admin"})):
        with pytest.raises(NotAllowed, match="requested this change"):
            approve(two, waiting, own)
    assert revision(two) == 0
    assert approve(two, waiting) == "applied"
    with pytest.raises(Conflict, match="already applied"):
        approve(two, waiting)


def test_a_requester_who_lost_the_role_changes_nothing(two: House) -> None:
    waiting = request(two, POLICY)
    with two.resources.write() as session:
        seconded = replace(HOST, seconded_by="second")
        namespaces.set_member(session, seconded, PRIVATE, "third", Role.ADMIN)
        namespaces.set_member(session, seconded, PRIVATE, "admin", None)
    assert approve(two, waiting) == "refused"
    assert error_of(two, waiting) == "role_lost"
    assert revision(two) == 0


@pytest.mark.on("SQLite", "PostgreSQL")
def test_an_approval_is_of_what_the_requester_saw(two: House) -> None:
    first, second = request(two, POLICY), request(two, POLICY | {"policy": {"version": 1}})
    assert approve(two, first) == "applied"
    assert approve(two, second) == "conflict"
    assert error_of(two, second) == "change_outdated"
    assert revision(two) == 1


@pytest.mark.on("PostgreSQL")
def test_of_two_requests_about_one_policy_approved_at_once_one_is_made(two: House) -> None:
    ids = [request(two, POLICY), request(two, POLICY | {"policy": {"version": 1}})]
    start = threading.Barrier(2)

    def approved(request_id: int) -> str:
        start.wait()
        return approve(two, request_id)

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(approved, ids)) == ["applied", "conflict"]
    assert revision(two) == 1


def test_a_request_expires_and_can_be_cancelled(two: House) -> None:
    old, withdrawn = request(two, POLICY), request(two, POLICY)
    later = replace(SECOND, at=NOW + timedelta(days=4))
    with two.resources.write() as session:
        requests.cancel(session, SECOND, requests.find(session, PRIVATE, withdrawn))
    with pytest.raises(Conflict, match="already expired"):
        approve(two, old, later)
    with pytest.raises(Conflict, match="already cancelled"):
        approve(two, withdrawn)
    with two.resources.write() as session:
        assert requests.expire(session, later) == 1
        assert [requests.find(session, PRIVATE, id_).state for id_ in (old, withdrawn)] == ["expired", "cancelled"]


def test_a_request_that_could_not_be_made_is_refused_at_once(two: House) -> None:
    with pytest.raises(NotFound):
        request(two, POLICY | {"scope": f"{PRIVATE}/absent@prod"})
    for scope in (f"{OTHER}/*@prod", f"{OTHER}/sql@prod"):
        with pytest.raises(Usage, match="is not in the namespace"):
            request(two, POLICY | {"scope": scope})
    with pytest.raises(Usage, match="is not in the namespace"):
        request(two, {"kind": "takedown", "release": f"{PUBLIC}/sql:1.0.0", "reason": "leak"})
    without_registry_admins(two)
    with pytest.raises(Refused, match="needs two admins"):
        request(two, {"kind": "member", "user": "second", "role": None})
    with two.resources.read() as session:
        assert requests.list_page(session, PRIVATE, before=0, limit=10) == []


def test_a_namespace_of_one_admin_cannot_require_two(house: House) -> None:
    without_registry_admins(house)
    with pytest.raises(Refused, match="needs two admins"), house.resources.write() as session:
        namespaces.change(session, HOST, PRIVATE, NamespaceChange(changes="two"))


def test_the_number_of_waiting_requests_is_limited(two: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_PENDING", 2)
    ids = [request(two, POLICY) for _ in range(2)]
    with pytest.raises(Refused, match="wait already"):
        request(two, POLICY)
    approve(two, ids[0])
    request(two, POLICY | {"policy": {"version": 1}})


def test_a_user_who_is_removed_approves_and_becomes_nothing(two: House) -> None:
    theirs = request(two, POLICY, admin(two))
    about = request(two, {"kind": "member", "user": "mate", "role": "releaser"}, SECOND)
    with two.resources.write() as session:
        for user in ("admin", "mate"):
            users.remove(session, HOST, user)
    with two.resources.read() as session:
        rows = [session.get_one(ChangeRequest, id_) for id_ in (theirs, about)]
        assert [row.state for row in rows] == ["cancelled", "cancelled"]
        assert "mate" not in str(rows[1].change)
        assert rows[0].actor.startswith(users.PSEUDONYM)


def test_the_audit_log_says_who_requested_and_who_approved(two: House) -> None:
    waiting = request(two, POLICY)
    approve(two, waiting)
    with two.resources.read() as session:
        rows = list_oldest_first(session, EventQuery(namespace=PRIVATE), limit=1000)
    listed = [(row.act, row.actor, (row.after or {}).get("state")) for row in rows if row.act.startswith("change:")]
    assert listed == [("change:request", "admin", "pending"), ("change:end", "second", "applied")]
