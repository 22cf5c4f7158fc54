"""Attests what this worker measured, in the worker's own process and the transaction that records it."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from registry.database.tables import Attestation, Composition, Release
from registry.domain.access import worker_keys
from registry.domain.access.audit import Actor, operator_actor
from registry.domain.catalog import attestations
from registry.domain.catalog.attestations import About
from registry.domain.catalog.suites import Measurement
from registry.environment.settings import Settings
from registry.environment.worker_key import own_key
from registry.formats.attestations import COMPOSITION, SCORES, attest


def attested(
    session: Session, settings: Settings, actor: Actor, about: About, stated: tuple[str, Mapping[str, Any]]
) -> Attestation | None:
    """Signs a predicate (its type and content), and stores it. None for a worker without a key. Raises Refused if the
    key was revoked."""
    key = own_key(settings)
    if key is None:
        return None
    worker = operator_actor(key.worker, actor.at)
    row = worker_keys.register(session, key.worker, key.public, worker)
    predicate = {**stated[1], "worker": key.worker, "at": actor.at.isoformat()}
    return attestations.keep(session, worker, about, row, attest(key.private, about.statement(stated[0], predicate)))


def attested_scores(
    session: Session, settings: Settings, actor: Actor, about: About, measured: list[Measurement]
) -> Attestation | None:
    """As `attested`, of scores on one suite."""
    names = ("metric", "value", "stderr", "n", "higher_is_better", "results_sha256", "source")
    rows = [{name: getattr(score, name) for name in names} for score in measured]
    return attested(session, settings, actor, about, (SCORES, {"scores": rows}))


def attested_composition(
    session: Session, settings: Settings, actor: Actor, about: About, composition: Composition
) -> Attestation | None:
    """As `attested`, of the lineage of a composed release, and of the verdict about its inputs."""
    if isinstance(about.subject, Release) and (known := attestations.of_composition(session, about.subject)):
        return known  # the same recipe again, which made the same release
    conflicts = composition.conflicts or {}
    judged = conflicts.get("by_default") or conflicts
    predicate = {
        "method": composition.recipe.get("method"),
        "weights": [locked["weight"] for locked in composition.lock["inputs"]],
        "verdict": judged.get("verdict"),
    }
    return attested(session, settings, actor, about, (COMPOSITION, predicate))
