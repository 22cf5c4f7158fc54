"""Reports of gates as pages show them: each rule with its mark, and where the value lies beside the limit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from registry.api.pages.html import drawings
from registry.api.pages.html.drawings import Interval
from registry.domain.catalog import intervals

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateLine:
    """A rule's result. `kind` is that of its mark; value, limit and drawing are None where there is only
    the sentence `detail`: of a rule without a score, or of a move from before results had numbers."""

    rule: str
    kind: str
    word: str
    detail: str
    value: float | None
    limit: float | None
    other: float | None
    sure: bool | None
    drawing: Markup | None


def lines(report: Sequence[Json]) -> list[GateLine]:
    return [_line(one) for one in report]


def summary(report: Sequence[Json]) -> str:
    """The number of rules that pass, as `2 of 3 pass`; empty without rules."""
    return f"{sum(bool(one['passed']) for one in report)} of {len(report)} pass" if report else ""


def _line(gate: Json) -> GateLine:
    waiting = bool(gate.get("waiting")) and not gate["passed"]
    kind, word = ("ok", "passed") if gate["passed"] else ("warn", "waits") if waiting else ("bad", "failed")
    value, limit, other = gate.get("value"), gate.get("limit"), gate.get("other")
    return GateLine(
        rule=gate["rule"],
        kind=kind,
        word=word,
        detail=gate["detail"],
        value=value,
        limit=limit,
        other=None if other is None else other["value"],
        sure=gate.get("sure"),
        drawing=None if value is None or limit is None else _drawing(gate, value, limit, other),
    )


def _drawing(gate: Json, value: float, limit: float, other: Json | None) -> Markup:
    metric = str(gate["rule"]).partition(" ")[0].rpartition(".")[2]
    rows = [Interval(value, *_interval(metric, gate), "now")]
    if other is not None:
        rows.append(Interval(other["value"], *_interval(metric, other), "before"))
    return drawings.against_limit(gate["rule"], rows, limit, above=bool(gate["at_least"]))


def _interval(metric: str, score: Json) -> tuple[float, float]:
    value = float(score["value"])
    return intervals.interval(metric, value, score["stderr"], score["n"]) or (value, value)
