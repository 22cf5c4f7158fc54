"""Lineage of a composition as its lock or its adaptory.json states it: members, weights, method."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from composer.errors import ComposerError
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.weights import Weight, WeightRule, parse_weight

NOTE_FILE = "adaptory.json"
NOTE_BYTES = 64 << 20
"""Maximum bytes read of a note: a merge writes about 300 bytes per tensor."""


@dataclass(frozen=True, slots=True)
class LineageInput:
    """An input. `name` is a repository, with version and commit; for local merges a directory, with a digest."""

    name: str
    version: str
    commit: str
    weight: Weight

    @property
    def exactly(self) -> str:
        return f"{self.version} {self.commit[:12]}".strip()

    def __str__(self) -> str:
        return f"{weight_words(self.weight)} x {self.name}{':' if self.version else ' '}{self.exactly}"


AS_SET = "a set with a router"
"""The method of a set, in words."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """The method and members of a composition. `method` is empty if only the members are known; `dtype` and
    `rounding` are empty for defaults."""

    members: tuple[LineageInput, ...]
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    dtype: str = ""
    rounding: str = ""

    def own_settings(self) -> dict[str, Any]:
        """The settings, without common ones at their defaults."""
        common = parse_settings("stack").to_json()
        settings = {name: value for name, value in self.settings.items() if value is not None and value != []}
        if settings.get("tied") == "refuse":  # the default before `auto`; equivalent for what passed
            del settings["tied"]
        return {name: value for name, value in settings.items() if name not in common or value != common[name]}

    @property
    def how(self) -> str:
        """The method with its settings, in words."""
        settings = ", ".join(f"{name} {_short(value)}" for name, value in self.own_settings().items())
        return f"{self.method}: {settings}" if settings else self.method

    def rows(self) -> dict[str, Any]:
        """Names and values to compare with another composition's."""
        rows: dict[str, Any] = {"method": self.method} if self.method else {}
        rows |= {f"settings.{name}": value for name, value in self.own_settings().items()}
        rows |= {name: value for name, value in (("dtype", self.dtype), ("rounding", self.rounding)) if value}
        for member in self.members:
            name = f"member {member.name}"
            value = f"{weight_words(member.weight)} x {member.exactly}"
            rows[name] = f"{rows[name]}, {value}" if name in rows else value
        return rows


def weight_words(weight: Weight) -> str:
    """`0.8 (0.3 in layers 0-9 of mlp.*)`."""
    rules = ", ".join(map(rule_words, weight.rules))
    return f"{weight.value:g} ({rules})" if rules else f"{weight.value:g}"


def rule_words(rule: WeightRule) -> str:
    """A weight rule in words: `0.5 in layers 0-9 of mlp.*`."""
    first, last = rule.layers or (0, 0)
    layers = "" if rule.layers is None else f"layer {first}" if first == last else f"layers {first}-{last}"
    return f"{rule.weight:g} in {' of '.join(part for part in (layers, rule.modules) if part)}"


class Changed(TypedDict):
    """A value that two releases state, under the same name."""

    name: str
    old: object
    new: object


def side_by_side(old: Lineage | None, new: Lineage | None) -> list[Changed]:
    """Rows {name, old, new} of both compositions; none if neither is one."""
    before, after = (lineage.rows() if lineage else {} for lineage in (old, new))
    return [
        {"name": name, "old": before.get(name), "new": after.get(name)} for name in dict.fromkeys([*before, *after])
    ]


def of_lock(lock: Mapping[str, Any]) -> Lineage:
    """The composition of a lock, or of an adaptory.json's excerpt of it, which names inputs only by commit."""
    members = tuple(_locked(row) for row in lock["inputs"])
    if lock.get("set"):
        return Lineage(members, AS_SET)
    return _composition(members, lock)


def of_note(content: bytes) -> Lineage | None:
    """The composition that an adaptory.json describes, or None: its content is untrusted."""
    try:
        note = json.loads(content)
        if lock := note["note"].get("lock"):
            return of_lock(lock)
        members = [
            LineageInput(str(row["name"]), "", str(row["digest"]), parse_weight(row["weight"]))
            for row in note["adapters"]
        ]
        return _composition(tuple(members), note)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ComposerError):
        return None


def _composition(members: tuple[LineageInput, ...], stated: Mapping[str, Any]) -> Lineage:
    rounding: Mapping[str, Any] = stated.get("rounding") or {}
    stochastic = rounding.get("mode", "nearest") != "nearest"
    return Lineage(
        members,
        str(stated["method"]),
        dict(stated["settings"]),
        str(stated.get("dtype") or ""),
        f"{rounding['mode']}, seed {rounding['seed']}" if stochastic else "",
    )


def _locked(row: Mapping[str, Any]) -> LineageInput:
    commit, weight = str(row["commit"]), parse_weight({"value": row["weight"], "rules": row.get("rules", [])})
    return LineageInput(str(row.get("repository", commit[:12])), str(row.get("version", "")), commit, weight)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)
