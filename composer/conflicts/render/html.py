"""Renders a conflict report as one self-contained HTML page: no network, no script, light and dark.

Heat maps are tables with a row per layer and a column per kind of module. The cells hold the numbers; colour only
repeats them. Radio buttons choose the measure, by CSS alone; without CSS all measures are shown. The markup is in
`templates/report.html`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from composer.conflicts.advice import FROM_WEIGHTS
from composer.conflicts.evidence.activations import Activations
from composer.conflicts.render.text import (
    LOUDEST_FIRST,
    Table,
    by_verdict,
    explanation,
    headline,
    overall_headline,
    probe_table,
    tables,
)
from composer.conflicts.report import ConflictReport, Pair
from composer.formats.recipes.weights import layer_of

MAX_MAPS = 40
"""Pairs with a heat map, worst verdicts first; the tables list all pairs."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What a map shows. `chance` is the value without colour, None if each module has its own. The strongest colour is
    at least `least` away from it, so that noise stays pale. A measure that is not `signed` has no colour below chance.
    """

    title: str
    chance: float | None = 0.0
    least: float = 0.1
    signed: bool = True


MEASURES = {
    "input_excess": Measure("Input overlap beyond chance"),
    "output_excess": Measure("Output overlap beyond chance"),
    "cosine": Measure("Cosine"),
    "interference": Measure("Interference - 1"),
    "share": Measure("Share of what they have in common", None, 0.02, signed=False),
    "crowding": Measure("c_max (Pico)", None, signed=False),
    "sign_excess": Measure("Sign conflict beyond the angle"),
    "dominance": Measure("Dominance", 0.5, 0.5, signed=False),
}
_STEPS = 8
_ENVIRONMENT = Environment(
    loader=PackageLoader("composer.conflicts.render"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A module's value. `shade` is its colour: `h` above chance or `c` below, and 0 to `_STEPS`."""

    shade: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Map:
    """One measure over the modules that both adapters touch: row -> one cell per column, None without a module."""

    measure: str
    caption: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell | None]]


def page(report: ConflictReport) -> str:
    """The complete page. All text from adapters, suites or users is escaped."""
    pairs = by_verdict(report)
    mapped = [pair for pair in pairs if pair.modules][:MAX_MAPS]
    scales = {measure: _scale(mapped, measure) for measure in MEASURES}
    return _ENVIRONMENT.get_template("report.html").render(
        title=f"Conflicts of {', '.join(member.name for member in report.members)}",
        verdict=report.verdict,
        overall=overall_headline(report),
        findings=sorted(report.findings, key=lambda one: LOUDEST_FIRST.index(one.severity)),
        from_weights=FROM_WEIGHTS if any(pair.evidence == "weights" for pair in pairs) else "",
        any_map=bool(mapped),
        pairs=[
            {
                "headline": headline(pair),
                "explanation": explanation(pair),
                "advice": pair.explanation.advice,
                "maps": [_map(pair, *scale) for scale in scales.items()] if pair in mapped else [],
            }
            for pair in pairs
        ],
        tables=_tables(report),
        measures=MEASURES,
        max_maps=MAX_MAPS,
        steps=_STEPS,
    )


def _tables(report: ConflictReport) -> list[Table]:
    built = [probe_table(report.probe)] if report.probe else []
    if isinstance(report.evidence, Activations):
        built.append(_activations_table(report.evidence))
    return built + [one for one in tables(report, worst_modules=0) if one.title != "Probe"]


def _activations_table(evidence: Activations) -> Table:
    rows = [
        (victim, intruder, *(f"{value:.3f}" for value in (one.intruder, one.victim, one.ratio, one.along, one.across)))
        for (victim, intruder), one in evidence.directed.items()
    ]
    columns = ("on the inputs of", "intruder", "strength", "victim's own", "ratio", "along", "across")
    note = f"On {evidence.prompts} prompts. Strength: the root of the sum over modules of (|Δx| / |Wx|)²."
    return Table("Activations", columns, tuple(rows), note)


def _scale(pairs: Sequence[Pair], measure: str) -> float:
    """The distance from chance with the strongest colour, the same in all maps of a report."""
    distances = [abs(_distance(pair, module, measure)) for pair in pairs for module in pair.modules]
    return max([MEASURES[measure].least, *distances])


def _map(pair: Pair, measure: str, most: float) -> Map:
    modules = {(_row(module), _column(module)): module for module in pair.modules}
    # Modules outside the layers come last, as in the rows.
    ordered = sorted(pair.modules, key=lambda module: layer_of(module) is None)
    columns = list(dict.fromkeys(map(_column, ordered)))
    rows = sorted(set(map(_row, pair.modules)), key=lambda row: (not row.isdecimal(), row.zfill(6)))

    def cell(row: str, column: str) -> Cell | None:
        module = modules.get((row, column))
        return None if module is None else _cell(pair, module, measure, most)

    return Map(measure, _caption(measure, most), columns, {row: [cell(row, one) for one in columns] for row in rows})


def _caption(measure: str, most: float) -> str:
    chance = MEASURES[measure].chance
    start = "chance" if chance is None else f"{chance:g}"
    return f"{MEASURES[measure].title}; no colour at {start}, the strongest {most:.3g} from there, in all maps"


def _cell(pair: Pair, module: str, measure: str, most: float) -> Cell:
    value, relative = _value(pair, module, measure), _distance(pair, module, measure) / most
    shade = f"{'h' if relative >= 0 else 'c'}{round(abs(relative) * _STEPS)}"
    return Cell(shade, f"{module}: {value:.4g}", f"{round(value, 2) + 0.0:.2f}")


def _value(pair: Pair, module: str, measure: str) -> float:
    if measure == "share":
        return pair.explanation.shares.get(module, 0.0)
    value = float(getattr(pair.modules[module], measure))
    return value - 1 if measure == "interference" else value


def _distance(pair: Pair, module: str, measure: str) -> float:
    """The distance from what chance gives in this module."""
    chance = MEASURES[measure].chance
    if chance is None:
        chance = 1 / len(pair.modules) if measure == "share" else pair.flat[module]
    distance = _value(pair, module, measure) - chance
    return distance if MEASURES[measure].signed else max(0.0, distance)


def _row(module: str) -> str:
    layer = layer_of(module)
    return "other" if layer is None else str(layer)


def _column(module: str) -> str:
    """The part after the layer number, such as `self_attn.q_proj`."""
    layer = layer_of(module)
    return module if layer is None else module.partition(f".{layer}.")[2] or module
