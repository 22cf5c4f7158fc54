"""The findings of a conflict report, by code. docs/concepts/conflicts.md lists them with their thresholds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf

from composer.conflicts.advice import alike, by_weight, cancelling, near_duplicate
from composer.conflicts.comparison import Compared, Rounded, finite
from composer.conflicts.evidence.interval import Interval, needed_for
from composer.conflicts.evidence.outcome import LEAST_ANSWERED, LEAST_EXAMPLES, NOTICEABLE_NATS, Effect, Limits, Outcome
from composer.conflicts.metrics import PairMetrics
from composer.deltas.delta import NOTHING, LowRank, RowwiseDelta, names_of
from composer.deltas.variants.load import LoadedAdapter
from composer.findings import Finding, Severity, Verdict, zero_deltas
from composer.formats.recipes.policy import Policy
from composer.formats.recipes.rounding import Rounding
from composer.formats.recipes.suite import Contradiction, guard_cost
from composer.formats.recipes.weights import Weight
from composer.merge.rounding_loss import find_lost

WEAK_EVIDENCE = {
    "weights": (
        "Nothing was measured. Across recipes, weights alone hardly predict damage: the statistic that ranked best on "
        "half of the study's adapters correlates at 0.25 on the other half and at -0.12 on fresh adapters. Give each "
        "adapter a suite and probe them."
    ),
    "activations": (
        "Activations on prompts are weaker evidence than a probe: on the members' own examples, with completions, the "
        "rank correlation with the loss of the worse member was 0.79 over the study's 66 pairs and 0.48 on fresh "
        "adapters. Other prompts were not tried. Give each adapter a suite and probe them."
    ),
}
_WATCHED = {
    "input_overlap": ("input_excess", "share input directions beyond chance"),
    "output_overlap": ("output_excess", "share output directions beyond chance"),
}
"""Codes without a default threshold; only a policy sets one. Each has the pair's number and its meaning."""


def of_adapters(adapters: Sequence[LoadedAdapter], compared: Compared, weights: Sequence[Weight]) -> list[Finding]:
    """Findings about NaN or infinity, deltas that add nothing, and deltas without factors."""
    findings: list[Finding] = []
    for index, adapter in enumerate(adapters):
        pairs = [delta for delta in adapter.deltas if isinstance(delta, LowRank)]
        findings += [
            Finding(
                "not_finite", Severity.ERROR, delta.module, f"{adapter.name} has NaN or infinity in {delta.module}."
            )
            for delta in pairs
            if not finite(delta)
        ]
        findings += _zero_deltas(adapter, index, compared, weights[index])
        others = [delta.module for delta in adapter.deltas if isinstance(delta, RowwiseDelta)]
        if others:
            message = (
                f"{len(others)} deltas of {adapter.name} have no factors ({others[0]} first). Only a probe covers "
                "them; the other checks leave them out."
            )
            findings.append(Finding("not_factors", Severity.NOTICE, adapter.name, message, float(len(others))))
    return findings


def _zero_deltas(adapter: LoadedAdapter, index: int, compared: Compared, weight: Weight) -> list[Finding]:
    """Deltas that are zero, or that the method's factors make zero. Modules whose weight is 0 are ignored, since a rule
    may want that; an adapter whose weights are all 0 adds nothing."""
    own = {delta.module: weight.of(*names_of(delta)) for delta in adapter.deltas}
    touched = [module for module in compared.touched[index] if own[module]]
    if not touched:
        return zero_deltas(adapter.name, compared.touched[index], len(compared.touched[index]))
    zero = [module for module in touched if compared.modules[module].weighted[index, index] ** 0.5 < NOTHING]
    return zero_deltas(adapter.name, zero, len(touched))


def of_rounding(rounded: Mapping[str, Rounded]) -> list[Finding]:
    """Deltas that rounding loses because they are too small."""
    survivals = {module: loss.survival for module, loss in rounded.items()}
    return find_lost(survivals, {module: loss.dtype for module, loss in rounded.items()}, Rounding())


def of_retention(retained: Mapping[str, float | None], policy: Policy) -> list[Finding]:
    """Members that retain too little, if a policy sets the limit."""
    least = policy.threshold("low_retention")
    return [
        Finding("low_retention", Severity.WARNING, name, f"{share:.0%} of {name} is left in the combination.", share)
        for name, share in retained.items()
        if least is not None and share is not None and share < least
    ]


def of_dropped(policy: Policy) -> list[Finding]:
    """Findings for codes in the policy that reports no longer have."""
    message = "The policy names {}, a number that reports no longer have: it does nothing. Remove it from the policy."
    return [Finding("dropped_code", Severity.NOTICE, code, message.format(code)) for code in policy.dropped]


def weak_evidence(pairs: Iterable[tuple[str, str, str]]) -> list[Finding]:
    """One finding for each kind of weak evidence, over all pairs (a, b, kind)."""
    named: dict[str, list[str]] = {kind: [] for kind in WEAK_EVIDENCE}
    for a, b, kind in pairs:
        if kind in named:
            named[kind].append(f"{a} + {b}")
    return [
        Finding("weak_evidence", Severity.NOTICE, ", ".join(own), WEAK_EVIDENCE[kind])
        for kind, own in named.items()
        if own
    ]


def of_pair(names: tuple[str, str], numbers: PairMetrics, outcome: Outcome | None, policy: Policy) -> list[Finding]:
    """Findings from a pair's numbers and its probe."""
    (a, b), subject = names, " + ".join(names)
    findings: list[Finding] = []
    if near_duplicate(numbers, policy):
        cosine = numbers.weighted_cosine
        message = (
            f"With their weights, {a} and {b} {_direction(cosine)} (cosine {cosine:.2f}), and their sum has "
            f"{numbers.interference:.2f} times the energy of the two separately."
        )
        if alike(numbers):
            message += " They overshoot like one task trained twice: lower the weights to a mean, or keep one."
        findings.append(Finding("near_duplicate", Severity.WARNING, subject, message, cosine))
    findings += of_cancelling(names, numbers.interference, numbers.dominance, policy)
    if _threshold(policy, "dominance") <= numbers.dominance < 1:  # 1: the other one is zero or has weight 0
        message = f"One of {a} and {b} has {numbers.dominance:.0%} of the energy and may drown out the other."
        findings.append(Finding("dominance", Severity.NOTICE, subject, message, numbers.dominance))
    for code, (number, says) in _WATCHED.items():
        value = getattr(numbers, number)
        if value >= _threshold(policy, code):
            message = f"{a} and {b} {says} ({number} {value:.2f})."
            findings.append(Finding(code, Severity.WARNING, subject, message, value))
    return findings + (of_outcome(outcome, policy) if outcome else [])


def _direction(cosine: float) -> str:
    """Words that hold for any cosine, since a policy may set the threshold to any value."""
    if cosine < 0.1:
        return "are barely related"
    return "point the same way" if cosine >= 0.9 else f"point {'mostly' if cosine >= 0.5 else 'partly'} the same way"


def of_cancelling(names: Sequence[str], interference: float, energy: float, policy: Policy) -> list[Finding]:
    """A finding for weighted adapters, two or all, that cancel. `energy` is 0 if they add nothing at all."""
    if not cancelling(interference, energy, policy):
        return []
    message = (
        f"{' and '.join(names)} cancel: with their weights, their sum has {max(0.0, interference):.2f} times their "
        "separate energy, where independent adapters keep all of it. Leave one out, or correct the sign of a weight. "
        "If one is meant to be subtracted from another, let a policy ignore this."
    )
    return [Finding("cancelling", Severity.WARNING, " + ".join(names), message, interference)]


def of_contradictions(contradictions: Iterable[Contradiction], policy: Policy) -> list[Finding]:
    """Findings for members whose suites require different answers to the same prompts."""
    return [
        Finding(
            "same_prompts",
            Severity.WARNING,
            f"{contradiction.a} + {contradiction.b}",
            f"{contradiction.a} and {contradiction.b} share {contradiction.shared} prompts and require "
            f"different answers to {contradiction.different} of "
            "them: no single model serves both by these prompts, and no router can tell which is meant. Serve them "
            "separately and name the adapter in each request, or begin the prompts of each with a phrase of its own "
            "(--optimize tries it).",
            contradiction.share,
        )
        for contradiction in contradictions
        if contradiction.share >= _threshold(policy, "same_prompts")
    ]


def of_outcome(outcome: Outcome, policy: Policy) -> list[Finding]:
    """Findings of a probe: a member that loses something or too much, a guard made worse, and open questions."""
    together, limits = " + ".join(outcome.members), Limits.of(policy)
    findings = [finding for effect in outcome.effects for finding in _of_effect(together, effect, limits)]
    findings += [finding for effect in outcome.effects for finding in _open(together, effect, limits)]
    for guard in outcome.guards:
        subject, verdict = f"{together}: {guard.suite}", guard.verdict(limits)
        if verdict is Verdict.WARN:
            message = (
                f"{together} is {guard.rise:.2f} nats a token worse on {guard.suite} than its worst member alone "
                f"({guard.base:.2f} base, {max(guard.alone.values()):.2f} alone, {guard.combined:.2f} combined); "
                f"it {guard_cost(guard.combined, guard.base)}."
            )
            findings.append(Finding("probe_guard", Severity.WARNING, subject, message, guard.rise))
        if verdict is Verdict.UNDECIDED:
            message = (
                f"After {_examples(guard.examples)}, it is open whether {together} is more than {limits.guard:.2f} "
                f"nats a token worse on {guard.suite} than its worst member alone ({_so_far(guard.rise_interval)})."
            )
            findings.append(Finding("probe_open", Severity.NOTICE, subject, message, guard.rise))
    return findings


def _open(together: str, effect: Effect, limits: Limits) -> Iterator[Finding]:
    """The open question for this member, with the numbers so far: its loss, its answers, or too few examples."""
    start = f"In {together}, it is open after {_examples(effect.examples)} whether {effect.member}"
    subject, open_loss = f"{together}: {effect.member}", effect.of_loss(limits) is Verdict.UNDECIDED
    if open_loss:
        message = (
            f"{start} loses more than {effect.limit(limits):.2f} nats a token on {effect.suite} "
            f"({_so_far(effect.loss_interval)})."
        )
        yield Finding("probe_open", Severity.NOTICE, subject, message, effect.loss)
    if effect.answered and effect.has_few_answers and limits.answers and effect.of_answers(limits) is Verdict.OK:
        message = (
            f"In {together}, {effect.member} is judged by its loss alone: it answers {effect.answered} of "
            f"{_examples(effect.examples)} of {effect.suite} exactly by itself ({effect.still_answered} of them here), "
            f"and a share of answers requires {LEAST_ANSWERED}."
        )
        yield Finding("few_answers", Severity.NOTICE, subject, message, float(effect.answered))
    if effect.of_answers(limits) is Verdict.UNDECIDED:
        least = needed_for(limits.answers)
        few = f"; at least {least} exact matches are needed to decide" if least and effect.answered < least else ""
        message = (
            f"{start} retains {limits.answers:.0%} of its exact match on {effect.suite} "
            f"({effect.still_answered} of {effect.answered} so far{few})."
        )
        yield Finding("probe_open", Severity.NOTICE, subject, message, effect.answers_left)
    elif effect.verdict(limits) is Verdict.UNDECIDED and not open_loss:
        message = f"{start} is unharmed on {effect.suite}: fewer than {LEAST_EXAMPLES} examples decide nothing."
        yield Finding("probe_open", Severity.NOTICE, subject, message, effect.loss)


def _so_far(sure: Interval) -> str:
    return f"between {sure.low:.2f} and {sure.high:.2f} so far" if sure.to_json() else "no error estimate so far"


def _examples(count: int) -> str:
    return f"{count} example" if count == 1 else f"{count} examples"


def _of_effect(together: str, effect: Effect, limits: Limits) -> Iterator[Finding]:
    """Findings for noticeable losses in nats, and for lost answers."""
    subject = f"{together}: {effect.member}"
    if effect.loss_interval.low > min(NOTICEABLE_NATS, effect.limit(limits)):
        kept = (
            "it had gained nothing alone" if effect.kept is None else f"{max(0, effect.kept):.0%} of its gain is left"
        )
        message = (
            f"In {together}, {effect.member} loses {effect.loss:.2f} nats a token on {effect.suite} "
            f"({effect.alone:.2f} alone, {effect.combined:.2f} combined){by_weight(effect)}; {kept}."
        )
        severity = Severity.WARNING if effect.of_loss(limits) is Verdict.WARN else Severity.NOTICE
        yield Finding("probe_loss", severity, subject, message, effect.loss)
    if effect.of_answers(limits) is Verdict.WARN:
        sure = effect.answers_interval
        message = (
            f"In {together}, {effect.member} retains exact match on {effect.still_answered} of the {effect.answered} "
            f"examples of {effect.suite} that it answers alone ({sure.low:.0%} to {sure.high:.0%} of all)."
        )
        yield Finding("probe_answers", Severity.WARNING, subject, message, effect.answers_left)


def _threshold(policy: Policy, code: str) -> float:
    number = policy.threshold(code)
    return inf if number is None else number
