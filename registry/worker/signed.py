"""Publishes a worker's outputs, signed with its key (`ADAPTORY_SIGNING_KEY`)."""

from dataclasses import replace

from sqlalchemy.orm import Session

from registry.database.tables import Release
from registry.domain.access import namespaces
from registry.domain.access.audit import Actor
from registry.domain.catalog import commits, releases, signatures
from registry.domain.catalog.releases import NewRelease
from registry.formats.signatures import fingerprint, open_signature, public_key_of, read_key, sign
from registry.settings import Settings


def publish_signed(settings: Settings, session: Session, actor: Actor, new: NewRelease) -> Release:
    """Publishes a release, signed with the worker's key if the namespace trusts that."""
    path, namespace = settings.signing_key, new.repository.namespace
    keys = namespaces.signing_keys(session, namespace) if path else []
    if path is None or not keys:
        return commits.publish(session, actor, new)[0]
    key = read_key(path)
    public = fingerprint(public_key_of(key))
    if public not in set(map(fingerprint, keys)):
        return commits.publish(session, actor, new)[0]
    bound = releases.signable(str(new.repository), str(new.version), new.base_digest, new.files)
    bundle = sign(key, bound, {file.path: file.sha256 for file in new.files})
    signed = open_signature(bundle, keys)
    release, created = commits.publish(session, actor, replace(new, signed=signed, signed_by=signed.fingerprint))
    if created:
        signatures.keep(session, actor, release, signed.fingerprint, bundle)
    return release
