"""Bars of takedowns: the namespace may publish neither the same set of files again, nor any of its weights."""

from collections.abc import Iterable, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Repository, Revision, RevisionFile
from registry.errors import Refused
from registry.formats.manifest import ManifestFile, is_weights, parse_manifest
from registry.formats.signatures import SIGNATURE_FILE


def refuse_files(session: Session, namespace: str, files: Sequence[ManifestFile]) -> None:
    """Raises Refused for files that were taken down in the namespace: the same set, ignoring signatures, or weights
    under whatever name. Weights that a release or commit of the namespace still has are not barred."""
    rows = session.execute(
        select(Revision.manifest, Revision.commit, Revision.takedown_reason, Repository.name)
        .join(Repository, Repository.id == Revision.repository_id)
        .where(Revision.barred, Repository.namespace == namespace)
    )
    named = {file.sha256: file.path for file in files}
    for manifest, commit, reason, name in rows:
        if not any(digest in manifest for digest in named):
            continue
        gone = parse_manifest(manifest)
        subject = f"{namespace}/{name}#{commit[:12]}"
        if without_signature(gone) == without_signature(files):
            raise _barred(subject, f"These are the files of {subject}, which was", reason)
        for file in gone_weights(session, namespace, gone):
            if file.sha256 in named:
                raise _barred(subject, f"{named[file.sha256]} has the weights of {subject}, which were", reason)


def gone_weights(session: Session, namespace: str, files: Iterable[ManifestFile]) -> list[ManifestFile]:
    """The weights among the files that no release or commit of the namespace has."""
    weights = [file for file in files if is_weights(file.path)]
    query = (
        select(RevisionFile.sha256)
        .join(Revision, Revision.id == RevisionFile.revision_id)
        .join(Repository, Repository.id == Revision.repository_id)
        .where(Repository.namespace == namespace, RevisionFile.sha256.in_([file.sha256 for file in weights]))
    )
    there = set(session.scalars(query))
    return [file for file in weights if file.sha256 not in there]


def without_signature(files: Sequence[RevisionFile] | Sequence[ManifestFile]) -> dict[str, str]:
    """Digests by path."""
    return {file.path: file.sha256 for file in files if file.path != SIGNATURE_FILE}


def _barred(subject: str, what: str, reason: str | None) -> Refused:
    return Refused("files_taken_down", f"{what} taken down: {reason}.", subject=subject)
