"""Publishes a worker's outputs, signed with its key (`ADAPTORY_SIGNING_KEY`)."""

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy.orm import Session

from registry.database.tables import Namespace, Release
from registry.domain.access import namespaces
from registry.domain.access.audit import Actor
from registry.domain.catalog import commits, releases, signatures
from registry.domain.catalog.releases import NewRelease
from registry.domain.catalog.signatures import SignedAs
from registry.environment.settings import Settings
from registry.formats.signatures import is_key_of, open_signature, own_fingerprint, read_key, sign


def publish_signed(
    settings: Settings, session: Session, actor: Actor, new: NewRelease, inputs: Sequence[Release]
) -> Release:
    """Publishes the composition of `inputs`. Signs it with the worker's key if the namespace trusts that key and one of
    its keys signed each input. Raises Refused for unsigned inputs where signatures are required."""
    namespace, path = _locked(session, new.repository.namespace), settings.signing_key
    if path is None or namespace is None or not is_key_of(namespace.signing_keys, own_fingerprint(path)):
        return commits.publish(session, actor, new)[0]
    if namespace.require_signature:  # keys may have been removed since the composition began
        signatures.refuse_unsigned_inputs(session, namespace.name, namespace.signing_keys, inputs)
    elif signatures.unsigned_input(session, namespace.signing_keys, inputs) is not None:
        return commits.publish(session, actor, new)[0]
    bound = releases.signable(str(new.repository), str(new.version), new.base_digest, new.files)
    bundle = sign(read_key(path), bound, {file.path: file.sha256 for file in new.files})
    signed = open_signature(bundle, namespace.signing_keys)
    own = replace(new, signed=signed, signed_by=signed.fingerprint, signed_as=SignedAs.WORKER)
    release, created = commits.publish(session, actor, own)
    if created:
        signatures.keep(session, actor, release, signed.fingerprint, SignedAs.WORKER, bundle)
    return release


def _locked(session: Session, name: str) -> Namespace | None:
    """Locks the namespace against changes and returns it; None if it does not exist yet."""
    return namespaces.find_for_share(session, name) if session.get(Namespace, name) else None
