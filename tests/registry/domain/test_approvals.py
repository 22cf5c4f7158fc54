"""Approvals: the approvers that count, their validity, and the moves that use them up."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest
from sqlalchemy import func, select

from registry.database.tables import Approval, Move, Promotion
from registry.domain.access import namespaces, sessions, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.people import Person
from registry.domain.access.roles import Role
from registry.domain.catalog import releases, repositories
from registry.domain.channels import deletion, moves, promotions
from registry.domain.channels.serving import ChannelMove, unspent_approvals
from registry.errors import NotAllowed
from registry.transfer.promotions import settle
from tests.access.house import HOST, NOW, OTHER, PRIVATE, House
from tests.registry.domain.test_waiting_promotions import (
    HOUR,
    NAME,
    NEW,
    OLD,
    demand,
    later,
    person,
    promote,
    seen,
    waiting,
)

ADA = Person("https://login.example", "1", "ada")


@pytest.mark.parametrize("ending", ["revoked", "signed out", "expired", "group gone", "group lower"])
def test_an_approval_counts_with_a_role_that_a_group_gives_while_it_does(house: House, ending: str) -> None:
    demand(house, approval={"role": "releaser", "count": 2}, expires_hours=48)
    began = waiting(house)
    at = NOW + HOUR

    def judged(at: datetime = at) -> str:
        settle(later(house, at), began)
        with house.resources.read() as session:
            return session.get_one(Promotion, began).gates[0]["detail"]

    def sign_in(roles: dict[str, Role], at: datetime = at) -> str:
        with house.resources.write() as session:
            row, _ = sessions.begin_with_roles(session, person(house, at=at), ADA, roles)
            return row.id

    first = sign_in({PRIVATE: Role.RELEASER})
    with house.resources.write() as session:
        approver = Actor("ada", at, tokens.grants_of(session, first), token_id=first)
        promotions.approve(session, approver, releases.find(session, NAME, OLD), "prod", "")
    assert judged() == "1 of 2: ada"
    if ending == "revoked":
        with house.resources.write() as session:
            tokens.revoke(session, HOST, first)
    elif ending == "signed out":
        with house.resources.write() as session:
            sessions.end(session, approver)
    elif ending == "expired":
        at += sessions.LIFETIME
    else:  # in another browser: the first session has not ended
        sign_in({PRIVATE: Role.PUBLISHER} if ending == "group lower" else {OTHER: Role.RELEASER}, at)
    assert judged(at) == "0 of 2; ada no longer has the role"
    sign_in({PRIVATE: Role.RELEASER}, at)
    assert judged(at) == ("0 of 2; ada no longer has the role" if ending == "revoked" else "1 of 2: ada")


def test_who_promotes_does_not_force_past_the_approval_of_others_unless_the_policy_says_so(house: House) -> None:
    demand(house, approval={})
    with pytest.raises(NotAllowed, match="allows nobody to force"):
        promote(house, force=True, reason="now")
    demand(house, approval={}, force="releaser")
    assert isinstance(promote(house, force=True, reason="now"), ChannelMove)
    demand(house, rules=["exact.nll <= 0.1"])
    assert isinstance(promote(house, NEW, force=True, reason="now"), ChannelMove), "without an approval as before"


def test_an_approval_is_for_one_promotion_and_can_be_withdrawn(house: House) -> None:
    demand(house, approval={"count": 2})
    hour = iter(range(1, 9))

    def approve(user: str) -> None:
        with house.resources.write() as session:
            release = releases.find(session, NAME, OLD)
            promotions.approve(session, person(house, user, NOW + next(hour) * HOUR), release, "prod", "")

    with house.resources.write() as session:
        namespaces.set_member(session, HOST, PRIVATE, "publisher", Role.RELEASER)
    for user in ("admin", "publisher"):
        approve(user)
    with house.resources.write() as session:
        assert promotions.withdraw(session, person(house, "admin"), releases.find(session, NAME, OLD), "prod")
    first = waiting(house, at=NOW + 3 * HOUR)
    approve("admin")
    settle(later(house, NOW + 4 * HOUR), first)
    assert seen(house, first)[0] == "completed"
    assert isinstance(promote(house, at=NOW + 4 * HOUR), ChannelMove), "it is there already"
    with house.resources.write() as session:
        moves.roll_back(session, person(house, at=NOW + 5 * HOUR), repositories.find(session, NAME), "prod")
    assert isinstance(promote(house, at=NOW + 6 * HOUR), Promotion)


@pytest.mark.on("PostgreSQL")
def test_an_approval_is_spent_by_the_move_after_it_whatever_the_clocks_say(house: House) -> None:
    """The approver's server is two minutes ahead, and the one that promotes again two minutes behind."""
    demand(house, approval={})
    first = waiting(house)
    with house.resources.write() as session:
        release = releases.find(session, NAME, OLD)
        promotions.approve(session, person(house, "admin", NOW + timedelta(minutes=2)), release, "prod", "")
    settle(house.resources, first)
    assert seen(house, first)[0] == "completed"
    with house.resources.write() as session:
        moves.roll_back(session, person(house), repositories.find(session, NAME), "prod")
    second = waiting(house)
    with house.resources.write() as session:
        release = releases.find(session, NAME, OLD)
        promotions.approve(session, person(house, "admin", NOW - timedelta(minutes=2)), release, "prod", "")
    settle(house.resources, second)
    assert seen(house, second)[0] == "completed", "one given after the rollback counts"


@pytest.mark.on("PostgreSQL")
def test_an_approval_that_is_sent_again_after_the_move_does_not_serve_for_the_next_one(house: House) -> None:
    """Like a client that lost the answer."""
    demand(house, approval={})
    first = waiting(house)
    for _ in range(2):
        with house.resources.write() as session:
            release = releases.find(session, NAME, OLD)
            promotions.approve(session, person(house, "admin"), release, "prod", "")
        settle(house.resources, first)
    assert seen(house, first)[0] == "completed"
    with house.resources.write() as session:
        moves.roll_back(session, person(house), repositories.find(session, NAME), "prod")
    assert isinstance(promote(house), Promotion)


@pytest.mark.on("PostgreSQL")
def test_an_approval_for_a_channel_that_was_deleted_and_comes_back_counts_if_it_is_new(house: House) -> None:
    """Both were given at the same moment, and the earlier moves stay in the history."""

    def approve() -> None:
        with house.resources.write() as session:
            promotions.approve(session, person(house, "admin"), releases.find(session, NAME, OLD), "beta", "")

    demand(house, "beta", approval={})
    approve()
    assert isinstance(promote(house, OLD, "beta"), ChannelMove)
    demand(house, "beta")
    with house.resources.write() as session:
        repository = repositories.find(session, NAME)
        deletion.delete_channel(session, person(house, "admin"), repository, "beta", serving=OLD, reason="a typo")
    demand(house, "beta", approval={})
    began = waiting(house, OLD, "beta")
    approve()
    settle(house.resources, began)
    assert seen(house, began)[0] == "completed"


def test_an_approval_beside_a_promotion_is_used_once_and_one_beside_its_withdrawal_is_answered(house: House) -> None:
    with house.resources.write() as session:
        for user in ("admin", "publisher"):
            namespaces.set_member(session, HOST, PRIVATE, user, Role.RELEASER)
    path = f"/v1/adapters/{NAME}/channels/prod"

    def approve(user: str) -> int:
        return house.ask(user, "POST", f"{path}/approvals", json={"version": str(OLD)}).status_code

    def withdraw(user: str) -> int:
        return house.ask(user, "DELETE", f"{path}/approvals/{OLD}").status_code

    def give(user: str, promotion_id: int) -> None:
        with house.resources.write() as session:
            promotions.approve(session, person(house, user), releases.find(session, NAME, OLD), "prod", "")
        settle(house.resources, promotion_id)

    with ThreadPoolExecutor(6) as pool:
        demand(house, approval={"count": 5})
        steps = [pool.submit(step, "admin") for _ in range(25) for step in (approve, withdraw, approve)]
        assert {step.result() for step in steps} == {200}
        withdraw("admin")
        for turn in range(8):
            demand(house)
            promote(house, NEW)
            demand(house, approval={})
            began = waiting(house)
            for step in [pool.submit(give, user, began) for user in ("admin", "publisher")]:
                step.result()
            assert seen(house, began)[0] == "completed"
            with house.resources.write() as session:
                moved = session.scalar(select(func.max(Move.id)))
                given = session.scalars(select(Approval).where(Approval.channel == "prod")).all()
                release = releases.find(session, NAME, OLD)
                after = [approval.user for approval in given if approval.after_move >= (moved or 0)]
                left = [unspent_approval.user for unspent_approval in unspent_approvals(session, release, "prod")]
            assert left == after, turn
            assert len(left) <= 1, "the move has used the other"
            for user in ("admin", "publisher"):
                withdraw(user)
