"""Growth of the cost of a merge with the number of adapters (1 to 16), their rank (4 to 128) and the size of the base
(0.1 to 2.1 billion).

Each point runs in its own process, timed without imports, next to a copy of the same checkpoint in the same round.
Writes the plot docs/methods/growth.svg.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import harness
from benchmarks.harness import Case, Sample
from benchmarks.merge import floor, once
from benchmarks.models import ADAPTERS as MADE
from benchmarks.models import Size

ADAPTERS, RANKS = (1, 2, 4, 8, 16), (4, 16, 64, 128)
SIZES = (Size(3, 1024), Size(2), Size(5), Size(11), Size(22), Size(44))
"""At the usual width the embeddings alone have 0.13 billion parameters."""
USUAL_SIZE, USUAL_RANK, USUAL_ADAPTERS = Size(11), 16, 3
PLOT = Path("docs/methods/growth.svg")
Point = tuple[float, Sequence[Sample], Sequence[Sample]]
"""(x, merges, copies)."""


def main() -> None:
    chosen = harness.options(__doc__, rounds=3)
    harness.announce("growth", "torch")
    cut = 2 if chosen.quick else 9
    with TemporaryDirectory(dir=chosen.base.parent, prefix="bench-growth-") as name:
        directory = Path(name)
        series = {
            "adapters of rank 16": _by_adapters(directory, ADAPTERS[:cut], chosen.rounds),
            "rank of 3 adapters": [_of_rank(directory, rank, chosen.rounds) for rank in RANKS[:cut]],
            "parameters of the base, billions": [_sized(directory, size, chosen.rounds) for size in SIZES[:cut]],
        }
    for title, points in series.items():
        rows = [[title, "merge, s", "times cp + fsync", "peak RSS, MB"]]
        for x, merges, copies in points:
            ratios = [one.inside_s / other.seconds for one, other in zip(merges, copies, strict=True) if one.inside_s]
            memory = [(merge.peak_rss_bytes or 0) / harness.MB for merge in merges]
            seconds = [merge.inside_s or 0.0 for merge in merges]
            rows.append([f"{x:g}", harness.spread(seconds), harness.spread(ratios), harness.spread(memory)])
        harness.table(f"By {title} ({chosen.rounds} rounds)", rows)
    if not chosen.quick:
        PLOT.write_text(plot(series))


def _by_adapters(directory: Path, counts: Sequence[int], rounds: int) -> list[Point]:
    with _made(directory, USUAL_SIZE, USUAL_RANK) as made:
        return [_point(count, made, count, rounds) for count in counts]


def _of_rank(directory: Path, rank: int, rounds: int) -> Point:
    with _made(directory, USUAL_SIZE, rank) as made:
        return _point(rank, made, USUAL_ADAPTERS, rounds)


def _sized(directory: Path, size: Size, rounds: int) -> Point:
    with _made(directory, size, USUAL_RANK) as made:
        size_bytes = sum(file.stat().st_size for file in (made / "base").glob("*.safetensors"))
        return _point(round(size_bytes / 2e9, 2), made, USUAL_ADAPTERS, rounds)


@contextmanager
def _made(directory: Path, size: Size, rank: int) -> Iterator[Path]:
    """Yields a base and its adapters, which exist for one series or point: all of them together would take 30 GB."""
    with TemporaryDirectory(dir=directory) as name:
        made = Path(name) / "made"
        given = map(str, (made, size.layers, rank, size.width))
        subprocess.run([sys.executable, "-m", "benchmarks.models", *given], check=True)
        yield made


def _point(x: float, made: Path, count: int, rounds: int) -> Point:
    """`count` adapters: copies of the three available ones, since identical files would share their memory."""
    adapters = [_copied(made / MADE[number % len(MADE)], made / f"adapter-{number}") for number in range(count)]
    out = made / "out"
    cases: dict[str, Case] = {
        "merge": once("composer", made / "base", out, adapters),
        "copy": floor(made / "base", out),
    }
    results = harness.interleave(cases, rounds)
    return x, results["merge"], results["copy"]


def _copied(adapter: Path, copy: Path) -> Path:
    """Copies by writing, as a trainer would: the kernel keeps copied files in smaller pieces of memory, which take less
    of it."""
    if not copy.exists():
        copy.mkdir()
        for file in adapter.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def plot(series: Mapping[str, Sequence[Point]]) -> str:
    """One panel per series: seconds of the merge and of the copy."""
    width, height, gap = 240, 190, 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {(width + gap) * len(series) + 20} {height + 80}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for panel, (title, points) in enumerate(series.items()):
        left, bottom = gap + panel * (width + gap), height + 20
        lines = {
            "#2f7fd1": [(x, median(merge.inside_s or 0.0 for merge in merges)) for x, merges, _ in points],
            "#7a869a": [(x, median(copy.seconds for copy in copies)) for x, _, copies in points],
        }
        most_x = max(x for x, _, _ in points)
        most_y = max(y for line in lines.values() for _, y in line)
        parts.append(f'<text x="{left + width / 2}" y="{bottom + 34}" text-anchor="middle">{title}</text>')
        parts.append(f'<text x="{left - 6}" y="{bottom - height + 14}" text-anchor="end">{most_y:.1f} s</text>')
        parts.append(f'<path d="M{left} {bottom - height} V{bottom} H{left + width}" fill="none" stroke="#bbb"/>')
        for colour, line in lines.items():
            at = [(left + width * x / most_x, bottom - (height - 20) * y / most_y) for x, y in line]
            parts.append(
                f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}" fill="none" stroke="{colour}"/>'
            )
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
        for x, _, _ in points:
            parts.append(
                f'<text x="{left + width * x / most_x:.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>'
            )
    parts.append(f'<text x="{gap}" y="{height + 76}" fill="#2f7fd1">merge, without imports</text>')
    parts.append(f'<text x="{gap + 160}" y="{height + 76}" fill="#7a869a">cp + fsync of the same checkpoint</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
