"""Channels as a state machine, compared with a model of plain lists that follows the rules and not the code. The model
keeps live releases in the order of their promotions, the current one last. A promotion appends one; a rollback removes
the last, then all that are yanked, equal the one just left, or were left by a rollback since they were live; a rollback
to a version removes all after its last position."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from registry.database.engine import Database, Session
from registry.database.tables import Base, Blob, BlobHolder, Channel, Move, Release
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.releases import NewRelease
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import moves, promotions, withdrawals
from registry.domain.channels.policy.judging import Expected, PromotionRequest
from registry.domain.channels.serving import CHANGES, ChannelMove, earlier_versions, serving_move
from registry.errors import NotFound, Refused, RegistryError, Stale
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName, parse_version

VERSIONS = ("1.0.0", "1.1.0", "2.0.0-rc.1", "2.0.0")
BYTES = {version: Digest(f"{number:064x}") for number, version in enumerate(VERSIONS)}
START = datetime(2026, 1, 1, tzinfo=UTC)

versions = st.sampled_from(VERSIONS)


@dataclass(frozen=True)
class Moment:
    """The state after one move: its kind, the release it left, and the live releases below the new top, which is last.
    `since` has the number of the move by which each became the top."""

    kind: str
    left: str | None
    live: tuple[str, ...]
    since: tuple[int, ...]


@pytest.fixture(scope="module")
def stocked(migrated: Database) -> Database:
    """A registry with a base, and the bytes of four releases."""
    with migrated.write() as session:
        session.add(
            Base(
                digest="b" * 64, architecture_digest="c" * 64, name="tiny", model_type="llama", tied=False,
                parameters=1, size_bytes=4, tensor_count=0, tensors=[], created_at=START, created_by="mia",
            )
        )  # fmt: skip
        for sha256 in BYTES.values():
            session.add(Blob(sha256=sha256, size_bytes=1, created_at=START))
            session.flush()
            session.add(BlobHolder(sha256=sha256, namespace="acme"))
            session.flush()
    return migrated


class ChannelMachine(RuleBasedStateMachine):
    """Each rule acts on the registry and on the model, and compares their states. Each example has its own repository
    with four releases, in a shared database."""

    database: Database
    numbers = itertools.count()

    @initialize()
    def open(self) -> None:
        self.name = RepositoryName("acme", f"sql-{next(self.numbers)}")
        self.now = START
        self.moments: list[Moment] = []
        self.yanked: set[str] = set()
        self.seen: list[tuple[Any, ...]] = []
        actor = Actor("mia", START, {EVERYWHERE: Role.ADMIN})
        with self.database.write() as session:
            for version, sha256 in BYTES.items():
                files = [ManifestFile("adapter_model.safetensors", 1, sha256)]
                new = NewRelease(self.name, Kind.ADAPTER, parse_version(version), None, files, "b" * 64, {})
                releases.publish(session, actor, new)
            self.repository_id = repositories.find(session, self.name).id

    def channel(self, session: Session) -> Channel | None:
        return session.scalar(select(Channel).where(Channel.repository_id == self.repository_id))

    @property
    def live(self) -> tuple[str, ...]:
        return self.moments[-1].live if self.moments else ()

    def record(self, kind: str, live: tuple[str, ...]) -> None:
        """Records the move to the last of `live`; those below are unchanged."""
        earlier = self.moments[-1].since if self.moments else ()
        since = (*earlier[: len(live) - 1], len(self.moments))
        self.moments.append(Moment(kind, self.live[-1] if self.live else None, live, since))

    def attempt(
        self, change: Callable[[Any, Actor], ChannelMove], refusal: type[RegistryError] | None
    ) -> ChannelMove | None:
        """Does the change in a transaction of its own, or sees it refused as the model foretold."""
        self.now += timedelta(seconds=1)
        actor = Actor("mia", self.now, {EVERYWHERE: Role.ADMIN})
        if refusal is None:
            with self.database.write() as session:
                return change(session, actor)
        with pytest.raises(refusal) as raised, self.database.write() as session:
            change(session, actor)
        assert type(raised.value) is refusal
        return None

    def expectation(self, honest: bool | None) -> Expected | None:
        """The state that the caller claims to have seen: none, the current one, or an earlier move."""
        made = [row for row in self.seen if row[1] not in CHANGES]
        last = made[-1][0] if made else moves.NOTHING_YET
        return None if honest is None else Expected(last if honest else last + 1)

    @rule(version=versions, honest=st.sampled_from([None, True, False]))
    def promote(self, version: str, honest: bool | None) -> None:
        refusal = Refused if version in self.yanked else Stale if honest is False else None
        expected = self.expectation(honest)

        def change(session: Any, actor: Actor) -> ChannelMove:
            wanted = PromotionRequest(self.name, parse_version(version), "prod", reason="r", expected=expected)
            moved = promotions.request(session, actor, wanted)
            assert isinstance(moved, ChannelMove)
            return moved

        self.attempt(change, refusal)
        if refusal is None and self.live[-1:] != (version,):
            self.record("promote", (*self.live, version))

    @rule(honest=st.sampled_from([None, True, False]))
    def roll_back(self, honest: bool | None) -> None:
        back = self.back
        refusal = NotFound if not self.live else Stale if honest is False else None if back else Refused
        self.roll_back_registry(None, self.expectation(honest), refusal)
        if refusal is None:
            self.record("rollback", self.live[: back[-1] + 1])

    @property
    def back(self) -> list[int]:
        """The releases below the top that a rollback may return to."""
        left = {moment.left: number for number, moment in enumerate(self.moments) if moment.kind == "rollback"}
        below = zip(self.live[:-1], self.moments[-1].since, strict=False) if self.moments else ()
        kept = [at for at, (one, since) in enumerate(below) if since > left.get(one, -1)]
        return [at for at in kept if self.live[at] not in self.yanked and self.live[at] != self.live[-1]]

    @precondition(lambda self: self.moments)
    @rule(version=versions)
    def roll_back_to(self, version: str) -> None:
        back = [at for at in self.back if self.live[at] == version]
        self.roll_back_registry(version, None, None if back else Refused)
        if back:
            self.record("rollback", self.live[: back[-1] + 1])

    @invariant()
    def the_versions_to_return_to_are_those_that_a_rollback_accepts(self) -> None:
        with self.database.read() as session:
            channel = self.channel(session)
            current = session.get(Move, channel.move_id) if channel and channel.move_id else None
            offered = earlier_versions(session, current, limit=9) if current else ()
        assert list(offered) == list(dict.fromkeys(self.live[at] for at in reversed(self.back)))

    def roll_back_registry(
        self, to: str | None, expected: Expected | None, refusal: type[RegistryError] | None
    ) -> None:
        def change(session: Any, actor: Actor) -> ChannelMove:
            target = parse_version(to) if to else None
            repository = repositories.find(session, self.name)
            return moves.roll_back(session, actor, repository, "prod", to=target, reason="r", expected=expected)

        self.attempt(change, refusal)

    @rule(version=versions, back=st.booleans())
    def yank(self, version: str, back: bool) -> None:
        actor = Actor("mia", self.now, {EVERYWHERE: Role.ADMIN})
        with self.database.write() as session:
            release = releases.find(session, self.name, parse_version(version))
            if back:
                withdrawals.unyank(session, actor, release, "it was right")
                self.yanked.discard(version)
            else:
                withdrawals.yank(session, actor, release, "because")
                self.yanked.add(version)

    @invariant()
    def the_channel_serves_what_the_model_says(self) -> None:
        with self.database.read() as session:
            channel = self.channel(session)
            serving = serving_move(session, channel) if channel is not None else None
            top = self.live[-1] if self.live else None
            if top in self.yanked:  # the release that a rollback would return to
                top = self.live[max(self.back)] if self.back else None
            assert (serving.to_release.version if serving else None) == top

    @invariant()
    def history_only_grows_and_never_changes(self) -> None:
        with self.database.read() as session:
            channel = self.channel(session)
            mine = Move.channel_id == (channel.id if channel else None)
            recorded = session.scalars(select(Move).where(mine).order_by(Move.id)).all()
            actual = [
                (move.id, move.kind, move.from_release.version if move.from_release else None, move.to_release.version,
                 move.actor, move.reason, move.at) for move in recorded
            ]  # fmt: skip
        assert actual[: len(self.seen)] == self.seen
        made = [row for row in actual if row[1] not in CHANGES]
        assert [row[1:4] for row in made] == [(m.kind, m.left, m.live[-1]) for m in self.moments]
        assert (channel.move_id if channel else None) == (made[-1][0] if made else None)
        self.seen = actual

    @invariant()
    def the_last_entry_of_the_history_leads_to_what_the_channel_serves(self) -> None:
        with self.database.read() as session:
            channel = self.channel(session)
            served = session.get(Release, channel.served_id) if channel and channel.served_id else None
            mine = select(Move).where(Move.channel_id == (channel.id if channel else None))
            last = session.scalars(mine.order_by(Move.id.desc()).limit(1)).first()
            reached = None if last is None or last.from_release_id == last.to_release_id else last.to_release
            assert (served.id if served else None) == (reached.id if reached else None)


@pytest.mark.parametrize("walks", [12, pytest.param(60, marks=pytest.mark.long)])
def test_channels_follow_the_model_whatever_is_promoted_rolled_back_or_yanked(stocked: Database, walks: int) -> None:
    machine = type("Machine", (ChannelMachine,), {"database": stocked})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=walks, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


def test_the_model_rolls_back_further_each_time(stocked: Database) -> None:
    """One explicit sequence, so that the rules are also documented by example."""
    machine = type("Machine", (ChannelMachine,), {"database": stocked})()
    machine.open()
    for version in ("1.0.0", "1.1.0", "2.0.0-rc.1", "2.0.0"):
        machine.promote(version, None)
    machine.yank("2.0.0-rc.1", False)
    machine.roll_back(None)
    assert machine.live == ("1.0.0", "1.1.0")
    machine.yank("2.0.0-rc.1", True)
    machine.roll_back_to("2.0.0")
    machine.roll_back_to("2.0.0-rc.1")
    assert machine.live == ("1.0.0", "1.1.0"), "neither is below any more"
    machine.promote("2.0.0", None)
    machine.promote("1.1.0", None)
    machine.roll_back(None)
    machine.roll_back_to("1.1.0")
    assert machine.live == ("1.0.0", "1.1.0", "2.0.0"), "it is below, and was left since"
    machine.roll_back(None)
    assert machine.live == ("1.0.0",), "nor does a rollback without a version return to it"
    machine.the_channel_serves_what_the_model_says()
    machine.history_only_grows_and_never_changes()
    machine.the_versions_to_return_to_are_those_that_a_rollback_accepts()
    assert [moment.kind for moment in machine.moments].count("rollback") == 3
