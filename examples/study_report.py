"""Make the tables and the plot of docs/methods/study.md from what study.py measured: `study_report.py [JSONL]`.

Every predictor is ranked against the measured loss by Spearman's correlation; the interval is a bootstrap over
adapters, since the pairs of one adapter are not independent of each other.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Row = Mapping[str, Any]
Floats = npt.NDArray[np.float64]
DRAWS = 2000
HALVES = 500
KEPT = Path(__file__).parent / "study.jsonl"
PLOT = Path(__file__).parents[1] / "docs" / "methods" / "study.svg"


@dataclass(frozen=True, slots=True)
class Ranked:
    """Spearman's correlation and its 95 % interval."""

    name: str
    kind: str
    rho: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rho:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def overall(name: str) -> Callable[[Row], float]:
    return lambda row: float(row["weights"]["whole"][name])


def worse(of: Callable[[Row, str, str], float]) -> Callable[[Row], float]:
    """A directed predictor as one of the pair: the larger of its two values, that of the victim who loses more."""
    return lambda row: max(of(row, row["a"], row["b"]), of(row, row["b"], row["a"]))


def _side(row: Row, name: str) -> str:
    return "a" if row["a"] == name else "b"


def norms(row: Row, victim: str, intruder: str) -> float:
    """|Δ_j| / |Δ_i|."""
    numbers = row["weights"]["whole"]
    return numbers[f"norm_{_side(row, intruder)}"] / numbers[f"norm_{_side(row, victim)}"]


def on_the_victims_inputs(row: Row, victim: str, intruder: str) -> float:
    """|Δ_j V_i V_i^T| / |Δ_i| over all modules: the intruder's effect on the victim's inputs, from weights."""
    i, j = _side(row, victim), _side(row, intruder)
    caught = sum(module[f"norm_{j}"] ** 2 * module[f"input_{j}{i}"] for module in row["weights"]["modules"])
    return (caught / row["weights"]["whole"][f"norm_{i}"] ** 2) ** 0.5


def by_late_layers(row: Row, victim: str, intruder: str) -> float:
    """The same, with every module weighted by its layer's number: late layers decide the answer."""
    i, j = _side(row, victim), _side(row, intruder)
    both = [
        (1 + _layer(module["module"]), module[f"norm_{j}"] ** 2 * module[f"input_{j}{i}"], module[f"norm_{i}"] ** 2)
        for module in row["weights"]["modules"]
    ]
    own = sum(layer * energy for layer, _, energy in both)
    return (sum(layer * caught for layer, caught, _ in both) / own) ** 0.5 if own else 0.0


def of_activations(name: str) -> Callable[[Row, str, str], float]:
    return lambda row, victim, _intruder: float(row["activations"][victim][name])


def strength(row: Row, victim: str, _intruder: str) -> float:
    """|Δ_j x| / |W x| alone, with its squares summed over modules: the intruder's effect on the victim's examples."""
    interference = row["activations"][victim]
    # In rows without `combined` this was still divided by the number of modules that either adapter touches.
    return float(interference["intruder"]) * (1.0 if "combined" in row else len(interference["modules"]) ** 0.5)


def mean_strength(row: Row, victim: str, intruder: str) -> float:
    """The same, as a mean over the modules that either adapter touches."""
    return strength(row, victim, intruder) / max(1, len(row["activations"][victim]["modules"])) ** 0.5


def in_the_way(row: Row, victim: str, _intruder: str) -> float:
    """The intruder's strength across the victim's direction, times how weak the victim itself is there."""
    interference = row["activations"][victim]
    return float(interference["across"]) * strength(row, victim, _intruder)


DIRECTED: dict[str, tuple[str, Callable[[Row, str, str], float]]] = {
    "norm ratio": ("weights", norms),
    "energy on the victim's inputs": ("weights", on_the_victims_inputs),
    "the same, late layers count more": ("weights", by_late_layers),
    "activation ratio": ("activations", of_activations("ratio")),
    "activation across": ("activations", of_activations("across")),
    "activation strength": ("activations", strength),
    "the same, a mean over modules": ("activations", mean_strength),
    "across x strength": ("activations", in_the_way),
}
DROPPED = {"c_max (Pico)": "crowding", "sign excess": "sign_excess", "sign weighted": "sign_weighted"}
"""Numbers of the kept rows that predicted nothing; reports no longer compute them, nor do rows measured since."""
PAIRED: dict[str, tuple[str, Callable[[Row], float]]] = {
    **{
        name.replace("_", " "): ("weights", overall(name))
        for name in (
            "cosine", "input_overlap", "input_excess", "output_overlap", "output_excess", "dominance", "interference",
        )
    },
    **{label: ("weights", overall(name)) for label, name in DROPPED.items()},
    "input excess x dominance": (
        "weights", lambda row: max(0.0, overall("input_excess")(row)) * overall("dominance")(row)
    ),
    **{name: (kind, worse(of)) for name, (kind, of) in DIRECTED.items()},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=KEPT)
    results = parser.parse_args().results
    if not results.is_file():
        parser.error(f"{results} does not exist: study.py writes it.")
    rows = [row for row in map(json.loads, results.read_text().splitlines()) if "a" in row]
    names = sorted({row[side] for row in rows for side in "ab"})
    methods = [*rows[0]["losses"]]
    columns = f" | {' | '.join(methods)} |\n|---|---{'|---' * len(methods)}|"
    print(f"{len(names)} adapters, {len(rows)} pairs\n")
    ranked = {method: _paired(rows, names, method) for method in methods}
    print(f"| predictor of the worse member's loss | from{columns}")
    for index, one in enumerate(ranked["sum"]):
        print(f"| {one.name} | {one.kind} | " + " | ".join(str(ranked[m][index]) for m in methods) + " |")
    print(f"\n| who is hurt (victim <- intruder) | from{columns}")
    directed = {method: _directed(rows, names, method) for method in methods}
    for index, one in enumerate(directed["sum"]):
        print(f"| {one.name} | {one.kind} | " + " | ".join(str(directed[m][index]) for m in methods) + " |")
    print()
    for line in _damage(rows):
        print(line)
    print("\nThe weight statistic that ranks best on half of the adapters, on the pairs of the other half:")
    print(", ".join(f"{method} {_on_the_other_half(rows, names, method):+.2f}" for method in methods))
    if results == KEPT:
        PLOT.write_text(_plot(sorted(ranked["sum"], key=lambda one: -one.rho)))


def _paired(rows: Sequence[Row], names: Sequence[str], method: str) -> list[Ranked]:
    loss = np.array([row["losses"][method]["worse"] for row in rows])
    pairs = [(row["a"], row["b"]) for row in rows]
    predictors = [
        _rank(name, kind, np.array([of(row) for row in rows]), loss, pairs, names)
        for name, (kind, of) in PAIRED.items()
        if name not in DROPPED or DROPPED[name] in rows[0]["weights"]["whole"]
    ]
    for k in rows[0]["losses"][method]["probe"]:
        probed = np.array([max(row["losses"][method]["probe"][k].values()) for row in rows])
        predictors.append(_rank(f"probe, k = {k}", "probe", probed, loss, pairs, names))
    return predictors


def _directed(rows: Sequence[Row], names: Sequence[str], method: str) -> list[Ranked]:
    both = [(row, one, other) for row in rows for one, other in ((row["a"], row["b"]), (row["b"], row["a"]))]
    loss = np.array([row["losses"][method]["measured"][victim] for row, victim, _ in both])
    pairs = [(victim, intruder) for _, victim, intruder in both]
    predictors = [
        _rank(name, kind, np.array([of(*ends) for ends in both]), loss, pairs, names)
        for name, (kind, of) in DIRECTED.items()
    ]
    for k in rows[0]["losses"][method]["probe"]:
        probed = np.array([row["losses"][method]["probe"][k][victim] for row, victim, _ in both])
        predictors.append(_rank(f"probe, k = {k}", "probe", probed, loss, pairs, names))
    return predictors


def _rank(
    name: str, kind: str, values: Floats, loss: Floats, pairs: Sequence[tuple[str, str]], names: Sequence[str]
) -> Ranked:
    """Correlation with a bootstrap interval over adapters. A pair counts as often as both of its adapters were drawn;
    there is no pair of an adapter with itself."""
    random = np.random.default_rng(0)
    drawn: list[float] = []
    for _ in range(DRAWS):
        counts = dict.fromkeys(names, 0)
        for name_drawn in random.choice(names, len(names)):
            counts[str(name_drawn)] += 1
        times = np.array([counts[one] * counts[other] for one, other in pairs])
        if len(set(values[times > 0])) > 1:
            drawn.append(_spearman(np.repeat(values, times), np.repeat(loss, times)))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Ranked(name, kind, _spearman(values, loss), float(low), float(high))


def _spearman(one: Floats, other: Floats) -> float:
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Floats) -> Floats:
    """Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - (counts - 1) / 2) - 1)[inverse]


def _on_the_other_half(rows: Sequence[Row], names: Sequence[str], method: str) -> float:
    """Median over random halves: what a statistic chosen on one set of adapters is worth on another."""
    random = np.random.default_rng(0)
    weights = [of for kind, of in PAIRED.values() if kind == "weights"]
    values = [np.array([of(row) for row in rows]) for of in weights]
    loss = np.array([row["losses"][method]["worse"] for row in rows])
    ranks: list[float] = []
    for _ in range(HALVES):
        half = set(random.permutation(names)[: len(names) // 2].tolist())
        inside = np.array([row["a"] in half and row["b"] in half for row in rows])
        outside = np.array([row["a"] not in half and row["b"] not in half for row in rows])
        best = max(values, key=lambda one: _spearman(one[inside], loss[inside]))
        ranks.append(_spearman(best[outside], loss[outside]))
    return float(np.median(ranks))


def _damage(rows: Sequence[Row]) -> list[str]:
    """Cost of the methods: the share of a member's gain over the base that is left, and the guard's rise."""
    lines = ["| method | gain kept, mean | gain kept, worse member | guard, rise in nats |", "|---|---|---|---|"]
    for method in rows[0]["losses"]:
        kept = [[_kept(row, method, row[side]) for side in "ab"] for row in rows]
        guard = np.mean([row["losses"][method]["guard"] for row in rows])
        lines.append(
            f"| {method} | {np.mean(kept):.2f} | {np.mean([min(shares) for shares in kept]):.2f} | {guard:+.2f} |"
        )
    return lines


def _kept(row: Row, method: str, name: str) -> float:
    gain = row["base"][name] - row["alone"][name]
    return 1 - row["losses"][method]["measured"][name] / gain


def _plot(ranked: Sequence[Ranked]) -> str:
    """Bars with intervals as SVG: thirty lines save a plotting library."""
    height, left, width = 18, 250, 380
    middle = left + width / 2
    colours = {"weights": "#7a869a", "activations": "#2f7fd1", "probe": "#1b8a5a"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {height * (len(ranked) + 3)}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<line x1="{middle}" y1="8" x2="{middle}" y2="{height * (len(ranked) + 1)}" stroke="#bbb"/>',
    ]
    for index, one in enumerate(ranked):
        y = height * (index + 1)
        x = [middle + width / 2 * value for value in (one.low, one.rho, one.high)]
        parts += [
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{one.name}</text>',
            f'<line x1="{x[0]:.1f}" y1="{y}" x2="{x[2]:.1f}" y2="{y}" stroke="{colours[one.kind]}" stroke-width="2"/>',
            f'<circle cx="{x[1]:.1f}" cy="{y}" r="4" fill="{colours[one.kind]}"><title>{one}</title></circle>',
        ]
    y = height * (len(ranked) + 2)
    for value in (-1, -0.5, 0, 0.5, 1):
        parts.append(f'<text x="{middle + width / 2 * value}" y="{y - 8}" text-anchor="middle">{value}</text>')
    for index, (kind, colour) in enumerate(colours.items()):
        parts.append(f'<text x="{left + 120 * index}" y="{y + 10}" fill="{colour}">from {kind}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _layer(module: str) -> int:
    return next((int(part) for part in module.split(".") if part.isdigit()), 0)


if __name__ == "__main__":
    main()
