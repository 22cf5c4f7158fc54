"""Canaries of channels: their beginning and end, and the live figures that decide about them."""

from typing import Annotated

from fastapi import Header, Query

from registry.api.http.pagination import expected_from
from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import Agent, Reader, Releaser
from registry.api.routes.repository import RepositoryOf, RepositoryRouter
from registry.api.routes.views import canary_view
from registry.domain.channels.policy.judging import PromotionRequest
from registry.domain.channels.serving import find_channel
from registry.domain.rollouts import canaries
from registry.domain.rollouts.canaries import VersionFigures
from registry.domain.rollouts.sequential import Sample
from registry.errors import NotFound
from registry.formats.references import parse_version
from registry.wire.fleet import CanaryIn, CanaryOut, VersionFiguresIn, WatchIn

repository_routes = RepositoryRouter(tags=["channels"], route_class=Route)

CANARY = "/{namespace}/{name}/channels/{channel}/canary"
IfMatch = Annotated[str | None, Header(description="The channel's ETag that you last saw.")]


@repository_routes.put(CANARY)
def begin(
    named: RepositoryOf, channel: str, body: CanaryIn, resources: ResourcesOf, actor: Releaser, if_match: IfMatch = None
) -> CanaryOut:
    """Give a release a share of the channel's requests, if its promotion would pass now. Replaces a running canary.

    422 if a gate does not pass, or if no node splits the requests of the channel; `why` names nodes that do not.
    With `watch` in the channel's policy, live figures lead it to its promotion or end it; without, somebody promotes
    or stops it.
    """
    wanted = PromotionRequest(
        named.name,
        parse_version(body.version),
        channel,
        named.kind,
        reason=body.reason,
        expected=expected_from(if_match, None),
    )
    with resources.write() as session:
        return canary_view(session, actor, canaries.begin(session, actor, wanted, body.weight), named.name, channel)


@repository_routes.get(CANARY)
def show(named: RepositoryOf, channel: str, resources: ResourcesOf, actor: Reader) -> CanaryOut:
    """Show the channel's last canary, with the standing of its rules."""
    with resources.snapshot() as session:
        row = find_channel(session, named.find(session), channel)
        canary = canaries.latest(session, row)
        if canary is None:
            raise NotFound("canary_unknown", f"{named.name}@{channel} has had no canary.", subject=channel)
        return canary_view(session, actor, canary, named.name, channel)


@repository_routes.delete(CANARY)
def stop(
    named: RepositoryOf,
    channel: str,
    resources: ResourcesOf,
    actor: Releaser,
    reason: Annotated[str, Query(max_length=1000)] = "",
) -> CanaryOut:
    """Stop the canary: all requests go to the served release again. 409 if none is running."""
    with resources.write() as session:
        ended = canaries.stop(session, actor, named.find(session), channel, reason)
        return canary_view(session, actor, ended, named.name, channel)


@repository_routes.post("/{namespace}/{name}/channels/{channel}/watch")
def watch(named: RepositoryOf, channel: str, body: WatchIn, resources: ResourcesOf, actor: Agent) -> CanaryOut:
    """Report live figures by version, counted since the source started. A broken rule ends the canary at once, and a
    step that has lasted is followed by the next one. 409 if no canary is running."""
    counted = {version: _figures(row) for version, row in body.versions.items()}
    with resources.write() as session:
        canary = canaries.report(session, actor, named.find(session), channel, body.source, counted)
        return canary_view(session, actor, canary, named.name, channel)


def _figures(row: VersionFiguresIn) -> VersionFigures:
    metrics = {name: Sample(n, total) for name, (n, total) in row.metrics.items()}
    return VersionFigures(row.requests, row.errors, row.seconds, metrics)
