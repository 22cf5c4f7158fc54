"""A lock is a recipe with every input resolved to a digest."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict, final

from composer.formats.recipes.rounding import Rounding, RoundingPart, parse_rounding, rounding_json
from composer.formats.recipes.weights import RulesPart, Weight, WeightRule, parse_weight, rules_json


@final
class ExamplesDocument(TypedDict):
    """Examples of a suite, by digest. They were used with the `phrase` before each prompt, and every second one in
    other words if `reworded`."""

    suite: str
    suite_digest: str
    examples: list[str]
    phrase: NotRequired[str]
    reworded: NotRequired[bool]


@final
class PromptsDocument(TypedDict):
    """Prompts of the recipe, by digest."""

    prompts: list[str]


CalibrationDocument = ExamplesDocument | PromptsDocument
"""What one adapter is fitted on."""


class ChoiceDocument(TypedDict):
    """A method with its settings and the factors of the inputs' weights, that a search has tried."""

    name: str
    family: str
    method: str
    settings: dict[str, object]
    factors: list[float]
    phrases: NotRequired[list[str]]


class SearchDocument(TypedDict):
    """The part of the search's report (composer/optimize/report.py) that a lock needs. `searched` are the examples that
    the search saw. Locks of earlier versions lack `accepted` and `offers`."""

    headline: str
    choice: ChoiceDocument | None
    accepted: NotRequired[str]
    offers: NotRequired[list[str]]
    searched: list[ExamplesDocument]


class LockedInputDocument(RulesPart):
    repository: str
    version: str
    commit: str
    weight: float
    files: dict[str, str]


class LockContent(RoundingPart):
    """The content that the digest of a lock covers."""

    base: str
    method: str
    settings: dict[str, Any]
    dtype: str | None
    inputs: list[LockedInputDocument]
    calibration: NotRequired[list[CalibrationDocument]]
    method_version: NotRequired[int]
    set: NotRequired[bool]


class LockDocument(LockContent):
    gates: NotRequired[list[str]]
    optimized: NotRequired[SearchDocument]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedInput:
    """A resolved input. `files` maps a path to its sha256."""

    repository: str
    version: str
    commit: str
    weight: float
    files: Mapping[str, str]
    rules: tuple[WeightRule, ...] = ()

    @property
    def weighted(self) -> Weight:
        """The weight with its rules."""
        return Weight(self.weight, self.rules)

    def to_json(self) -> LockedInputDocument:
        return {
            "repository": self.repository,
            "version": self.version,
            "commit": self.commit,
            "weight": self.weight,
            "files": dict(self.files),
            **rules_json(self.rules),
        }

    @classmethod
    def from_json(cls, document: LockedInputDocument) -> "LockedInput":
        return cls(
            repository=document["repository"],
            version=document["version"],
            commit=document["commit"],
            weight=document["weight"],
            files=document["files"],
            rules=parse_weight({"rules": document.get("rules", [])}).rules,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """Everything that determines the result, by digest: equal locks give the same weights, except for the last bits of
    a fitted method.

    `calibration` has for each input the digests of the examples that it is fitted on. `gates` are the default ones:
    each member against the inputs on its own suite. They decide whether the result is published, so the digest excludes
    them. `method_version` is that of the method's pipeline; the digest excludes it if it is 1, so that older locks keep
    theirs. `optimized` is the evidence of the search that chose method, settings and weights, None without one; the
    digest excludes it. With `is_set` the inputs are not combined: `calibration` has the examples of the set's router.
    """

    base: str
    method: str
    settings: Mapping[str, Any]
    dtype: str | None
    inputs: tuple[LockedInput, ...]
    rounding: Rounding = field(default_factory=Rounding)
    calibration: tuple[CalibrationDocument, ...] = ()
    gates: tuple[str, ...] = ()
    method_version: int = 1
    optimized: SearchDocument | None = None
    is_set: bool = False

    def to_json(self) -> LockDocument:
        document: LockDocument = {**self._content(), "digest": self.digest}
        if self.gates:
            document["gates"] = list(self.gates)
        if self.optimized is not None:
            document["optimized"] = self.optimized
        return document

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, without gates and without method version 1."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> LockContent:
        content: LockContent = {
            "base": self.base,
            "method": self.method,
            "settings": dict(self.settings),
            "dtype": self.dtype,
            "inputs": [source.to_json() for source in self.inputs],
            **rounding_json(self.rounding),
        }
        if self.calibration:
            content["calibration"] = list(self.calibration)
        if self.method_version > 1:
            content["method_version"] = self.method_version
        if self.is_set:
            content["set"] = True
        return content

    @classmethod
    def from_json(cls, document: LockDocument) -> "Lock":
        """Parses what `to_json` wrote, also in earlier versions."""
        return cls(
            base=document["base"],
            method=document["method"],
            settings=document["settings"],
            dtype=document["dtype"],
            inputs=tuple(map(LockedInput.from_json, document["inputs"])),
            rounding=parse_rounding(**document["rounding"]) if "rounding" in document else Rounding(),
            calibration=tuple(document.get("calibration", ())),
            gates=tuple(document.get("gates", ())),
            method_version=document.get("method_version", 1),
            optimized=document.get("optimized"),
            is_set=document.get("set", False),
        )
