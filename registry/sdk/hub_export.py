"""Export: a release as a commit and a tag of a Hugging Face Hub, with a card and the measured scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from composer.errors import InvalidFile
from composer.formats.checkpoints.card import CARD_FILE
from registry.errors import Conflict, Usage
from registry.formats.addresses import HubAddress
from registry.formats.signatures import SIGNATURE_FILE
from registry.sdk.connection import Connection
from registry.sdk.display import Display
from registry.sdk.hub_card import exported_card, results_file
from registry.sdk.local_files import release_directory, resolved, total_bytes
from registry.storage.hub.remote import Content, Hub, HubFile
from registry.wire.catalog import ReleaseOut

_LOADED = (".safetensors", ".json", ".jinja", ".model", ".tiktoken")
"""Endings of files by which a program loads a model."""
_LISTED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """The result of an export. `created` is false if it was there already; `scores` is the number of measured ones."""

    release: str
    exported_to: str
    endpoint: str
    tag: str
    created: bool
    files: list[str]
    scores: int


def export_release(
    connection: Connection, ref: str, target: HubAddress, endpoint: str | None, display: Display, *, private: bool
) -> Export:
    """Uploads the release that `ref` names to the main branch of the repository, and tags it with its version.

    The same release again changes nothing (`created` is False). Raises Conflict if the tag has other content. A file
    on the branch that a program would load, and that the release lacks, is deleted there; others stay.
    """
    if target.revision is not None:
        raise Usage(
            "bad_hub_address",
            f"{target} names a revision.",
            subject=str(target),
            next_step="Name the repository alone: the tag is the release's version.",
        )
    hub = Hub(endpoint)
    release = connection.api.get(resolved(connection, ref, display.warn).path, ReleaseOut)
    if release.kind == "set":
        message = f"{release.name} is a set, whose members are releases of this registry: a hub cannot load it."
        step = f"Export its members, and write its router with `adaptory router {release.name}`."
        raise Usage("set_not_exported", message, subject=release.name, next_step=step)
    files = _contents(connection, release, display)
    tag = target.at(release.version)
    hub.create(target, private=private)
    known = hub.tagged(tag)
    if known is not None:
        _refuse_other_content(tag, known.files, files)
        commit = str(known.address.revision)
    else:
        removed = _superfluous(hub.head(target), files)
        size_bytes = total_bytes(release)
        with display.progress(f"export {release.name}", size_bytes) as done:
            commit = hub.write(tag, files, removed, (release.name, release.notes))
            done(size_bytes)
    return Export(
        release=release.name,
        exported_to=str(target.at(commit)),
        endpoint=hub.endpoint,
        tag=release.version,
        created=known is None,
        files=sorted(files),
        scores=sum(not score.reported for score in release.scores),
    )


def _contents(connection: Connection, release: ReleaseOut, display: Display) -> dict[str, Content]:
    """The files of the export: those of the release, with the card and the scores."""
    directory = release_directory(connection, release, display)
    files: dict[str, Content] = {row.path: directory / row.path for row in release.files}
    card = files.get(CARD_FILE)
    existing = card.read_bytes() if isinstance(card, Path) else None
    base = connection.api.base(release.base.digest)
    try:
        files[CARD_FILE] = exported_card(release, base, existing)
    except InvalidFile as error:
        display.warn(f"{error.message} It is exported as it is, without base and scores.")
    results = results_file(release)
    if results is not None:
        path, content = results
        files[path] = content
    if files.pop(SIGNATURE_FILE, None):
        display.warn(f"{SIGNATURE_FILE} is left out: it signs this registry's release, without what is added to it.")
    return files


def _superfluous(there: Mapping[str, HubFile], files: Mapping[str, Content]) -> list[str]:
    """Files that the release lacks, and that a program would load with it."""
    return [path for path in there if path not in files and "/" not in path and path.endswith(_LOADED)]


def _refuse_other_content(tag: HubAddress, there: Mapping[str, HubFile], files: Mapping[str, Content]) -> None:
    different = [path for path in sorted(files) if path not in there or not there[path].holds(files[path])]
    different += _superfluous(there, files)
    if not different:
        return
    more = f" and {len(different) - _LISTED} more" if len(different) > _LISTED else ""
    raise Conflict(
        "hub_tag_differs",
        f"{tag} already exists with different content: {', '.join(different[:_LISTED])}{more}.",
        subject=str(tag),
    )
