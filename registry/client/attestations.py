"""Checks what workers attested of a release, on the reader's own machine."""

from dataclasses import dataclass, replace
from pathlib import Path

from registry.client.api import Api
from registry.errors import Refused
from registry.formats.attestations import SCORES, Statement, key_id, open_attestation
from registry.formats.evidence import EvidenceExample, evidence_of
from registry.wire.quality import AttestationOut, AttestationsOut, ScoresOut
from registry.wire.search import AnyRelease

_COMPARED = ("metric", "value", "stderr", "n", "higher_is_better")


@dataclass(frozen=True, slots=True)
class Attested:
    """An attestation whose key is not revoked, with its statement. For scores, `is_newest` says whether any of them was
    not measured again on the same suite."""

    row: AttestationOut
    statement: Statement
    is_newest: bool = True

    @property
    def suite(self) -> tuple[str, str] | None:
        """The name and digest of the suite that was measured, if any."""
        subjects = self.statement.subjects.items()
        return next(((name[6:], digest) for name, digest in subjects if name.startswith("suite ")), None)

    @property
    def metrics(self) -> set[tuple[object, str]]:
        """The suite and name of each score; empty for attestations of other kinds."""
        is_scores = self.statement.predicate_type == SCORES
        return {(self.suite, score["metric"]) for score in self.statement.predicate["scores"]} if is_scores else set()


def checked_attestations(api: Api, release: AnyRelease) -> tuple[list[Attested], list[AttestationOut]]:
    """The attestations of a release, oldest first: those by keys that are not revoked, and the others. The evidence is
    among them if the caller may read it.

    Raises Refused for one that its key did not sign, one of other weights or another base, and for a score that is
    shown as measured by a worker and differs from what the worker attested.
    """
    rows = api.get(f"{release.path}/attestations", AttestationsOut).attestations
    checked = [Attested(row, _checked(row, release)) for row in rows if row.key.revoked_at is None]
    attested = {
        (item.suite[1], item.row.key.worker, *(score[name] for name in _COMPARED))
        for item in checked
        if item.suite and item.metrics
        for score in item.statement.predicate["scores"]
    }
    for score in api.get(f"{release.path}/scores", ScoresOut).scores:
        measured = (score.suite_digest, score.measured_by, *(getattr(score, name) for name in _COMPARED))
        if score.measured_by is not None and measured not in attested:
            raise _untrusted(f"{score.suite}.{score.metric} of {release.name} is not what a worker attested")
    newest = {metric: item for item in checked for metric in item.metrics}
    dated = [
        replace(item, is_newest=not item.metrics or any(newest[it] is item for it in item.metrics)) for item in checked
    ]
    return dated, [row for row in rows if row.key.revoked_at is not None]


def checked_evidence(api: Api, release: AnyRelease) -> tuple[EvidenceExample, ...]:
    """The examples of a release's evidence. Raises NotFound without any, Refused as `checked_attestations` does, and
    Invalid for evidence by which the release looks like its base."""
    row = api.get(f"{release.path}/evidence", AttestationOut)
    if row.key.revoked_at is not None:
        raise _untrusted(f"the evidence of {release.name} is by a key that was revoked")
    return evidence_of(_checked(row, release))


def _checked(row: AttestationOut, release: AnyRelease) -> Statement:
    if key_id(row.key.public_key) != row.key.id:
        raise _untrusted(f"the key {row.key.id[:12]} is not the one that the registry names")
    statement = open_attestation(row.envelope, row.key.public_key)
    files = {file.path: file.sha256 for file in release.files} | {"base": release.base.digest}
    for name, digest in files.items():
        if statement.subjects.get(name, digest) != digest:
            raise _untrusted(f"an attestation of {release.name} is about another {name}")
    if statement.subjects.get("base") is None or not statement.subjects.keys() & {row.path for row in release.files}:
        raise _untrusted(f"an attestation of {release.name} does not name its weights and base")
    return statement


def save_attestations(rows: list[Attested], directory: Path) -> list[Path]:
    """Writes each envelope and each public key to a file of its own, for tools that read DSSE. Returns the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {f"{item.row.key.id[:12]}.pub.pem": item.row.key.public_key for item in rows}
    contents |= {f"{number}-{item.row.kind}.dsse.json": item.row.envelope for number, item in enumerate(rows, 1)}
    for name, content in contents.items():
        (directory / name).write_text(content, encoding="utf-8")
    return [directory / name for name in contents]


def _untrusted(why: str) -> Refused:
    return Refused("attestation_untrusted", f"{why[0].upper()}{why[1:]}.")
