"""Compares two releases, as the API shows them: facts, provenance, files, and scores, example by example."""

from collections.abc import Mapping
from math import hypot
from typing import Any, cast

from composer.findings import Finding
from registry.formats import compatibility
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest

Json = dict[str, Any]

STANDARD_ERRORS = 2.0
"""A score difference is significant beyond this many of its standard errors."""


Results = Mapping[str, Json]
"""{metric, examples} by suite digest, of the suites for which the result of each example was recorded; the mean of
their scores is the metric, `accuracy` if it is not named."""


def differences(old: Json, new: Json, old_results: Results, new_results: Results) -> Json:
    """{change, breaking: [finding], facts, provenance: [{name, old, new}], files: {added, removed, changed}, scores}.

    Lists contain only what differs, except scores, which are complete. `change` is what the version number must
    express: breaking, weights, files or none.
    """
    broken = _breaks(old, new)
    files = _files(old, new)
    weights = _surface(old).weights != _surface(new).weights
    change = "breaking" if broken else "weights" if weights else "files" if any(files.values()) else "none"
    return {
        "change": change,
        "breaking": [finding.to_json() for finding in broken],
        "facts": _changed(_facts(old, new), _facts(new, old)),
        "provenance": _changed(stated_provenance(old), stated_provenance(new)),
        "files": files,
        "scores": score_differences(old["scores"], new["scores"], old_results, new_results),
    }


def differences_in_scores(old: Json, new: Json, old_results: Results, new_results: Results) -> Json:
    """The result of `differences` for a base and a release, which have nothing but scores in common."""
    return {
        "change": None,
        "breaking": [],
        "facts": [],
        "provenance": [],
        "files": {"added": [], "removed": [], "changed": []},
        "scores": score_differences(old["scores"], new["scores"], old_results, new_results),
    }


def changed_examples(suite: Json, old: Json, new: Json) -> list[Json]:
    """The examples of a suite whose answer's score changed, those that lost most first. The registry does not have the
    prompts of a harness."""
    pairs = list(zip(old["examples"], new["examples"], strict=True))
    known: list[Json] = suite["content"].get("examples") or [{}] * len(pairs)
    rows: list[Json] = [
        {"suite": suite["name"], "example": index + 1, "prompt": example.get("prompt")}
        | {"completion": example.get("completion"), "old": before, "new": after}
        for index, (example, (before, after)) in enumerate(zip(known, pairs, strict=True))
        if before["score"] != after["score"]
    ]
    return sorted(rows, key=lambda row: row["new"]["score"] - row["old"]["score"])


def _surface(release: Json) -> compatibility.Surface:
    facts = release["adapter"] or release["model"]
    files = [ManifestFile(row["path"], row["size_bytes"], Digest(row["sha256"])) for row in release["files"]]
    return compatibility.surface(release["base"]["digest"] or "", facts, files)


def _breaks(old: Json, new: Json) -> list[Finding]:
    """The breaking changes; a new base only if both digests are known, which directories may lack."""
    changes = compatibility.breaking_changes(_surface(old), _surface(new))
    known = old["base"]["digest"] and new["base"]["digest"]
    return [finding for finding in changes if known or finding.code != "new_base"]


def _facts(release: Json, other: Json) -> Json:
    """The facts to compare. The base only if both sides have a digest or neither has: a directory knows only the name
    that its base was loaded from."""
    alike = bool(release["base"]["digest"]) == bool(other["base"]["digest"])
    base = {"base": release["base"]["name"]} if alike else {}
    return {**base, **_flat(release["adapter"] or release["model"]), "servers": release["servers"]}


def stated_provenance(release: Json) -> Json:
    """A release's provenance as names and values."""
    stated = dict(release["provenance"])
    rows: list[Json] = stated.pop("data", [])
    return {**_flat(stated), "data": [" ".join(str(value) for value in row.values() if value) for row in rows]}


def _flat(document: Mapping[str, Any]) -> Json:
    """Flattens one level: `hyperparameters` becomes `hyperparameters.learning_rate`, …"""
    flat: Json = {}
    for name, value in document.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in cast(Json, value).items()}
        else:
            flat[name] = value
    return flat


def _changed(old: Json, new: Json) -> list[Json]:
    """Rows of what differs; None and an empty list are equal."""
    return [
        {"name": name, "old": old.get(name), "new": new.get(name)}
        for name in dict.fromkeys([*old, *new])
        if (old.get(name) or None) != (new.get(name) or None)
    ]


def _files(old: Json, new: Json) -> dict[str, list[str]]:
    before, after = ({row["path"]: row["sha256"] for row in release["files"]} for release in (old, new))
    return {
        "added": sorted(set(after) - set(before)),
        "removed": sorted(set(before) - set(after)),
        "changed": sorted(path for path in set(before) & set(after) if before[path] != after[path]),
    }


def score_differences(old: list[Json], new: list[Json], old_results: Results, new_results: Results) -> list[Json]:
    """Each score's comparison, with `paired` where both sides have results on the same examples."""
    before, after = ({(row["suite"], row["metric"]): row for row in rows} for rows in (old, new))
    rows: list[Json] = []
    for key in dict.fromkeys([*before, *after]):
        row = _score(key, before.get(key), after.get(key))
        digest = before[key]["suite_digest"] if row["difference"] is not None else ""
        paired = _paired(key[1], old_results.get(digest), new_results.get(digest))
        rows.append(row | {"paired": paired})
    return rows


def _paired(metric: str, old: Json | None, new: Json | None) -> Json | None:
    from composer.evaluation.paired import compare_losses, compare_scores, describe

    if old is None or new is None:
        return None
    before, after = old["examples"], new["examples"]
    if metric == (new.get("metric") or "accuracy"):
        paired = compare_scores([row["score"] for row in before], [row["score"] for row in after])
    elif metric == "nll" and all(row.get("nats") is not None for row in (*before, *after)):
        paired = compare_losses(*([(row["nats"], row["tokens"]) for row in rows] for rows in (before, after)))
    else:
        return None
    return {**paired.to_json(), "in_words": describe(paired)}


def _score(key: tuple[str, str], old: Json | None, new: Json | None) -> Json:
    """Compares a score. `stderr` is that of the difference of two independent means. On the same examples the true one
    is smaller, so a difference `beyond` it is real. None if a score is missing or the suite's content differs."""
    row: Json = {
        "suite": key[0],
        "task": (new or old or {})["task"],
        "metric": key[1],
        "old": old["value"] if old else None,
        "old_stderr": old["stderr"] if old else None,
        "old_n": old["n"] if old else None,
        "old_reported": bool(old and old.get("reported")),
        "new": new["value"] if new else None,
        "new_stderr": new["stderr"] if new else None,
        "new_n": new["n"] if new else None,
        "new_reported": bool(new and new.get("reported")),
        "difference": None,
        "stderr": None,
        "better": None,
        "beyond": None,
    }
    if old is None or new is None or old["suite_digest"] != new["suite_digest"]:
        return row
    row["difference"] = new["value"] - old["value"]
    row["better"] = (row["difference"] > 0) == new["higher_is_better"] if row["difference"] else None
    if old["stderr"] is not None and new["stderr"] is not None:
        row["stderr"] = hypot(old["stderr"], new["stderr"])
        row["beyond"] = abs(row["difference"]) > STANDARD_ERRORS * row["stderr"]
    return row
