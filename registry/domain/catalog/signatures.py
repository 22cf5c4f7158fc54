"""Signatures added after publication: by `adaptory sign REF`, and with a worker's key."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Release, Signature
from registry.domain.access import audit, namespaces
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.releases import full_name
from registry.errors import NotAllowed, Refused
from registry.formats.manifest import parse_manifest
from registry.formats.signatures import Signed, is_key_of, refuse_other_release, refuse_tampered


def add(session: Session, actor: Actor, release: Release, signed: Signed, bundle: bytes) -> None:
    """Adds a signature to a published release. A key's new signature replaces its old one; signatures of other keys are
    kept. The release names the first one whose key its namespace still has.

    Only for its publisher and admins of its namespace. Raises Refused for a signature of another release or of other
    files, or one that covers only files.
    """
    name, namespace = full_name(release), release.repository.namespace
    if release.created_by != actor.name and not holds(actor, Role.ADMIN, namespace):
        raise NotAllowed(
            "not_yours",
            f"{name} was published by {release.created_by}.",
            subject=name,
            next_step=f"Ask {release.created_by} or an admin of {namespace} to sign it.",
        )
    files = parse_manifest(release.revision.manifest)
    if signed.release is None:
        raise Refused(
            "signature_files_only",
            f"This signature does not name {name}: it covers only files.",
            subject=name,
            next_step=f"Create one with `adaptory sign {name} --key KEY.pem`.",
        )
    refuse_other_release(
        signed,
        releases.signable(str(repositories.name_of(release.repository)), release.version, release.base_digest, files),
    )
    refuse_tampered(signed, {file.path: file.sha256 for file in files})
    signers = [release.signed_by, *(row.signed_by for row in of_release(session, release))]
    known = [key for key in dict.fromkeys(signers) if key and key != signed.fingerprint]
    before = {"signatures": known, "signature_covers": release.signature_covers}
    keep(session, actor, release, signed.fingerprint, bundle)
    trusted = namespaces.find_for_share(session, namespace).signing_keys
    if release.signature_covers != "release" or not is_key_of(trusted, release.signed_by):
        release.signed_by, release.signature_covers = signed.fingerprint, signed.covers
    session.flush()
    after = {"signatures": [*known, signed.fingerprint], "signature_covers": release.signature_covers}
    audit.record(session, actor, Act.RELEASE_SIGN, name, namespace=namespace, before=before, after=after)


def signer(
    session: Session, release_id: int, keys: Sequence[str], named: tuple[str | None, str | None]
) -> tuple[str | None, str | None]:
    """The signer and what the signature covers: as `named` in the release if its key is among the keys, else of a later
    signature by one of them. Later ones always cover the release."""
    if is_key_of(keys, named[0]):
        return named
    later = session.scalars(select(Signature.signed_by).where(Signature.release_id == release_id))
    return next(((one, "release") for one in later if is_key_of(keys, one)), named)


def of_release(session: Session, release: Release) -> list[Signature]:
    """The signatures of a release, oldest first."""
    query = select(Signature).where(Signature.release_id == release.id).order_by(Signature.created_at)
    return list(session.scalars(query))


def keep(session: Session, actor: Actor, release: Release, signed_by: str, bundle: bytes) -> None:
    """Stores a verified signature; replaces an earlier one by the same key."""
    session.flush()
    row = session.get(Signature, (release.id, signed_by)) or Signature(release_id=release.id, signed_by=signed_by)
    row.bundle, row.created_at, row.created_by = bundle.decode(), actor.at, actor.name
    session.add(row)
