"""Contents of suites whose examples the registry does not have: a task of an evaluation harness, and a benchmark of
reported scores. Models cannot be run on them here; they distinguish scores on one content from scores on others.
"""

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from composer.errors import InvalidFile
from composer.formats.recipes.documents import Document, problem_of
from composer.formats.recipes.suite import MAX_METRICS, MAX_TEXT_CHARS, Better, Kind, Metric, Name, Suite, VersionLabel
from composer.formats.recipes.tasks import JsonMapping

MAX_DOCUMENTS = 10_000_000
_DIGEST = r"^[0-9a-f]{64}$"
_MAX_NAME = 64
_HASH_DIGITS = 8
_UNFIT = re.compile(r"[^a-z0-9_]+")

ShortText = Annotated[str, Field(min_length=1, max_length=200)]


class HarnessVersion(Document):
    """The harness that defines a task, and its version."""

    name: Literal["lm-eval"]
    version: Annotated[str, Field(min_length=1, max_length=40)]


class Documents(Document):
    """A task's documents: how many, and the sha256 of all of them in order."""

    count: Annotated[int, Field(ge=1, le=MAX_DOCUMENTS)]
    sha256: Annotated[str, Field(pattern=_DIGEST)]


class _Elsewhere(Document):
    @property
    def content(self) -> dict[str, object]:
        """The identity of the suite as JSON: all fields but `version` and `metrics`."""
        return self.model_dump(mode="json", exclude={"version", "metrics"})

    @property
    def digest(self) -> str:
        """sha256, in hex, of `content` as canonical JSON."""
        text = json.dumps(self.content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


class HarnessTask(_Elsewhere):
    """A task of an evaluation harness: its configuration, the harness' version and the documents identify it."""

    name: Name
    version: VersionLabel = Field(None, description="A semantic version that labels this content.")
    kind: Kind = "target"
    description: Annotated[str, Field(max_length=MAX_TEXT_CHARS)] = ""
    task: Literal["harness"]
    harness: HarnessVersion
    config: JsonMapping
    documents: Documents
    metrics: Annotated[dict[Metric, Better], Field(max_length=MAX_METRICS)] = Field(
        default_factory=dict[Metric, Better]
    )

    @property
    def count(self) -> int:
        """The number of documents."""
        return self.documents.count

    @property
    def higher_is_better(self) -> dict[str, bool]:
        return {metric: better == "higher" for metric, better in self.metrics.items()}

    def to_json(self) -> dict[str, object]:
        """The JSON that the registry accepts."""
        return self.content | self.model_dump(mode="json", include={"version", "metrics"}, exclude_defaults=True)


class ReportedBenchmark(_Elsewhere):
    """A data set, with its configuration and split if these are known, that scores are reported of."""

    task: Literal["reported"] = "reported"
    dataset: ShortText
    config: ShortText | None = None
    split: ShortText | None = None

    @property
    def name(self) -> str:
        """`reported-` and the data set's own words, at most 64 characters; a long one ends with a part of its hash."""
        parts = [self.dataset, self.config or "", self.split or ""]
        words = "-".join(filter(None, ["reported", *(_UNFIT.sub("-", part.lower()).strip("-") for part in parts)]))
        if len(words) <= _MAX_NAME:
            return words
        return f"{words[: _MAX_NAME - _HASH_DIGITS - 1]}-{self.digest[:_HASH_DIGITS]}"


SuiteContent = Suite | HarnessTask


def parse_content(document: dict[str, Any], subject: str = "suite") -> SuiteContent:
    """Parses a suite with its examples, or a task of a harness. Raises InvalidFile naming the field."""
    if document.get("task") != "harness":
        return Suite.from_json(document, subject)
    try:
        return HarnessTask.model_validate(document)
    except ValidationError as error:
        problem = problem_of(error)
        next_step = problem.next_step or "Record the scores with `adaptory eval REF --harness TASK`, which writes this."
        message = f"{problem.at(subject)}: {problem.why}."
        raise InvalidFile("suite_field", message, subject=subject, next_step=next_step) from error
