"""Promote, roll back, history: a channel moves by compare-and-set and its moves are never rewritten."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session, selectinload
from sqlalchemy.orm.attributes import set_committed_value

from registry import audit, gates, releases, repositories
from registry.audit import Act, Actor
from registry.errors import Conflict, NotFound, Refused, Stale, Usage
from registry.gates import GateResult
from registry.models import Channel, Move, Release, Repository
from registry.names import Version, parse_part
from registry.releases import full_name

NOTHING_YET = 0
"""The expected move of a channel that must not exist yet."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the caller last saw: the id of the channel's move, from its ETag; `NOTHING_YET` for no channel at all."""

    move_id: int


def promote(  # noqa: PLR0913
    session: Session,
    actor: Actor,
    release: Release,
    channel_name: str,
    *,
    reason: str = "",
    force: bool = False,
    expected: Expected | None = None,
) -> Move:
    """Puts the release on the channel when every gate passes. `force` skips failed gates, and needs a reason."""
    subject = f"{repositories.name_of(release.repository)}@{channel_name}"
    releases.refuse_unsigned(session, release.repository.namespace, release.signed_by)
    _refuse_unpromotable(release, subject, reason, force=force)
    channel = _find_or_create(session, release.repository, parse_part(channel_name, "channel"))
    _check_expected(channel, expected, subject)
    current = current_move(session, channel)
    report = _judge(session, channel, release)
    failed = [result for result in report if not result.passed]
    if failed and not force:
        raise Refused(
            "gate_failed",
            f"{full_name(release)} does not pass {len(failed)} of {len(report)} gates of {subject}.",
            subject=subject,
            next_step="Look at the numbers; a releaser may use --force with a --reason.",
            findings=[result.to_json() for result in report],
        )
    if current is not None and current.to_release_id == release.id:
        return current
    move = Move(
        channel_id=channel.id,
        kind="promote",
        from_release=current.to_release if current else None,
        to_release=release,
        below_id=current.id if current else None,
        actor=actor.name,
        reason=reason,
        forced=bool(failed),
        gates=[result.to_json() for result in report],
        at=actor.at,
    )
    _set(session, channel, current, move, expected)
    audit.record(
        session,
        actor,
        Act.CHANNEL_PROMOTE,
        subject,
        namespace=release.repository.namespace,
        reason=reason,
        before=_state(current),
        after=_state(move),
        forced=move.forced,
        gates=move.gates,
    )
    return move


def roll_back(  # noqa: PLR0913
    session: Session,
    actor: Actor,
    repository: Repository,
    channel_name: str,
    *,
    to: Version | None = None,
    reason: str = "",
    expected: Expected | None = None,
) -> Move:
    """Returns to the release that was live before the current one was promoted, or to `to`; yanked ones are skipped."""
    session.scalar(_locked(repository, channel_name))
    channel = find(session, repository, channel_name)
    subject = f"{repositories.name_of(repository)}@{channel_name}"
    _check_expected(channel, expected, subject)
    current = current_of(session, channel)
    target = _served_before(session, channel, current, to, subject) if to else _below(session, current)
    if target is None:
        raise Refused(
            "nothing_below",
            f"{subject} has no earlier release to return to.",
            subject=subject,
            next_step=f"`adaptory history {subject}` shows its moves; promote another release.",
        )
    move = Move(
        channel_id=channel.id,
        kind="rollback",
        from_release=current.to_release,
        to_release=target.to_release,
        below_id=target.below_id,
        actor=actor.name,
        reason=reason,
        forced=False,
        gates=[],
        at=actor.at,
    )
    _set(session, channel, current, move, expected)
    audit.record(
        session,
        actor,
        Act.CHANNEL_ROLLBACK,
        subject,
        namespace=repository.namespace,
        reason=reason,
        before=_state(current),
        after=_state(move),
        returns_to_move=target.id,
    )
    return move


def _state(move: Move | None) -> dict[str, Any] | None:
    """What a channel serves after this move, for the audit."""
    if move is None:
        return None
    return {"move": move.id, "version": move.to_release.version, "commit": move.to_release.revision.commit}


def serving(session: Session, channel: Channel) -> Move | None:
    """The move whose release the channel gives out: the current one, or the first one below it that is not yanked."""
    current = current_move(session, channel)
    if current is None or not current.to_release.yanked:
        return current
    return _below(session, current)


def history(session: Session, channel: Channel, *, before: int, limit: int) -> list[Move]:
    """The newest move first; `before` is the id of the last move of the page before, 0 for the first page."""
    query = select(Move).where(Move.channel_id == channel.id).options(selectinload(Move.from_release))
    query = query.order_by(Move.id.desc()).limit(limit)
    if before:
        query = query.where(Move.id < before)
    return list(session.scalars(query))


def find(session: Session, repository: Repository, name: str) -> Channel:
    channel = session.scalar(select(Channel).where(Channel.repository_id == repository.id, Channel.name == name))
    if channel is None or channel.move_id is None:
        full = f"{repositories.name_of(repository)}@{name}"
        raise NotFound(
            "channel_unknown",
            f"There is no channel {full}.",
            subject=full,
            next_step=f"Promote a release with --to {name}.",
        )
    return channel


def list_all(session: Session, repository: Repository) -> Sequence[Channel]:
    query = select(Channel).where(Channel.repository_id == repository.id, Channel.move_id.is_not(None))
    return session.scalars(query.order_by(Channel.name)).all()


def current_move(session: Session, channel: Channel) -> Move | None:
    return session.get(Move, channel.move_id) if channel.move_id else None


def current_of(session: Session, channel: Channel) -> Move:
    """The last move of a channel that `find` returned, which has one."""
    return session.get_one(Move, channel.move_id)


def _below(session: Session, move: Move) -> Move | None:
    below = session.get(Move, move.below_id) if move.below_id else None
    while below is not None and (below.to_release.yanked or below.to_release_id == move.to_release_id):
        below = session.get(Move, below.below_id) if below.below_id else None
    return below


def _served_before(session: Session, channel: Channel, current: Move, to: Version, subject: str) -> Move:
    """The latest move that served this version; the one with it furthest down would lose what lies between."""
    query = select(Move).join(Release, Release.id == Move.to_release_id)
    query = query.where(Move.channel_id == channel.id, Release.version == str(to)).order_by(Move.id.desc()).limit(1)
    move = session.scalars(query).first()
    if move is None:
        raise Refused(
            "never_served",
            f"{subject} never served {to}.",
            subject=subject,
            next_step=f"Promote it: `adaptory promote REPO:{to} --to CHANNEL`.",
        )
    if move.to_release.yanked:
        raise Refused(
            "release_yanked",
            f"{full_name(move.to_release)} is yanked: {move.to_release.yank_reason}.",
            subject=subject,
            next_step="Choose another version.",
        )
    if move.to_release_id == current.to_release_id:
        raise Refused("already_served", f"{subject} already serves {to}.", subject=subject)
    return move


def _refuse_unpromotable(release: Release, subject: str, reason: str, *, force: bool) -> None:
    if release.yanked:
        raise Refused(
            "release_yanked",
            f"{full_name(release)} is yanked: {release.yank_reason}.",
            subject=full_name(release),
            next_step="Promote another release.",
        )
    if force and not reason.strip():
        raise Usage(
            "reason_missing", "A forced promotion needs a reason.", subject=subject, next_step="Say why with --reason."
        )


def _judge(session: Session, channel: Channel, release: Release) -> list[GateResult]:
    rules = gates.rules_of(session, release.repository, channel.name)
    if not rules:
        return []
    given = serving(session, channel)  # what users get: a yanked release on the channel is no yardstick
    served = gates.scores(session, given.to_release) if given else None
    return gates.judge(rules, gates.scores(session, release), served, gates.scores(session, release.base))


def _find_or_create(session: Session, repository: Repository, name: str) -> Channel:
    channel = session.scalar(_locked(repository, name))
    if channel is None:
        channel = Channel(repository_id=repository.id, name=name, move_id=None)
        session.add(channel)
        session.flush()
    return channel


def _locked(repository: Repository, name: str) -> Select[Channel]:
    """Moves of one channel wait for each other instead of failing, unless they say what they expect to find."""
    query = select(Channel).where(Channel.repository_id == repository.id, Channel.name == name)
    return query.with_for_update().execution_options(populate_existing=True)


def _check_expected(channel: Channel, expected: Expected | None, subject: str) -> None:
    if expected is not None and (channel.move_id or NOTHING_YET) != expected.move_id:
        raise Stale(
            "channel_moved",
            f"{subject} has moved since you looked.",
            subject=subject,
            next_step="Read the channel again and decide again.",
        )


def _set(session: Session, channel: Channel, current: Move | None, move: Move, expected: Expected | None) -> None:
    """Compare-and-set: of two moves that saw the same state exactly one gets through."""
    session.add(move)
    session.flush()
    seen = Channel.move_id == current.id if current else Channel.move_id.is_(None)
    statement = update(Channel).where(Channel.id == channel.id, seen).values(move_id=move.id)
    won = session.execute(statement.returning(Channel.id), execution_options={"synchronize_session": False}).first()
    if won is None:
        family = Stale if expected else Conflict
        raise family(
            "channel_moved",
            f"Somebody moved {channel.name} a moment ago.",
            subject=channel.name,
            next_step="Read the channel again and decide again.",
        )
    set_committed_value(channel, "move_id", move.id)
