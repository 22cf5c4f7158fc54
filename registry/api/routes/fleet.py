"""Nodes that serve channels: their reports, and what a channel's rollout has reached."""

from typing import Annotated

from fastapi import APIRouter, Query

from registry.api.http.pagination import Cursor, Limit, decode_cursor, page
from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import Caller, Reader
from registry.api.routes.repository import RepositoryOf, RepositoryRouter
from registry.api.routes.views import rollout_view
from registry.database.tables import FleetChannel, FleetNode
from registry.domain.access.audit import Actor
from registry.domain.channels.serving import ChannelName, find_channel
from registry.domain.rollouts import fleet
from registry.domain.rollouts.fleet import LiveChannel, LoadedRelease, NodeReport, ReportedServer
from registry.errors import Usage
from registry.formats.references import (
    is_version,
    parse_channel_reference,
    parse_name,
    parse_node_name,
    parse_repository,
)
from registry.wire.document import Page
from registry.wire.fleet import (
    LEASE_S,
    ForgottenOut,
    NodeChannel,
    NodeOut,
    NodeReportIn,
    NodeReportOut,
    NodeServer,
    RolloutOut,
)

router = APIRouter(tags=["fleet"], route_class=Route)
repository_routes = RepositoryRouter(tags=["fleet"], route_class=Route)

Namespace = Annotated[str, Query(max_length=64, description="The namespace of the channels that it followed.")]


@router.put("/v1/fleet/{group}/{node}")
def report(group: str, node: str, body: NodeReportIn, resources: ResourcesOf, actor: Caller) -> NodeReportOut:
    """Report what a node of a group serves. The report replaces the last one of the node and counts for `lease_s`: 60
    seconds, and 46 or more if it repeats the last one within 15 seconds.

    Needs the role agent for each of the channels, which need not exist. Names that a server has loaded from elsewhere
    are left out. One without channels removes the node.
    """
    reported = NodeReport(
        parse_node_name(group, "group"),
        parse_node_name(node, "node"),
        body.agent,
        [_live(channel) for channel in body.channels],
        [_server(server) for server in body.servers],
        body.switch.max_unavailable if body.switch else None,
        body.instance,
    )
    fleet.permit_report(actor, reported)
    with resources.read() as session:
        left = fleet.repeats(session, actor, reported)
    if left is not None:
        return NodeReportOut(lease_s=int(left.total_seconds()), switch=False)
    with resources.write() as session:
        return NodeReportOut(lease_s=LEASE_S, switch=fleet.report(session, actor, reported))


def _live(channel: NodeChannel) -> LiveChannel:
    name = ChannelName(*parse_channel_reference(channel.channel))
    check = channel.check.model_dump(mode="json") if channel.check else None
    live = (channel.state, channel.splits, channel.version, channel.commit, channel.move, channel.since)
    return LiveChannel(name, *live, check, channel.error)


def _server(server: NodeServer) -> ReportedServer:
    loaded: dict[str, LoadedRelease] = {}
    for name in server.loaded:
        if release := _release(name.name, name.commit):
            loaded[name.name] = release
    return ReportedServer(server.url, server.kind, server.ready, server.error, loaded)


def _release(name: str, commit: str | None) -> LoadedRelease | None:
    """The release with the name `acme/sql@1.2.0` on a server; None for a name of something else, such as the base."""
    repository, _, version = name.partition("@")
    if not is_version(version):
        return None
    try:
        return LoadedRelease(parse_repository(repository), version, commit)
    except Usage:
        return None


@router.delete("/v1/fleet/{group}/{node}")
def forget(group: str, node: str, namespace: Namespace, resources: ResourcesOf, actor: Caller) -> ForgottenOut:
    """Remove a node that has ended from a namespace where the caller has the role agent or admin. It comes back with
    its next report."""
    named = (parse_name(namespace, "namespace"), parse_node_name(group, "group"), parse_node_name(node, "node"))
    with resources.write() as session:
        fleet.remove(session, actor, *named)
    return ForgottenOut(namespace=namespace, group=group, node=node)


@router.get("/v1/fleet")
def list_nodes(resources: ResourcesOf, actor: Caller, limit: Limit = 50, cursor: Cursor = None) -> Page[NodeOut]:
    """List the nodes in namespaces where the caller has a role, by namespace, group and name."""
    after = decode_cursor(cursor).split("/") if cursor else ()
    if len(after) not in (0, 3):
        raise Usage("bad_cursor", f"The cursor {cursor!r} belongs to another list.")
    with resources.snapshot() as session:
        rows = fleet.list_page(session, actor, after=after, limit=limit + 1)
        channels = fleet.channels_of(session, rows)
        items = [_node(row, channels[row.id], actor) for row in rows]
        return page(items, limit, [f"{row.namespace}/{row.group}/{row.node}" for row in rows])


def _node(row: FleetNode, channels: list[FleetChannel], actor: Actor) -> NodeOut:
    named = [
        NodeChannel.of(channel, channel=f"{row.namespace}/{channel.repository}@{channel.channel}")
        for channel in channels
    ]
    silent, switch_until = fleet.is_silent(row.seen_at, actor.at), fleet.switch_until(row, actor.at)
    return NodeOut.of(row, silent=silent, switch_until=switch_until, channels=named)


@repository_routes.get("/{namespace}/{name}/channels/{channel}/rollout")
def show_rollout(named: RepositoryOf, channel: str, resources: ResourcesOf, actor: Reader) -> RolloutOut:
    """The release that the channel serves, and the nodes that give it to users."""
    with resources.snapshot() as session:
        repository = named.find(session)
        return rollout_view(session, actor, find_channel(session, repository, channel), repository)
