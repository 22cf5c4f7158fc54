"""Namespaces, and repositories with their channels and releases."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fastapi import APIRouter, Request, Response

from registry.api.http.pagination import Cursor, decode_cursor, first_rows
from registry.api.http.request import ResourcesOf
from registry.api.pages.catalog.answers import FIRST_CHOICE
from registry.api.pages.html import scores
from registry.api.pages.html.render import page, page_about
from registry.api.pages.html.wire import PageReader, PageRoute, RepositoryOf
from registry.api.routes.documents import releases_shown
from registry.api.routes.views import channel_view, repository_page
from registry.domain.access import namespaces
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.repositories import RepositoryFilter
from registry.domain.channels.serving import channels_of_repository, load_current_moves
from registry.formats.references import parse_name
from registry.wire.catalog import ReleaseOut
from registry.wire.quality import ChannelOut

router = APIRouter(route_class=PageRoute)

SHOWN, MAX_CHANNELS = 20, 100


@router.get("/{namespace}")
def show_namespace(
    namespace: str, request: Request, resources: ResourcesOf, actor: PageReader, cursor: Cursor = None
) -> Response:
    name = parse_name(namespace, "namespace")
    wanted = RepositoryFilter(namespace=name)
    with resources.snapshot() as session:
        namespaces.find(session, name)
        rows = repositories.list_page(session, actor, wanted, after=decode_cursor(cursor), limit=SHOWN + 1)
        listed, more = first_rows(rows, SHOWN, lambda row: str(repositories.name_of(row)))
        views = repository_page(session, listed)
    facts: dict[str, Any] = {"namespace": name, "repositories": views, "more": more}
    facts["administers"] = holds(actor, Role.ADMIN, name)
    return page(request, "namespace.html", **facts, json_address=f"/v1/adapters?namespace={name}")


@router.get("/{namespace}/{name}")
def show_repository(
    named: RepositoryOf, request: Request, resources: ResourcesOf, actor: PageReader, cursor: Cursor = None
) -> Response:
    """Channels first, with what each serves, then the releases."""
    with resources.snapshot() as session:
        row = repositories.find(session, named)
        served = channels_of_repository(session, row, after="", limit=MAX_CHANNELS)
        _kept = load_current_moves(session, *served)
        channels = [channel_view(session, channel, row) for channel in served]
        rows = releases.list_page(session, row, before=decode_cursor(cursor), limit=SHOWN + 1)
        shown = releases_shown(session, actor, [row.id for row in rows[:SHOWN]])
        _, more = first_rows(rows, len(shown), lambda row: row.sort_key)
        newest = next((release for release in rows if not release.yanked), None) if cursor is None else None
        drawn = scores.histories(session, newest) if newest else []
        summary = repository_page(session, [row])[0]
    to_use, by_channel = _release_to_use(shown, channels)
    serving: dict[tuple[str, str | None], list[str]] = {}
    for channel in channels:
        serving.setdefault((str(named), channel.version), []).append(channel.channel)
    return page_about(
        request,
        "repository.html",
        named,
        summary=summary,
        channels=channels,
        histories=drawn,
        releases=shown,
        serving=serving,
        changes=_changes(shown),
        to_use=to_use,
        by_channel=by_channel,
        more=more,
        json_address=f"/v1/{summary.kind}s/{named}",
    )


def _changes(listed: Sequence[ReleaseOut]) -> dict[str, float]:
    """The difference of each release's first score from that of the release below it on the same content, by
    version."""
    changes: dict[str, float] = {}
    for release, before in pairwise(listed):
        scored = {(score.suite_digest, score.metric): score.value for score in before.scores}
        for score in release.scores[:1]:
            if (key := (score.suite_digest, score.metric)) in scored:
                changes[release.version] = score.value - scored[key]
    return changes


def _release_to_use(
    listed: Sequence[ReleaseOut], channels: Sequence[ChannelOut]
) -> tuple[ReleaseOut | None, str | None]:
    """The listed release whose use the page explains, and the channel that serves it: FIRST_CHOICE if it serves one,
    else any other. Without such a channel, the newest release that is not yanked."""
    for channel in sorted(channels, key=lambda channel: channel.channel != FIRST_CHOICE):
        for release in listed:
            if release.version == channel.version:
                return release, channel.channel
    return next((release for release in listed if not release.yanked), None), None
