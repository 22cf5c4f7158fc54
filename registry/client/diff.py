"""Compares two releases, as the API shows them: facts, provenance, files, and scores, example by example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Any, Self, TypedDict, cast

from registry.formats import compatibility
from registry.formats.lineage import Changed
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.wire.catalog import ReleaseOut
from registry.wire.quality import ScoreOut, SuiteOut, SuiteResultsOut

STANDARD_ERRORS = 2.0
"""A score difference is significant beyond this many of its standard errors."""


Results = Mapping[str, SuiteResultsOut]
"""By suite digest, of the suites for which the result of each example was recorded."""


class ChangedFiles(TypedDict):
    """Paths of files."""

    added: list[str]
    removed: list[str]
    changed: list[str]


class PairedDocument(TypedDict):
    """A `Paired` of composer.evaluation.paired, also in words."""

    n: int
    difference: float
    low: float | None
    high: float | None
    gained: int
    lost: int
    verdict: str
    needed: int | None
    in_words: str


class ScoreDifference(TypedDict):
    """A score of both sides. `stderr` is that of the difference of two independent means. On the same examples the true
    one is smaller, so a difference `beyond` it is real. `difference` and what follows from it are None if a score is
    missing or the suite's content differs; `paired` is there if both sides have results on the same examples."""

    suite: str
    task: str
    metric: str
    old: float | None
    old_stderr: float | None
    old_n: int | None
    old_reported: bool
    new: float | None
    new_stderr: float | None
    new_n: int | None
    new_reported: bool
    difference: float | None
    stderr: float | None
    better: bool | None
    beyond: bool | None
    paired: PairedDocument | None


class ChangedExample(TypedDict):
    """An example whose answer's score changed. The registry does not have the prompts of a harness."""

    suite: str
    example: int
    prompt: str | None
    completion: str | None
    old: dict[str, Any]
    new: dict[str, Any]


class Differences(TypedDict):
    """Lists contain only what differs, except scores, which are complete. `change` is what the version number must
    express: breaking, weights, files or none; None for a base and a release."""

    change: str | None
    breaking: list[dict[str, object]]
    facts: list[Changed]
    provenance: list[Changed]
    files: ChangedFiles
    scores: list[ScoreDifference]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedFacts:
    """The compared facts of a release or a directory. A directory may lack the digest of its base; a base has only
    scores."""

    base_digest: str = ""
    base_name: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    servers: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: Sequence[ManifestFile] = ()
    scores: Sequence[ScoreOut] = ()

    @classmethod
    def of(cls, release: ReleaseOut) -> Self:
        facts = release.own_facts
        return cls(
            base_digest=release.base.digest,
            base_name=release.base.name,
            facts=facts.document if facts else {},
            servers=release.servers,
            provenance=release.provenance.document,
            files=[ManifestFile(row.path, row.size_bytes, Digest(row.sha256)) for row in release.files],
            scores=release.scores,
        )


def differences(old: ComparedFacts, new: ComparedFacts, old_results: Results, new_results: Results) -> Differences:
    """Compares two releases or directories of one kind."""
    # A new base breaks only if both digests are known, which directories may lack.
    changes = compatibility.breaking_changes(_surface(old), _surface(new))
    known = old.base_digest and new.base_digest
    broken = [finding for finding in changes if known or finding.code != "new_base"]
    files = _files(old, new)
    weights = _surface(old).weights != _surface(new).weights
    moved = files["added"] or files["removed"] or files["changed"]
    change = "breaking" if broken else "weights" if weights else "files" if moved else "none"
    return {
        "change": change,
        "breaking": [finding.to_json() for finding in broken],
        "facts": _changed(_facts(old, new), _facts(new, old)),
        "provenance": _changed(stated_provenance(old.provenance), stated_provenance(new.provenance)),
        "files": files,
        "scores": score_differences(old.scores, new.scores, old_results, new_results),
    }


def differences_in_scores(
    old: ComparedFacts, new: ComparedFacts, old_results: Results, new_results: Results
) -> Differences:
    """The result of `differences` for a base and a release, which have nothing but scores in common."""
    return {
        "change": None,
        "breaking": [],
        "facts": [],
        "provenance": [],
        "files": {"added": [], "removed": [], "changed": []},
        "scores": score_differences(old.scores, new.scores, old_results, new_results),
    }


def changed_examples(suite: SuiteOut, old: SuiteResultsOut, new: SuiteResultsOut) -> list[ChangedExample]:
    """The examples of a suite whose answer's score changed, those that lost most first."""
    sides = list(zip(old.document["examples"], new.document["examples"], strict=True))
    known: list[dict[str, str]] = (suite.content or {}).get("examples") or [{}] * len(sides)
    gains = [after.score - before.score for before, after in zip(old.examples, new.examples, strict=True)]
    worst_first = sorted((index for index, gain in enumerate(gains) if gain), key=lambda index: gains[index])
    return [
        {
            "suite": suite.name,
            "example": index + 1,
            "prompt": known[index].get("prompt"),
            "completion": known[index].get("completion"),
            "old": sides[index][0],
            "new": sides[index][1],
        }
        for index in worst_first
    ]


def _surface(side: ComparedFacts) -> compatibility.Surface:
    return compatibility.surface(side.base_digest, side.facts, side.files)


def _facts(side: ComparedFacts, other: ComparedFacts) -> dict[str, object]:
    """The facts to compare. The base only if both sides have a digest or neither has: a directory knows only the name
    that its base was loaded from."""
    alike = bool(side.base_digest) == bool(other.base_digest)
    base = {"base": side.base_name} if alike else {}
    return {**base, **_flat(side.facts), "servers": side.servers}


def stated_provenance(provenance: Mapping[str, Any]) -> dict[str, object]:
    """A release's provenance as names and values."""
    stated = dict(provenance)
    rows: list[dict[str, object]] = stated.pop("data", [])
    return {**_flat(stated), "data": [" ".join(str(value) for value in row.values() if value) for row in rows]}


def _flat(document: Mapping[str, object]) -> dict[str, object]:
    """Flattens one level: `hyperparameters` becomes `hyperparameters.learning_rate`, …"""
    flat: dict[str, object] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in cast("dict[str, object]", value).items()}
        else:
            flat[name] = value
    return flat


def _changed(old: Mapping[str, object], new: Mapping[str, object]) -> list[Changed]:
    """Rows of what differs; None and an empty list are equal."""
    return [
        {"name": name, "old": old.get(name), "new": new.get(name)}
        for name in dict.fromkeys([*old, *new])
        if (old.get(name) or None) != (new.get(name) or None)
    ]


def _files(old: ComparedFacts, new: ComparedFacts) -> ChangedFiles:
    before, after = ({file.path: file.sha256 for file in side.files} for side in (old, new))
    return {
        "added": sorted(set(after) - set(before)),
        "removed": sorted(set(before) - set(after)),
        "changed": sorted(path for path in set(before) & set(after) if before[path] != after[path]),
    }


def score_differences(
    old: Sequence[ScoreOut], new: Sequence[ScoreOut], old_results: Results, new_results: Results
) -> list[ScoreDifference]:
    """The comparison of each score."""
    before, after = ({(row.suite, row.metric): row for row in rows} for rows in (old, new))
    rows: list[ScoreDifference] = []
    for key in dict.fromkeys([*before, *after]):
        row = _score(key, before.get(key), after.get(key))
        digest = before[key].suite_digest if row["difference"] is not None else ""
        row["paired"] = _paired(key[1], old_results.get(digest), new_results.get(digest))
        rows.append(row)
    return rows


def _paired(metric: str, old: SuiteResultsOut | None, new: SuiteResultsOut | None) -> PairedDocument | None:
    from composer.evaluation.paired import compare_losses, compare_scores, describe

    if old is None or new is None:
        return None
    before, after = old.examples, new.examples
    if metric == new.metric:
        paired = compare_scores([row.score for row in before], [row.score for row in after])
    elif metric == "nll" and all(row.nats is not None for row in (*before, *after)):
        paired = compare_losses(*([(row.nats or 0.0, row.tokens or 1) for row in rows] for rows in (before, after)))
    else:
        return None
    return {
        "n": paired.n,
        "difference": paired.difference,
        "low": paired.low,
        "high": paired.high,
        "gained": paired.gained,
        "lost": paired.lost,
        "verdict": paired.verdict,
        "needed": paired.needed,
        "in_words": describe(paired),
    }


def _score(key: tuple[str, str], old: ScoreOut | None, new: ScoreOut | None) -> ScoreDifference:
    row: ScoreDifference = {
        "suite": key[0],
        "task": new.task if new else old.task if old else "",
        "metric": key[1],
        "old": old.value if old else None,
        "old_stderr": old.stderr if old else None,
        "old_n": old.n if old else None,
        "old_reported": bool(old and old.reported),
        "new": new.value if new else None,
        "new_stderr": new.stderr if new else None,
        "new_n": new.n if new else None,
        "new_reported": bool(new and new.reported),
        "difference": None,
        "stderr": None,
        "better": None,
        "beyond": None,
        "paired": None,
    }
    if old is None or new is None or old.suite_digest != new.suite_digest:
        return row
    difference = new.value - old.value
    row["difference"] = difference
    row["better"] = (difference > 0) == new.higher_is_better if difference else None
    if old.stderr is not None and new.stderr is not None:
        stderr = hypot(old.stderr, new.stderr)
        row["stderr"], row["beyond"] = stderr, abs(difference) > STANDARD_ERRORS * stderr
    return row
