"""Verify bytes, then publish rows: for web, hub and worker alike."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.findings import Finding
from composer.formats.checkpoint import Architecture, open_checkpoint
from composer.formats.facts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.header import DEFAULT_LIMITS, header_length
from composer.formats.inspection import inspect
from registry import bases, releases
from registry.audit import Actor
from registry.db import insert_if_absent
from registry.errors import Invalid, TooLarge, Unavailable, refuse_errors
from registry.manifest import ManifestFile, check_path
from registry.models import Blob, Release
from registry.names import Digest, RepositoryName, Version
from registry.releases import Input, NewRelease
from registry.repositories import Kind
from registry.resources import Resources
from registry.schemas.catalog import AdapterFactsOut
from registry.storage.blobs import BlobStore

_BLOCK_BYTES = 1 << 20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, slots=True)
class Push:
    """What a client wants released; `version` or `bump` is set, and the bytes of `files` are in the store."""

    repository: RepositoryName
    kind: Kind
    version: Version | None
    bump: str | None
    base: str
    files: Sequence[ManifestFile]
    notes: str = ""
    inputs: Sequence[Input] = field(default=())
    composition_id: int | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """`created` is False for a retry. `warnings` are findings that did not stop the push."""

    release_id: int
    created: bool
    warnings: list[Finding]


def absent(resources: Resources, files: Sequence[ManifestFile]) -> list[ManifestFile]:
    """Those files whose bytes must be sent, the store may have lost them; paths and sizes are checked first."""
    for file in files:
        check_path(file.path)
        _check_size(resources, file.path, file.size_bytes)
        _refuse_pickle(file.path)
    with resources.read() as session:
        known = set(session.scalars(select(Blob.sha256).where(Blob.sha256.in_({file.sha256 for file in files}))))
    return [file for file in files if file.sha256 not in known or not _is_stored(resources, file)]


def _is_stored(resources: Resources, file: ManifestFile) -> bool:
    stat = resources.store.stat(file.sha256)
    return stat is not None and stat.size_bytes == file.size_bytes


def receive(resources: Resources, actor: Actor, sha256: Digest, chunks: Iterable[bytes], size_bytes: int) -> None:
    """Takes the bytes of one blob. Nothing appears under its digest unless digest and size are right."""
    _check_size(resources, sha256, size_bytes)
    with TemporaryDirectory(dir=resources.work_directory, prefix="upload-") as directory:
        path = Path(directory) / "blob"
        digest, taken = hashlib.sha256(), 0
        try:
            with path.open("wb") as file:
                for chunk in chunks:
                    taken += len(chunk)
                    if taken > size_bytes:
                        break
                    digest.update(chunk)
                    file.write(chunk)
        except OSError as error:
            raise Unavailable(
                "store_full",
                f"The upload cannot be written: {error.strerror}.",
                subject=sha256,
                next_step="Free some space and repeat.",
            ) from error
        if taken != size_bytes or digest.hexdigest() != sha256:
            raise Invalid(
                "digest_differs",
                f"The bytes received are not those of {sha256}.",
                subject=sha256,
                next_step="Send the file again.",
            )
        store_file(resources, actor, sha256, path, move=True)


def store_file(resources: Resources, actor: Actor, sha256: Digest, path: Path, *, move: bool) -> None:
    """Puts a verified file into the store, then its row: a crash between the two leaves an orphan, no more."""
    stat = resources.store.put(sha256, path, move=move)
    with resources.write() as session:
        insert_if_absent(session, Blob, sha256=sha256, size_bytes=stat.size_bytes, created_at=actor.at)


def publish(resources: Resources, actor: Actor, push: Push) -> Published:
    """Reads the facts from the files themselves, checks them against the base, and makes the release.

    Raises Invalid with every error finding when the files do not fit; nothing is written then.
    """
    new, findings = prepare(resources, push)
    with resources.write() as session:
        release, created = releases.publish(session, actor, new)
        return Published(release.id, created, findings)


def prepare(resources: Resources, push: Push) -> tuple[NewRelease, list[Finding]]:
    """All of a publication but its rows, so that several can be published in one transaction."""
    with resources.read() as session:
        base_digest = bases.find(session, push.base).digest
        architecture = bases.architecture(session, base_digest)
    facts, findings = _inspect(resources, push, architecture)
    new = NewRelease(
        repository=push.repository,
        kind=push.kind,
        version=push.version,
        bump=push.bump,
        files=push.files,
        base_digest=base_digest,
        facts=facts,
        notes=push.notes,
        inputs=push.inputs,
        composition_id=push.composition_id,
    )
    return new, findings


def materialise(resources: Resources, files: Sequence[ManifestFile], directory: Path) -> None:
    """Writes files of a release below `directory`, every one verified against its digest."""
    for file in files:
        target = directory / check_path(file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            continue
        aside = target.with_name(f".{target.name}.partial")
        _copy_verified(resources.store, file, aside)
        aside.replace(target)


def manifest_files(session: Session, release: Release) -> list[ManifestFile]:
    return [
        ManifestFile(file.path, file.size_bytes, Digest(file.sha256))
        for file in releases.files_of(session, release)[release.revision_id]
    ]


def _inspect(resources: Resources, push: Push, architecture: Architecture) -> tuple[Mapping[str, Any], list[Finding]]:
    for file in push.files:
        check_path(file.path)
        _refuse_pickle(file.path)
    with TemporaryDirectory(dir=resources.work_directory, prefix="inspect-") as directory:
        place = Path(directory) / push.repository.name
        place.mkdir()
        if push.kind is Kind.MODEL:
            _materialise_headers(resources, push.files, place)
            return inspect_model(place, architecture), []
        wanted = (CONFIG_FILE, WEIGHTS_FILE)
        materialise(resources, [file for file in push.files if file.path in wanted], place)
        seen = inspect(place, architecture)
        refuse_errors(seen.findings, str(push.repository))
        return _presentable(seen.facts.to_json()), seen.findings


def _presentable(facts: dict[str, Any]) -> dict[str, Any]:
    """What could not be shown again must not be published: one such release would spoil every list it is on."""
    try:
        AdapterFactsOut(**facts).model_dump_json()
    except ValueError as error:
        raise Invalid(
            "bad_config",
            f"adapter_config.json has a value that cannot be kept: {error}.",
            subject="adapter_config.json",
            next_step="Save the adapter again with PEFT.",
        ) from error
    return facts


def _materialise_headers(resources: Resources, files: Sequence[ManifestFile], directory: Path) -> None:
    """JSON files whole; of a shard only its header, with a hole for the tensors: looking must not cost a copy."""
    materialise(resources, [file for file in files if file.path.endswith(".json")], directory)
    for file in files:
        if file.path.endswith(".safetensors"):
            (directory / file.path).parent.mkdir(parents=True, exist_ok=True)
            with resources.store.open(file.sha256) as source, (directory / file.path).open("wb") as copy:
                first = source.read(8)
                copy.write(first + source.read(header_length(first, file.size_bytes, DEFAULT_LIMITS, file.path)))
                copy.truncate(file.size_bytes)


def inspect_model(directory: Path, architecture: Architecture) -> dict[str, Any]:
    """Facts of a checkpoint. Raises Invalid when a tensor of the base is missing or has another shape."""
    found = open_checkpoint(directory).architecture
    for name, spec in architecture.tensors.items():
        own = found.tensors.get(name)
        if own is None or own.shape != spec.shape:
            what = "is missing" if own is None else f"has the shape {list(own.shape)}, not {list(spec.shape)}"
            raise Invalid(
                "model_differs",
                f"{name} {what}: this is not a checkpoint of that base.",
                subject=name,
                next_step="Name its true base.",
            )
    sizes = [spec.size_bytes for spec in found.tensors.values()]
    dtypes = sorted({spec.dtype for spec in found.tensors.values()})
    parameters = sum(spec.elements for spec in found.tensors.values())
    return {
        "type": "model",
        "variant": "merged",
        "parameters": parameters,
        "size_bytes": sum(sizes),
        "dtype": ",".join(dtypes),
    }


def _copy_verified(store: BlobStore, file: ManifestFile, target: Path) -> None:
    digest = hashlib.sha256()
    with store.open(file.sha256) as source, target.open("wb") as copy:
        while block := source.read(_BLOCK_BYTES):
            digest.update(block)
            copy.write(block)
    if digest.hexdigest() != file.sha256:
        target.unlink()
        raise Unavailable(
            "blob_corrupt",
            f"The stored bytes of {file.path} are damaged ({file.sha256[:12]}).",
            subject=file.path,
            next_step="Restore the blob from a backup.",
        )


def _check_size(resources: Resources, subject: str, size_bytes: int) -> None:
    limit = resources.settings.max_file_bytes
    if not 0 <= size_bytes <= limit:
        raise TooLarge(
            "file_too_large",
            f"{subject} has {size_bytes:,} bytes; the limit is {limit:,}.",
            subject=subject,
            next_step="ADAPTORY_MAX_FILE_BYTES sets it.",
        )


def _refuse_pickle(path: str) -> None:
    if path.lower().endswith(_PICKLES):
        raise Invalid(
            "pickle",
            f"{path} is a pickle, which runs code when it is opened.",
            subject=path,
            next_step="Save safetensors (PEFT's save_pretrained does) and leave the pickle out.",
        )
