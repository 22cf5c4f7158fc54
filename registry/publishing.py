"""Verify bytes, then publish rows: for web, hub and worker alike."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy.orm import Session

from composer.findings import Finding
from composer.formats.checkpoint import Architecture, open_checkpoint
from composer.formats.facts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.header import DEFAULT_LIMITS, header_length
from composer.formats.inspection import inspect
from registry import bases, releases
from registry.audit import Actor
from registry.errors import Invalid, Unavailable, refuse_errors
from registry.manifest import ManifestFile, check_path, refuse_pickle
from registry.models import Release
from registry.names import Digest, RepositoryName, Version
from registry.releases import Input, NewRelease
from registry.repositories import Kind
from registry.resources import Resources
from registry.schemas.catalog import AdapterFactsOut
from registry.storage.blobs import BlobStore

_BLOCK_BYTES = 1 << 20


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
        refuse_pickle(file.path)
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
