"""Signatures added after publication: by `adaptory sign REF`, and with a worker's key.

Every signature by a worker's key counts as a worker's, since anyone can download its bundles and send them again.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Release, ReleaseInput, Signature
from registry.domain.access import audit, namespaces
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.releases import full_name
from registry.errors import NotAllowed, Refused
from registry.formats.manifest import parse_manifest
from registry.formats.signatures import Signed, fingerprint, is_key_of, refuse_other_release, refuse_tampered


class SignedAs(StrEnum):
    """Who signed: a person who publishes, or the worker that composed the release."""

    PUBLISHER = "publisher"
    WORKER = "worker"


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
    kind = signed_as(session, signed.fingerprint)
    keep(session, actor, release, signed.fingerprint, kind, bundle)
    trusted = namespaces.find_for_share(session, namespace).signing_keys
    weaker = release.signature_covers != "release" or not is_key_of(trusted, release.signed_by)
    if weaker or (kind is SignedAs.PUBLISHER and release.signed_as != kind):
        release.signed_by, release.signature_covers, release.signed_as = signed.fingerprint, signed.covers, kind
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
    return next(((key, "release") for key in later if is_key_of(keys, key)), named)


def of_release(session: Session, release: Release) -> list[Signature]:
    """The signatures of a release, oldest first."""
    query = select(Signature).where(Signature.release_id == release.id).order_by(Signature.created_at)
    return list(session.scalars(query))


def signed_as(session: Session, signed_by: str) -> SignedAs:
    """The kind of the key: a worker's if a worker has signed with it here."""
    query = select(Signature.signed_by).where(Signature.signed_by == signed_by, Signature.signed_as == SignedAs.WORKER)
    return SignedAs.WORKER if session.execute(query.limit(1)).first() else SignedAs.PUBLISHER


def signers(session: Session, release: Release, keys: Iterable[str]) -> dict[str, str | None]:
    """The signers of the release itself among the keys: `SignedAs` by fingerprint, None where it is not known."""
    rows = {row.signed_by: row.signed_as for row in of_release(session, release)}
    if release.signed_by and release.signature_covers == "release":
        rows[release.signed_by] = release.signed_as
    trusted = {fingerprint(key) for key in keys}
    return {signed_by: kind for signed_by, kind in rows.items() if signed_by in trusted}


def unsigned_input(session: Session, keys: Sequence[str], inputs: Iterable[Release]) -> Release | None:
    """The first of these releases that none of the keys vouches for: none of them signed the release, or only a worker
    did and one of its inputs lacks a signature."""
    return next((source for source in inputs if not _is_vouched_for(session, keys, source)), None)


def _is_vouched_for(session: Session, keys: Sequence[str], release: Release) -> bool:
    """Whether a signature vouches for the release. A worker's proves only as much as those of the inputs that it
    signed."""
    left, seen = [release], {release.id}
    while left:
        one = left.pop()
        kinds = signers(session, one, keys).values()
        if not kinds:
            return False
        if SignedAs.PUBLISHER not in kinds:
            query = select(Release).join(ReleaseInput, ReleaseInput.input_id == Release.id)
            further = session.scalars(query.where(ReleaseInput.release_id == one.id, Release.id.not_in(seen))).all()
            seen |= {source.id for source in further}
            left += further
    return True


def refuse_unsigned_inputs(session: Session, namespace: str, keys: Sequence[str], inputs: Iterable[Release]) -> None:
    """Raises Refused if a worker's signature of the composition of these releases would vouch for inputs that nobody
    has signed."""
    unsigned = unsigned_input(session, keys, inputs)
    if unsigned is None:
        return
    name = full_name(unsigned)
    both = " and ".join(dict.fromkeys([namespace, unsigned.repository.namespace]))
    both = f"each of {both}" if both != namespace else namespace
    own = bool(signers(session, unsigned, keys))
    what = "was composed from releases that no key of it has signed" if own else "is not signed by a key of it"
    raise Refused(
        "inputs_unsigned",
        f"{namespace} accepts only signed releases, and {name} {what}: a worker signs only compositions of signed "
        "releases.",
        subject=name,
        next_step=f"Sign it with a key that {both} trusts: `adaptory sign {name} --key KEY.pem`. "
        "Or compose into another namespace.",
    )


def keep(session: Session, actor: Actor, release: Release, signed_by: str, kind: SignedAs, bundle: bytes) -> None:
    """Stores a verified signature; replaces an earlier one by the same key."""
    session.flush()
    row = session.get(Signature, (release.id, signed_by)) or Signature(release_id=release.id, signed_by=signed_by)
    row.bundle, row.signed_as, row.created_at, row.created_by = bundle.decode(), kind, actor.at, actor.name
    session.add(row)
