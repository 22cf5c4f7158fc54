"""Drawings as SVG, coloured by classes alone, because the content security policy forbids styles in attributes.

Each has a title that describes it, and a size, so that the page does not shift while it loads.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

from markupsafe import Markup, escape

from composer.conflicts.view import LossLine, cells_of
from composer.formats.recipes.weights import tower_name, tower_of
from registry.database.engine import Session
from registry.database.tables import Base
from registry.domain.catalog import bases

_STEPS = 7
"""The number of strengths of a colour; the first is barely visible."""
_LABELS_PX, _ROW_GAP_PX = 72, 1
MAX_HOVER = 300
"""The most cells that show their values on hover, which takes 28 kB."""
_MODEL_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Kinds of module in the order in which a layer runs them; a map lists other kinds below these, by name."""
Cell = tuple[str, int]
"""The kind of a module, and its layer."""
_MARKS = {
    "ok": "M3 9.5 7.5 14 15 4.5",
    "bad": "M4 4 14 14M14 4 4 14",
    "warn": "M9 3v7.5M9 14v.5",
    "none": "M4 9h10",
    "copy": "M6 6h8v9H6zM4 12V3h7",
}


def mark(kind: str) -> Markup:
    """The icon beside a word: `ok`, `bad`, `warn`, `none` or `copy`."""
    return Markup('<svg class="mark" viewBox="0 0 18 18" aria-hidden="true"><path d="{}"/></svg>').format(_MARKS[kind])


@dataclass(frozen=True, slots=True)
class IntervalBar:
    """A value with its 95 % interval, drawn in the style `kind`: base, before or now."""

    value: float
    low: float
    high: float
    kind: str


def intervals(named: str, rows: Sequence[IntervalBar], low: float, high: float) -> Markup:
    """Values with error bars on one axis from `low` to `high`, each in a row of 9 px."""
    left, right, row_px = 6.0, 164.0, 9
    height = 4 + row_px * len(rows)

    def x(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.0
        return round(left + (right - left) * min(1.0, max(0.0, share)), 1)

    parts = [f'<line class="axis" x1="{end}" x2="{end}" y1="0" y2="{height}"/>' for end in (f"{left:g}", f"{right:g}")]
    parts += _bars(rows, x)
    said = ", ".join(f"{row.kind} {row.value:.3g}" for row in rows)
    return _svg(f"{named}: {said}; axis {low:.3g} to {high:.3g}", 170, height, "".join(parts))


def against_limit(named: str, rows: Sequence[IntervalBar], limit: float, *, above: bool) -> Markup:
    """Values with error bars beside a limit, a dashed line. The zone that passes, above or below it, is shaded."""
    ends = [limit, *(end for row in rows for end in (row.low, row.high))]
    margin = 0.08 * ((max(ends) - min(ends)) or abs(limit) or 1.0)
    low, high = min(ends) - margin, max(ends) + margin
    left, right, row_px = 6.0, 164.0, 9
    height = 4 + row_px * len(rows)

    def x(value: float) -> float:
        return round(left + (right - left) * (value - low) / (high - low), 1)

    start, end = (x(limit), right) if above else (left, x(limit))
    parts = [f'<rect class="zone" x="{start:g}" y="0" width="{end - start:.1f}" height="{height}"/>']
    parts.append(f'<line class="limit" x1="{x(limit)}" x2="{x(limit)}" y1="0" y2="{height}"/>')
    parts += _bars(rows, x)
    side = "above" if above else "below"
    return _svg(f"{named}: {rows[0].value:.3g}, passes {side} {limit:.3g}", 170, height, "".join(parts))


@dataclass(frozen=True, slots=True)
class ScorePoint:
    """A version's score, and the number of its examples."""

    version: str
    score: IntervalBar
    n: int


def history(named: str, points: Sequence[ScorePoint]) -> Markup:
    """Scores with error bars over versions, lowest first. Each shows its value on hover."""
    ends = [end for point in points for end in (point.score.low, point.score.high)]
    margin = 0.06 * ((max(ends) - min(ends)) or abs(ends[0]) or 1.0)
    low, high = min(ends) - margin, max(ends) + margin
    left, right, top, bottom = 44.0, 292.0, 6.0, 76.0
    step = (right - left - 16) / max(1, len(points) - 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - low) / (high - low), 1)

    spots = [(round(left + 8 + step * number, 1), point) for number, point in enumerate(points)]
    parts = [f'<line class="axis" x1="{left:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>']
    parts += [
        f'<text x="{left - 4:g}" y="{y(end) + 4:g}" text-anchor="end">{end:.3g}</text>'
        for end in (min(ends), max(ends))
    ]
    parts.append(f'<path class="trend" d="M{"L".join(f"{x} {y(point.score.value)}" for x, point in spots)}"/>')
    for kind in dict.fromkeys(point.score.kind for point in points):
        bars = "".join(
            f"M{x} {y(point.score.low)}V{y(point.score.high)}" for x, point in spots if point.score.kind == kind
        )
        parts.append(f'<path class="bar {kind}" d="{bars}"/>')
    for x, point in spots:
        score = point.score
        said = f"{point.version}: {score.value:.3g}, 95 % {score.low:.3g} to {score.high:.3g}, n={point.n}"
        dot = f'<circle class="dot {score.kind}" cx="{x}" cy="{y(score.value)}" r="3.5">'
        parts.append(f"{dot}<title>{escape(said)}</title></circle>")
    first, last = points[0], points[-1]
    parts.append(f'<text x="{left:g}" y="90">{escape(first.version)}</text>')
    parts.append(f'<text x="{right:g}" y="90" text-anchor="end">{escape(last.version)}</text>')
    between = f"{named} from {first.version} to {last.version}: {first.score.value:.3g} to {last.score.value:.3g}"
    return _svg(between, 300, 94, "".join(parts))


def energy(shares: Mapping[int, float]) -> Markup:
    """The share of a change's energy that each rank keeps, as bars."""
    parts: list[str] = []
    for number, (rank, share) in enumerate(shares.items()):
        y = 3 + 18 * number
        parts.append(f'<text x="44" y="{y + 9}" text-anchor="end">rank {rank}</text>')
        parts.append(f'<rect class="c1" x="50" y="{y}" width="130" height="12"/>')
        parts.append(f'<rect class="c6" x="50" y="{y}" width="{130 * min(1.0, share):.1f}" height="12"/>')
        parts.append(f'<text class="ink" x="186" y="{y + 9}">{share:.1%}</text>')
    return _svg("Energy kept by rank", 230, 18 * len(shares), "".join(parts))


def layer_map(
    named: str,
    cells: Mapping[Cell, float],
    top: float = 0.0,
    frame: Collection[Cell] = (),
    *,
    hover: bool = True,
    signed: bool = False,
) -> Markup:
    """A map of kinds of module by layers: the larger the value, the stronger the colour. The strongest colour stands
    for `top`, or for the largest value if that is larger. Cells without a value show a point. If `signed`, zero has no
    colour, and negative values have a different colour from positive ones.

    `frame` are cells whose rows and columns the map also includes, so that maps side by side share them, as they share
    `top`. With `hover`, each cell shows its value. Use it for one map on a page, of at most MAX_HOVER cells: it takes a
    hundred bytes for each cell instead of ten.
    """
    if not cells:
        return Markup("")
    order = {kind: row for row, kind in enumerate(_MODEL_ORDER)}
    kinds = sorted({kind for kind, _ in (*cells, *frame)}, key=lambda kind: (order.get(kind, len(order)), kind))
    layers = max(layer for _, layer in (*cells, *frame)) + 1
    side, top = max(8, min(16, 640 // layers)), max(top, *map(abs, cells.values()))
    colours = {cell: _colour(value, top, signed=signed) for cell, value in cells.items()}
    pitch = side + _ROW_GAP_PX
    height, width = len(kinds) * pitch, _LABELS_PX + layers * pitch
    hovering = hover and len(cells) <= MAX_HOVER
    parts = [
        *(
            f'<text x="{_LABELS_PX - 4}" y="{row * pitch + side - 3}" text-anchor="end">{escape(kind)}</text>'
            for row, kind in enumerate(kinds)
        ),
        *(_hovering(cells, colours, kinds, side, signed=signed) if hovering else _in_paths(colours, kinds, side)),
        _points(cells, kinds, layers, side),
        f'<text x="{_LABELS_PX - 4}" y="{height + 12}" text-anchor="end">layer</text>',
        *(
            f'<text x="{_LABELS_PX + layer * pitch}" y="{height + 12}">{layer}</text>'
            for layer in range(0, layers, 1 if layers <= 12 else 5)
        ),
    ]
    said = f"{named}, {len(kinds)} kinds of module by {layers} layers; most in {strongest(cells, signed=signed)}"
    return _svg(said, width, height + 16, "".join(parts), "map")


def strongest(cells: Mapping[Cell, float], *, signed: bool = False) -> str:
    """The cell farthest from zero, in words: `layer 20 q_proj: +0.2`."""
    (kind, layer), value = max(cells.items(), key=lambda one: abs(one[1]))
    return f"layer {layer} {kind}: {_number(value, signed=signed)}"


def _hovering(
    cells: Mapping[Cell, float], colours: Mapping[Cell, str], kinds: Sequence[str], side: int, *, signed: bool
) -> Iterator[str]:
    for (kind, layer), value in cells.items():
        x, y = _at(kinds.index(kind), layer, side)
        title = f"<title>layer {layer} {escape(kind)}: {_number(value, signed=signed)}</title>"
        yield f'<rect class="{colours[kind, layer]}" x="{x}" y="{y}" width="{side}" height="{side}">{title}</rect>'


def _in_paths(colours: Mapping[Cell, str], kinds: Sequence[str], side: int) -> Iterator[str]:
    """The cells, in one path for each colour."""
    drawn: dict[str, list[str]] = {}
    for (kind, layer), colour in colours.items():
        x, y = _at(kinds.index(kind), layer, side)
        drawn.setdefault(colour, []).append(f"M{x} {y}h{side}v{side}h-{side}z")
    yield from (f'<path class="{colour}" d="{"".join(squares)}"/>' for colour, squares in sorted(drawn.items()))


def _points(cells: Mapping[Cell, float], kinds: Sequence[str], layers: int, side: int) -> str:
    """Points for the cells without a value, in one path."""
    absent = [(row, layer) for row, kind in enumerate(kinds) for layer in range(layers) if (kind, layer) not in cells]
    positions = (_at(row, layer, side) for row, layer in absent)
    points = "".join(f"M{x + side // 2} {y + side // 2}h1" for x, y in positions)
    return f'<path class="axis" d="{points}"/>' if points else ""


def _at(row: int, layer: int, side: int) -> tuple[int, int]:
    pitch = side + _ROW_GAP_PX
    return _LABELS_PX + layer * pitch, row * pitch


def key(top: float, unit: str = "") -> Markup:
    """The key of a map with values from zero to `top`."""
    parts = [f'<rect class="c{step}" x="{18 * step - 18}" y="0" width="18" height="12"/>' for step in range(1, 8)]
    parts.append(f'<text x="0" y="25">0</text><text x="126" y="25" text-anchor="end">{top:.3g}{escape(unit)}</text>')
    return _svg(f"Key: no colour is 0, the strongest {top:.3g}{unit}", 128, 28, "".join(parts), "key")


def signed_key(top: float) -> Markup:
    """The key of a map with values from -`top` to `top`."""
    steps = [*(f"c{step}" for step in range(_STEPS, 0, -1)), "z", *(f"h{step}" for step in range(1, _STEPS + 1))]
    parts = [
        f'<rect class="{step}" x="{14 * number}" y="0" width="14" height="12"/>' for number, step in enumerate(steps)
    ]
    width = 14 * len(steps)
    ends = (f"{_number(-top, signed=True)}", "0", f"{_number(top, signed=True)}")
    for text, x, anchor in zip(ends, (0, width / 2, width), ("start", "middle", "end"), strict=True):
        parts.append(f'<text x="{x:g}" y="25" text-anchor="{anchor}">{text}</text>')
    return _svg(f"Key: from {ends[0]} to {ends[2]}; zero has no colour", width, 28, "".join(parts), "key")


def loss(row: LossLine, axis: tuple[float, float]) -> Markup:
    """A loss with its interval, clipped to the axis, beside zero and the tolerated loss, a dashed line."""
    left, right, height, (low, high) = 6.0, 164.0, 18, axis
    kind = {"warn": "loss", "undecided": "open"}.get(row.verdict, "now")
    start, end = (row.loss if bound is None else bound for bound in (row.low, row.high))

    def x(value: float) -> float:
        return round(left + (right - left) * (min(high, max(low, value)) - low) / (high - low), 1)

    parts = [f'<line class="axis" x1="{left:g}" x2="{right:g}" y1="9" y2="9"/>']
    parts.append(f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{height}"/>')
    if row.tolerated is not None:
        parts.append(f'<line class="limit" x1="{x(row.tolerated)}" x2="{x(row.tolerated)}" y1="1" y2="17"/>')
    parts.append(f'<line class="bar {kind}" x1="{x(start)}" x2="{x(end)}" y1="9" y2="9"/>')
    parts.append(f'<circle class="dot {kind}" cx="{x(row.loss)}" cy="9" r="3.5"/>')
    tolerated = "" if row.tolerated is None else f"; {row.tolerated:.2f} is tolerated"
    said = f"{row.name} on {row.suite} loses {row.loss:+.2f}, 95 % {start:+.2f} to {end:+.2f}{tolerated}"
    return _svg(said, 170, height, "".join(parts))


def _bars(rows: Sequence[IntervalBar], x: Callable[[float], float]) -> Iterator[str]:
    for number, row in enumerate(rows):
        y = 6.5 + 9 * number
        yield f'<line class="bar {row.kind}" x1="{x(row.low)}" x2="{x(row.high)}" y1="{y}" y2="{y}"/>'
        yield f'<circle class="dot {row.kind}" cx="{x(row.value)}" cy="{y}" r="3"/>'


def axis_end(values: Sequence[float]) -> float:
    """The end of an axis that begins at 0 and includes all values, rounded up to two digits."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest <= 0:
        return 1.0
    unit = 10 ** (int(log10(largest)) - (1 if largest >= 1 else 2))
    return round((int(largest / unit) + 1) * unit, 12)


def _colour(value: float, top: float, *, signed: bool) -> str:
    """The CSS class of a value: `z` for no colour, else a strength of one of two colours."""
    if not signed:
        return f"c{max(1, min(_STEPS, round(_STEPS * value / top)))}" if value > 0 else "z"
    step = min(_STEPS, round(_STEPS * abs(value) / top)) if top else 0
    return f"{'h' if value > 0 else 'c'}{step}" if step else "z"


def _number(value: float, *, signed: bool) -> str:
    return f"{value:+.3g}" if signed else f"{value:.3g}"


def _svg(title: str, width: float, height: float, content: str, kind: str = "") -> Markup:
    opened = Markup('<svg role="img" class="{}" width="{:g}" height="{:g}" viewBox="0 0 {:g} {:g}"><title>{}</title>')
    return opened.format(kind, width, height, width, height, title) + Markup(content) + Markup("</svg>")  # noqa: S704


MAX_ROWS = 256
"""The most modules in the table on a release's page, 40 kB; a longer table has its own page."""
MAX_TENSORS, MAX_KINDS = 5_000, 40
"""The most modules of a base for which a map shows which ones are adapted: a base with many experts has more."""


def in_layers(*named: Iterable[str]) -> dict[str, Cell]:
    """Kind and layer of each module in a layer. Kinds of several towers have the tower's name, so what is drawn side
    by side is located together."""
    located = cells_of([module for modules in named for module in modules])
    return {module: (kind, layer) for module, (kind, layer) in located.items() if layer is not None}


def modules_of(spectrum: Mapping[str, Any] | None) -> list[str]:
    """The modules of a stored spectrum."""
    return [row["module"] for row in spectrum["modules"]] if spectrum else []


def cells(spectrum: Mapping[str, Any] | None, measure: str, located: Mapping[str, Cell]) -> dict[Cell, float]:
    """A measure of the modules by kind and layer, without modules outside of layers, which only the table shows."""
    rows = spectrum["modules"] if spectrum else ()
    return {cell: float(row[measure]) for row in rows if (cell := located.get(row["module"]))}


def frame_of(session: Session, base: Base) -> list[str]:
    """The matrices in a base's layers that an adapter could change; empty if there are more than a map shows."""
    if base.tensor_count > MAX_TENSORS:
        return []
    tensors = bases.architecture(session, base.digest).tensors
    matrices = [name.removesuffix(".weight") for name, spec in tensors.items() if len(spec.shape) == 2]
    located = in_layers(matrices)
    return list(located) if len({kind for kind, _ in located.values()}) <= MAX_KINDS else []


def short(module: str) -> str:
    """A module in words: `layer 20 q_proj`."""
    kind, layer = cells_of([module])[module]
    words = ("layer", str(layer), tower_name(tower_of(module)), kind)
    return module if layer is None else " ".join(filter(None, words))
