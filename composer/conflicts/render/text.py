"""Renders a conflict report as headlines and tables of plain text.

A table is a title, column names and rows of strings; terminals, pages and files do the layout.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

from composer.conflicts.advice import FROM_WEIGHTS, of_outcome, of_unmeasured
from composer.conflicts.evidence.interval import Interval
from composer.conflicts.evidence.outcome import COVERAGE, NOTICEABLE_NATS, Effect, Limits, Outcome, SideEffect
from composer.conflicts.evidence.probe import ProbeResult
from composer.conflicts.metrics import PairMetrics
from composer.conflicts.report import ConflictReport, Pair
from composer.findings import Finding, Severity, Verdict, next_step
from composer.formats.recipes.suite import guard_cost
from composer.formats.untrusted import cut

COLUMNS = ("cosine", "input overlap", "output overlap", "dominance", "interference")
AS_WELL_NATS = 0.04
"""Members answer as well as alone if no loss exceeds this at the upper end of its interval."""
LOUDEST_FIRST = (Severity.ERROR, Severity.WARNING, Severity.NOTICE)


@dataclass(frozen=True, slots=True)
class TextTable:
    """`rows` have one string per column; `note` explains how to read them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """A screenful: the verdict and its evidence, about three lines, and the advice (may be empty)."""

    headline: str
    lines: tuple[str, ...]
    fix: str

    def to_json(self) -> dict[str, object]:
        return {"headline": self.headline, "lines": list(self.lines), "fix": self.fix}


def document(report: ConflictReport) -> dict[str, Any]:
    """The report as JSON, with its summary."""
    return {**report.to_json(), "summary": summary(report).to_json()}


def summary(report: ConflictReport) -> Summary:
    """Summarizes what decides the verdict: prompts with contradicting answers, else an error, else the worst measured
    combination, else another warning."""
    # The most severe error or warning, unless the probe has one as severe.
    loud = sorted((finding for finding in report.findings if finding.severity is not Severity.NOTICE), key=_loudest)
    loudest = [finding for finding in loud if _loudest(finding) == _loudest(loud[0])]
    decisive = None if any(finding.code.startswith("probe_") for finding in loudest) else next(iter(loudest), None)
    if report.probe is None:
        headline = f"{report.verdict}"
    else:
        most = max(outcome.k for outcome in _outcomes(report))
        headline = f"{report.verdict}, measured on {_count(most, 'example')} a suite in {report.probe.seconds:.0f} s"
    if decisive is not None:
        otherwise = next((line for pair in by_verdict(report) for line in pair.explanation.advice), "")
        measured = _measured_lines(report)[1:3] if report.probe else ()
        alike = sum(finding.code == decisive.code for finding in report.findings) - 1
        message = f"{decisive.message} ({alike} more like this: --explain)" if alike else decisive.message
        return Summary(headline, (message, *measured), next_step(decisive.code, otherwise))
    if report.probe is None:
        fix = " ".join(of_unmeasured(len(report.members), report.method))
        return Summary(headline, _unmeasured_lines(report), fix)
    return Summary(headline, _measured_lines(report), next(iter(advice(report, cut_names=True)), ""))


def _outcomes(report: ConflictReport) -> list[Outcome]:
    if report.probe is None:
        return []
    return [*report.probe.pairs, *([report.probe.overall] if len(report.members) > 2 else [])]


def by_verdict(report: ConflictReport) -> list[Pair]:
    """The pairs by verdict and risk, worst first; without measurements, equal ones keep their order."""
    order = list(Verdict)
    return sorted(report.pairs, key=lambda pair: (-order.index(pair.verdict), -(pair.risk or 0.0)))


def _measured_lines(report: ConflictReport) -> tuple[str, ...]:
    limits, order = report.limits, list(Verdict)
    outcomes = _outcomes(report)
    worst = max(outcomes, key=lambda one: (order.index(one.verdict(limits)), one.worst.loss))
    together = " + ".join(cut(member, 32) for member in worst.members)
    among = f" (worst of {len(outcomes)} combinations)" if len(outcomes) > 1 else ""
    victim = worst.victim(limits)
    guards = [guard for guard in worst.guards if guard.verdict(limits) is not Verdict.OK]
    lines = (f"{together}{among}", _answers_line(victim, limits), _loss_line(victim, limits))
    if not guards:
        return lines
    guard = max(guards, key=lambda one: (order.index(one.verdict(limits)), one.rise))
    spread = _between(guard.rise_interval)
    return (
        *lines,
        f"guard {cut(guard.suite)} rises {guard.rise:.2f} nats a token{spread}, {limits.guard:.2f} allowed",
        f"guard {cut(guard.suite)} {guard_cost(guard.combined, guard.base)}",
    )


def _answers_line(effect: Effect, limits: Limits) -> str:
    name = cut(effect.member)
    if not effect.answered:
        return f"{name} alone has no exact match on {_count(effect.examples, 'example')}: its loss decides"
    share = effect.answers_interval
    kept = f"{effect.still_answered} of {effect.answered} ({share.low:.0%} to {share.high:.0%})"
    required = f", {limits.answers:.0%} required" if limits.answers else ""
    if effect.has_few_answers and effect.of_answers(limits) is Verdict.OK:
        required = ", too few to judge: its loss decides"
    return f"{name}: exact match retained on {kept}{required}"


def _loss_line(effect: Effect, limits: Limits) -> str:
    limit = effect.limit(limits)
    allowed = f", {limit:.2f} allowed" if limit < inf else ""
    return f"{cut(effect.member)} loses {effect.loss:.2f} nats a token{_between(effect.loss_interval)}{allowed}"


def _between(sure: Interval) -> str:
    return f" ({sure.low:.2f} to {sure.high:.2f})" if sure.to_json() else ""


def _unmeasured_lines(report: ConflictReport) -> tuple[str, ...]:
    pairs = report.pairs
    compared = f"{_count(len(pairs), 'pair')} compared, none probed: their combined effect is unknown"
    if pairs and pairs[0].evidence == "activations":
        worst = max(pairs, key=lambda pair: pair.risk or 0.0)
        who = f"{cut(worst.a, 30)} + {cut(worst.b, 30)}"
        return (
            compared,
            f"{who} act most on each other's prompts",
            f"strength {worst.risk or 0.0:.2f} (weak; checked only on members' own examples)",
        )
    meeting = [
        f"{cut(pair.a)} + {cut(pair.b)} meet most in {cut(module, 40)}"
        for pair in pairs[:1]
        for module, _ in pair.explanation.causes[:1]
    ]
    return (compared, "weights alone hardly predict damage across recipes", *meeting)


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def headlines(report: ConflictReport) -> list[str]:
    """The verdict, then one sentence for the whole set if it was measured, and one per pair."""
    overall = overall_headline(report)
    first = [f"Verdict: {report.verdict}.", *([overall] if overall else [])]
    return first + [headline(pair) for pair in report.pairs]


def overall_headline(report: ConflictReport) -> str:
    """The risk of more than two adapters together; empty if not measured."""
    if report.probe is None or len(report.members) < 3:
        return ""
    return _measured("All together", report.probe.overall)


def headline(pair: Pair) -> str:
    """The risk of a pair, the quality of its evidence, and which member suffers."""
    if pair.outcome is not None:
        return _measured(name(pair), pair.outcome)
    if pair.risk is None:
        return f"{name(pair)}: risk unknown; weights alone do not show it (probe to find out)."
    strength = f"strength {pair.risk:.2f} relative to the base's activations"
    return f"{name(pair)}: {strength}, from prompts alone (weak evidence)."


def _measured(who: str, outcome: Outcome) -> str:
    worst, sure = outcome.worst, outcome.risk
    risk = f"{who}: risk {_within(worst.loss, sure)} nats per token, measured"
    lost = [effect for effect in outcome.effects if effect.still_answered < effect.answered]
    silenced = "".join(
        f" {effect.member}: exact match retained on {effect.still_answered} of {effect.answered}." for effect in lost
    )
    if sure.high <= AS_WELL_NATS and not lost:
        everybody = "both" if len(outcome.effects) == 2 else "all"
        return f"{risk}: combined, {everybody} answer their own suites as well as alone."
    if worst.loss_interval.low <= NOTICEABLE_NATS:
        return f"{risk}: no certain loss on {_count(worst.examples, 'example')}.{silenced}"
    kept = "" if worst.kept is None else f", {max(0, worst.kept):.0%} of its gain is left"
    return f"{risk}: {worst.member} suffers{kept}.{silenced}"


def explanations(report: ConflictReport) -> list[str]:
    """Explains the risks, one line per pair, after the lines that hold for all pairs."""
    from_weights = any(pair.evidence == "weights" for pair in report.pairs)
    lines = [*([FROM_WEIGHTS] if from_weights else []), *(explanation(pair) for pair in report.pairs)]
    return [line for line in lines if line]


def explanation(pair: Pair) -> str:
    """Explains this pair's risk, unless all pairs share the explanation, and names the modules that cause it."""
    own = "" if pair.evidence == "weights" else pair.explanation.meaning
    return f"{own} {causes(pair)}".strip()


def causes(pair: Pair) -> str:
    """The modules where the pair has most in common, with their shares; empty if it has nothing in common."""
    modules = ", ".join(f"{module} {share:.0%}" for module, share in pair.explanation.causes)
    return f"{name(pair)} meet most in {modules}." if modules else ""


def tables(report: ConflictReport, worst_modules: int = 5) -> list[TextTable]:
    """The probe if there is one, the whole-model numbers, and the modules that overlap most."""
    built = [probe_table(report.probe)] if report.probe else []
    built += [_members(report), _pairs(report)]
    rows = [(name(pair), *row) for pair in report.pairs for row in _worst_modules(pair, worst_modules)]
    if rows:
        built.append(TextTable("Modules that share most input directions", ("pair", "module", *COLUMNS), tuple(rows)))
    return built


def remarks(findings: Iterable[Finding]) -> list[str]:
    """One line per finding, most severe first, without the probe's notices, which its table repeats."""
    shown = [
        finding for finding in findings if not (finding.severity is Severity.NOTICE and finding.code == "probe_loss")
    ]
    return [f"{finding.severity}: {finding.message}" for finding in sorted(shown, key=_loudest)]


def _loudest(finding: Finding) -> tuple[bool, int]:
    """Sort key: contradicting prompts first, since nothing else matters if no single model can serve both."""
    return finding.code != "same_prompts", LOUDEST_FIRST.index(finding.severity)


def advice(report: ConflictReport, *, cut_names: bool = False) -> list[str]:
    """The advice, one line each with its pair, worst pair first."""
    alone = cut_names and len(report.pairs) == 1
    lines: list[str] = []
    for pair in by_verdict(report):
        who = f"{cut(pair.a)} + {cut(pair.b)}" if cut_names else name(pair)
        lines += [line if alone else f"{who}: {line}" for line in pair.explanation.advice]
    if report.probe is not None and len(report.members) > 2:
        lines += [f"All together: {line}" for line in of_outcome(report.probe.overall, report.limits, report.method)]
    return lines


def name(pair: Pair) -> str:
    return f"{pair.a} + {pair.b}"


def probe_table(probe: ProbeResult) -> TextTable:
    """Every suite under every combination."""
    outcomes = [*probe.pairs, *([probe.overall] if len(probe.pairs) > 1 else [])]
    rows = [
        (" + ".join(outcome.members), *_line(line))
        for outcome in outcomes
        for line in (*outcome.effects, *outcome.guards)
    ]
    columns = (
        "combination",
        "suite",
        "examples",
        "base",
        "alone",
        "combined",
        "loss (95 %)",
        "gain kept",
        "exact match retained",
    )
    note = (
        f"Nats per token, measured in {probe.seconds:.0f} s. Alone is at weight 1; loss is combined minus alone, with "
        f"its 95 % interval. {coverage(len(outcomes))}"
    )
    return TextTable("Probe", columns, tuple(rows), note)


def coverage(combinations: int) -> str:
    """The coverage of the intervals in the study, and the effects that they are not corrected for."""
    held = " and ".join(f"{share:.2f} on {k}" for k, share in COVERAGE.items())
    note = f"On the study's pairs, both members' intervals held together with frequency {held} examples."
    if combinations > 1:
        note += f" They are not corrected for {combinations} combinations."
    return note


def _members(report: ConflictReport) -> TextTable:
    rows = [
        (
            member.name,
            f"{member.weight.value:.3g}" + (" with rules" if member.weight.rules else ""),
            f"{member.share:.0%}",
            "-" if member.retention is None else f"{member.retention:.2f}",
        )
        for member in report.members
    ]
    columns = ("adapter", "weight", "energy", "retention")
    note = "Retention: how much of the adapter is in the combination (its weight, if the others do not affect it)."
    note += f" The combination {report.kept.words}." if report.kept.words else ""
    return TextTable("Adapters", columns, tuple(rows), note)


def _pairs(report: ConflictReport) -> TextTable:
    return TextTable(
        "Whole model, from the factors",
        ("pair", *COLUMNS),
        tuple((name(pair), *_cells(pair.numbers)) for pair in report.pairs),
        "Overlap: share of one's energy in the other's span (excess over chance). Interference: 1 is independent; "
        "above 1 they add up, below 1 they cancel. These explain a risk; they do not predict one.",
    )


def _cells(numbers: PairMetrics) -> tuple[str, ...]:
    return (
        f"{numbers.cosine:+.3f}",
        f"{numbers.input_overlap:.3f} ({numbers.input_excess:+.3f})",
        f"{numbers.output_overlap:.3f} ({numbers.output_excess:+.3f})",
        f"{numbers.dominance:.0%}",
        f"{numbers.interference:.3f}",
    )


def _worst_modules(pair: Pair, count: int) -> list[tuple[str, ...]]:
    modules = [module for module in pair.explanation.shares if module in pair.modules][:count]
    return [(module, *_cells(pair.modules[module])) for module in modules]


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
