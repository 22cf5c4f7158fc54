"""Import: the files of one commit of a Hugging Face Hub, published by the same push as a directory's."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from composer.formats.adapters.layouts import SET_FILE
from registry.client.push import ReleaseOptions
from registry.client.selection import Selection, is_included, select_files
from registry.client.signing import Publication
from registry.errors import Invalid, NotFound, Refused, RegistryError
from registry.formats.addresses import HubAddress
from registry.formats.manifest import check_paths, refuse_hidden
from registry.formats.pickles import refuse_pickle_name
from registry.formats.references import Reference
from registry.formats.signatures import SIGNATURE_FILE
from registry.sdk.connection import Connection
from registry.sdk.display import Display
from registry.sdk.fit import fitting_base
from registry.sdk.local_files import publish
from registry.storage.hub.remote import Hub, Snapshot

if TYPE_CHECKING:
    from registry.client.api import Api
    from registry.wire.catalog import PublishedOut


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """An import to run: `source` on the hub at `endpoint` becomes `target`. `request` is that of a release, without its
    base, files and provenance; `base` overrides the base that the files name; `key` signs the release."""

    source: HubAddress
    target: Reference
    request: ReleaseOptions
    endpoint: str | None = None
    base: str | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The published release, the number of `sent` files, and the origin. `left_out` are the files of the hub that
    are not published."""

    published: "PublishedOut"
    sent: int
    imported_from: str
    endpoint: str
    left_out: tuple[str, ...]


def import_release(connection: Connection, wanted: Import, display: Display) -> Imported:
    """Downloads what a push includes, checks and publishes it.

    The commit is resolved once. What has been downloaded stays in the cache until it is published.
    """
    hub = Hub(wanted.endpoint)
    snapshot = hub.snapshot(wanted.source)
    # A repository with an adapter's configuration or weights is one, even with a `config.json`.
    is_adapter = any(path.startswith(("adapter_config.", "adapter_model.")) for path in snapshot.files)
    if SET_FILE in snapshot.files and not is_adapter:
        message = f"{wanted.source} is a set of adapters, which only a composition makes."
        raise Refused("set_not_composed", message, subject=str(wanted.source))
    kind = "model" if "config.json" in snapshot.files and not is_adapter else "adapter"
    # The same commit of two hubs need not be the same files.
    source = hashlib.sha256(f"{hub.endpoint} {snapshot.address}".encode()).hexdigest()[:12]
    folder = f"{snapshot.address.repository.rpartition('/')[2]}-{source}"
    selection = _selected(snapshot, kind, connection.cache / "imports" / folder)
    with hub.exclusive(selection.directory):
        size_bytes = sum(snapshot.files[path].size_bytes for path in selection.paths)
        with display.progress(f"download {snapshot.address.repository}", size_bytes) as done:
            hub.download(snapshot, selection.paths, selection.directory)
            done(size_bytes)
        stated = {"imported_from": str(snapshot.address), "imported_endpoint": hub.endpoint}
        base = _base(connection.api, selection.directory, wanted.base, kind)
        publication = Publication(
            wanted.target.repository, kind, {**wanted.request, "base": base, "provenance": stated}
        )
        files = select_files(selection.directory, kind)
        published, sent = publish(connection.api, files, publication, display, wanted.key)
        shutil.rmtree(selection.directory)
    return Imported(
        published=published,
        sent=sent,
        imported_from=str(snapshot.address),
        endpoint=hub.endpoint,
        left_out=selection.left_out,
    )


def _selected(snapshot: Snapshot, kind: str, directory: Path) -> Selection:
    """The files of the snapshot that a push includes, by name, before any is read. Pickles beside safetensors are left
    out. Raises Invalid for a repository with nothing but pickles, and for names that no release can have."""
    chosen, pickles = list[str](), list[str]()
    for path in _included(snapshot, kind):
        try:
            refuse_pickle_name(path)
        except RegistryError:
            pickles.append(path)
        else:
            chosen.append(path)
    weights = [path for path in (*snapshot.files,) if _is_pickled(path)]
    if weights and not any(path.endswith(".safetensors") for path in chosen):
        raise Invalid(
            "pickle",
            f"{snapshot.address} has its weights only as a pickle ({weights[0]}), which runs code when opened.",
            subject=weights[0],
            next_step="Ask its author for safetensors, or convert it yourself and push the directory.",
        )
    if not chosen:
        raise Invalid(
            "bad_manifest",
            f"{snapshot.address} has no file of an adapter or a model.",
            subject=str(snapshot.address),
            next_step="Name a repository with adapter_config.json and adapter_model.safetensors, or with a model.",
        )
    check_paths(chosen)
    kept = {*chosen, ".gitattributes"}
    return Selection(directory, tuple(chosen), tuple(path for path in snapshot.files if path not in kept))


def _included(snapshot: Snapshot, kind: str) -> Iterator[str]:
    for path in snapshot.files:
        try:
            refuse_hidden(path)
        except RegistryError:  # .gitattributes and its kind, which a push does not see either
            continue
        if is_included(path, kind) and path != SIGNATURE_FILE:  # it signs all files there, and perhaps their repository
            yield path


def _is_pickled(path: str) -> bool:
    try:
        refuse_pickle_name(path)
    except RegistryError:
        return path.startswith(("adapter_model", "pytorch_model", "model"))
    return False


def _base(api: "Api", directory: Path, given: str | None, kind: str) -> str:
    """The base: as given, or the one that the card names, or else the one that the configuration names.

    Raises as `fitting_base` does."""
    stated = None if given else _stated_base(directory)
    if stated is None:
        return fitting_base(api, directory, given, kind)
    try:
        known = api.base(stated).digest
    except NotFound as unknown:
        try:
            return fitting_base(api, directory, None, kind)
        except RegistryError as error:
            raise (unknown if error.code == "base_missing" else error) from None
    return fitting_base(api, directory, known, kind)


def _stated_base(directory: Path) -> str | None:
    from composer.formats.checkpoints.card import CARD_FILE, FRONT_MATTER_BYTES, card_provenance

    card = directory / CARD_FILE
    if not card.is_file():
        return None
    with card.open("rb") as file:
        return card_provenance(file.read(2 * FRONT_MATTER_BYTES))[0].get("base_model")
