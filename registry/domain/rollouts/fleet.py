"""The fleet: nodes report which channels they follow and what their servers have loaded, and may switch in turn.

A report counts for `LEASE`; a node without one that counts is silent. The rows of a node belong to one namespace each:
its readers see them, and nodes of other namespaces with the same names are different nodes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, case, delete, func, insert, literal, or_, select, tuple_
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.locks import lock_fleet
from registry.database.tables import Channel, FleetChannel, FleetNode, FleetRelease, Release, Repository, Revision
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, granted, holds, permit, permit_somewhere
from registry.domain.channels.serving import ChannelName
from registry.errors import NotFound, Refused
from registry.formats.references import RepositoryName

LEASE = timedelta(seconds=60)
"""How long a report counts, and a permission to switch."""
RECORDED_EVERY = timedelta(seconds=15)
"""A report that repeats the last one is recorded after that time."""
FORGOTTEN = timedelta(days=7)
"""How long the row of a silent node stays: retention keeps what the node had loaded, also after an outage."""
MAX_NODES = 1_000
"""The most nodes of a namespace. Silent nodes make room for new ones, those with the oldest report first."""
_INSTANCES = 8
"""The number of processes to remember that reported as the same node."""
FOLLOWING, SWITCHING, BEHIND, FAILED, SILENT = "following", "switching", "behind", "failed", "silent"
STATES: tuple[str, ...] = (FOLLOWING, SWITCHING, BEHIND, FAILED, SILENT)


@dataclass(frozen=True, slots=True)
class LiveChannel:
    """A channel that a node follows, with what the node serves to users: nothing if these are None."""

    name: ChannelName
    state: str
    splits: bool
    version: str | None
    commit: str | None
    move: int | None
    since: datetime
    check: Mapping[str, Any] | None
    error: str | None


@dataclass(frozen=True, slots=True)
class LoadedRelease:
    """A release by what a server calls it. `commit` is None if the node does not know it."""

    repository: RepositoryName
    version: str
    commit: str | None


@dataclass(frozen=True, slots=True)
class ReportedServer:
    """A server of a node. `loaded` has its names of releases; those of something else are left out."""

    url: str
    kind: str
    ready: bool
    error: str | None
    loaded: Mapping[str, LoadedRelease]


@dataclass(frozen=True, slots=True)
class NodeReport:
    """The report of a node. `max_unavailable` is set if it asks to switch; `instance` is a text of its process."""

    group: str
    node: str
    agent: str
    channels: Sequence[LiveChannel]
    servers: Sequence[ReportedServer]
    max_unavailable: int | None
    instance: str | None


@dataclass(slots=True)
class _Part:
    """The part of a report about one namespace."""

    channels: list[LiveChannel] = field(default_factory=list[LiveChannel])
    servers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    loaded: set[LoadedRelease] = field(default_factory=set[LoadedRelease])


def permit_report(actor: Actor, reported: NodeReport) -> None:
    """Raises NotFound or NotAllowed unless the actor has the role agent for each of the channels."""
    if not reported.channels:
        permit_somewhere(actor, Role.AGENT)
    for channel in reported.channels:
        permit(actor, Role.AGENT, str(channel.name.repository), hidden=_unknown(channel.name))


def repeats(session: Session, actor: Actor, reported: NodeReport) -> timedelta | None:
    """The time that the node's last report counts, if this one is the same and follows so soon that it need not be
    recorded; else None. Agents may then look often, without a write each time."""
    parts = _parts(actor, reported)
    if reported.max_unavailable is not None or not parts:
        return None
    own = (FleetNode.group == reported.group, FleetNode.node == reported.node)
    reach = granted(actor, Role.AGENT).within(FleetNode.namespace)
    rows = session.scalars(select(FleetNode).where(*own, reach)).all()
    if any(row.shared_until or (row.instances or [None])[-1] != reported.instance for row in rows):
        return None
    said = {row.namespace: (row.agent, row.digest, row.switch_until) for row in rows}
    if said != {namespace: (reported.agent, _digest(part), None) for namespace, part in parts.items()}:
        return None
    age = actor.at - min(row.seen_at for row in rows)
    return LEASE - age if timedelta(0) <= age < RECORDED_EVERY else None


def report(session: Session, actor: Actor, reported: NodeReport) -> bool:
    """Records a permitted report in place of the node's last one, and returns whether the node may switch now. Names of
    releases that a server has loaded from elsewhere are left out. Raises Refused if the namespace has too many nodes.
    """
    parts = _parts(actor, reported)
    # The node's rows of namespaces that it no longer reports about go.
    own = (FleetNode.group == reported.group, FleetNode.node == reported.node)
    query = select(FleetNode.id).where(*own, FleetNode.namespace.not_in(parts))
    left = session.scalars(query.where(granted(actor, Role.AGENT).within(FleetNode.namespace))).all()
    _remove(session, FleetNode.id.in_(left))
    rows = [_record(session, actor.at, namespace, reported, part) for namespace, part in sorted(parts.items())]
    most = reported.max_unavailable
    may_switch = bool(rows) and most is not None and all(_switching(session, row, actor.at) < most for row in rows)
    for row in rows:
        row.switch_until = actor.at + LEASE if may_switch else None
    session.flush()
    return may_switch


def is_silent(seen_at: datetime, now: datetime) -> bool:
    """Whether a node's last report no longer counts. One in the future was recorded before the clock was set back."""
    return not now - LEASE < seen_at <= now + LEASE


def switch_until(node: FleetNode, now: datetime) -> datetime | None:
    """Until when the node may switch; None without a permission that counts now, as in `_switching`."""
    until = node.switch_until
    return until if until is not None and now < until <= now + 2 * LEASE else None


def _silent(now: datetime) -> ColumnElement[bool]:
    return or_(FleetNode.seen_at <= now - LEASE, FleetNode.seen_at > now + LEASE)


def _unknown(name: ChannelName) -> NotFound:
    return NotFound("channel_unknown", f"{name} does not exist, or you have no access to it.", subject=str(name))


def _parts(actor: Actor, reported: NodeReport) -> Mapping[str, _Part]:
    """The report by namespace."""
    parts: dict[str, _Part] = {}
    for channel in reported.channels:
        part = parts.setdefault(channel.name.repository.namespace, _Part())
        part.channels.append(channel)
        if channel.version is not None:
            part.loaded.add(LoadedRelease(channel.name.repository, channel.version, channel.commit))
    loaded = {release for server in reported.servers for release in server.loaded.values()}
    for release in loaded:
        if holds(actor, Role.AGENT, str(release.repository)):
            parts.setdefault(release.repository.namespace, _Part()).loaded.add(release)
    named = {*parts, *(release.repository.namespace for release in loaded)}
    for namespace, part in parts.items():
        part.servers = [_shown(server, namespace, part, named) for server in reported.servers]
    return parts


def _shown(server: ReportedServer, namespace: str, part: _Part, named: Iterable[str]) -> dict[str, Any]:
    """A server as readers of the namespace see it. An error that names another namespace is left out."""
    others = [f"{other}/" for other in named if other != namespace]
    return {
        "url": server.url,
        "kind": server.kind,
        "ready": server.ready,
        "loaded": [
            {"name": name, "commit": release.commit}
            for name, release in server.loaded.items()
            if release in part.loaded
        ],
        "error": None if any(other in (server.error or "") for other in others) else server.error,
    }


def remove(session: Session, actor: Actor, namespace: str, group: str, node: str) -> None:
    """Removes a node of the namespace that has ended, for its agents and admins. Raises NotFound."""
    if not holds(actor, Role.AGENT, namespace):
        permit(actor, Role.ADMIN, namespace)
    own = (FleetNode.namespace == namespace, FleetNode.group == group, FleetNode.node == node)
    if not _remove(session, and_(*own)):
        name = f"{group}/{node}"
        raise NotFound("node_unknown", f"No node {name} has reported about channels of {namespace}.", subject=name)
    audit.record(session, actor, Act.NODE_REMOVE, f"{group}/{node}", namespace=namespace)


def _remove(session: Session, condition: ColumnElement[bool]) -> int:
    """Removes nodes, and returns their number. The database removes what belongs to them."""
    gone = delete(FleetNode).where(condition).returning(FleetNode.id)
    return len(session.scalars(gone, execution_options={"synchronize_session": False}).all())


def _record(session: Session, now: datetime, namespace: str, reported: NodeReport, part: _Part) -> FleetNode:
    """The row of the node, with what it reports now. Locks it; with a new row, or a request to switch, also the fleet
    of the namespace, before the row."""
    key = {"namespace": namespace, "group": reported.group, "node": reported.node}
    query = select(FleetNode).filter_by(**key).with_for_update().execution_options(populate_existing=True)
    if reported.max_unavailable is not None:
        lock_fleet(session, namespace)
    row = session.scalar(query)
    if row is None:
        lock_fleet(session, namespace)
        _make_room(session, now, namespace)
        insert_if_absent(session, FleetNode, **key, agent="", servers=[], digest="", seen_at=now, switch_until=None)
        row = session.scalars(query).one()
    row.seen_at, row.agent = now, reported.agent
    if _note_instance(row, now, reported.instance):
        error = f"Two agents report as {reported.group}/{reported.node}: start each with a --node of its own."
        part = replace(part, channels=[replace(channel, state=FAILED, error=error) for channel in part.channels])
    digest = _digest(part)
    if row.digest != digest:
        row.digest, row.servers = digest, part.servers
        _replace(session, row, namespace, part)
    return row


def _note_instance(row: FleetNode, now: datetime, instance: str | None) -> bool:
    """Notes the process that reports. Returns whether two of them report as the node: one came back after another. A
    process that was started again comes once."""
    seen = row.instances or []
    if instance is not None and instance != (seen or [None])[-1]:
        if instance in seen:
            row.shared_until = now + LEASE
        row.instances = [*(other for other in seen if other != instance), instance][-_INSTANCES:]
    if row.shared_until is not None and not now < row.shared_until <= now + LEASE:
        row.shared_until = None
    return row.shared_until is not None


def _digest(part: _Part) -> str:
    content = [[asdict(channel) for channel in part.channels], part.servers, sorted(map(str, part.loaded))]
    return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _make_room(session: Session, now: datetime, namespace: str) -> None:
    own = FleetNode.namespace == namespace
    count = session.scalar(select(func.count()).select_from(FleetNode).where(own)) or 0
    if count < MAX_NODES:
        return
    silent = select(FleetNode.id).where(own, _silent(now))
    oldest = session.scalars(silent.order_by(FleetNode.seen_at).limit(count - MAX_NODES + 1)).all()
    if not _remove(session, FleetNode.id.in_(oldest)):
        raise Refused(
            "fleet_full", f"{namespace} has {MAX_NODES:,} nodes that report, the most there may be.", subject=namespace
        )


def _replace(session: Session, row: FleetNode, namespace: str, part: _Part) -> None:
    """Replaces what belongs to the node."""
    for table in (FleetChannel, FleetRelease):
        session.execute(delete(table).where(table.node_id == row.id), execution_options={"synchronize_session": False})
    channels = [
        {
            "node_id": row.id,
            "repository": channel.name.repository.name,
            "channel": channel.name.channel,
            "state": channel.state,
            "splits": channel.splits,
            "version": channel.version,
            "commit": channel.commit,
            "move": channel.move,
            "since": channel.since,
            "check": channel.check,
            "error": channel.error,
        }
        for channel in part.channels
    ]
    if channels:
        session.execute(insert(FleetChannel), channels)
    if ids := _release_ids(session, namespace, part.loaded):
        session.execute(insert(FleetRelease), [{"node_id": row.id, "release_id": release_id} for release_id in ids])


def _release_ids(session: Session, namespace: str, loaded: Iterable[LoadedRelease]) -> set[int]:
    """The releases of the namespace among these; one with another commit than the node knows is not the same."""
    commits: dict[tuple[str, str], set[str | None]] = {}
    for release in loaded:
        commits.setdefault((release.repository.name, release.version), set()).add(release.commit)
    query = (
        select(Release.id, Repository.name, Release.version, Revision.commit)
        .join(Repository, Repository.id == Release.repository_id)
        .join(Revision, Revision.id == Release.revision_id)
        .where(Repository.namespace == namespace, Repository.name.in_({name for name, _ in commits}))
        .where(Release.version.in_({version for _, version in commits}))
    )
    return {
        release_id
        for release_id, name, version, commit in session.execute(query)
        if commits.get((name, version), set()) & {commit, None}
    }


def _switching(session: Session, row: FleetNode, now: datetime) -> int:
    """The number of other nodes of the group that may switch now. A permission that ends later than any given now was
    given before the clock was set back."""
    others = (FleetNode.namespace == row.namespace, FleetNode.group == row.group, FleetNode.id != row.id)
    still = (FleetNode.switch_until > now, FleetNode.switch_until <= now + 2 * LEASE)
    query = select(func.count()).select_from(FleetNode).where(*others, *still)
    return session.scalar(query) or 0


def forget(session: Session, now: datetime) -> None:
    """Removes nodes that have been silent for a long time."""
    _remove(session, FleetNode.seen_at < now - FORGOTTEN)


@dataclass(frozen=True, slots=True)
class RolloutNode:
    """A node that follows a channel: its state by `_state`, and what it reported last."""

    group: str
    node: str
    state: str
    version: str | None
    commit: str | None
    move: int | None
    since: datetime
    seen_at: datetime
    check: Mapping[str, Any] | None
    error: str | None

    @property
    def is_proved(self) -> bool:
        return self.state == FOLLOWING and self.check is not None and self.check["verdict"] == "proved"


def _state(now: datetime) -> ColumnElement[str]:
    """The state of a node's channel, the first that applies. It follows if it serves the version and the commit that
    the channel serves; nothing counts as served by a channel that does not exist."""
    same = and_(
        FleetChannel.version.is_not_distinct_from(Release.version),
        FleetChannel.commit.is_not_distinct_from(Revision.commit),
    )
    return case(
        (_silent(now), literal(SILENT)),
        (FleetChannel.state.in_((FAILED, SWITCHING)), FleetChannel.state),
        (same, literal(FOLLOWING)),
        else_=literal(BEHIND),
    )


def _followed(*columns: Any) -> Select[*tuple[Any, ...]]:
    """The channels of nodes, each with the release that the channel serves."""
    named = (Repository.namespace == FleetNode.namespace, Repository.name == FleetChannel.repository)
    return (
        select(*columns)
        .select_from(FleetNode)
        .join(FleetChannel, FleetChannel.node_id == FleetNode.id)
        .outerjoin(Repository, and_(*named))
        .outerjoin(Channel, and_(Channel.repository_id == Repository.id, Channel.name == FleetChannel.channel))
        .outerjoin(Release, Release.id == Channel.served_id)
        .outerjoin(Revision, Revision.id == Release.revision_id)
    )


def nodes_of(session: Session, name: ChannelName, now: datetime) -> list[RolloutNode]:
    """The nodes that follow a channel, by group and name."""
    own, said = FleetNode, FleetChannel
    live = (said.version, said.commit, said.move, said.since, own.seen_at, said.check, said.error)
    query = _followed(own.group, own.node, _state(now), *live).where(
        own.namespace == name.repository.namespace,
        said.repository == name.repository.name,
        said.channel == name.channel,
    )
    return [RolloutNode(*row) for row in session.execute(query.order_by(own.group, own.node))]


def whether_split(session: Session, name: ChannelName, now: datetime) -> dict[str, bool]:
    """The nodes that follow a channel and report, GROUP/NODE, and whether they split its requests for a canary."""
    query = select(FleetNode.group, FleetNode.node, FleetChannel.splits).join(
        FleetChannel, FleetChannel.node_id == FleetNode.id
    )
    query = query.where(
        FleetNode.namespace == name.repository.namespace,
        FleetChannel.repository == name.repository.name,
        FleetChannel.channel == name.channel,
        ~_silent(now),
    )
    return {f"{group}/{node}": splits for group, node, splits in session.execute(query)}


def totals(nodes: Iterable[RolloutNode]) -> dict[str, int]:
    """The number of nodes by state."""
    counts = dict.fromkeys(STATES, 0)
    for node in nodes:
        counts[node.state] += 1
    return counts


def counts_of_all(session: Session, now: datetime) -> dict[str, int]:
    """The number of a channel's nodes, by state; a node counts once for each of its channels."""
    followed = _followed(_state(now).label("state")).subquery()
    rows = session.execute(select(followed.c.state, func.count()).group_by(followed.c.state))
    return dict.fromkeys(STATES, 0) | {state: count for state, count in rows}  # noqa: C416


@dataclass(frozen=True, slots=True)
class OutOfStep:
    """A channel of a node that neither follows nor is switching."""

    node_id: int
    namespace: str
    group: str
    node: str
    repository: str
    channel: str
    state: str
    version: str | None
    error: str | None

    @property
    def key(self) -> tuple[int, str, str]:
        return self.node_id, self.repository, self.channel


def out_of_step(session: Session, now: datetime) -> list[OutOfStep]:
    """The channels of nodes that are behind, have failed, or are silent."""
    named = (FleetNode.id, FleetNode.namespace, FleetNode.group, FleetNode.node)
    said = (FleetChannel.repository, FleetChannel.channel)
    query = _followed(*named, *said, _state(now), FleetChannel.version, FleetChannel.error)
    return [OutOfStep(*row) for row in session.execute(query.where(_state(now).in_((BEHIND, FAILED, SILENT))))]


def yanked_channels(session: Session) -> int:
    """The number of channels that serve a yanked release, since their policies keep it."""
    query = select(func.count()).select_from(Channel).join(Release, Release.id == Channel.served_id)
    return session.scalar(query.where(Release.yanked)) or 0


@dataclass(frozen=True, slots=True)
class LoadedOn:
    """A node that has a release loaded, or had when it reported last."""

    group: str
    node: str
    silent: bool


def loaded_on(session: Session, release: Release, now: datetime) -> list[LoadedOn]:
    """The nodes that have a release, or another one with the same files, loaded."""
    query = (
        select(FleetNode.group, FleetNode.node, _silent(now))
        .join(FleetRelease, FleetRelease.node_id == FleetNode.id)
        .join(Release, Release.id == FleetRelease.release_id)
        .where(Release.revision_id == release.revision_id)
    )
    return [LoadedOn(*row) for row in session.execute(query.distinct().order_by(FleetNode.group, FleetNode.node))]


def list_page(session: Session, actor: Actor, *, after: Sequence[str], limit: int) -> list[FleetNode]:
    """The nodes in namespaces where the actor has a role, by namespace, group and name; not those of namespaces that
    are only public."""
    key = (FleetNode.namespace, FleetNode.group, FleetNode.node)
    query = select(FleetNode).where(granted(actor, Role.READER).within(FleetNode.namespace))
    if after:
        query = query.where(tuple_(*key) > tuple_(*(literal(part) for part in after)))
    return list(session.scalars(query.order_by(*key).limit(limit)))


def channels_of(session: Session, nodes: Sequence[FleetNode]) -> dict[int, list[FleetChannel]]:
    """The channels of each node, by its id."""
    query = select(FleetChannel).where(FleetChannel.node_id.in_([node.id for node in nodes]))
    channels: dict[int, list[FleetChannel]] = {node.id: [] for node in nodes}
    for row in session.scalars(query.order_by(FleetChannel.repository, FleetChannel.channel)):
        channels[row.node_id].append(row)
    return channels
