"""A conflict report as headlines and tables of plain text: what to say first, and what to line up below it.

Nothing here draws: a table is a title, column names and rows of strings, for a terminal, a page or a file to lay out.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from composer.conflicts import ConflictReport, Numbers, Pair
from composer.findings import Finding, Severity
from composer.probe import Effect, Outcome, ProbeResult, SideEffect

COLUMNS = ("cosine", "input overlap", "output overlap", "norms", "dominance", "interference")
LOUDEST_FIRST = (Severity.ERROR, Severity.WARNING, Severity.NOTICE)
# A loss below this many nats a token changes a token's probability by 2 %: nothing a reader would see.
NOTICEABLE_NATS = 0.02


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` have one string for each of `columns`; `note` says how to read them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def headlines(report: ConflictReport) -> list[str]:
    """The verdict, then one sentence a pair: its risk, the evidence for it, and what it means."""
    return [f"Verdict: {report.verdict}.", *(_headline(pair) for pair in report.pairs)]


def tables(report: ConflictReport, worst_modules: int = 5) -> list[Table]:
    """The probe if there is one, the whole-model numbers, and the modules that overlap most."""
    built = [_probe_table(report.probe)] if report.probe else []
    built.append(
        Table(
            "Whole model, from the factors",
            ("pair", *COLUMNS),
            tuple((_name(pair), *_cells(pair.numbers)) for pair in report.pairs),
            "Overlap: share of one's energy in the other's span, (excess over chance). Interference: 1 independent, "
            "above 1 they add up, below 1 they cancel. These explain a risk; they do not predict one.",
        )
    )
    rows = [(_name(pair), *row) for pair in report.pairs for row in _worst_modules(pair, worst_modules)]
    if rows:
        built.append(Table("Modules that share most input directions", ("pair", "module", *COLUMNS), tuple(rows)))
    return built


def remarks(findings: Iterable[Finding]) -> list[str]:
    """One line a finding, the loudest first; a notice of the probe is left out, since its table says the same."""
    told = [one for one in findings if not (one.severity is Severity.NOTICE and one.code.startswith("probe_"))]
    told.sort(key=lambda finding: LOUDEST_FIRST.index(finding.severity))
    return [f"{finding.severity}: {finding.message}" for finding in told]


def _name(pair: Pair) -> str:
    return f"{pair.a} + {pair.b}"


def _headline(pair: Pair) -> str:
    if pair.outcome is None:
        return f"{_name(pair)}: risk {pair.risk:.2f} of 1, from weights alone (weak evidence: probe it to know)."
    worst = pair.outcome.worst
    risk = f"{_name(pair)}: risk {_with_error(worst.loss, worst.loss_stderr)} nats per token, measured"
    if worst.loss < NOTICEABLE_NATS:
        return f"{risk}: combined, both answer their own suites as well as alone."
    kept = "" if worst.kept is None else f", {max(0, worst.kept):.0%} of its gain is left"
    return f"{risk}: {worst.member} is the one that suffers{kept}."


def _cells(numbers: Numbers) -> tuple[str, ...]:
    return (
        f"{numbers.cosine:+.3f}",
        f"{numbers.input_overlap:.3f} ({numbers.input_excess:+.3f})",
        f"{numbers.output_overlap:.3f} ({numbers.output_excess:+.3f})",
        f"{numbers.norm_a:.3g} : {numbers.norm_b:.3g}",
        f"{numbers.dominance:.0%}",
        f"{numbers.interference:.3f}",
    )


def _worst_modules(pair: Pair, count: int) -> list[tuple[str, ...]]:
    ordered = sorted(pair.modules.items(), key=lambda item: -item[1].input_excess * item[1].dominance)
    return [(module, *_cells(numbers)) for module, numbers in ordered[:count]]


def _probe_table(probe: ProbeResult) -> Table:
    outcomes = [*probe.pairs, *([probe.whole] if len(probe.pairs) > 1 else [])]
    rows = [row for outcome in outcomes for row in _outcome_rows(outcome)]
    columns = ("combination", "suite", "base", "alone", "combined", "loss", "gain kept")
    note = f"Nats per token on {probe.k} examples a suite, in {probe.seconds:.0f} s; loss is combined minus alone."
    return Table("Probe", columns, tuple(rows), note)


def _outcome_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    together = " + ".join(outcome.members)
    lines: list[Effect | SideEffect] = [*outcome.effects, *outcome.guards]
    return [(together, *_line(line)) for line in lines]


def _line(line: Effect | SideEffect) -> tuple[str, ...]:
    if isinstance(line, Effect):
        loss, kept = _with_error(line.loss, line.loss_stderr), "-" if line.kept is None else f"{line.kept:.0%}"
        return (line.suite, f"{line.base:.2f}", f"{line.alone:.2f}", f"{line.combined:.2f}", loss, kept)
    rise, alone = _with_error(line.rise, line.rise_stderr), max(line.alone.values())
    return (f"{line.suite} (guard)", f"{line.base:.2f}", f"{alone:.2f}", f"{line.combined:.2f}", rise, "-")


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:+.2f}" if stderr is None else f"{value:+.2f} ± {stderr:.2f}"
