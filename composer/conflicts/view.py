"""The view model of a conflict report, read from its JSON: the page of `--html` and the registry's pages both draw it.
Reports are stored, so every schema up to this one can be read; fields that an older report lacks stay empty. Needs no
torch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from composer.conflicts.documents import (
    FindingDocument,
    IntervalDocument,
    MemberDocument,
    PairDocument,
    ProbeDocument,
    ReportDocument,
    SummaryDocument,
)
from composer.formats.recipes.suite import guard_cost
from composer.formats.recipes.weights import layer_of, tower_labels, tower_of

Cell = tuple[str, int | None]
"""Kind of module and layer; a module outside of the layers is a kind of its own, with None."""

SCHEMA = 3
"""Version of a report's JSON; it changes when a key is removed or changes its meaning."""
KINDS = {"ok": "ok", "warn": "warn", "refuse": "bad"}
"""The mark of a verdict; others have none."""
SENTENCES = {
    "ok": "Measured, and nothing is harmed.",
    "undecided": "Measured, and still open.",
    "unmeasured": "Not measured: weights alone do not show a risk.",
    "warn": "Not like this.",
    "refuse": "They cannot be combined like this.",
}
"""From the best verdict to the worst."""
WORDS = {"ok": "no harm", "undecided": "open: too few examples to tell", "warn": "harmed"}
"""The verdict on one measured combination."""
SEVERITIES = {"error": "bad", "warning": "warn", "notice": ""}
"""The marks of findings, loudest first."""
LEAST_SCALE = 0.1
"""The least value with the strongest colour: smaller differences do not matter, and would look as if they did."""
_AXIS = 0.1
_NO_SUMMARY: SummaryDocument = {"headline": "", "lines": ()}


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure shown in maps: the distance from `origin`, the value by chance. A `signed` one has two colours."""

    name: str
    meaning: str
    origin: float = 0.0
    signed: bool = True


MEASURES = {
    "input_excess": Measure("input overlap", "Share of one's input directions that the other uses too, beyond chance."),
    "output_excess": Measure("output overlap", "Share of output directions that both write to, beyond chance."),
    "cosine": Measure("cosine", "1: the same change; -1: the opposite one."),
    "interference": Measure(
        "interference - 1", "Energy of the sum relative to that of both: below 0, they cancel.", 1.0
    ),
    "dominance": Measure("dominance - 0.5", "The larger one's share of the energy beyond one half.", 0.5, signed=False),
}
DEFAULT_MEASURE = "input_excess"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossLine:
    """The loss of a member on its own suite, or of a guard, in nats per token: `verdict` judges it against `tolerated`.
    `cost` compares a guard with the base, in words."""

    name: str
    suite: str
    verdict: str
    loss: float
    interval: IntervalDocument | None
    tolerated: float | None
    answers: str = ""
    kept: float | None = None
    cost: str = ""

    @property
    def low(self) -> float | None:
        return self.interval["low"] if self.interval else None

    @property
    def high(self) -> float | None:
        return self.interval["high"] if self.interval else None


@dataclass(frozen=True, slots=True)
class Losses:
    """One measured combination, of all adapters or of two, on `examples` of each suite."""

    name: str
    examples: int
    verdict: str
    lines: Sequence[LossLine]

    @property
    def kind(self) -> str:
        return KINDS.get(self.verdict, "")

    @property
    def word(self) -> str:
        return WORDS.get(self.verdict, self.verdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """Two adapters. `risk` is None if unknown. `causes` are the modules where they meet most, with their shares."""

    name: str
    verdict: str
    risk: float | None
    unit: str
    low: float | None
    high: float | None
    meaning: str
    causes: Sequence[tuple[str, float]]
    advice: Sequence[str]
    numbers: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class PairMap:
    """A map of two adapters: each common module's distance from chance. `modules` counts them."""

    name: str
    modules: int
    cells: Mapping[Cell, float]

    @property
    def in_layers(self) -> dict[tuple[str, int], float]:
        return {(kind, layer): value for (kind, layer), value in self.cells.items() if layer is not None}

    def farthest(self, most: int) -> list[tuple[tuple[str, int], float]]:
        """The cells in layers with the largest distances."""
        return sorted(self.in_layers.items(), key=lambda one: -abs(one[1]))[:most]


@dataclass(frozen=True, slots=True)
class Maps:
    """The maps of a measure, worst pairs first, on one scale that ends at `top`. `frame` has the cells of all adapters;
    `pairs` counts all pairs."""

    measure: Measure
    top: float
    frame: Sequence[Cell]
    drawn: Sequence[PairMap]
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`sentence` has the kind of its mark; `lines` give the reasons. `note` holds for all pairs. `pairs` are the worst
    ones of
    `all_pairs`, `findings` the loudest ones of `all_findings`; `axis` has the ends for all losses; `kept` says what the
    method keeps of the adapters, from the weights."""

    kind: str
    verdict: str
    measured: str
    sentence: str
    lines: Sequence[str]
    advice: Sequence[str]
    members: Sequence[MemberDocument]
    note: str
    pairs: Sequence[PairRow]
    all_pairs: int
    losses: Sequence[Losses]
    axis: tuple[float, float]
    activations: Mapping[str, Any] | None
    findings: Sequence[tuple[str, FindingDocument]]
    all_findings: int
    kept: str


def read(report: ReportDocument, most_pairs: int | None = None, most_findings: int | None = None) -> Report:
    """The view of a report's JSON, with at most that many pairs and findings."""
    verdict, summary = report["verdict"], report.get("summary", _NO_SUMMARY)
    current = report.get("schema", SCHEMA) > 1  # an earlier `ok` may be unmeasured
    earlier = f"The verdict is {verdict}, by the rules of an earlier version."
    pairs = _by_verdict(report)
    findings = sorted(report["findings"], key=lambda one: list(SEVERITIES).index(one["severity"]))
    together = report["whole"].get("probe")
    measured = [("All together", together)] if together and len(report["pairs"]) > 1 else []
    measured += [(_name(pair), probe) for pair in pairs[:most_pairs] if (probe := pair.get("probe"))]
    losses = [_combination(name, probe) for name, probe in measured]
    meanings = {pair.get("meaning", "") for pair in pairs if pair.get("evidence") == "weights"}
    note = meanings.pop() if len(meanings) == 1 else ""  # schema 1 has one for each pair
    return Report(
        kind=KINDS.get(verdict, "") if current else "",
        verdict=verdict,
        measured=summary["headline"].partition(", ")[2],
        sentence=SENTENCES.get(verdict, f"The verdict is {verdict}.") if current else earlier,
        lines=summary["lines"],
        advice=report["whole"].get("advice", ()),
        members=report["adapters"],
        note=note,
        pairs=[_pair(pair, note) for pair in pairs[:most_pairs]],
        all_pairs=len(pairs),
        losses=losses,
        axis=_axis([line for block in losses for line in block.lines]),
        activations=report.get("activations"),
        findings=[(SEVERITIES[finding["severity"]], finding) for finding in findings[:most_findings]],
        all_findings=len(findings),
        kept=report["whole"].get("kept_words", ""),
    )


def maps(report: ReportDocument, measure: str) -> Maps:
    """The maps of a measure; a pair without common modules has none."""
    chosen, pairs = MEASURES[measure], _by_verdict(report)
    listed = [module["module"] for member in report["adapters"] for module in member["modules"]]
    cells = cells_of([*listed, *(module["module"] for pair in pairs for module in pair["modules"])])
    drawn = [
        PairMap(
            _name(pair),
            len(pair["modules"]),
            {cells[module["module"]]: module[measure] - chosen.origin for module in pair["modules"]},
        )
        for pair in pairs
        if pair["modules"]
    ]
    top = max([LEAST_SCALE, *(abs(value) for pair_map in drawn for value in pair_map.cells.values())])
    frame = dict.fromkeys(cells[module] for module in listed)
    return Maps(chosen, top, list(frame), drawn, len(pairs))


def cells_of(modules: Collection[str]) -> dict[str, Cell]:
    """The cell of each module: its kind, without its block but with its tower if there are several, and its layer."""
    labels = tower_labels(modules)
    return {module: _cell(module, labels.get(tower_of(module), "")) for module in modules}


def _cell(module: str, tower: str) -> Cell:
    layer = layer_of(module)
    kind = f".{module}".partition(f".{layer}.")[2] or module
    return f"{tower} {kind.removeprefix('self_attn.').removeprefix('mlp.')}".lstrip(), layer


def _name(pair: PairDocument) -> str:
    return f"{pair['a']} + {pair['b']}"


def _by_verdict(report: ReportDocument) -> list[PairDocument]:
    """The pairs, worst first; schema 1 has no verdict of a pair."""
    return sorted(report["pairs"], key=lambda one: (-_rank(one.get("verdict", "ok")), -(one.get("risk") or 0.0)))


def _rank(verdict: str) -> int:
    """The verdict's rank, from best to worst; an unknown one is best."""
    return list(SENTENCES).index(verdict) if verdict in SENTENCES else -1


def _pair(pair: PairDocument, note: str) -> PairRow:
    return PairRow(
        name=_name(pair),
        verdict=pair.get("verdict", ""),
        risk=pair.get("risk"),
        unit=pair.get("risk_unit") or "",
        low=pair.get("risk_low"),
        high=pair.get("risk_high"),
        meaning=pair.get("meaning", "").removeprefix(note),
        causes=[(cause["module"], cause["share"]) for cause in pair.get("causes", ())],
        advice=pair.get("advice", ()),
        numbers={name: pair.get(name) for name in MEASURES},
    )


def _combination(name: str, probe: ProbeDocument) -> Losses:
    members = [
        LossLine(
            name=row["member"],
            suite=row["suite"],
            verdict=row.get("verdict", ""),
            loss=row["loss"],
            interval=row["loss_interval"],
            tolerated=row.get("tolerated"),
            answers=f"{row['still_answered']} of {row['answered']}" if row["answered"] else "",
            kept=row["kept"],
        )
        for row in probe["effects"]
    ]
    guards = [
        LossLine(
            name="guard",
            suite=row["suite"],
            verdict=row.get("verdict", ""),
            loss=row["rise"],
            interval=row["rise_interval"],
            tolerated=row.get("tolerated"),
            cost=guard_cost(row["combined"], row["base"]),
        )
        for row in probe["guards"]
    ]
    lines = [*members, *guards]
    return Losses(name, probe["k"], max((line.verdict for line in lines), key=_rank), lines)


def _axis(lines: Sequence[LossLine]) -> tuple[float, float]:
    """The ends of an axis for members' losses and limits. Intervals of a few examples are cut there."""
    own = [line for line in lines if not line.cost]
    ends = [_AXIS, *(line.loss for line in own), *(line.tolerated for line in own if line.tolerated is not None)]
    return min(*ends, -max(ends) / 2), max(ends)
