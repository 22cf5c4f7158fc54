"""Renders a conflict report as one self-contained HTML page: no network, no script, light and dark.

Heat maps are tables with a row per layer and a column per kind of module. The cells hold the numbers; colour only
repeats them. Radio buttons choose the measure, by CSS alone; without CSS all measures are shown. The markup is in
`templates/report.html`.
"""

from jinja2 import Environment, PackageLoader, StrictUndefined

from composer.conflicts.documents import ReportDocument
from composer.conflicts.view import MEASURES, Measure, PairMap, maps, read

MAX_MAPS = 40
"""Pairs with a heat map, worst verdicts first; all pairs are listed."""
_STEPS = 8


def page(report: ReportDocument) -> str:
    """The page of a report's JSON, also of earlier versions. All text from adapters, suites or users is escaped."""
    view, shown = read(report), {name: maps(report, name) for name in MEASURES}
    return _ENVIRONMENT.get_template("report.html").render(
        title=f"Conflicts of {', '.join(member['name'] for member in view.members)}",
        report=view,
        maps={
            name: {pair_map.name: pair_map for pair_map in of_measure.drawn[:MAX_MAPS]}
            for name, of_measure in shown.items()
        },
        tops={name: of_measure.top for name, of_measure in shown.items()},
        measures=MEASURES,
        mapped=len(shown[next(iter(MEASURES))].drawn),
        max_maps=MAX_MAPS,
        steps=_STEPS,
    )


def rows(drawn: PairMap) -> dict[str, list[tuple[str, float | None]]]:
    """The layers of a map, then modules outside all layers: kinds of module with their values, None for a missing
    module."""
    # Modules outside the layers come last, as in the rows.
    columns = dict.fromkeys(kind for kind, _ in sorted(drawn.cells, key=lambda cell: cell[1] is None))
    layers = sorted({layer for _, layer in drawn.cells}, key=lambda layer: (layer is None, layer or 0))
    return {
        "other" if layer is None else str(layer): [(kind, drawn.cells.get((kind, layer))) for kind in columns]
        for layer in layers
    }


def shade(value: float, top: float, measure: Measure) -> str:
    """The class of a value's colour: `h` above chance or `c` below, and 0 to `_STEPS`."""
    step = round((abs(value) if measure.signed else max(0.0, value)) / top * _STEPS)
    return f"{'h' if value >= 0 else 'c'}{step}"


_ENVIRONMENT = Environment(
    loader=PackageLoader("composer.conflicts.render"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters.update(rows=rows, shade=shade)  # pyright: ignore[reportUnknownMemberType]
