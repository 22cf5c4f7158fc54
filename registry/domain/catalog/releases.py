"""Publish and find releases. A release never changes; its facts were true of its files when it was published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Row, Select, func, select
from sqlalchemy.orm import Session

from registry.database.locks import lock_blobs_shared
from registry.database.tables import (
    Base,
    Blob,
    BlobHolder,
    Namespace,
    Release,
    ReleaseInput,
    Repository,
    Revision,
    RevisionFile,
)
from registry.domain.access import audit, namespaces, quotas
from registry.domain.access.audit import Act, Actor
from registry.domain.catalog import barred, repositories, search_index, versioning
from registry.domain.catalog.barred import without_signature
from registry.domain.catalog.repositories import Kind
from registry.errors import Conflict, Invalid, NotFound, Refused
from registry.formats import compatibility
from registry.formats.manifest import ManifestFile, canonical_manifest, commit_id
from registry.formats.references import RepositoryName, Version
from registry.formats.signatures import SIGNATURE_FILE, Signed, SignedRelease, is_key_of, refuse_other_release

MAX_NOTES = 20_000
_LISTED = 5
"""Maximum number of versions that an error lists."""


@dataclass(frozen=True, slots=True)
class Input:
    """A release that a composition used."""

    release_id: int
    weight: float


@dataclass(frozen=True, slots=True)
class NewRelease:
    """A release to publish: `version` or `bump` is set; `facts` are an adapter's or a merged checkpoint's.

    `allow_breaking` is why a breaking change may keep a version number that promises compatibility. `facts`, `servers`
    and `loading`, and `spectrum` come from facts.py, serving.py and spectrum.py in composer/formats/adapters/. `signed`
    is the content of a signature among or beside the files; `signed_by` is its key's fingerprint if that is trusted,
    and `signed_as` tells whether a publisher or a worker signed.
    """

    repository: RepositoryName
    kind: Kind
    version: Version | None
    bump: str | None
    files: Sequence[ManifestFile]
    base_digest: str
    facts: Mapping[str, Any]
    notes: str = ""
    inputs: Sequence[Input] = field(default=())
    composition_id: int | None = None
    allow_breaking: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    spectrum: Mapping[str, Any] | None = None
    servers: int = 0
    loading: Mapping[str, Any] = field(default_factory=dict[str, Any])
    signed: Signed | None = None
    signed_by: str | None = None
    signed_as: str | None = None


def publish(session: Session, actor: Actor, new: NewRelease) -> tuple[Release, bool]:
    """Publishes a release. Returns it and whether it is new. Publishing the same content again is a retry.

    The blobs must be stored already. Raises Conflict for different content under the version, and Refused for a
    breaking change whose version lies within `^previous`, unless `allow_breaking` states a reason.
    """
    refuse_long_notes(new.notes, str(new.repository))
    commit = commit_id(canonical_manifest(new.files))
    repository = repositories.find_or_create(session, actor, new.repository, new.kind)
    # Serialized: the next version and breaking changes depend on the existing releases.
    repositories.lock(session, repository.id)
    surface = compatibility.surface(new.base_digest, new.facts, new.files)
    version = new.version or versioning.next_version(session, repository, new.bump, surface)
    existing = _by_version(session, repository, version)
    if existing is not None:
        return _retry(existing, new, commit), False
    if new.version is None and (same := versioning.unchanged_release(session, repository, commit, new.base_digest)):
        return same, False
    repositories.refuse_shadowed(session, new.repository, str(version))
    bound = signable(str(new.repository), str(version), new.base_digest, new.files)
    if new.signed is not None:
        refuse_other_release(new.signed, bound)
    quotas.refuse_release(session, new.repository.namespace)
    # Locked, so that no concurrent change is missed.
    policy = SignaturePolicy.of(namespaces.find_for_share(session, new.repository.namespace))
    covers = new.signed.covers if new.signed and new.signed_by else None
    refuse_without_signature(new.repository.namespace, policy, new.signed_by, covers)
    if policy.require_signature:
        refuse_yanked_files(session, new.repository.namespace, new.files)
    breaking_reason = versioning.refuse_breaking(session, repository, version, surface, commit, new.allow_breaking)
    revision = find_or_create_revision(session, actor, repository, new.files)
    release = _insert(session, actor, new, version, repository, revision)
    release.breaking_reason = breaking_reason
    release.signed_by, release.signature_covers, release.signed_as = new.signed_by, covers, new.signed_as
    for source in new.inputs:
        session.add(
            ReleaseInput(
                release_id=release.id,
                input_id=source.release_id,
                composition_id=new.composition_id,
                weight=source.weight,
            )
        )
    session.flush()
    audit.record(
        session,
        actor,
        Act.RELEASE_PUBLISH,
        full_name(release),
        namespace=new.repository.namespace,
        reason=breaking_reason,
        after={"commit": commit, "base": new.base_digest, "signed_by": new.signed_by},
    )
    return release, True


def refuse_long_notes(notes: str, subject: str) -> None:
    """Raises Invalid for notes longer than MAX_NOTES characters."""
    if len(notes) > MAX_NOTES:
        raise Invalid("notes_too_long", f"Notes are limited to {MAX_NOTES:,} characters.", subject=subject)


def refuse_absent_blobs(session: Session, namespace: str, files: Sequence[ManifestFile]) -> None:
    """Raises Invalid for a file whose bytes the namespace has not uploaded itself, since knowing a digest grants no
    access to its content, or whose stated size is wrong."""
    query = select(Blob.sha256, Blob.size_bytes).join(BlobHolder, BlobHolder.sha256 == Blob.sha256)
    query = query.where(BlobHolder.namespace == namespace, Blob.sha256.in_({file.sha256 for file in files}))
    query = query.where(Blob.removing_at.is_(None))
    sizes = dict(session.execute(query).all())
    for file in files:
        stored = sizes.get(file.sha256)
        if stored is None:
            raise NotFound("blob_missing", f"The bytes of {file.path} were not uploaded.", subject=file.path)
        if stored != file.size_bytes:
            raise Invalid(
                "size_differs",
                f"{file.path} has a stated size of {file.size_bytes:,} bytes, but the blob of its digest has "
                f"{stored:,}.",
                subject=file.path,
                next_step="Check the file: its digest belongs to a blob of another size.",
            )


def find(session: Session, name: RepositoryName, version: Version, kind: Kind | None = None) -> Release:
    """The release of that version. Raises NotFound."""
    release = _by_version(session, repositories.find(session, name, kind), version)
    if release is None:
        raise unknown(session, name, version)
    return release


def unknown(session: Session, name: RepositoryName, version: Version) -> NotFound:
    """The error for an unknown version; lists the repository's highest ones."""
    query = select(Release.version).join(Repository, Repository.id == Release.repository_id)
    query = query.where(Repository.namespace == name.namespace, Repository.name == name.name)
    there = list(session.scalars(query.order_by(Release.sort_key.desc()).limit(_LISTED)))
    return NotFound(
        "release_unknown",
        f"{name} has no release {version}.",
        subject=f"{name}:{version}",
        next_step=f"It has {', '.join(there)}; `adaptory log {name}` shows all." if there else "It has no release yet.",
    )


def spectrum_of(session: Session, name: RepositoryName, version: Version, kind: Kind) -> dict[str, Any]:
    """The share of its rank that each module uses: the JSON of `composer.formats.adapters.spectrum`."""
    release = find(session, name, version, kind)
    spectrum = session.scalar(select(Release.spectrum).where(Release.id == release.id))
    if spectrum is None:
        raise NotFound("spectrum_unknown", f"{full_name(release)} has no spectrum.", subject=full_name(release))
    return spectrum


def list_page(session: Session, repository: Repository, *, before: str, limit: int) -> list[Release]:
    """Releases, highest version first; `before` is the sort key of the last release of the previous page."""
    query = select(Release).where(Release.repository_id == repository.id).order_by(Release.sort_key.desc()).limit(limit)
    if before:
        query = query.where(Release.sort_key < before)
    return list(session.scalars(query))


def find_file(session: Session, release: Release, path: str) -> RevisionFile:
    """The file of a release at that path. Raises NotFound."""
    return find_revision_file(session, release.revision_id, path, full_name(release))


def find_revision_file(session: Session, revision_id: int, path: str, release: str) -> RevisionFile:
    """Like `find_file`, by the id of the revision; `release` is its name in errors."""
    file = session.get(RevisionFile, (revision_id, path)) if "\0" not in path else None
    if file is None:
        if (revision := session.get(Revision, revision_id)) is not None:
            refuse_taken_down(release, revision)
        raise unknown_file(release, path)
    return file


def refuse_taken_down(name: str, files: Revision | Row[*tuple[Any, ...]]) -> None:
    """Raises NotFound for files that were taken down; `name` is that of the release or commit."""
    if files.taken_down_at is not None:
        raise NotFound(
            "taken_down",
            f"{name} was taken down on {files.taken_down_at:%Y-%m-%d}: {files.takedown_reason}.",
            subject=name,
        )


def unknown_file(release: str, path: str) -> NotFound:
    """The error for a path that the release with that name does not have."""
    return NotFound(
        "file_unknown",
        f"{release} has no file {path[:200]!r}.",
        subject=path[:200],
        next_step=f"`adaptory show {release}` lists its files.",
    )


@dataclass(frozen=True, slots=True)
class PublishedEntry:
    """A release as an entry of its repository's history."""

    id: int
    version: str
    commit: str
    notes: str
    created_at: datetime
    created_by: str


def list_history(session: Session, name: RepositoryName) -> list[PublishedEntry]:
    """A repository's releases in reverse order of publication."""
    return [PublishedEntry(*row) for row in session.execute(_history(name).order_by(Release.id.desc()))]


def list_versions(session: Session, name: RepositoryName) -> dict[str, str]:
    """The commit of each version, highest version first."""
    query = _history(name).order_by(Release.sort_key.desc())
    return {row.version: row.commit for row in session.execute(query)}


def list_introductions(session: Session, name: RepositoryName, revision_id: int) -> dict[str, PublishedEntry]:
    """The first release of the repository that had each file of a revision with this content, by path; without files
    that none has."""
    file, earlier = RevisionFile.__table__.alias("file"), Release.__table__.alias("earlier")
    wanted = select(RevisionFile.path, RevisionFile.sha256).where(RevisionFile.revision_id == revision_id).subquery()
    first = (
        select(wanted.c.path, func.min(earlier.c.id).label("first"))
        .join(file, (file.c.path == wanted.c.path) & (file.c.sha256 == wanted.c.sha256))
        .join(earlier, earlier.c.revision_id == file.c.revision_id)
        .join(Repository, Repository.id == earlier.c.repository_id)
        .where(Repository.namespace == name.namespace, Repository.name == name.name)
        .group_by(wanted.c.path)
    )
    ids = dict(session.execute(first).all())
    rows = session.execute(_history(name).where(Release.id.in_(set(ids.values()))))
    published = {row.id: PublishedEntry(*row) for row in rows}
    return {path: published[number] for path, number in ids.items()}


def _history(name: RepositoryName) -> Select[int, str, str, str, datetime, str]:
    """The columns of `Published`, of a repository's releases."""
    columns = (Release.id, Release.version, Revision.commit, Release.notes, Release.created_at, Release.created_by)
    query = select(*columns).join(Revision, Revision.id == Release.revision_id)
    query = query.join(Repository, Repository.id == Release.repository_id)
    return query.where(Repository.namespace == name.namespace, Repository.name == name.name)


def files_of(session: Session, *listed: Release) -> dict[int, list[RevisionFile]]:
    """The files of each revision, by path, with one query for a page of releases."""
    files: dict[int, list[RevisionFile]] = {release.revision_id: [] for release in listed}
    query = select(RevisionFile).where(RevisionFile.revision_id.in_(files)).order_by(RevisionFile.path)
    for file in session.scalars(query):
        files[file.revision_id].append(file)
    return files


def full_name(release: Release) -> str:
    """NAMESPACE/NAME:VERSION."""
    return f"{repositories.name_of(release.repository)}:{release.version}"


class SignaturePolicy(NamedTuple):
    """A namespace's columns about signatures."""

    require_signature: bool
    signing_keys: Sequence[str]
    signature_covers: str

    @classmethod
    def of(cls, namespace: Namespace) -> "SignaturePolicy":
        return cls(namespace.require_signature, namespace.signing_keys, namespace.signature_covers)


def refuse_without_signature(
    namespace: str,
    policy: SignaturePolicy,
    signed_by: str | None,
    covers: str | None,
    published: str | None = None,
) -> None:
    """Raises Refused if the namespace's policy, which must be locked, requires a signature that is missing.

    `published` names an existing release. Its own signature was verified with the keys at its publication and is not
    read again.
    """
    if not policy.require_signature:
        return
    if is_key_of(policy.signing_keys, signed_by):
        _refuse_files_only(namespace, policy.signature_covers, covers, published)
        return
    detail = f"{namespace} accepts only releases signed by one of its keys"
    next_step = "Push with --sign KEY.pem. A published version is signed with `adaptory sign REF --key KEY.pem`."
    if published is not None:
        detail += f", and none of them has signed {published}"
        next_step = f"Its publisher or an admin: run `adaptory sign {published} --key KEY.pem`; then promote it."
    raise Refused("unsigned", f"{detail}.", subject=namespace, next_step=next_step)


def has_required_signature(policy: Namespace, signed_by: str | None, covers: str | None) -> bool:
    """Whether a release with this signature may be published in the namespace now."""
    covered = covers == "release" or policy.signature_covers == "files"
    return not policy.require_signature or (covered and is_key_of(policy.signing_keys, signed_by))


def _refuse_files_only(namespace: str, needed: str, covers: str | None, published: str | None) -> None:
    if covers == "release" or needed == "files":
        return
    next_step = f"`adaptory sign {published} --key KEY.pem`" if published else "Push it with --sign KEY.pem"
    raise Refused(
        "signature_files_only",
        f"{namespace} requires signatures of the release; this one covers only files, which could be published under "
        "another name, version or base.",
        subject=published or namespace,
        next_step=f"{next_step}. An admin can allow it: `adaptory namespace set {namespace} --signature-covers files`.",
    )


def signable(repository: str, version: str, base_digest: str, files: Sequence[ManifestFile]) -> SignedRelease:
    """The statement that a signature of the release must make; it excludes the signature file itself."""
    kept = [file for file in files if file.path != SIGNATURE_FILE]
    return SignedRelease(repository, version, base_digest, commit_id(canonical_manifest(kept)))


def _largest(files: Sequence[ManifestFile]) -> str:
    """The digest of the largest file besides the signature; empty if there is none."""
    signed = (file for file in files if file.path != SIGNATURE_FILE)
    largest = max(signed, key=lambda file: file.size_bytes, default=None)
    return largest.sha256 if largest else ""


def yanked_twin(session: Session, namespace: str, files: Sequence[ManifestFile]) -> Release | None:
    """A yanked release of the namespace with the same files, ignoring signatures."""
    digests, largest = without_signature(files), _largest(files)
    query = select(Release).join(RevisionFile, RevisionFile.revision_id == Release.revision_id)
    query = query.join(Repository, Repository.id == Release.repository_id)
    query = query.where(Release.yanked, Repository.namespace == namespace, RevisionFile.sha256 == largest)
    candidates = session.scalars(query.order_by(Release.id.desc())).unique().all()
    there = files_of(session, *candidates)
    return next(
        (candidate for candidate in candidates if without_signature(there[candidate.revision_id]) == digests), None
    )


def refuse_yanked_files(session: Session, namespace: str, files: Sequence[ManifestFile]) -> None:
    """Raises Refused for the files of a yanked release: its old signature must not make them available again."""
    twin = yanked_twin(session, namespace, files)
    if twin is not None:
        raise Refused(
            "yanked_files",
            f"These are the files of {full_name(twin)}, which is yanked: {twin.yank_reason}.",
            subject=full_name(twin),
            next_step=f"Publish other files, or undo the yank: `adaptory unyank {full_name(twin)} --reason WHY`.",
        )


def _retry(existing: Release, new: NewRelease, commit: str) -> Release:
    if existing.revision.commit == commit and existing.base_digest == new.base_digest:
        return existing
    what = "different files" if existing.revision.commit != commit else "a different base"
    raise Conflict(
        "version_exists",
        f"{full_name(existing)} has {what}, as {existing.revision.commit[:12]}; a release never changes.",
        subject=full_name(existing),
        next_step="Push it as the next version, or with --bump patch.",
    )


def _by_version(session: Session, repository: Repository, version: Version) -> Release | None:
    return session.scalar(
        select(Release).where(Release.repository_id == repository.id, Release.version == str(version))
    )


def find_or_create_revision(
    session: Session, actor: Actor, repository: Repository, files: Sequence[ManifestFile]
) -> Revision:
    """The repository's revision with these files, whose blobs its namespace must hold. Raises Refused for files that
    were taken down, except by retention: those may come back."""
    manifest = canonical_manifest(files)
    commit = commit_id(manifest)
    query = select(Revision).where(Revision.repository_id == repository.id, Revision.commit == commit)
    lock_blobs_shared(session)  # a collection deletes revisions too
    barred.refuse_files(session, repository.namespace, files)
    revision = session.scalar(query)
    if revision is not None and revision.taken_down_at is None:
        return revision
    refuse_absent_blobs(session, repository.namespace, files)
    if revision is None:
        revision = Revision(repository_id=repository.id, commit=commit, manifest=manifest.decode(), created_at=actor.at)
        session.add(revision)
    revision.taken_down_at = revision.takedown_reason = None
    session.flush()
    for file in files:
        session.add(
            RevisionFile(revision_id=revision.id, path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
        )
    return revision


def _insert(
    session: Session, actor: Actor, new: NewRelease, version: Version, repository: Repository, revision: Revision
) -> Release:
    targets = new.facts.get("targets")
    release = Release(
        repository=repository,
        revision=revision,
        base=session.get_one(Base, new.base_digest),
        version=str(version),
        sort_key=version.sort_key,
        stable=version.stable,
        type=new.facts.get("type"),
        variant=new.facts.get("variant"),
        rank_max=new.facts.get("rank_max"),
        alpha=new.facts.get("alpha"),
        dtype=new.facts.get("dtype"),
        license=new.provenance.get("license"),
        provenance=dict(new.provenance),
        spectrum=dict(new.spectrum) if new.spectrum is not None else None,
        servers=new.servers,
        loading=dict(new.loading),
        breaking_reason=None,
        target_set_id=search_index.target_set(session, targets) if targets else None,
        size_bytes=sum(file.size_bytes for file in new.files),
        facts=dict(new.facts),
        notes=new.notes,
        yanked=False,
        yank_reason=None,
        created_at=actor.at,
        created_by=actor.name,
    )
    search_index.index_release(session, release)
    return release
