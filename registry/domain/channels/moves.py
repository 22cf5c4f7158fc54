"""Promotion, rollback and deletion of channels: they move by compare-and-set, and moves are never rewritten."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol, cast

from sqlalchemy import Table, bindparam, func, insert, literal_column, select, update
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.tables import (
    Canary,
    Channel,
    Gate,
    Move,
    Namespace,
    NamespacePolicy,
    PolicyException,
    Promotion,
    Release,
    Repository,
    Revision,
)
from registry.domain.access import audit, namespaces
from registry.domain.access.audit import Act, Actor
from registry.domain.catalog import releases, repositories, set_members, signatures
from registry.domain.catalog.releases import SignaturePolicy, full_name
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import pending
from registry.domain.channels.policy import judging, policies
from registry.domain.channels.policy.judging import (
    SERVES_NOTHING,
    Expected,
    PolicyReport,
    PromotionRequest,
    PromotionVerdict,
)
from registry.domain.channels.serving import (
    LEFT_RELEASE,
    MOVE_COLUMNS,
    ChannelMove,
    NewMove,
    current_move,
    find_channel,
    locked_channel,
    move_before,
    served_version,
    way_back,
)
from registry.domain.jobs.evaluations import WantedScore
from registry.errors import Refused, Stale
from registry.formats.references import PolicyScope, RepositoryName, Version, parse_name, refuse_ambiguous_channel

NOTHING_YET = 0
"""The expected move of a channel that must not exist yet."""

_canary, _channel, _gate, _move, _namespace, _promotion, _release, _repository, _revision = (
    table.__table__.c for table in (Canary, Channel, Gate, Move, Namespace, Promotion, Release, Repository, Revision)
)
_shared, _exception = NamespacePolicy.__table__.c, PolicyException.__table__.c

# A promotion is these five statements on columns; with mapped objects it took twice as long.
_PROMOTED = (
    select(
        _release.id,
        _release.sort_key,
        _release.signed_by,
        _release.signature_covers.label("covers"),
        _revision.commit,
        _repository.kind,
        _channel.id.label("channel_id"),
        _namespace.require_signature,
        _namespace.signing_keys,
        _namespace.signature_covers,
    )
    .select_from(Repository.__table__)
    .join(Release.__table__, _release.repository_id == _repository.id)
    .join(Revision.__table__, _revision.id == _release.revision_id)
    .join(Channel.__table__, _channel.repository_id == _repository.id)
    .join(Namespace.__table__, _namespace.name == _repository.namespace)
    .where(
        _repository.namespace == bindparam("in_namespace"),
        _repository.name == bindparam("in_repository"),
        _release.version == bindparam("named"),
        _channel.name == bindparam("onto"),
    )
    .with_for_update(of=_channel.id)
    .suffix_with("FOR SHARE OF namespaces", dialect="postgresql")
)
"""The release and the namespace's policy, locked until the transaction ends. Moves of one channel, and yanks, wait for
each other here instead of failing, unless they state the move that they expect."""


class _PromotedRelease(Protocol):
    """The columns of `_PROMOTED`."""

    id: int
    sort_key: str
    signed_by: str | None
    covers: str | None
    commit: str
    kind: Kind
    channel_id: int
    require_signature: bool
    signing_keys: Sequence[str]
    signature_covers: str


_asked_for, _served = Release.__table__.alias("asked_for"), Release.__table__.alias("served")
_STATE = (
    select(
        _asked_for.c.yank_reason,
        _channel.move_id,
        _gate.rules,
        _gate.policy,
        _shared.policy.label("shared_policy"),
        _promotion.id.label("pending_id"),
        _canary.id.label("canary_id"),
        _move.to_release_id,
        _revision.commit,
        _served.c.version.label("served_version"),
        *MOVE_COLUMNS,
    )
    .select_from(Channel.__table__)
    .outerjoin(Gate.__table__, (_gate.repository_id == _channel.repository_id) & (_gate.channel == _channel.name))
    .outerjoin(
        PolicyException.__table__,
        (_exception.repository_id == _channel.repository_id)
        & (_exception.channel == _channel.name)
        & (_exception.until > bindparam("now", type_=_exception.until.type)),
    )
    .outerjoin(
        NamespacePolicy.__table__,
        (_shared.namespace == bindparam("in_namespace"))
        & (_shared.channel == _channel.name)
        & _exception.channel.is_(None),
    )
    .outerjoin(
        Promotion.__table__, (_promotion.channel_id == _channel.id) & (_promotion.state == literal_column("'pending'"))
    )
    .outerjoin(Canary.__table__, (_canary.channel_id == _channel.id) & (_canary.state == literal_column("'running'")))
    .outerjoin(Move.__table__, _move.id == _channel.move_id)
    .outerjoin(Release.__table__, _release.id == _move.to_release_id)
    .outerjoin(Revision.__table__, _revision.id == _release.revision_id)
    .outerjoin(LEFT_RELEASE, LEFT_RELEASE.c.id == _move.from_release_id)
    .outerjoin(_served, _served.c.id == _channel.served_id)
    .outerjoin(_asked_for, (_asked_for.c.id == bindparam("release")) & _asked_for.c.yanked)
    .where(_channel.id == bindparam("channel"))
)
"""The policies in force for a channel, its current move and waiting promotion, and why the release is yanked: read
after the lock is acquired."""


class _State(Protocol):
    """The columns of `_STATE`. They are None where the channel has none, as all of a move before the first one."""

    yank_reason: str | None
    move_id: int | None
    rules: Sequence[str] | None
    policy: Mapping[str, Any] | None
    shared_policy: Mapping[str, Any] | None
    pending_id: int | None
    canary_id: int | None
    to_release_id: int | None
    commit: str | None
    served_version: str | None
    id: int | None
    kind: str | None
    from_version: str | None
    to_version: str | None
    actor: str | None
    reason: str | None
    forced: bool | None
    gates: Sequence[Mapping[str, Any]] | None
    at: datetime | None


_INSERT = insert(cast(Table, Move.__table__)).returning(_move.id)
_POINT = (
    update(cast(Table, Channel.__table__))
    .where(_channel.id == bindparam("channel"), _channel.move_id.is_not_distinct_from(bindparam("seen")))
    .returning(_channel.id)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A promotion that no rule refuses, and that lacks something which may still come. `seen` is the channel's move."""

    channel_id: int
    release: Release
    seen: int
    report: PolicyReport


def attempt(
    session: Session,
    actor: Actor,
    wanted: PromotionRequest,
    *,
    completing: int | None = None,
    given_up: Mapping[WantedScore, str] | None = None,
) -> ChannelMove | Waiting:
    """Moves the channel to the release if every rule of its policy passes, or is overridden by force. Returns
    `Waiting`, and changes nothing, if the release lacks only what may still come.

    If the channel already serves the release, returns its current move. `completing` is the waiting promotion that this
    completes; a move ends any other waiting promotion of the channel. `given_up` are scores that will not come.
    """
    release = _load_release_and_policy(session, wanted)
    signing = SignaturePolicy(release.require_signature, release.signing_keys, release.signature_covers)
    refuse_unsigned(session, release.id, signing, (release.signed_by, release.covers), wanted)
    scope = PolicyScope(wanted.repository.namespace, wanted.repository.name, wanted.channel)
    values = {
        "channel": release.channel_id,
        "release": release.id,
        "in_namespace": scope.namespace,
        "now": actor.at,
    }
    current = cast(_State, session.execute(_STATE, values).one())
    judging.refuse_unpromotable(current.yank_reason, wanted)
    if release.kind == Kind.SET:
        set_members.refuse_withdrawn(session, release.id, wanted.release)
    check_expected(current.move_id, current.served_version, wanted.expected, wanted.subject)
    # A request that waited here may be older than the last move.
    actor = replace(actor, at=max(actor.at, current.at or actor.at))
    in_force = policies.combined(scope, policies.of_columns(current.rules, current.policy), current.shared_policy)
    report = judging.judge(session, actor, release.id, release.channel_id, in_force, given_up or {})
    verdict = report.verdict(served=current.to_release_id == release.id)
    if report.failed and wanted.force:
        judging.refuse_force(actor, report, wanted)
    elif verdict is PromotionVerdict.WAITS:
        seen, mapped = current.move_id or NOTHING_YET, session.get_one(Release, release.id)
        return Waiting(channel_id=release.channel_id, release=mapped, seen=seen, report=report)
    elif verdict is PromotionVerdict.REFUSED:
        raise judging.gate_failed(wanted, report)
    if current.to_release_id == release.id:
        return replace(ChannelMove.of_row(current), changed=False)
    move = _record_promotion(session, actor, wanted, release, current, report, completing)
    if current.pending_id not in (None, completing):
        pending.end_moved(session, actor, current.pending_id)
    if current.canary_id is not None:
        pending.end_canary(session, release.channel_id, release.id, actor.at)
    return move


def _record_promotion(  # noqa: PLR0913
    session: Session,
    actor: Actor,
    wanted: PromotionRequest,
    release: _PromotedRelease,
    current: _State,
    report: PolicyReport,
    completing: int | None,
) -> ChannelMove:
    results = [result.to_json() for result in report.results]
    values: NewMove = {
        "channel_id": release.channel_id,
        "kind": "promote",
        "from_release_id": current.to_release_id,
        "to_release_id": release.id,
        "below_id": current.move_id,
        "actor": actor.name,
        "reason": wanted.reason,
        "forced": bool(report.failed),
        "gates": results,
        "at": actor.at,
    }
    move_id = _record_move(session, values, release.sort_key, current.move_id, wanted.subject)
    audit.record(
        session,
        actor,
        Act.CHANNEL_PROMOTE,
        wanted.subject,
        namespace=wanted.repository.namespace,
        reason=wanted.reason,
        before=_serves(current.move_id, current.to_version, current.commit) if current.move_id else None,
        after=_serves(move_id, str(wanted.version), release.commit),
        forced=bool(report.failed),
        gates=results,
        **({"promotion": completing} if completing else {}),
    )
    return ChannelMove.recorded(move_id, values, current.to_version, str(wanted.version))


def roll_back(  # noqa: PLR0913
    session: Session,
    actor: Actor,
    repository: Repository,
    channel_name: str,
    *,
    to: Version | None = None,
    reason: str = "",
    expected: Expected | None = None,
) -> ChannelMove:
    """Returns to the release served before the current one was promoted; skips yanked releases, sets with a yanked
    member, and those that a rollback has left since. `to` names an earlier version."""
    session.scalar(locked_channel(repository, channel_name))
    channel = find_channel(session, repository, channel_name)
    subject = f"{repositories.name_of(repository)}@{channel_name}"
    check_expected(channel.move_id, served_version(session, channel), expected, subject)
    pending.refuse_running_canary(session, channel.id, subject)
    current = current_move(session, channel)
    actor = replace(actor, at=max(actor.at, current.at))
    target = _served_before(session, channel, current, to, subject) if to else move_before(session, current)
    if target is None:
        raise Refused(
            "nothing_below",
            f"{subject} has no earlier release to return to.",
            subject=subject,
            next_step=f"`adaptory history {subject}` shows its moves; promote another release.",
        )
    values: NewMove = {
        "channel_id": channel.id,
        "kind": "rollback",
        "from_release_id": current.to_release_id,
        "to_release_id": target.to_release_id,
        "below_id": target.below_id,
        "actor": actor.name,
        "reason": reason,
        "forced": False,
        "gates": [],
        "at": actor.at,
    }
    move_id = _record_move(session, values, target.to_release.sort_key, current.id, subject)
    if waiting := pending.of_channel(session, channel.id):
        pending.end_moved(session, actor, waiting.id)
    left, reached = current.to_release, target.to_release
    audit.record(
        session,
        actor,
        Act.CHANNEL_ROLLBACK,
        subject,
        namespace=repository.namespace,
        reason=reason,
        before=_serves(current.id, left.version, left.revision.commit),
        after=_serves(move_id, reached.version, reached.revision.commit),
        returns_to_move=target.id,
    )
    return ChannelMove.recorded(move_id, values, left.version, reached.version)


def _serves(move_id: int, version: str | None, commit: str | None) -> dict[str, Any]:
    """The release that a channel serves after a move, for the audit row."""
    return {"move": move_id, "version": version, "commit": commit}


def _served_before(session: Session, channel: Channel, current: Move, to: Version, subject: str) -> Move:
    """The last move on the way back that served this version. Raises Refused for a version that was never served, is
    yanked, is served now, or would move the channel forward past its policy."""
    served = select(Release).join(Move, Move.to_release_id == Release.id)
    release = session.scalars(served.where(Move.channel_id == channel.id, Release.version == str(to)).limit(1)).first()
    if release is None:
        raise Refused(
            "never_served",
            f"{subject} never served {to}.",
            subject=subject,
            next_step=f"Promote it: {_promoting(channel, to, subject)}.",
        )
    if release.yanked:
        raise Refused("release_yanked", f"{full_name(release)} is yanked: {release.yank_reason}.", subject=subject)
    if release.repository.kind == Kind.SET:
        set_members.refuse_withdrawn(session, release.id, full_name(release), "served again")
    if release.id == current.to_release_id:
        raise Refused("already_served", f"{subject} already serves {to}.", subject=subject)
    back = way_back(current).subquery()
    last = select(func.max(back.c.id)).where(back.c.to_release_id == release.id)
    if (move_id := session.scalar(last)) is None:
        raise Refused(
            "not_earlier",
            f"{subject} did not serve {to} before {current.to_release.version}, or was rolled back from it since.",
            subject=subject,
            next_step=f"A rollback goes only back. Promote it: {_promoting(channel, to, subject)}.",
        )
    return session.get_one(Move, move_id)


def _promoting(channel: Channel, to: Version, subject: str) -> str:
    return f"`adaptory promote {subject.rpartition('@')[0]}:{to} --to {channel.name}`"


def _load_release_and_policy(session: Session, wanted: PromotionRequest) -> _PromotedRelease:
    """Loads the release and policy, and creates the channel if needed. Raises NotFound if anything else is missing."""
    name = wanted.repository
    values = {
        "in_namespace": name.namespace,
        "in_repository": name.name,
        "named": str(wanted.version),
        "onto": parse_name(wanted.channel, "channel"),
    }
    row = session.execute(_PROMOTED, values).first()
    if row is None or (wanted.kind is not None and row.kind != wanted.kind):
        release = releases.find(session, name, wanted.version, wanted.kind)
        _create(session, release.repository_id, name, wanted.channel)
        row = session.execute(_PROMOTED, values).one()
    return cast(_PromotedRelease, row)


def _create(session: Session, repository_id: int, name: RepositoryName, channel: str) -> None:
    namespaces.find_for_share(session, name.namespace)
    repositories.lock(session, repository_id)  # a yank locks all existing channels
    refuse_ambiguous_channel(channel)
    repositories.refuse_shadowed(session, name, channel)
    # If several transactions create it at once, one succeeds and the others wait for its result.
    insert_if_absent(session, Channel, repository_id=repository_id, name=channel, move_id=None)


def lock(session: Session, repository: Repository, name: str) -> Channel:
    """The channel, created if needed, locked against moves until the transaction ends. Raises as the promotion that
    would create it."""
    channel = session.scalar(locked_channel(repository, name))
    if channel is None:
        _create(session, repository.id, repositories.name_of(repository), parse_name(name, "channel"))
        channel = session.scalars(locked_channel(repository, name)).one()
    return channel


def refuse_unsigned(
    session: Session,
    release_id: int,
    policy: SignaturePolicy,
    named: tuple[str | None, str | None],
    wanted: PromotionRequest,
) -> None:
    """Raises Refused if the namespace requires a signature that the release lacks. `named` are the signer and the
    extent that the release's own row names."""
    if policy.require_signature:
        signed = signatures.signer(session, release_id, policy.signing_keys, named)
        releases.refuse_without_signature(wanted.repository.namespace, policy, *signed, wanted.release)


def check_expected(move_id: int | None, served: str | None, expected: Expected | None, subject: str) -> None:
    if expected is None:
        return
    if (move_id or NOTHING_YET) != expected.move_id or expected.served not in (None, served or SERVES_NOTHING):
        raise _moved(subject)


def _record_move(session: Session, move: NewMove, key: str, seen: int | None, subject: str) -> int:
    """Records a move and returns its id. Compare-and-set: of two moves that saw the same state, one succeeds. The
    target is not yanked, so it is served; `key` is its sort key."""
    move_id = session.scalars(_INSERT, move).one()
    served = {"served_id": move["to_release_id"], "served_key": key}
    values = {"channel": move["channel_id"], "seen": seen, "move_id": move_id, **served}
    if session.execute(_POINT, values).first() is None:
        raise _moved(subject)
    return move_id


def _moved(subject: str) -> Stale:
    return Stale("channel_moved", f"{subject} has moved since you looked.", subject=subject)
