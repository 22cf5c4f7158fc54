"""The releases that channels serve and have served, by moves, yanks and policies, and as followers see them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict

from sqlalchemy import ColumnElement, Select, bindparam, func, literal_column, or_, select
from sqlalchemy.orm import Session, joinedload

from registry.database.dialects import in_list, padded
from registry.database.prepared import Prepared, Query, prepared
from registry.database.tables import (
    Approval,
    Canary,
    Channel,
    Gate,
    Move,
    NamespacePolicy,
    Release,
    Repository,
    Revision,
)
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import readable_names
from registry.domain.catalog import repositories, set_members
from registry.domain.channels import pending
from registry.formats.references import RepositoryName

DELETION = "delete"
"""The kind of the move that deletes a channel: it leaves a release for nothing."""
YANK, UNYANK, POLICY = "yank", "unyank", "policy"
CHANGES = {YANK: Act.CHANNEL_YANK, UNYANK: Act.CHANNEL_UNYANK, POLICY: Act.CHANNEL_POLICY}
"""Entries in a channel's history that are not moves. The channel serves another release because one was yanked or
unyanked, or because a new policy treats yanks differently; its last move stays the same."""
ACTS = {DELETION: Act.CHANNEL_DELETE, **CHANGES}


def find_channel(session: Session, repository: Repository, name: str) -> Channel:
    """The channel. Raises NotFound for one that was never moved."""
    channel = session.scalar(select(Channel).where(Channel.repository_id == repository.id, Channel.name == name))
    if channel is None or channel.move_id is None:
        raise repositories.unknown_channel(session, repository, name)
    return channel


def channels_of_repository(
    session: Session, repository: Repository, *, served: Release | None = None, after: str, limit: int
) -> Sequence[Channel]:
    """Channels by name, only those that serve `served` if given; `after` is the last one of the previous page."""
    query = select(Channel).where(Channel.repository_id == repository.id, Channel.move_id.is_not(None))
    if served is not None:
        query = query.where(Channel.served_id == served.id)
    return session.scalars(query.where(Channel.name > after).order_by(Channel.name).limit(limit)).all()


def current_move(session: Session, channel: Channel) -> Move:
    """The last move of a channel from `find_channel`, which always has one."""
    return session.get_one(Move, channel.move_id)


def load_current_moves(session: Session, *channels: Channel) -> list[Move]:
    """The last moves of channels with their releases, in one query. While the list is kept, `current_move` needs no
    query."""
    wanted = [channel.move_id for channel in channels]
    loaded = select(Move).where(Move.id.in_(wanted)).options(joinedload(Move.to_release).joinedload(Release.revision))
    return list(session.scalars(loaded))


def locked_channel(repository: Repository, name: str) -> Select[Channel]:
    """Locks the channel, so that moves wait for each other instead of failing, unless they state the expected move."""
    query = select(Channel).where(Channel.repository_id == repository.id, Channel.name == name)
    return query.with_for_update().execution_options(populate_existing=True)


def served_version(session: Session, channel: Channel) -> str | None:
    """The version that the channel serves; None for nothing."""
    return session.get_one(Release, channel.served_id).version if channel.served_id else None


def serving_move(session: Session, channel: Channel) -> Move | None:
    """The move whose release the channel serves: the current one, or the one before it that the channel has fallen back
    to (`due_move`). None before the first move, and for a channel that serves nothing."""
    current = session.get(Move, channel.move_id) if channel.move_id else None
    if current is None or current.to_release_id == channel.served_id:
        return current
    return _last_before(session, current, Release.id == channel.served_id)


def due_move(session: Session, channel: Channel, *, again: bool = True) -> Move | None:
    """The move whose release the channel is to serve: the current one or, if its release is yanked and the channel's
    policy does not keep it, the one that a rollback returns to. A yank never leads to a release that a rollback has
    left. A set goes on being served when a member is withdrawn. Without `again`, a channel that has fallen back stays
    where it is while that release is not yanked, whatever has become of the members of others."""
    current = session.get(Move, channel.move_id) if channel.move_id else None
    if current is None or not current.to_release.yanked or keeps_yanked(session, channel, current.to_release):
        return current
    served = serving_move(session, channel)
    if not again and (served is None or not served.to_release.yanked):
        return served
    return _last_before(session, current, _returns() | (~Release.yanked & (Release.id == channel.served_id)))


def keeps_yanked(session: Session, channel: Channel, release: Release) -> bool:
    """Whether the channel goes on serving the release although it is yanked, by its own policy or, where that does not
    say, by its namespace's. One that was taken down has no files."""
    gate = session.get(Gate, (channel.repository_id, channel.name))
    stated = (gate.policy or {}).get("on_yank") if gate else None
    if stated is None:
        namespace = session.get_one(Repository, channel.repository_id).namespace
        shared = session.get(NamespacePolicy, (namespace, channel.name))
        stated = shared.policy.get("on_yank") if shared else None
    return stated == "keep" and release.revision.taken_down_at is None


@dataclass(frozen=True, slots=True)
class ServedChange:
    """The versions that a channel served before and serves now; None for nothing."""

    channel: str
    before: str | None
    after: str | None


def refresh_served(
    session: Session, actor: Actor, repository: Repository, kind: str, reason: str
) -> list[ServedChange]:
    """Sets what each channel of the repository serves, after a yank, an unyank or a new policy. Locks the channels,
    and ends the canaries of what is withdrawn. Records a change, of this `kind`, in the channel's history and in the
    audit log, and returns it."""
    query = select(Channel).where(Channel.repository_id == repository.id).order_by(Channel.id)
    changes: list[ServedChange] = []
    for channel in session.scalars(query.with_for_update().execution_options(populate_existing=True)).all():
        serving, served = due_move(session, channel, again=kind == UNYANK), channel.served_id
        if channel.move_id is None or (serving.to_release_id if serving else None) == served:
            continue
        left = session.get_one(Release, served) if served else None
        reached = serving.to_release if serving else None
        channel.served_id = reached.id if reached else None
        channel.served_key = reached.sort_key if reached else None
        subject, last = f"{repositories.name_of(repository)}@{channel.name}", session.get_one(Move, channel.move_id)
        record_entry(session, actor, subject, last, Entry(kind, reason, left, reached))
        changes.append(ServedChange(channel.name, left.version if left else None, reached.version if reached else None))
    pending.end_canaries_by_yank(session, actor, repository)
    return changes


@dataclass(frozen=True, slots=True)
class Entry:
    """A change in what a channel serves that neither a promotion nor a rollback made. `kind` is one of `ACTS`; `left`
    and `reached` are the releases served before and after, None for nothing."""

    kind: str
    reason: str
    left: Release | None
    reached: Release | None = None


def record_entry(session: Session, actor: Actor, channel: str, last: Move, entry: Entry) -> None:
    """Adds the entry to the history of a channel, NAMESPACE/NAME@CHANNEL, after its `last` move, and to the audit
    log."""
    ended = entry.reached or entry.left
    move = Move(
        channel_id=last.channel_id,
        kind=entry.kind,
        from_release_id=entry.left.id if entry.left else None,
        to_release_id=ended.id if ended else last.to_release_id,
        below_id=None,
        actor=actor.name,
        reason=entry.reason,
        forced=False,
        gates=[],
        at=max(actor.at, last.at),
    )
    session.add(move)
    session.flush()
    audit.record(
        session,
        actor,
        ACTS[entry.kind],
        channel,
        namespace=channel.partition("/")[0],
        reason=entry.reason,
        before=_served(last.id, entry.left),
        after=_served(move.id, entry.reached),
    )


def _served(move_id: int, release: Release | None) -> dict[str, Any]:
    """The release that a channel serves, for the audit row."""
    if release is None:
        return {"move": move_id, "version": None}
    return {"move": move_id, "version": release.version, "commit": release.revision.commit}


def move_before(session: Session, current: Move) -> Move | None:
    """The move that a rollback from the current one returns to; None if no release before it can be served, or
    rollbacks have left them all since."""
    return _last_before(session, current, _returns())


def _last_before(session: Session, current: Move, which: ColumnElement[bool]) -> Move | None:
    back = way_back(current).subquery()
    query = select(Move).join(back, back.c.id == Move.id).join(Release, Release.id == Move.to_release_id)
    return session.scalars(query.where(which).order_by(Move.id.desc()).limit(1)).first()


def earlier_versions(session: Session, move: Move, *, limit: int) -> Sequence[str]:
    """The versions that a channel whose current move is `move` can be rolled back to, last served first."""
    back = way_back(move).subquery()
    query = select(Release.version).join(back, back.c.to_release_id == Release.id).where(_returns())
    return session.scalars(query.group_by(Release.id).order_by(func.max(back.c.id).desc()).limit(limit)).all()


def _returns() -> ColumnElement[bool]:
    """Whether a rollback may return to a release: not to a yanked one, nor to a set with a yanked member."""
    return ~Release.yanked & ~set_members.lacks_member()


def way_back(current: Move) -> Select[Any, Any]:
    """The earlier moves whose release the channel may return to: a different release, which no rollback has left since.
    Only a promotion, judged by the policy, brings back a release that was left."""
    columns = (Move.id, Move.to_release_id, Move.below_id)
    below = select(*columns).where(Move.id == current.below_id).cte("below", recursive=True)
    below = below.union_all(select(*columns).join(below, Move.id == below.c.below_id))
    rollbacks = select(Move.from_release_id, func.max(Move.id).label("id"))
    rollbacks = rollbacks.where(Move.channel_id == current.channel_id, Move.kind == "rollback")
    left = rollbacks.group_by(Move.from_release_id).subquery()
    query = select(below.c.id, below.c.to_release_id).outerjoin(left, left.c.from_release_id == below.c.to_release_id)
    kept = left.c.id.is_(None) | (left.c.id < below.c.id)
    return query.where(kept, below.c.to_release_id != current.to_release_id)


def last_period(
    session: Session, release: Release, channel: str, *, besides: Collection[str] = ()
) -> tuple[Move, Move | None] | None:
    """The last period in which the channel served the release: the entry in its history that led to it, and the one
    after, if any. `besides` are kinds that are left out. None if the channel never served it."""
    of_channel = (Channel.repository_id == release.repository_id, Channel.name == channel)
    moves = select(Move).join(Channel, Channel.id == Move.channel_id).where(*of_channel, Move.kind.not_in(besides))
    # An entry that leads to nothing repeats the release that it leaves.
    leads_on = or_(Move.from_release_id.is_(None), Move.from_release_id != Move.to_release_id)
    to_it = moves.where(Move.to_release_id == release.id, leads_on)
    began = session.scalars(to_it.order_by(Move.id.desc()).limit(1)).first()
    if began is None:
        return None
    return began, session.scalars(moves.where(Move.id > began.id).order_by(Move.id).limit(1)).first()


def unspent_approvals(session: Session, release: Release, channel: str) -> list[Approval]:
    """The approvals of a release for a channel, oldest first. The first move to the release after an approval uses it
    up, and the next one ends those given while the channel served it: after a rollback, the release needs new
    approvals, even if one was sent again."""
    query = select(Approval).where(Approval.release_id == release.id, Approval.channel == channel)
    last = last_period(session, release, channel, besides=CHANGES)
    given = session.scalars(query.order_by(Approval.at, Approval.user))
    return [approval for approval in given if last is None or approval.after_move >= (last[1] or last[0]).id]


# Moves as rows: the history of a channel, of a release, of the registry.

_canary, _channel, _move, _release, _repository, _revision = (
    table.__table__.c for table in (Canary, Channel, Move, Release, Repository, Revision)
)
LATEST_AMONG = 2_000
"""`latest_moves` reads this many of a registry's last moves, so that a caller who may see few of them waits no
longer."""

LEFT_RELEASE = Release.__table__.alias("left")
"""The release that a move leaves."""
_VERSIONS = [LEFT_RELEASE.c.version.label("from_version"), _release.version.label("to_version")]
MOVE_COLUMNS = [_move.id, _move.kind, *_VERSIONS, _move.actor, _move.reason, _move.forced, _move.gates, _move.at]
"""The columns of a `ChannelMove`, named as its fields."""
_HISTORY = (
    select(*MOVE_COLUMNS)
    .select_from(Move.__table__)
    .join(Release.__table__, _release.id == _move.to_release_id)
    .outerjoin(LEFT_RELEASE, LEFT_RELEASE.c.id == _move.from_release_id)
    .where(_move.channel_id == bindparam("channel"))
    .order_by(_move.id.desc())
)
_OF_RELEASE = (
    select(_channel.name.label("channel"), *MOVE_COLUMNS)
    .select_from(Channel.__table__)
    .join(Move.__table__, _move.channel_id == _channel.id)
    .join(Release.__table__, _release.id == _move.to_release_id)
    .outerjoin(LEFT_RELEASE, LEFT_RELEASE.c.id == _move.from_release_id)
    .where(
        _channel.repository_id == bindparam("repository"),
        (_move.to_release_id == bindparam("release")) | (_move.from_release_id == bindparam("release")),
    )
    .order_by(_move.id.desc())
)


class NewMove(TypedDict):
    """The columns of a move that is inserted."""

    channel_id: int
    kind: str
    from_release_id: int | None
    to_release_id: int
    below_id: int | None
    actor: str
    reason: str
    forced: bool
    gates: Sequence[Mapping[str, Any]]
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelMove:
    """A channel's move; `gates` are the recorded results, empty where they were not read. `changed` is false for a
    promotion to the release that the channel already served: the move is then its last one."""

    id: int
    kind: str
    from_version: str | None
    to_version: str
    actor: str
    reason: str
    forced: bool
    gates: Sequence[Mapping[str, Any]] = ()
    at: datetime
    changed: bool = True

    @classmethod
    def of_row(cls, row: Any) -> "ChannelMove":
        """Makes it from a row with the columns `MOVE_COLUMNS`, possibly without gates or with further columns."""
        columns = row._asdict()
        return cls(**{name: columns[name] for name in cls.__dataclass_fields__ if name in columns})

    @classmethod
    def recorded(cls, move_id: int, values: NewMove, from_version: str | None, to_version: str) -> "ChannelMove":
        """Makes it from the inserted columns."""
        return cls(
            id=move_id,
            kind=values["kind"],
            from_version=from_version,
            to_version=to_version,
            actor=values["actor"],
            reason=values["reason"],
            forced=values["forced"],
            gates=values["gates"],
            at=values["at"],
        )


@prepared
def _latest(everywhere: bool) -> Query:
    """The last moves of all repositories, or of those in the namespaces of the parameter."""
    query = (
        select(
            _repository.namespace,
            _repository.name.label("repository"),
            _channel.name.label("channel"),
            *(column for column in MOVE_COLUMNS if column is not _move.gates),
        )
        .select_from(Move.__table__)
        .join(Channel.__table__, _channel.id == _move.channel_id)
        .join(Repository.__table__, _repository.id == _channel.repository_id)
        .join(Release.__table__, _release.id == _move.to_release_id)
        .outerjoin(LEFT_RELEASE, LEFT_RELEASE.c.id == _move.from_release_id)
        .where(_move.id > select(func.max(_move.id) - LATEST_AMONG).scalar_subquery())
        .order_by(_move.id.desc())
        .limit(bindparam("at_most"))
    )
    return query if everywhere else query.where(in_list(_repository.namespace, "namespaces"))


def moves_of_channel(session: Session, channel: Channel, *, before: int, limit: int) -> list[ChannelMove]:
    """Moves, newest first; `before` is the id of the last move of the previous page, 0 for the first page."""
    query = _HISTORY.where(_move.id < before) if before else _HISTORY
    return [ChannelMove.of_row(row) for row in session.execute(query.limit(limit), {"channel": channel.id})]


def latest_moves(session: Session, actor: Actor, *, limit: int) -> list[tuple[str, str, ChannelMove]]:
    """The newest moves that the actor may read among the registry's last `LATEST_AMONG`, each with its repository and
    channel."""
    namespaces = readable_names(actor)
    values = {"namespaces": sorted(namespaces or ()), "at_most": limit}
    rows = _latest(namespaces is None).records(session, values)
    return [(f"{row.namespace}/{row.repository}", row.channel, ChannelMove.of_row(row)) for row in rows]


def moves_of_release(session: Session, release: Release, *, before: int, limit: int) -> list[tuple[str, ChannelMove]]:
    """The moves of all channels to a release and away from it, each with its channel, newest first; `before` as in
    `moves_of_channel`."""
    query = _OF_RELEASE.where(_move.id < before) if before else _OF_RELEASE
    named = {"repository": release.repository_id, "release": release.id}
    return [(row.channel, ChannelMove.of_row(row)) for row in session.execute(query.limit(limit), named)]


# Joined through the repository, which has an index; on columns, since mapped objects would take most of the time.
_SERVED = Prepared(
    select(_channel.served_id, _channel.name)
    .select_from(Release.__table__)
    .join(
        Channel.__table__,
        (_channel.repository_id == _release.repository_id) & (_channel.served_id == _release.id),
    )
    .where(in_list(_release.id, "releases"))
    .order_by(_channel.name)
)


def channels_of(session: Session, releases: Collection[int]) -> Mapping[int, list[str]]:
    """The names of the channels that serve each of these releases now, in order, by the release's id.

    The caller has checked that they may be read.
    """
    serving: dict[int, list[str]] = {}
    for release, channel in _SERVED.rows(session, {"releases": padded(list(releases))}):
        serving.setdefault(release, []).append(channel)
    return serving


# The states of channels that are followed.

_candidate, _candidate_revision = Release.__table__.alias("candidate"), Revision.__table__.alias("candidate_revision")
# The lists are read separately, each by its index; the few combinations that nobody named are left out afterwards.
_STATES = Prepared(
    select(
        _repository.namespace,
        _repository.name.label("repository"),
        _channel.name.label("channel"),
        _channel.move_id,
        _release.version,
        _revision.commit,
        _candidate.c.version.label("candidate_version"),
        _candidate_revision.c.commit.label("candidate_commit"),
        _canary.weight,
    )
    .select_from(Repository.__table__)
    .join(Channel.__table__, _channel.repository_id == _repository.id)
    .outerjoin(Release.__table__, _release.id == _channel.served_id)
    .outerjoin(Revision.__table__, _revision.id == _release.revision_id)
    .outerjoin(
        Canary.__table__,
        (_canary.channel_id == _channel.id)
        & (_canary.served_id == _channel.served_id)
        & (_canary.state == literal_column("'running'")),
    )
    .outerjoin(_candidate, (_candidate.c.id == _canary.release_id) & ~_candidate.c.yanked)
    .outerjoin(_candidate_revision, _candidate_revision.c.id == _candidate.c.revision_id)
    .where(
        in_list(_repository.namespace, "namespaces"),
        in_list(_repository.name, "repositories"),
        in_list(_channel.name, "channels"),
        _channel.move_id.is_not(None),
    )
)


@dataclass(frozen=True, slots=True)
class ChannelName:
    """NAMESPACE/NAME@CHANNEL."""

    repository: RepositoryName
    channel: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.channel}"


@dataclass(frozen=True, slots=True)
class CanaryRelease:
    """The release of a running canary, and its share of the requests in per cent."""

    version: str
    commit: str
    weight: int


@dataclass(frozen=True, slots=True)
class ChannelState:
    """A channel's last move, the release that it serves, none if all are yanked, and the candidate beside it."""

    move: int
    version: str | None
    commit: str | None
    candidate: CanaryRelease | None = None


def states(session: Session, names: Sequence[ChannelName]) -> Mapping[ChannelName, ChannelState]:
    """The states of these channels, in one query. A channel that was never moved, or is deleted, has none."""
    values = {
        "namespaces": sorted({name.repository.namespace for name in names}),
        "repositories": sorted({name.repository.name for name in names}),
        "channels": sorted({name.channel for name in names}),
    }
    wanted = frozenset(names)
    by_name: dict[ChannelName, ChannelState] = {}
    for namespace, repository, channel, move, version, commit, *candidate in _STATES.rows(session, values):
        name = ChannelName(RepositoryName(namespace, repository), channel)
        if name in wanted:
            beside = CanaryRelease(*candidate) if version and candidate[0] else None
            by_name[name] = ChannelState(move, version, commit, beside)
    return by_name
