"""Drawings as SVG, coloured by classes alone: the content security policy forbids styles in attributes.

Each has a title that says what it shows, and a size, so that nothing moves while a page loads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10

from markupsafe import Markup, escape

_STEPS = 7
"""Strengths of a colour, the first next to none."""
_LABELS_PX, _ROW_GAP_PX = 72, 1
_MARKS = {
    "ok": "M3 9.5 7.5 14 15 4.5",
    "bad": "M4 4 14 14M14 4 4 14",
    "warn": "M9 3v7.5M9 14v.5",
    "none": "M4 9h10",
    "copy": "M6 6h8v9H6zM4 12V3h7",
}


def mark(kind: str) -> Markup:
    """A small sign beside a word: `ok`, `bad`, `warn`, `none` or `copy`."""
    return Markup('<svg class="mark" viewBox="0 0 18 18" aria-hidden="true"><path d="{}"/></svg>').format(_MARKS[kind])


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval, drawn in the style `kind`: base, before or now."""

    value: float
    low: float
    high: float
    kind: str


def intervals(named: str, rows: Sequence[Interval], low: float, high: float) -> Markup:
    """Values with error bars on one axis from `low` to `high`, each in a row of 9 px."""
    left, right, row_px = 6.0, 164.0, 9
    height = 4 + row_px * len(rows)

    def x(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.0
        return round(left + (right - left) * min(1.0, max(0.0, share)), 1)

    parts = [f'<line class="axis" x1="{end}" x2="{end}" y1="0" y2="{height}"/>' for end in (f"{left:g}", f"{right:g}")]
    for number, row in enumerate(rows):
        y = 6.5 + row_px * number
        parts.append(f'<line class="bar {row.kind}" x1="{x(row.low)}" x2="{x(row.high)}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot {row.kind}" cx="{x(row.value)}" cy="{y}" r="3"/>')
    said = ", ".join(f"{row.kind} {row.value:.3g}" for row in rows)
    return _svg(f"{named}: {said}; axis {low:.3g} to {high:.3g}", 170, height, "".join(parts))


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


def layer_map(named: str, cells: Mapping[tuple[str, int], float], floor: float = 0.0) -> Markup:
    """Kinds of module by layers, the stronger the larger the value. A point where there is no value.

    Hover texts are in the cells: use it for one map a page, and `strengths` for others."""
    if not cells:
        return Markup("")
    kinds = sorted({kind for kind, _ in cells})
    layers = range(max(layer for _, layer in cells) + 1)
    side = max(8, min(16, 640 // len(layers)))
    top = max(floor, *cells.values())
    parts: list[str] = []
    for row, kind in enumerate(kinds):
        y = row * (side + _ROW_GAP_PX)
        label = escape(kind)
        parts.append(f'<text x="{_LABELS_PX - 4}" y="{y + side - 3}" text-anchor="end">{label}</text>')
        for layer in layers:
            x = _LABELS_PX + layer * (side + _ROW_GAP_PX)
            value = cells.get((kind, layer))
            if value is None:
                parts.append(f'<circle class="z" cx="{x + side / 2:g}" cy="{y + side / 2:g}" r="1"/>')
                continue
            title = f"<title>layer {layer} {label}: {value:.3g}</title>"
            parts.append(
                f'<rect class="{_step(value, top)}" x="{x}" y="{y}" width="{side}" height="{side}">{title}</rect>'
            )
    height = len(kinds) * (side + _ROW_GAP_PX)
    parts += [
        f'<text x="{_LABELS_PX + layer * (side + _ROW_GAP_PX)}" y="{height + 12}">{layer}</text>'
        for layer in layers
        if layer % _every(len(layers)) == 0
    ]
    (kind, layer), strongest = max(cells.items(), key=lambda one: one[1])
    said = (
        f"{named}, {len(kinds)} kinds of module by {len(layers)} layers; most in layer {layer} {kind}: {strongest:.3g}"
    )
    width = _LABELS_PX + len(layers) * (side + _ROW_GAP_PX)
    return _svg(said, width, height + 16, "".join(parts), "map")


def key(top: float, unit: str = "") -> Markup:
    """The colours of a map from zero to `top`."""
    parts = [f'<rect class="c{step}" x="{18 * step - 18}" y="0" width="18" height="12"/>' for step in range(1, 8)]
    parts.append(f'<text x="0" y="25">0</text><text x="126" y="25" text-anchor="end">{top:.3g}{escape(unit)}</text>')
    return _svg(f"Key: no colour is 0, the strongest {top:.3g}{unit}", 128, 28, "".join(parts), "key")


def axis_end(values: Sequence[float]) -> float:
    """The end of an axis from 0 that holds all values: a number of two digits."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest <= 0:
        return 1.0
    unit = 10 ** (int(log10(largest)) - (1 if largest >= 1 else 2))
    return round((int(largest / unit) + 1) * unit, 12)


def _every(count: int) -> int:
    return 1 if count <= 12 else 5


def _step(value: float, top: float) -> str:
    return f"c{max(1, min(_STEPS, round(_STEPS * value / top)))}" if value > 0 else "z"


def _svg(title: str, width: float, height: float, content: str, kind: str = "") -> Markup:
    opened = Markup('<svg role="img" class="{}" width="{:g}" height="{:g}" viewBox="0 0 {:g} {:g}"><title>{}</title>')
    return opened.format(kind, width, height, width, height, title) + Markup(content) + Markup("</svg>")  # noqa: S704
