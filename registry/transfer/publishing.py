"""Publishes: verifies the bytes, then writes the rows; for both the API and the worker."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from composer.checks.check import NEW_EMBEDDINGS, check_one
from composer.errors import ComposerError, InvalidFile
from composer.findings import Finding, Severity
from composer.formats.adapters.facts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.adapters.inspection import inspect
from composer.formats.adapters.serving import judge
from composer.formats.adapters.spectrum import spectrum
from composer.formats.checkpoints.card import CARD_FILE, card_provenance, parse_provenance
from composer.formats.checkpoints.checkpoint import Architecture, open_checkpoint
from composer.formats.checkpoints.header import DEFAULT_LIMITS, header_length, parse_header
from composer.formats.sets.adapter_set import MAX_BYTES as MAX_SET_BYTES
from composer.formats.sets.adapter_set import SET_FILE, AdapterSet, parse_set
from registry.database import idempotency
from registry.database.idempotency import IdempotentRequest
from registry.database.tables import Release
from registry.domain.access import namespaces
from registry.domain.access.audit import Actor
from registry.domain.catalog import barred, bases, commits, lineage, releases, repositories, signatures, versioning
from registry.domain.catalog import reported as reported_scores
from registry.domain.catalog.releases import Input, NewRelease
from registry.domain.catalog.repositories import Kind
from registry.errors import Invalid, Refused, RegistryError, Unavailable
from registry.errors.translation import refuse_errors, strictly
from registry.formats import compatibility
from registry.formats.manifest import ManifestFile, check_path, refuse_hidden, refuse_unportable
from registry.formats.pickles import ENDS_BYTES, is_zip, refuse_pickle_content, refuse_pickle_name
from registry.formats.references import Digest, RepositoryName, Version
from registry.formats.signatures import (
    MAX_SIGNATURE_BYTES,
    SIGNATURE_FILE,
    Signed,
    open_signature,
    refuse_tampered,
    unverifiable_signature,
)
from registry.storage.blobs import BlobStore, OpensBlobs
from registry.transfer.resources import Resources
from registry.transfer.verified import copy_verified, read_reported

_BLOCK_BYTES = 1 << 20
_CARD_BYTES = 1_000_000
_PARALLEL = 8
_VERIFIED_BYTES = 1 << 30
"""The bytes that are read again to confirm a refusal: all of an adapter, but not a model's shards."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """A release to publish; `version` or `bump` is set, and the bytes of `files` are in the store.

    `provenance` is stated by the publisher; it overrides the model card. `moves_main`: files that are not those of a
    commit become the head of `main`. `strict`: warnings are errors.
    """

    repository: RepositoryName
    kind: Kind
    version: Version | None
    bump: str | None
    base: str
    files: Sequence[ManifestFile]
    notes: str = ""
    inputs: Sequence[Input] = field(default=())
    composition_id: int | None = None
    allow_breaking: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    moves_main: bool = True
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """`created` is False if the same was already published. `warnings` are findings that did not prevent it."""

    release_id: int
    created: bool
    warnings: list[dict[str, Any]]


def publish(resources: Resources, actor: Actor, push: Push, keyed: IdempotentRequest | None = None) -> Published:
    """Reads the facts from the files, checks them against the base, and makes the release. Raises Invalid with every
    error finding, and writes nothing, if the files do not fit."""
    if keyed is not None:
        with resources.read() as session:
            known = idempotency.find_answer(session, keyed)
        if known is not None:
            return Published(**known)
    new, findings = prepare(resources, push)
    stated, doubts = read_reported(resources, push.files)
    with resources.write() as session:
        known = idempotency.claim_key(session, keyed, actor.at)
        if known is not None:
            return Published(**known)
        new, inherited = lineage.with_inherited(session, actor, new)
        release, created = commits.publish(session, actor, new, moves_main=push.moves_main)
        if created:
            findings += [*inherited, *doubts, *reported_scores.record(session, actor, release, stated)[1]]
        if push.strict:
            refuse_errors(strictly(findings), str(push.repository))
        published = Published(release.id, created, [finding.to_json() for finding in findings])
        idempotency.store_answer(session, keyed, asdict(published))
        return published


def prepare(resources: Resources, push: Push) -> tuple[NewRelease, list[Finding]]:
    """Does everything except writing the rows, so that several releases can be published in one transaction."""
    for file in push.files:
        check_path(file.path)
        refuse_hidden(file.path)
        refuse_unportable(file.path)
        refuse_pickle_name(file.path)
    with resources.read() as session:
        base_digest = bases.find(session, push.base).digest
        base_names = bases.names(session, base_digest)
        architecture = bases.architecture(session, base_digest)
        keys = namespaces.signing_keys(session, push.repository.namespace)
        barred.refuse_files(session, push.repository.namespace, push.files)
        releases.refuse_absent_blobs(session, push.repository.namespace, push.files)  # before their bytes are read
        yanked = _doubts_of_yanked(session, push)
    parsed = {WEIGHTS_FILE} if push.kind is Kind.ADAPTER else set[str]()  # its inspection parses it
    unparsed = [file for file in push.files if file.path not in parsed]
    _look_again(resources, unparsed, lambda: refuse_pickled(resources, unparsed))
    signed, doubted = _judge_signature(resources, push, keys)
    signed_by = signed.fingerprint if signed and keys else None
    with resources.read() as session:
        signed_as = signatures.signed_as(session, signed_by) if signed_by else None
    seen = _look_again(resources, push.files, lambda: _inspect(resources, push, architecture, base_names))
    stated, doubts = card_provenance(seen.card) if seen.card else ({}, [])
    new = NewRelease(
        repository=push.repository,
        kind=push.kind,
        version=push.version,
        bump=push.bump,
        files=push.files,
        base_digest=base_digest,
        facts=seen.facts,
        notes=push.notes,
        inputs=push.inputs,
        composition_id=push.composition_id,
        allow_breaking=push.allow_breaking,
        provenance={**stated, **parse_provenance(push.provenance, "provenance")},
        spectrum=seen.spectrum,
        servers=seen.servers,
        loading=seen.loading,
        signed=signed,
        signed_by=signed_by,
        signed_as=signed_as,
    )
    return new, [*seen.findings, *doubts, *doubted, *yanked]


def next_version(resources: Resources, push: Push) -> Version:
    """The number that the push would get now, for a client that must sign it first."""
    new, _ = prepare(resources, push)
    with resources.read() as session:
        repository = repositories.find_if_any(session, new.repository, new.kind)
        if repository is None:
            return versioning.FIRST_VERSION
        surface = compatibility.surface(new.base_digest, new.facts, new.files)
        return versioning.next_version(session, repository, new.bump, surface)


def add_signature(
    resources: Resources, actor: Actor, target: tuple[RepositoryName, Version, Kind], bundle: bytes
) -> int:
    """Adds a signature to a release and returns the release's id. Raises Refused if no key of its namespace made it."""
    repository, version, kind = target
    with resources.write() as session:
        release = releases.find(session, repository, version, kind)
        keys = namespaces.find_for_share(session, repository.namespace).signing_keys
        if not keys:
            raise Refused(
                "signing_keys_missing",
                f"{repository.namespace} has no signing key.",
                subject=repository.namespace,
                next_step=f"An admin can: `adaptory namespace set {repository.namespace} --signing-key PUB.pem`.",
            )
        signatures.add(session, actor, release, open_signature(bundle, keys), bundle)
        return release.id


def import_scores(
    resources: Resources, actor: Actor, target: tuple[RepositoryName, Version, Kind]
) -> tuple[list[int], list[Finding]]:
    """Records the scores that the files of a published release report, as its publication does. Returns the ids of the
    scores, and a warning for each that is not kept."""
    with resources.read() as session:
        files = manifest_files(session, releases.find(session, *target))
    stated, doubts = read_reported(resources, files)
    with resources.write() as session:
        rows, refused = reported_scores.record(session, actor, releases.find(session, *target), stated)
        return [row.id for row in rows], [*doubts, *refused]


def materialise(store: OpensBlobs, files: Sequence[ManifestFile], directory: Path) -> None:
    """Writes files of a release from the store below `directory`, created if missing. Verifies each by its digest."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        target = directory / check_path(file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            continue
        staging = target.with_name(f".{target.name}.partial")
        with staging.open("wb") as copy:
            copy_verified(store, file, copy)
        staging.replace(target)


def manifest_files(session: Session, release: Release) -> list[ManifestFile]:
    """The files of a release's manifest. Raises NotFound if they were taken down."""
    releases.refuse_taken_down(releases.full_name(release), release.revision)
    return [
        ManifestFile(file.path, file.size_bytes, Digest(file.sha256))
        for file in releases.files_of(session, release)[release.revision_id]
    ]


def _look_again(resources: Resources, files: Sequence[ManifestFile], look: Callable[[], T]) -> T:
    """Returns the result of `look`. If that refuses the files, confirms that the bytes were read correctly, since
    partial reads are not verified. Raises Unavailable if the store returns other bytes than it received."""
    try:
        return look()
    except Unavailable:
        raise
    except (ComposerError, RegistryError):
        read_bytes = 0
        for file in sorted(files, key=lambda one: one.size_bytes):
            read_bytes += file.size_bytes
            if read_bytes > _VERIFIED_BYTES:  # the second look must do
                break
            copy_verified(resources.store, file, None)
        return look()


@dataclass(frozen=True, slots=True)
class _Inspected:
    """The contents of the files. `card` is the README's text, empty if it is missing or too long. `servers` and
    `loading` are those of `composer.formats.adapters.serving`; a model has neither, nor a spectrum."""

    facts: Mapping[str, Any]
    findings: Sequence[Finding]
    card: bytes
    spectrum: Mapping[str, Any] | None = None
    servers: int = 0
    loading: Mapping[str, Any] = field(default_factory=dict[str, Any])


def refuse_pickled(resources: Resources, files: Sequence[ManifestFile]) -> None:
    """Inspects every file. A file named safetensors must be one: loaders that ignore names would run a pickle of that
    name. No other file may be a pickle."""

    def look(file: ManifestFile) -> None:
        with resources.store.open(file.sha256, 0, ENDS_BYTES) as source:
            first = source.read()
        if file.path.lower().endswith(".safetensors"):
            _check_header(resources.store, file, first)
            return
        last = b""
        if is_zip(first):
            with resources.store.open(file.sha256, max(0, file.size_bytes - ENDS_BYTES)) as source:
                last = source.read()
        refuse_pickle_content(file.path, first, last)

    with ThreadPoolExecutor(_PARALLEL, "look") as pool:
        list(pool.map(look, files))


def _check_header(store: BlobStore, file: ManifestFile, first: bytes) -> None:
    """Raises InvalidFile unless the file is safetensors; `first` are its first bytes."""
    rest = 8 + header_length(first, file.size_bytes, DEFAULT_LIMITS, file.path) - len(first)
    if rest > 0:
        with store.open(file.sha256, len(first), rest) as source:
            first += source.read()
    parse_header(first, file.size_bytes, DEFAULT_LIMITS, file.path)


def _inspect(resources: Resources, push: Push, architecture: Architecture, base_names: Sequence[str]) -> _Inspected:
    with TemporaryDirectory(dir=resources.work_directory, prefix="inspect-") as directory:
        adapter_directory = Path(directory) / push.repository.name
        adapter_directory.mkdir()
        cards = [file for file in push.files if file.path == CARD_FILE and file.size_bytes <= _CARD_BYTES]
        materialise(resources.store, cards, adapter_directory)
        card = (adapter_directory / CARD_FILE).read_bytes() if cards else b""
        if push.kind is Kind.SET:
            return _inspect_set(resources, push, card)
        if push.kind is Kind.MODEL:
            _materialise_headers(resources, push.files, adapter_directory)
            return _Inspected(inspect_model(adapter_directory, architecture), [], card)
        wanted = (CONFIG_FILE, WEIGHTS_FILE, *NEW_EMBEDDINGS)
        materialise(resources.store, [file for file in push.files if file.path in wanted], adapter_directory)
        return _inspect_adapter(adapter_directory, architecture, base_names, str(push.repository), card)


def _inspect_set(resources: Resources, push: Push, card: bytes) -> _Inspected:
    """The facts of a set, whose members are the inputs of its composition. A server that loads all of them needs their
    largest rank and all their targets. Raises Refused for a set that no composition made."""
    if push.composition_id is None:
        raise set_not_composed(push.repository)
    members = read_set(resources, push.files).members
    with resources.read() as session:
        inputs = [session.get_one(Release, used.release_id) for used in push.inputs]
        known: list[dict[str, Any]] = [{**release.facts, "size_bytes": release.size_bytes} for release in inputs]
        servers = reduce(lambda mask, release: mask & release.servers, inputs, -1)
        loading = {server: refusal for release in inputs for server, refusal in release.loading.items()}
    facts: dict[str, Any] = {
        "type": "set",
        "variant": "set",
        "members": sorted(members),
        "rank_max": max(facts["rank_max"] for facts in known),
        "targets": sorted({target for facts in known for target in facts["targets"]}),
        "parameters": sum(facts["parameters"] for facts in known),
        "size_bytes": sum(facts["size_bytes"] for facts in known),
        "dtype": ", ".join(sorted({facts["dtype"] for facts in known})),
    }
    return _Inspected(facts, [], card, servers=servers, loading=loading)


def set_not_composed(name: RepositoryName) -> Refused:
    """The error for files of a set that no composition has made."""
    return Refused("set_not_composed", "A set is not pushed.", subject=str(name))


def read_set(resources: Resources, files: Sequence[ManifestFile]) -> AdapterSet:
    """The set that is stored among the files. Raises InvalidFile if there is none, or if it is too large."""
    file = next((file for file in files if file.path == SET_FILE and file.size_bytes <= MAX_SET_BYTES), None)
    if file is None:
        message = f"{SET_FILE} is missing or has more than {MAX_SET_BYTES:,} bytes."
        raise InvalidFile("bad_set", message, subject=SET_FILE)
    with resources.store.open(file.sha256) as source:
        return parse_set(source.read())


def misfit(resources: Resources, name: str, files: Sequence[ManifestFile], architecture: Architecture) -> str:
    """The reason why a stored adapter does not fit the architecture; empty if it does. Reads only headers, and verifies
    them before reporting a misfit. Raises Unavailable if the store returns other bytes than it received."""
    wanted = [file for file in files if file.path in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        _look_again(resources, wanted, lambda: _refuse_misfit(resources, name, wanted, architecture))
    except Unavailable:
        raise
    except ComposerError as error:
        return error.message
    except RegistryError as error:
        return error.detail
    return ""


def _refuse_misfit(resources: Resources, name: str, files: Sequence[ManifestFile], architecture: Architecture) -> None:
    with TemporaryDirectory(dir=resources.work_directory, prefix="inspect-") as directory:
        _materialise_headers(resources, files, Path(directory))
        refuse_errors(inspect(Path(directory), architecture).findings, name)


def _inspect_adapter(
    directory: Path, architecture: Architecture, base_names: Sequence[str], subject: str, card: bytes
) -> _Inspected:
    seen = inspect(directory, architecture)
    findings = check_one(seen, base_names)
    refuse_errors(findings, subject)
    used = spectrum(seen.adapter, seen.placed)
    facts = seen.facts.to_json() | {"spectrum": used.summary() if used else None}
    servers, loading = judge(seen.adapter.config, seen.facts, seen.placed)
    return _Inspected(
        facts=_presentable(facts),
        findings=[*findings, *(used.hints(seen.findings) if used else [])],
        card=card,
        spectrum=used.to_json() if used else None,
        servers=servers,
        loading=loading,
    )


def _doubts_of_yanked(session: Session, push: Push) -> list[Finding]:
    """A warning if a yanked release has the same files; not if that release is pushed again."""
    twin = releases.yanked_twin(session, push.repository.namespace, push.files)
    if twin is None or (name := releases.full_name(twin)) == f"{push.repository}:{push.version}":
        return []
    message = f"These are the files of {name}, which is yanked: {twin.yank_reason}."
    return [Finding("yanked_files", Severity.WARNING, name, message)]


def _judge_signature(resources: Resources, push: Push, keys: Sequence[str]) -> tuple[Signed | None, list[Finding]]:
    """The verified signature; its fingerprint is empty if the namespace has no keys. None without a signature.

    Raises Refused for a signature by none of the namespace's keys, and for files that differ from the signed ones.
    Without keys the signer is unknown; a signature of other files is then kept, with a warning, unless it is too large.
    The signed release name is checked once the release has its number.
    """
    files = push.files
    signature = next((file for file in files if file.path == SIGNATURE_FILE), None)
    if signature is None:
        return None, []
    if signature.size_bytes > MAX_SIGNATURE_BYTES:
        raise Invalid(
            "bad_signature",
            f"{SIGNATURE_FILE} is too large to be a signature.",
            subject=SIGNATURE_FILE,
            next_step="Push it with --sign KEY.pem, which makes one.",
        )
    with TemporaryDirectory(dir=resources.work_directory, prefix="signature-") as directory:
        materialise(resources.store, [signature], Path(directory))
        content = (Path(directory) / SIGNATURE_FILE).read_bytes()
    digests = {file.path: file.sha256 for file in files}
    if not keys:
        return unverifiable_signature(content, digests)
    signed = open_signature(content, keys)
    refuse_tampered(signed, digests)
    if signed.release is not None:
        return signed, []
    message = (
        f"{SIGNATURE_FILE} covers only files: it verifies under any name, version and base. Push with --sign KEY.pem."
    )
    return signed, [Finding("signature_files_only", Severity.WARNING, SIGNATURE_FILE, message)]


def _presentable(facts: dict[str, Any]) -> dict[str, Any]:
    """Raises Invalid for facts that JSON cannot represent: one such release would break every list that contains it."""
    try:
        json.dumps(facts, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise Invalid(
            "bad_config",
            f"adapter_config.json has a value that cannot be stored: {error}.",
            subject="adapter_config.json",
        ) from error
    return facts


def _materialise_headers(resources: Resources, files: Sequence[ManifestFile], directory: Path) -> None:
    """Copies JSON files completely, but of a shard only its header, with a hole for the tensors: inspection must not
    cost a copy."""
    materialise(resources.store, [file for file in files if file.path.endswith(".json")], directory)
    for file in files:
        if file.path.endswith(".safetensors"):
            (directory / file.path).parent.mkdir(parents=True, exist_ok=True)
            with resources.store.open(file.sha256) as source, (directory / file.path).open("wb") as copy:
                first = source.read(8)
                copy.write(first + source.read(header_length(first, file.size_bytes, DEFAULT_LIMITS, file.path)))
                copy.truncate(file.size_bytes)


def inspect_model(directory: Path, architecture: Architecture) -> dict[str, Any]:
    """The facts of a checkpoint. Raises Invalid if a tensor of the base is missing or has another shape."""
    checkpoint = open_checkpoint(directory).architecture
    for name, spec in architecture.tensors.items():
        own = checkpoint.tensors.get(name)
        if own is None or own.shape != spec.shape:
            what = "is missing" if own is None else f"has the shape {list(own.shape)}, not {list(spec.shape)}"
            raise Invalid(
                "model_differs",
                f"{name} {what}: this is not a checkpoint of that base.",
                subject=name,
                next_step="Name the base that it was merged into.",
            )
    sizes = [spec.size_bytes for spec in checkpoint.tensors.values()]
    dtypes = sorted({spec.dtype for spec in checkpoint.tensors.values()})
    parameters = sum(spec.elements for spec in checkpoint.tensors.values())
    return {
        "type": "model",
        "variant": "merged",
        "parameters": parameters,
        "size_bytes": sum(sizes),
        "dtype": ",".join(dtypes),
    }
