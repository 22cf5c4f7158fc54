"""Attestations of workers about releases and bases, verified when they are stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from composer.formats.adapters.layouts import SET_FILE
from registry.database.tables import Attestation, Base, Release, SuiteVersion, WorkerKey
from registry.domain.access.audit import Actor
from registry.domain.catalog.releases import full_name
from registry.errors import NotFound, Refused
from registry.formats.attestations import COMPOSITION, EVIDENCE, SCORES, Statement, code_digest, open_attestation
from registry.formats.manifest import parse_manifest

_WEIGHTS = (".safetensors", ".bin", ".gguf", SET_FILE)
BASE, CODE = "base", "adaptory"
KINDS: Mapping[str, str] = {SCORES: "scores", COMPOSITION: "composition", EVIDENCE: "evidence"}
"""By predicate type."""


@dataclass(frozen=True, slots=True)
class About:
    """The subjects of an attestation: a release on its base, or a base alone; the suite that was measured; and the
    releases that a composition was made of."""

    subject: Release | Base
    suite: SuiteVersion | None = None
    inputs: Sequence[Release] = field(default=())

    @property
    def name(self) -> str:
        return full_name(self.subject) if isinstance(self.subject, Release) else self.subject.name

    @property
    def base(self) -> str:
        return self.subject.base_digest if isinstance(self.subject, Release) else self.subject.digest

    def content(self) -> dict[str, str]:
        """The sha256 of each content by its name, as stored now: the weights, the base, the suite, and the weights of
        inputs."""
        digests = dict[str, str]()
        if isinstance(self.subject, Release):
            digests |= _weights(self.subject)
        for number, release in enumerate(self.inputs, 1):
            # Readers of this release may not read a namespace that an input is from.
            own = (
                isinstance(self.subject, Release) and release.repository.namespace == self.subject.repository.namespace
            )
            name = full_name(release) if own else f"input {number}"
            digests |= {f"{name}/{path}": sha256 for path, sha256 in _weights(release).items()}
        return digests | {BASE: self.base} | ({f"suite {self.suite.name}": self.suite.digest} if self.suite else {})

    def statement(self, predicate_type: str, predicate: Mapping[str, Any]) -> Statement:
        """A statement of this code about them."""
        named = {"release" if isinstance(self.subject, Release) else "base": self.name}
        return Statement(predicate_type, self.content() | {CODE: code_digest()}, named | dict(predicate))


def _weights(release: Release) -> dict[str, str]:
    files = parse_manifest(release.revision.manifest)
    return {file.path: str(file.sha256) for file in files if file.path.endswith(_WEIGHTS)}


def keep(session: Session, actor: Actor, about: About, key: WorkerKey, envelope: str) -> Attestation:
    """Stores an attestation. Evidence replaces the earlier one of the same release and suite.

    Raises Refused for a revoked key, for a text that the key did not sign, and for subjects other than those stored
    here.
    """
    statement = open_attestation(envelope, key.public_key)
    stated = {name: digest for name, digest in statement.subjects.items() if name != CODE}
    if key.revoked_at is not None or stated != about.content():
        why = "its key is revoked" if key.revoked_at is not None else "its subjects are not those that are stored here"
        raise Refused(
            "attestation_untrusted", f"An attestation of {about.name} is not accepted: {why}.", subject=about.name
        )
    release = about.subject if isinstance(about.subject, Release) else None
    row = Attestation(
        key=key,
        predicate_type=statement.predicate_type,
        release_id=release.id if release else None,
        base_digest=about.base,
        suite_id=about.suite.id if about.suite else None,
        envelope=envelope,
        created_at=actor.at,
    )
    if statement.predicate_type == EVIDENCE:
        same = (Attestation.release_id == row.release_id, Attestation.suite_id == row.suite_id)
        session.execute(delete(Attestation).where(*same, Attestation.predicate_type == EVIDENCE))
    session.add(row)
    session.flush()
    return row


def of_release(session: Session, release: Release) -> list[Attestation]:
    """The attestations of a release, oldest first. Those of evidence have token ids, which are for readers of the
    suite."""
    query = select(Attestation).where(Attestation.release_id == release.id)
    return list(session.scalars(query.order_by(Attestation.id)))


def suite_of(session: Session, row: Attestation) -> SuiteVersion:
    """The suite that evidence or scores are of."""
    return session.get_one(SuiteVersion, row.suite_id)


def of_composition(session: Session, release: Release) -> Attestation | None:
    """The attested lineage of a release whose key is not revoked; None for a release that no worker composed."""
    query = select(Attestation).join(WorkerKey).where(WorkerKey.revoked_at.is_(None))
    query = query.where(Attestation.release_id == release.id, Attestation.predicate_type == COMPOSITION)
    return session.scalars(query.order_by(Attestation.id.desc()).limit(1)).first()


def evidence_of(session: Session, release: Release) -> Attestation:
    """The newest evidence of a release whose key is not revoked. Raises NotFound."""
    query = select(Attestation).join(WorkerKey).where(WorkerKey.revoked_at.is_(None))
    query = query.where(Attestation.release_id == release.id, Attestation.predicate_type == EVIDENCE)
    row = session.scalars(query.order_by(Attestation.id.desc()).limit(1)).first()
    if row is None:
        name = full_name(release)
        raise NotFound(
            "evidence_unknown",
            f"{name} has no evidence.",
            subject=name,
            next_step=f"Make it on a suite that allows it: `adaptory evidence {name} --suite SUITE`.",
        )
    return row
