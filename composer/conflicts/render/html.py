"""Renders a conflict report as one self-contained HTML page: no network, no script, light and dark.

Heat maps are tables with a row per layer and a column per kind of module. The cells hold the numbers; colour only
repeats them. Radio buttons choose the measure, by CSS alone; without CSS all measures are shown.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

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
from composer.findings import Finding
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
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1d21;--soft:#5b6068;--line:#d9dce1;--card:#f6f7f9;--hot:#e8590c;
--cold:#1971c2;--ok:#2b8a3e;--warn:#b35c00;--refuse:#c92a2a}
@media(prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e9eaec;--soft:#a3a8b0;--line:#363a41;--card:#1d2024;
--hot:#d9480f;--cold:#1864ab;--ok:#69db7c;--warn:#ffc078;--refuse:#ff8787}}
*{box-sizing:border-box}body{margin:0 auto;max-width:78rem;padding:2rem 1.25rem 4rem;background:var(--paper);
color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0 0 .5rem}h2{font-size:1.2rem;margin:2.5rem 0 .5rem}h3{font-size:1rem;margin:1.5rem 0 .25rem}
p{margin:.35rem 0;max-width:60rem}.soft,caption{color:var(--soft)}
.verdict{font-weight:700}.ok{color:var(--ok)}.warn,.warning,.undecided,.unmeasured{color:var(--warn)}.refuse,.error{color:var(--refuse)}
section.pair h3{margin-top:0}
section.pair{border:1px solid var(--line);border-radius:.6rem;background:var(--card);padding:1rem 1.25rem;margin:1rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.4rem 0;white-space:nowrap}
th,td{padding:.22rem .55rem;text-align:left;border-bottom:1px solid var(--line);
white-space:nowrap}thead th{font-weight:600;vertical-align:bottom}
.map td{text-align:right;border:1px solid var(--paper)}.map th{border:0}.map td,.map tbody th{padding:.05rem .6rem}
fieldset{border:1px solid var(--line);border-radius:.6rem;margin:1rem 0;padding:.5rem 1rem}
label{margin-right:1rem;white-space:nowrap}
"""


def page(report: ConflictReport) -> str:
    """The complete page. All text from adapters, suites or users is escaped."""
    pairs = by_verdict(report)
    mapped = [pair for pair in pairs if pair.modules][:MAX_MAPS]
    scales = {measure: _scale(mapped, measure) for measure in MEASURES}
    title = f"Conflicts of {', '.join(member.name for member in report.members)}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{_text(title)}</title><style>{_STYLE}{_levels()}{_chooser()}</style></head><body><main>",
        f"<h1>{_text(title)}</h1>",
        f'<p>Verdict: <span class="verdict {report.verdict}">{report.verdict}</span></p>',
        f"<p>{_text(overall)}</p>" if (overall := overall_headline(report)) else "",
        *_findings(report.findings),
        "<h2>Pairs</h2>",
        f"<p>{_text(FROM_WEIGHTS)}</p>" if any(pair.evidence == "weights" for pair in pairs) else "",
        *_choices(bool(mapped)),
        *(line for pair in pairs for line in _pair(pair, scales if pair in mapped else {})),
        f'<p class="soft">Maps are shown for {MAX_MAPS} pairs, those with the worst verdicts.</p>'
        if len(pairs) > MAX_MAPS
        else "",
        "<h2>Numbers</h2>",
        *(line for one in _tables(report) for line in _table(one)),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


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


def _findings(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["<h2>Findings</h2>", "<p>None.</p>"]
    ordered = sorted(findings, key=lambda one: LOUDEST_FIRST.index(one.severity))
    items = [
        f'<li><strong class="{one.severity}">{one.severity}</strong> <code>{_text(one.code)}</code> '
        f"{_text(one.message)}</li>"
        for one in ordered
    ]
    return ["<h2>Findings</h2>", "<ul>", *items, "</ul>"]


def _pair(pair: Pair, scales: Mapping[str, float]) -> list[str]:
    advice = [f"<li>{_text(line)}</li>" for line in pair.explanation.advice]
    return [
        f'<section class="pair"><h3>{_text(headline(pair))}</h3>',
        f"<p>{_text(explanation(pair))}</p>",
        *(["<p>What can be done:</p><ul>", *advice, "</ul>"] if advice else []),
        *(line for measure, most in scales.items() for line in _map(pair, measure, most)),
        "</section>",
    ]


def _scale(pairs: Sequence[Pair], measure: str) -> float:
    """The distance from chance with the strongest colour, the same in all maps of a report."""
    distances = [abs(_distance(pair, module, measure)) for pair in pairs for module in pair.modules]
    return max([MEASURES[measure].least, *distances])


def _map(pair: Pair, measure: str, most: float) -> list[str]:
    """The map of one measure over the modules that both touch."""
    values = {module: _value(pair, module, measure) for module in pair.modules}
    cells = {(_row(module), _column(module)): module for module in values}
    # Modules outside the layers come last, as in the rows.
    columns = list(dict.fromkeys(_column(module) for module in sorted(values, key=lambda one: layer_of(one) is None)))
    lines = [
        f'<div class="scroll measure m-{measure}"><table class="map">',
        f"<caption>{_text(_caption(measure, most))}</caption>",
        '<thead><tr><th scope="col">layer</th>',
        *(f'<th scope="col">{_text(column)}</th>' for column in columns),
        "</tr></thead><tbody>",
    ]
    for row in sorted({_row(module) for module in values}, key=lambda row: (not row.isdecimal(), row.zfill(6))):
        lines.append(f'<tr><th scope="row">{_text(row)}</th>')
        for column in columns:
            module = cells.get((row, column))
            lines.append(
                "<td></td>"
                if module is None
                else _cell(module, values[module], _distance(pair, module, measure) / most)
            )
        lines.append("</tr>")
    return [*lines, "</tbody></table></div>"]


def _caption(measure: str, most: float) -> str:
    chance = MEASURES[measure].chance
    start = "chance" if chance is None else f"{chance:g}"
    return f"{MEASURES[measure].title}; no colour at {start}, the strongest {most:.3g} from there, in all maps"


def _cell(module: str, value: float, relative: float) -> str:
    level = round(abs(relative) * _STEPS)
    shade = f"{'h' if relative >= 0 else 'c'}{level}"
    return f'<td class="{shade}" title="{_text(module)}: {value:.4g}">{round(value, 2) + 0.0:.2f}</td>'


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


def _choices(any_map: bool) -> list[str]:
    if not any_map:
        return []
    radios = [
        f'<label><input type="radio" name="measure" id="{name}"{" checked" if number == 0 else ""}> '
        f"{_text(measure.title)}</label>"
        for number, (name, measure) in enumerate(MEASURES.items())
    ]
    return ["<fieldset><legend>What the maps show</legend>", *radios, "</fieldset>"]


def _chooser() -> str:
    """CSS that shows only the chosen measure (`:has`), on paper as on screen; the page contains all of them."""
    shown = "".join(f"body:has(#{measure}:checked) .m-{measure}{{display:block}}" for measure in MEASURES)
    return f"@supports selector(:has(*)){{.measure{{display:none}}{shown}}}"


def _levels() -> str:
    hues = (("h", "hot"), ("c", "cold"))
    return "".join(
        f".{letter}{level}{{background:color-mix(in srgb,var(--{hue}) {level * 60 // _STEPS}%,var(--paper))}}"
        for letter, hue in hues
        for level in range(_STEPS + 1)
    )


def _table(table: Table) -> list[str]:
    head = "".join(f'<th scope="col">{_text(column)}</th>' for column in table.columns)
    body = ["<tr>" + "".join(_cells(row)) + "</tr>" for row in table.rows]
    note = [f'<p class="soft">{_text(table.note)}</p>'] if table.note else []
    return [
        f"<h3>{_text(table.title)}</h3>",
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>',
        *body,
        "</tbody></table></div>",
        *note,
    ]


def _cells(row: Iterable[str]) -> list[str]:
    first, *others = row
    return [f'<th scope="row">{_text(first)}</th>', *(f"<td>{_text(value)}</td>" for value in others)]


def _text(value: str) -> str:
    return escape(value, quote=True)
