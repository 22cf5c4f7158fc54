"""Attests what this worker measured, in the worker's own process and the transaction that records it."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkstemp
from typing import Any

from sqlalchemy.orm import Session

from registry.database.tables import Attestation, Composition, Release
from registry.domain.access import worker_keys
from registry.domain.access.audit import Actor, operator_actor
from registry.domain.catalog import attestations
from registry.domain.catalog.attestations import About
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.environment.settings import Settings
from registry.errors import Unavailable
from registry.formats.attestations import COMPOSITION, SCORES, attest, new_key, public_half

_FILE = "worker-key.pem"
"""The key of this machine's worker, in its home, unless ADAPTORY_WORKER_KEY names another file."""


@dataclass(frozen=True, slots=True)
class OwnKey:
    """The worker's name, and its key in PEM. `private` must stay in the worker's own process: units never get it."""

    worker: str
    private: bytes
    public: str


def own_key(settings: Settings) -> OwnKey | None:
    """Reads the key, and makes it in the home if no setting names one. None without the extra `sign`: then nothing is
    attested. Raises Unavailable if the key of the setting cannot be read, and Invalid if it is not an Ed25519 key."""
    if find_spec("cryptography") is None and settings.worker_key is None:
        return None
    path = settings.worker_key or _made(settings.home_directory / _FILE)
    try:
        private = path.read_bytes()
    except OSError as error:
        raise Unavailable(
            "worker_key_missing", f"The worker's key {path} cannot be read: {error.strerror}.", subject=str(path)
        ) from error
    return OwnKey(socket.gethostname()[:64], private, public_half(private))


def _made(path: Path) -> Path:
    """Makes the key unless it is there. Of two processes, one wins, and both use its key."""
    if not path.exists():
        descriptor, name = mkstemp(dir=path.parent, prefix=".worker-key.")  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(new_key())
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(name, path)
        finally:
            Path(name).unlink()
    return path


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
    """Attests scores on one suite, like `attested`."""
    names = ("metric", "value", "stderr", "n", "higher_is_better", "results_sha256", "source")
    rows = [{name: getattr(score, name) for name in names} for score in measured]
    return attested(session, settings, actor, about, (SCORES, {"scores": rows}))


def attested_composition(
    session: Session, settings: Settings, actor: Actor, about: About, composition: Composition
) -> Attestation | None:
    """Attests, like `attested`, the lineage of a composed release, and of the verdict about its inputs."""
    if isinstance(about.subject, Release) and (known := attestations.of_composition(session, about.subject)):
        return known  # the same recipe again, which made the same release
    conflicts = composition.conflicts or {}
    judged = conflicts.get("by_default") or conflicts
    predicate = {
        "method": composition.recipe.get("method"),
        "weights": [locked["weight"] for locked in composition.lock["inputs"]],
        "verdict": judged.get("verdict"),
    }
    if isinstance(about.subject, Release) and about.subject.repository.kind == Kind.MODEL:
        predicate["proof"] = (composition.merge or {}).get("proof")
    return attested(session, settings, actor, about, (COMPOSITION, predicate))
