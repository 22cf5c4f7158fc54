"""A conflict report as headlines and tables of plain text: what to say first, and what to line up below it.

Nothing here draws: a table is a title, column names and rows of strings, for a terminal, a page or a file to lay out.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from composer.conflicts import ConflictReport, Pair
from composer.conflicts.advice import FROM_WEIGHTS
from composer.conflicts.interval import Interval
from composer.conflicts.probe import NOTICEABLE_NATS, Effect, Limits, Outcome, ProbeResult, SideEffect
from composer.findings import Finding, Severity, Verdict
from composer.numbers import Numbers

COLUMNS = ("cosine", "input overlap", "output overlap", "norms", "dominance", "interference", "sign excess", "crowding")
LOUDEST_FIRST = (Severity.ERROR, Severity.WARNING, Severity.NOTICE)


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` have one string for each of `columns`; `note` says how to read them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def headlines(report: ConflictReport) -> list[str]:
    """The verdict, then one sentence for the whole set where it was measured, and one a pair."""
    whole = whole_headline(report)
    told = [f"Verdict: {report.verdict}{still_open(report)}.", *([whole] if whole else [])]
    return told + [headline(pair) for pair in report.pairs]


def still_open(report: ConflictReport) -> str:
    """What is to be said after the verdict where the probe has not decided it, and nothing else has."""
    undecided = [one for one in report.findings if one.code == "probe_open"]
    if not undecided or report.verdict is not Verdict.OK:
        return ""
    return (
        f" so far, but {len(undecided)} {'question is' if len(undecided) == 1 else 'questions are'} open (probe_open)"
    )


def whole_headline(report: ConflictReport) -> str:
    """The risk of more than two adapters together; empty where that was not measured."""
    if report.probe is None or len(report.members) < 3:
        return ""
    return _measured("All together", report.probe.whole)


def headline(pair: Pair) -> str:
    """The risk of a pair, how good the evidence for it is, and who suffers."""
    if pair.outcome is not None:
        return _measured(name(pair), pair.outcome)
    if pair.risk is None:
        return f"{name(pair)}: risk unknown; one of them has no factors to look at (probe it to know)."
    scale = "of 1, from weights" if pair.evidence == "weights" else "of the base's activations, from prompts"
    return f"{name(pair)}: risk {pair.risk:.2f} {scale} alone (weak evidence: probe it to know)."


def _measured(who: str, outcome: Outcome) -> str:
    worst = outcome.worst
    risk = f"{who}: risk {_within(worst.loss, outcome.risk)} nats per token, measured"
    lost = [effect for effect in outcome.effects if effect.silenced(Limits())]
    silenced = "".join(
        f" {effect.member} still answers {effect.still_answered} of {effect.answered} word for word." for effect in lost
    )
    if worst.loss < NOTICEABLE_NATS:
        everybody = "both" if len(outcome.effects) == 2 else "all"
        return f"{risk}: combined, {everybody} answer their own suites as well as alone.{silenced}"
    kept = "" if worst.kept is None else f", {max(0, worst.kept):.0%} of its gain is left"
    return f"{risk}: {worst.member} is the one that suffers{kept}.{silenced}"


def explanations(report: ConflictReport) -> list[str]:
    """What the risks mean, one line a pair; what is the same for all pairs is said once, before them."""
    from_weights = any(pair.evidence == "weights" for pair in report.pairs)
    told = [*([FROM_WEIGHTS] if from_weights else []), *(explanation(pair) for pair in report.pairs)]
    return [line for line in told if line]


def explanation(pair: Pair) -> str:
    """What the risk of this pair means, if that is its own, and which modules cause it."""
    own = "" if pair.evidence == "weights" else pair.explanation.meaning
    return f"{own} {causes(pair)}".strip()


def causes(pair: Pair) -> str:
    """The modules that the pair has most in common in, with their shares; empty when it has nothing in common."""
    told = ", ".join(f"{module} {share:.0%}" for module, share in pair.explanation.causes)
    return f"{name(pair)} meet most in {told}." if told else ""


def tables(report: ConflictReport, worst_modules: int = 5) -> list[Table]:
    """The probe if there is one, the whole-model numbers, and the modules that overlap most."""
    built = [probe_table(report.probe)] if report.probe else []
    built += [_members(report), _pairs(report)]
    rows = [(name(pair), *row) for pair in report.pairs for row in _worst_modules(pair, worst_modules)]
    if rows:
        built.append(Table("Modules that share most input directions", ("pair", "module", *COLUMNS), tuple(rows)))
    return built


def remarks(findings: Iterable[Finding]) -> list[str]:
    """One line a finding, the loudest first; a notice of the probe is left out, since its table says the same."""
    told = [one for one in findings if not (one.severity is Severity.NOTICE and one.code == "probe_loss")]
    told.sort(key=lambda finding: LOUDEST_FIRST.index(finding.severity))
    return [f"{finding.severity}: {finding.message}" for finding in told]


def advice(report: ConflictReport) -> list[str]:
    """What can be done, one line each, with the pair that it is for."""
    return [f"{name(pair)}: {line}" for pair in report.pairs for line in pair.explanation.advice]


def name(pair: Pair) -> str:
    return f"{pair.a} + {pair.b}"


def probe_table(probe: ProbeResult) -> Table:
    """Every suite under every combination."""
    outcomes = [*probe.pairs, *([probe.whole] if len(probe.pairs) > 1 else [])]
    rows = [row for outcome in outcomes for row in _outcome_rows(outcome)]
    columns = (
        "combination",
        "suite",
        "examples",
        "base",
        "alone",
        "combined",
        "loss (95 %)",
        "gain kept",
        "answers kept",
    )
    note = (
        f"Nats per token, in {probe.seconds:.0f} s; alone is at weight 1, and loss combined minus that, with the "
        "interval it lies in."
    )
    return Table("Probe", columns, tuple(rows), note)


def _members(report: ConflictReport) -> Table:
    rows = [
        (
            member.name,
            f"{member.weight.value:.3g}" + (" with rules" if member.weight.rules else ""),
            f"{member.share:.0%}",
            "-" if member.retention is None else f"{member.retention:.2f}",
            f"{member.size.norm:.3g}",
            f"{member.size.spectral_norm:.3g}",
            f"{member.size.stable_rank:.1f}",
            _ratio(member.size.amplification),
            _ratio(member.size.spectral_amplification),
        )
        for member in report.members
    ]
    columns = (
        "adapter",
        "weight",
        "energy",
        "retention",
        "norm",
        "spectral norm",
        "stable rank",
        "of the base",
        "top direction",
    )
    note = (
        "Retention: how much of it is in the combination (its weight, where the others leave it alone). Top direction: "
        "its strongest one beside the base's, in the worst of the modules that were looked at."
    )
    return Table("Adapters", columns, tuple(rows), note)


def _ratio(size: float | None) -> str:
    return "-" if size is None else f"{size:.3g}"


def _pairs(report: ConflictReport) -> Table:
    return Table(
        "Whole model, from the factors",
        ("pair", *COLUMNS),
        tuple((name(pair), *_cells(pair.numbers)) for pair in report.pairs),
        "Overlap: share of one's energy in the other's span, (excess over chance). Interference: 1 independent, "
        "above 1 they add up, below 1 they cancel. These explain a risk; they do not predict one.",
    )


def _cells(numbers: Numbers) -> tuple[str, ...]:
    return (
        f"{numbers.cosine:+.3f}",
        f"{numbers.input_overlap:.3f} ({numbers.input_excess:+.3f})",
        f"{numbers.output_overlap:.3f} ({numbers.output_excess:+.3f})",
        f"{numbers.norm_a:.3g} : {numbers.norm_b:.3g}",
        f"{numbers.dominance:.0%}",
        f"{numbers.interference:.3f}",
        f"{numbers.sign_excess:+.3f}",
        f"{numbers.crowding:.2f}",
    )


def _worst_modules(pair: Pair, count: int) -> list[tuple[str, ...]]:
    told = [module for module in pair.explanation.shares if module in pair.modules][:count]
    return [(module, *_cells(pair.modules[module])) for module in told]


def _outcome_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    together = " + ".join(outcome.members)
    lines: list[Effect | SideEffect] = [*outcome.effects, *outcome.guards]
    return [(together, *_line(line)) for line in lines]


def _line(line: Effect | SideEffect) -> tuple[str, ...]:
    k = str(line.examples)
    if isinstance(line, Effect):
        loss, kept = _within(line.loss, line.loss_interval), "-" if line.kept is None else f"{line.kept:.0%}"
        answers = f"{line.still_answered} of {line.answered}" if line.answered else "-"
        alone = f"{line.alone:.2f}"
        if line.alone_weighted is not None:
            alone += f" ({line.alone_weighted:.2f} at its weight)"
        return (line.suite, k, f"{line.base:.2f}", alone, f"{line.combined:.2f}", loss, kept, answers)
    rise, alone = _within(line.rise, line.rise_interval), max(line.alone.values())
    return (f"{line.suite} (guard)", k, f"{line.base:.2f}", f"{alone:.2f}", f"{line.combined:.2f}", rise, "-", "-")


def _within(value: float, sure: Interval) -> str:
    return f"{value:+.2f}" if sure.to_json() is None else f"{value:+.2f} [{sure.low:+.2f}, {sure.high:+.2f}]"
