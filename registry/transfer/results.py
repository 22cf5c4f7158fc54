"""The results of each example behind a score, kept as a blob."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from registry.domain.access.audit import Actor
from registry.domain.catalog import suites
from registry.domain.catalog.suites import Measurement
from registry.errors import Invalid, Unavailable
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.transfer import uploads
from registry.transfer.resources import Resources
from registry.transfer.verified import read_verified

Row = Mapping[str, Any]
"""An example's `nats`, `tokens`, `score` and, unless teacher-forced, `answer` and `cut`. A harness gives no `nats`."""


@dataclass(frozen=True, slots=True)
class ExampleResults:
    """The rows of all examples of a suite; the mean of their scores is `metric`."""

    examples: Sequence[Row]
    metric: str = "accuracy"


def store(
    resources: Resources,
    actor: Actor,
    namespace: str,
    measurements: Sequence[Measurement],
    results: Mapping[str, ExampleResults],
) -> list[Measurement]:
    """Stores results by suite digest, each as a blob of the namespace, and returns the measurements with these blobs'
    digests. Raises Invalid for results that lack examples, or that do not agree with a measurement."""
    blobs: dict[str, Digest] = {}
    for digest, own in results.items():
        with resources.read() as session:
            suite = suites.find(session, digest)
        _check(
            suite.name,
            suite.examples,
            own,
            [measurement for measurement in measurements if measurement.suite_digest == digest],
        )
        metric = {} if own.metric == "accuracy" else {"metric": own.metric}
        document = {"suite": suite.name, "suite_digest": digest, **metric, "examples": own.examples}
        blobs[digest] = _stored(resources, actor, namespace, json.dumps(document, separators=(",", ":")).encode())
    return [replace(measurement, results_sha256=blobs.get(measurement.suite_digest)) for measurement in measurements]


def load(resources: Resources, digest: str) -> bytes:
    """The stored document: {suite, suite_digest, examples}. Raises Unavailable if the store has lost it."""
    with resources.read() as session:
        size_bytes = uploads.size_of(session, digest)
    stat = resources.store.stat(Digest(digest))
    if stat is None:
        raise Unavailable(
            "blob_lost",
            f"The store has lost the results {digest}.",
            subject=digest,
            next_step="Restore the blob from a backup, or run `adaptory eval` again.",
        )
    uploads.refuse_damaged(stat, size_bytes, "the results")
    return read_verified(resources.store, ManifestFile("the results", stat.size_bytes, stat.sha256))


def _stored(resources: Resources, actor: Actor, namespace: str, content: bytes) -> Digest:
    digest = Digest(sha256(content).hexdigest())
    with TemporaryDirectory(dir=resources.work_directory, prefix="upload-") as directory:
        path = Path(directory) / "results.json"
        path.write_bytes(content)
        uploads.store_file(resources, actor, namespace, digest, path, move=True)
    return digest


def _check(suite: str, count: int, results: ExampleResults, measurements: Sequence[Measurement]) -> None:
    rows = results.examples
    values = {results.metric: sum(row["score"] for row in rows) / len(rows)}
    if all("nats" in row and "tokens" in row for row in rows):
        values["nll"] = sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
    made = {measurement.metric: measurement for measurement in measurements if measurement.metric in values}
    differing = [
        name
        for name, measurement in made.items()
        if not isclose(measurement.value, values[name], rel_tol=1e-6, abs_tol=1e-9)
    ]
    if len(rows) != count or not made or differing:
        raise Invalid(
            "bad_results",
            f"These are results of {len(rows)} of {count} examples of {suite}"
            + (f", and {', '.join(differing)} does not agree with them." if differing else "."),
            subject=suite,
        )
