"""Prepares reports of gates for pages: each rule with its mark, and its value relative to the limit."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from registry.api.pages.html import drawings
from registry.api.pages.html.drawings import IntervalBar
from registry.api.pages.html.scores import ends
from registry.wire.quality import GateResultOut, PromotionGateOut


@dataclass(frozen=True, slots=True, kw_only=True)
class GateLine:
    """A rule's result. `kind` selects its mark. Value, limit and drawing are None if there is only the sentence
    `detail`: for a rule without a score, and for a move from before results contained numbers."""

    rule: str
    kind: str
    word: str
    detail: str
    value: float | None
    limit: float | None
    other: float | None
    sure: bool | None
    drawing: Markup | None


def lines(report: Sequence[GateResultOut]) -> list[GateLine]:
    return [_line(result) for result in report]


def summary(report: Sequence[GateResultOut]) -> str:
    """The number of rules that pass, as `2 of 3 pass`; empty without rules."""
    return f"{sum(gate.passed for gate in report)} of {len(report)} pass" if report else ""


def _line(gate: GateResultOut) -> GateLine:
    waiting = isinstance(gate, PromotionGateOut) and gate.waiting and not gate.passed
    kind, word = ("ok", "passed") if gate.passed else ("warn", "waits") if waiting else ("bad", "failed")
    return GateLine(
        rule=f"{gate.rule} ({gate.policy})" if gate.policy else gate.rule,
        kind=kind,
        word=word,
        detail=gate.detail,
        value=gate.value,
        limit=gate.limit,
        other=gate.other.value if gate.other else None,
        sure=gate.sure,
        drawing=_drawing(gate),
    )


def _drawing(gate: GateResultOut) -> Markup | None:
    if gate.value is None or gate.limit is None:
        return None
    metric = gate.rule.partition(" ")[0].rpartition(".")[2]
    rows = [IntervalBar(gate.value, *ends(metric, gate.value, gate.stderr, gate.n or 0), "now")]
    if other := gate.other:
        rows.append(IntervalBar(other.value, *ends(metric, other.value, other.stderr, other.n), "before"))
    return drawings.against_limit(gate.rule, rows, gate.limit, above=bool(gate.at_least))
