"""A release: whether it can be promoted, what it changes, where it comes from and where it is served."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response

from composer.formats.adapters.serving import SERVERS
from registry.api.http.request import ResourcesOf
from registry.api.http.threads import in_store_threads
from registry.api.pages.catalog import answers, card
from registry.api.pages.catalog.answers import AnswerBlock, Channels
from registry.api.pages.html import scores
from registry.api.pages.html.drawings import MAX_ROWS, Cell, cells, frame_of, in_layers, modules_of
from registry.api.pages.html.render import HEADERS, link, page_about, redirect
from registry.api.pages.html.scores import History
from registry.api.pages.html.wire import PageReader, PageRoute, RepositoryOf, VersionOf
from registry.api.routes.blobs import file_response, record_download
from registry.api.routes.documents import releases_shown
from registry.api.routes.views import channel_view, score_view
from registry.database.engine import Session
from registry.database.tables import Release
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import lineage, releases, suites
from registry.domain.catalog.lineage import Descendant
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import resolve
from registry.domain.channels.serving import channels_of_repository, load_current_moves
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName, is_version, parse_reference, parse_version
from registry.storage.blobs import BlobStore
from registry.transfer.resources import Resources
from registry.transfer.verified import read_verified
from registry.wire.catalog import FileRow, ReleaseOut
from registry.wire.quality import ChannelOut, MoveOut, ScoreOut

router = APIRouter(route_class=PageRoute)

CARD = "README.md"
MAX_CHANNELS, MAX_SERVING, MAX_MOVES, MAX_DESCENDANTS, MAX_FILES = 100, 10, 20, 10, 100
_cards = card.Cards()
ChannelQuery = Annotated[str | None, Query(max_length=64, description="The channel that a promotion is judged for.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasePage:
    """A release and what its page compares it with. `before` is the next lower version that is not yanked."""

    release: ReleaseOut
    before: ReleaseOut | None
    base_scores: Sequence[ScoreOut]
    spectrum: Mapping[str, Any] | None
    frame: Collection[str]
    serving: Sequence[ChannelOut]
    moves: Sequence[MoveOut]
    answer: AnswerBlock
    descendants: Sequence[Descendant]
    histories: Sequence[History]
    latest: str | None


@router.get("/{namespace}/{name}/{version}")
def show_release(
    named: RepositoryOf,
    version: str,
    request: Request,
    resources: ResourcesOf,
    actor: PageReader,
    channel: ChannelQuery = None,
) -> Response:
    if not is_version(version):  # a range or `latest`
        return _to_release(resources, str(named) if version == "latest" else f"{named}:{version}")
    with resources.snapshot() as session:
        shown = _shown(session, actor, named, releases.find(session, named, parse_version(version)), channel)
    release, located = shown.release, in_layers(shown.frame, modules_of(shown.spectrum))
    compared = scores.lines(release.scores, shown.before.scores if shown.before else [], shown.base_scores)
    return page_about(
        request,
        "release.html",
        named,
        release=release,
        answer=shown.answer,
        releaser=holds(actor, Role.RELEASER, str(named)),
        publisher=holds(actor, Role.PUBLISHER, str(named)),
        serving=shown.serving,
        moves=shown.moves[:MAX_MOVES],
        more_moves=len(shown.moves) > MAX_MOVES,
        highest=shown.latest == release.version,
        before=shown.before,
        scores=compared,
        histories=shown.histories,
        spectrum=shown.spectrum,
        maps=_maps(shown.spectrum, located),
        frame={located[module] for module in shown.frame},
        max_rows=MAX_ROWS,
        max_files=MAX_FILES,
        descendants=shown.descendants[:MAX_DESCENDANTS],
        more_descendants=len(shown.descendants) > MAX_DESCENDANTS,
        loading=[(server, release.loading.get(server)) for server in SERVERS],
        has_card=(file := _card_file(release)) is not None,
        card=_cards.show(Digest(file.sha256), partial(_text, resources.store, file)) if file else None,
        json_address=release.path,
    )


@router.get("/{namespace}/{name}:{version}")
def show_reference(named: RepositoryOf, version: str, resources: ResourcesOf, actor: PageReader) -> Response:
    """Redirects `acme/sql:1.2.0`, the form of the commands, to its page."""
    return _to_release(resources, f"{named}:{version}")


@router.get("/{namespace}/{name}/commit/{commit}")
def show_commit(named: RepositoryOf, commit: str, resources: ResourcesOf, actor: PageReader) -> Response:
    """Redirects to the page of the highest release of a commit."""
    return _to_release(resources, f"{named}#{commit}")


@router.get("/{namespace}/{name}/{version}/files/{path:path}")
@in_store_threads
def download_file(
    named: RepositoryOf, version: VersionOf, path: str, request: Request, resources: ResourcesOf, actor: PageReader
) -> Response:
    """A file, as an attachment, so that no browser shows it as a page of this server."""
    with resources.read() as session:
        file = releases.find_file(session, releases.find(session, named, version), path)
    name = quote(path.rpartition("/")[2], safe="")
    disposition = f"attachment; filename*=UTF-8''{name}"
    record_download(resources, actor, f"{named}:{version}", path)
    answer = file_response(request, resources, file, f"{path} of {named}:{version}", None, disposition)
    answer.headers["Content-Disposition"] = disposition
    answer.headers["Cache-Control"] = HEADERS["Cache-Control"]
    return answer


def _to_release(resources: Resources, text: str) -> Response:
    reference = parse_reference(text)
    with resources.snapshot() as session:
        version = str(reference.version or resolve.locate(session, reference).row.version)
    return redirect(link(str(reference.repository), version), 302)


@router.get("/{namespace}/{name}/{version}/modules")
def show_modules(
    named: RepositoryOf, version: VersionOf, request: Request, resources: ResourcesOf, actor: PageReader
) -> Response:
    """The table of all modules, for a release with too many for its page."""
    with resources.snapshot() as session:
        row = releases.find(session, named, version)
        spectrum = releases.spectrum_of(session, named, version, Kind.ADAPTER)
    return page_about(
        request,
        "modules.html",
        named,
        version=row.version,
        spectrum=spectrum,
        json_address=f"/v1/adapters/{named}/releases/{row.version}/spectrum",
    )


def _maps(spectrum: Mapping[str, Any] | None, located: Mapping[str, Cell]) -> list[dict[str, Any]]:
    """The maps of a release: how large its change is, and how much of its rank it uses."""
    return [
        {
            "id": "size",
            "name": "Size of the change",
            "unit": "Frobenius norm",
            "cells": cells(spectrum, "norm", located),
        },
        {
            "id": "rank",
            "name": "Rank in use",
            "unit": "for 95 % of the energy",
            "cells": cells(spectrum, "rank_95", located),
        },
    ]


def _shown(session: Session, actor: Actor, named: RepositoryName, row: Release, channel: str | None) -> ReleasePage:
    repository = row.repository
    lower = releases.list_page(session, repository, before=row.sort_key, limit=10)
    before = next((release for release in lower if not release.yanked), None)
    read = releases_shown(session, actor, [row.id, *([before.id] if before else [])])
    listed = channels_of_repository(session, repository, after="", limit=MAX_CHANNELS)
    served_by = channels_of_repository(session, repository, served=row, after="", limit=MAX_SERVING)
    _kept = load_current_moves(session, *served_by)
    serving = [channel_view(session, entry, repository) for entry in served_by]
    moved = answers.moves_of(session, named, row, limit=MAX_MOVES + 1)
    names = [entry.name for entry in listed]
    base_scores = suites.scores_of_bases(session, row.base)[row.base_digest]
    return ReleasePage(
        release=read[0],
        before=read[1] if len(read) > 1 else None,
        base_scores=list(map(score_view, base_scores)),
        spectrum=row.spectrum,
        frame=frame_of(session, row.base) if row.spectrum else (),
        serving=serving,
        moves=moved,
        answer=answers.answer(session, actor, row, Channels(names, serving, channel), moved),
        descendants=lineage.descendants(session, actor, row, before=0, limit=MAX_DESCENDANTS + 1),
        histories=scores.histories(session, row),
        latest=resolve.heads(session, repository)[repository.id].latest,
    )


def _card_file(release: ReleaseOut) -> FileRow | None:
    """The model card's file, if it is of a size that a person would read. A release that was taken down has none."""
    if release.taken_down:
        return None
    cards = (file for file in release.files if file.path == CARD and file.size_bytes <= card.MAX_BYTES)
    return next(cards, None)


def _text(store: BlobStore, file: FileRow) -> str:
    card_file = ManifestFile(file.path, file.size_bytes, Digest(file.sha256))
    return read_verified(store, card_file).decode(errors="replace")
