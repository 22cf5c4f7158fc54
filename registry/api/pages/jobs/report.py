"""A conflict report as pages show it: its verdict, its advice, each adapter's loss, and where adapters meet."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup, escape

from composer.formats.recipes.suite import guard_cost
from registry.api.pages.html import drawings
from registry.api.pages.html.drawings import Cell, Interval, cells
from registry.api.pages.jobs.chosen import Chosen

Json = Mapping[str, Any]
OptionAddress = Callable[[str, str], str | None]
"""Where an option leads to, by its name and its value; None for one that pages do not have."""

SCHEMA = 2
"""Of the reports that are shown; composer/conflicts/report.py counts it."""
KINDS = {"ok": "ok", "warn": "warn", "refuse": "bad"}
"""The mark of a verdict; others have none."""
SENTENCES = {
    "ok": "Measured, and nothing is harmed.",
    "undecided": "Measured, and still open.",
    "unmeasured": "Not measured: weights alone do not show a risk.",
    "warn": "Not like this.",
    "refuse": "They cannot be combined like this.",
}
WORDS = {"ok": "no harm", "undecided": "open: too few examples to tell", "warn": "harmed"}
"""What a measurement of one combination says."""
SEVERITIES = {"error": "bad", "warning": "warn", "notice": ""}
"""The marks of findings, loudest first."""
LEAST_SCALE = 0.1
"""Where a map's colours end at the least: smaller differences do not matter, and would look as if they did."""
MAX_CELLS, MAX_PAIRS, MAX_FINDINGS, MAX_LISTED = 2_000, 30, 40, 10
"""Of all maps on a page, of 40 kB; of the table of pairs, the worst ones first; of findings; of modules below a map."""
_NO_SUMMARY: Json = {"headline": "", "lines": ()}
_OPTION = re.compile(r"--(?:(optimize)(?![\w-])|([a-z-]+) ([\w.:=/*-]*\w))")


@dataclass(frozen=True, slots=True)
class Measure:
    """What maps show. `origin` is the value without colour; one that is `signed` has colours on both sides of it."""

    name: str
    meaning: str
    origin: float = 0.0
    signed: bool = True


MEASURES = {
    "input_excess": Measure("input overlap", "Share of one's input directions that the other uses too, beyond chance."),
    "output_excess": Measure("output overlap", "Share of output directions that both write to, beyond chance."),
    "cosine": Measure("cosine", "1: the same change; -1: the opposite one."),
    "interference": Measure("interference - 1", "Energy of the sum beside that of both: below 0, they cancel.", 1.0),
    "crowding": Measure("crowding", "The most that both press into one output direction (Pico's c_max).", signed=False),
}
DEFAULT_MEASURE = "input_excess"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossLine:
    """The loss of a member on its own suite, or of a guard, and whether that is too much (`bad`), open or neither.
    `cost` compares a guard with the base, in words."""

    name: str
    suite: str
    loss: float
    low: float | None
    high: float | None
    answers: str
    kept: float | None
    kind: str
    cost: str
    drawing: Markup


@dataclass(frozen=True, slots=True)
class Losses:
    """One combination that was measured: all adapters together, or two of them."""

    name: str
    examples: int
    kind: str
    word: str
    lines: Sequence[LossLine]


@dataclass(frozen=True, slots=True)
class PairMap:
    """Where two adapters meet, if there was room to draw it. `largest` are the cells farthest from zero, in words."""

    name: str
    most: str
    modules: int
    drawing: Markup
    largest: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Maps:
    """The maps of a measure, all on the scale that ends at `top`. `undrawn` pairs had no room."""

    shown: str
    top: float
    drawn: Sequence[PairMap]
    undrawn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`sentence` has the kind of its mark; `lines` say why. `pairs` are the worst ones of `all_pairs`, `findings` the
    loudest ones of `all_findings`."""

    kind: str
    verdict: str
    measured: str
    sentence: str
    lines: Sequence[str]
    advice: Sequence[Markup]
    members: Sequence[Json]
    pairs: Sequence[Json]
    all_pairs: int
    losses: Sequence[Losses]
    findings: Sequence[tuple[str, Json]]
    all_findings: int


def readable(report: Json | None) -> Json | None:
    """A stored report, if it has the shape that pages know."""
    return report if report and report.get("schema") == SCHEMA else None


def read(report: Json, address: OptionAddress) -> Report:
    """The report of REST for a page. `address` makes links of the options that its advice names. Reports of before 1.0
    may lack the summary, the advice for all, and what is tolerated."""
    verdict, summary = str(report["verdict"]), report.get("summary", _NO_SUMMARY)
    pairs = sorted(report["pairs"], key=lambda one: (-_rank(one["verdict"]), -(one["risk"] or 0.0)))
    loudest = sorted(report["findings"], key=lambda one: list(SEVERITIES).index(one["severity"]))
    return Report(
        kind=KINDS.get(verdict, ""),
        verdict=verdict,
        measured=summary["headline"].partition(", ")[2],
        sentence=SENTENCES.get(verdict, f"The verdict is {verdict}."),
        lines=summary["lines"],
        advice=[_linked(one, address) for one in report["whole"].get("advice", ())],
        members=report["adapters"],
        pairs=pairs[:MAX_PAIRS],
        all_pairs=len(pairs),
        losses=_losses(report, pairs[:MAX_PAIRS]),
        findings=[(SEVERITIES[one["severity"]], one) for one in loudest[:MAX_FINDINGS]],
        all_findings=len(loudest),
    )


def _rank(verdict: str) -> int:
    """From best to worst; one that is not known comes first."""
    return list(SENTENCES).index(verdict) if verdict in SENTENCES else -1


def maps(report: Json, measure: str) -> Maps:
    """The maps of a measure, those of the worst pairs first. All have the rows and columns of all adapters."""
    wanted = MEASURES[measure]
    values_by_pair = [(pair, _relative(pair, measure, wanted.origin)) for pair in report["pairs"]]
    top = max([LEAST_SCALE, *(abs(value) for _, values in values_by_pair for value in values.values())])
    frame = {cell for member in report["adapters"] for cell in cells(member, "norm")}
    drawn: list[PairMap] = []
    room = MAX_CELLS
    for pair, values in values_by_pair:
        if not values or len(frame) > room:
            continue
        room -= len(frame)
        name = f"{pair['a']} + {pair['b']}"
        hover = not drawn
        picture = drawings.layer_map(f"{wanted.name} of {name}", values, top, frame, hover=hover, signed=wanted.signed)
        most = drawings.strongest(values, signed=wanted.signed)
        farthest = sorted(values.items(), key=lambda one: -abs(one[1]))[:MAX_LISTED]
        largest = [(f"layer {layer} {kind}", value) for (kind, layer), value in farthest]
        drawn.append(PairMap(name, most, len(pair["modules"]), picture, largest))
    return Maps(measure, top, drawn, len(values_by_pair) - len(drawn))


def _relative(pair: Json, measure: str, origin: float) -> dict[Cell, float]:
    return {cell: value - origin for cell, value in cells(pair, measure).items()}


def _linked(advice: str, address: OptionAddress) -> Markup:
    """Advice with its options as code, and as links where a page has them."""
    parts, end = Markup(), 0
    for option in _OPTION.finditer(advice):
        target = address(option[1] or option[2], option[3] or "")
        code = Markup("<code>{}</code>").format(option[0])
        parts += escape(advice[end : option.start()])
        parts += Markup('<a href="{}">{}</a>').format(target, code) if target else code
        end = option.end()
    return parts + escape(advice[end:])


def options_of(chosen: Chosen) -> OptionAddress:
    """Links of the options in an advice: to a recipe for the chosen adapters that has them."""

    def address(name: str, value: str) -> str | None:
        if name == "method":
            return chosen.with_method(value).address("/compose")
        if name == "set":
            return chosen.with_setting(value).address("/compose")
        others = {"probe": {"probe": value}, "optimize": {"optimize": "yes"}}.get(name)
        return chosen.address("/compose", **others) if others else None

    return address


def options_for(composition_id: int) -> OptionAddress:
    """The recipe of a composition, with the option."""

    def address(name: str, value: str) -> str | None:
        known = name in ("method", "set", "probe", "optimize")
        query = urlencode({"composition": composition_id, name: value or "yes"}, safe="=")
        return f"/compose?{query}" if known else None

    return address


def _losses(report: Json, pairs: Sequence[Json]) -> list[Losses]:
    """Those of all adapters together, then those of pairs, on one axis."""
    together = report["whole"].get("probe")
    measured = [("All together", together)] if together and len(report["pairs"]) > 1 else []
    measured += [(f"{pair['a']} + {pair['b']}", pair["probe"]) for pair in pairs if pair["probe"]]
    ends = [0.1, *(value for _, probe in measured for one in probe["effects"] for value in _ends(one))]
    high = max(ends)
    low = min(*ends, -high / 2)
    return [_combination(name, probe, low, high) for name, probe in measured]


def _ends(effect: Json) -> list[float]:
    """The range of the axis: the loss and its limit. Intervals of a few examples are cut at its ends."""
    tolerated = effect.get("tolerated")
    return [effect["loss"], *([] if tolerated is None else [tolerated])]


def _combination(name: str, probe: Json, low: float, high: float) -> Losses:
    rows = [*probe["effects"], *probe["guards"]]
    worst: str = max((row.get("verdict", "") for row in rows), key=_rank)
    lines = [_line(row, low, high) for row in rows]
    return Losses(name, probe["k"], KINDS.get(worst, ""), WORDS.get(worst, worst), lines)


def _line(row: Json, low: float, high: float) -> LossLine:
    guard = "member" not in row
    loss, sure = (row["rise"], row["rise_interval"]) if guard else (row["loss"], row["loss_interval"])
    start, end = (float(sure["low"]), float(sure["high"])) if sure else (float(loss), float(loss))
    harmed = row.get("verdict") == "warn"
    kind = "loss" if harmed else "open" if row.get("verdict") == "undecided" else "now"
    name = "guard" if guard else row["member"]
    cost = guard_cost(row["combined"], row["base"]) if guard else ""
    return LossLine(
        name=name,
        suite=row["suite"],
        loss=loss,
        low=start if sure else None,
        high=end if sure else None,
        answers="" if guard or not row["answered"] else f"{row['still_answered']} of {row['answered']}",
        kept=None if guard else row["kept"],
        kind="bad" if harmed else "",
        cost=cost,
        drawing=drawings.loss(
            f"{name} on {row['suite']}", Interval(loss, start, end, kind), row.get("tolerated"), low, high
        ),
    )
