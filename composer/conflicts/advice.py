"""Explains the risk of a pair: its meaning, the modules that cause it, and the remedies."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Literal

from composer.conflicts.evidence.activations import Directed
from composer.conflicts.evidence.outcome import Effect, Limits, Outcome
from composer.conflicts.evidence.probe import USUAL_K, USUAL_MOST
from composer.conflicts.metrics import PairMetrics, rounded_for_json
from composer.deltas.lowrank import PairSums
from composer.findings import Verdict
from composer.formats.recipes.policy import THRESHOLDS, Policy
from composer.formats.recipes.weights import layer_of, tower_of

EvidenceKind = Literal["probe", "activations", "weights"]
FROM_WEIGHTS = (
    "Nothing was measured: weights alone give no risk. What two adapters have in common shows where they meet, but "
    "hardly predicts what will happen."
)
"""The meaning of every pair that is neither probed nor compared by activations."""
# If one kind of module holds at least this share of what two adapters have in common, leaving it out is worth a try.
_CONCENTRATED = 0.4
_LISTED = 5
MEASURE = f"Measure it: --probe {USUAL_K} (probe: {USUAL_K} in a recipe), with a suite for each."
FIND = "Find the combination that keeps most of each: --optimize (optimize: {} in a recipe)."
MEAN = "Without a measurement, take the mean: --method mean. A sum of three or more keeps far less of the worst one."
"""Over the study's eight sets a sum kept 0.43 of the worst member's gain, the mean 0.80."""
FITTED = "regmean"
_SERVE_APART = (
    "Serve them separately and name the adapter in each request, or begin the prompts of each with a phrase of its own "
    "(--optimize tries it): by these prompts no single model can give both answers."
)
_CANCEL = "They cancel: leave one of them out, or flip the sign of its weight if that is wrong."
_SUMS = ("stack", "linear")
_SHRINK = "Shrink the sum: --set lambda=0.7, or --method mean."


@dataclass(frozen=True, slots=True)
class Explanation:
    """`meaning` is one sentence. `shares` are the modules' parts of what the two have in common, largest first; they
    sum to 1. `advice` can be followed literally; adapters are numbered from 1 in the order given."""

    meaning: str
    shares: Mapping[str, float]
    advice: tuple[str, ...]

    @property
    def causes(self) -> list[tuple[str, float]]:
        """The modules with the largest shares, largest first."""
        return [(module, share) for module, share in self.shares.items() if share > 0][:_LISTED]

    def to_json(self) -> dict[str, object]:
        causes = [{"module": module, "share": rounded_for_json(share)} for module, share in self.causes]
        return {"meaning": self.meaning, "causes": causes, "advice": list(self.advice)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pair to explain: names and positions, numbers, sums over the model and over the modules that both touch, and
    the measurement: an outcome, or the worse victim and what is done to it. `factored` is as in Compared. They
    `contradict` if they require different answers to the same prompts. `method` combines them."""

    names: tuple[str, str]
    positions: tuple[int, int]
    numbers: PairMetrics
    total: PairSums
    modules: Mapping[str, PairSums]
    outcome: Outcome | None
    directed: tuple[str, Directed] | None
    factored: bool
    contradict: bool
    method: str

    def position(self, name: str) -> int:
        return self.positions[self.names.index(name)]

    def other(self, name: str) -> str:
        return self.names[1 - self.names.index(name)]


def explain(case: Case, policy: Policy) -> Explanation:
    """Explains a pair's risk: its meaning, the share of each module, and the advice."""
    shares = _shares(case)
    return Explanation(_meaning(case, policy), shares, tuple(_advice(case, policy, shares)))


def _shares(case: Case) -> dict[str, float]:
    """Each module's share. From activations: of the intruder's energy on the victim's inputs. Otherwise: of the energy
    in the other's input span beyond chance, since deltas without shared inputs are not triggered together."""
    if case.directed is not None:
        shares = {module: case.directed[1].modules.get(module, 0.0) for module in case.modules}
    else:
        shares = {module: _caught(sums, case.total) for module, sums in case.modules.items()}
    total = sum(shares.values())
    ordered = sorted(shares.items(), key=lambda one: -one[1])
    return {module: share / total if total else 0.0 for module, share in ordered}


def _caught(sums: PairSums, total: PairSums) -> float:
    shares = [
        max(0.0, float(sums.inputs[i, 1 - i] - sums.inputs_chance[i, 1 - i])) / float(total.inner[i, i]) for i in (0, 1)
    ]
    return sum(shares)


def _meaning(case: Case, policy: Policy) -> str:
    if case.outcome is not None:
        return _measured(case.outcome, policy)
    if case.directed is not None:
        victim, directed = case.directed
        return (
            f"On these prompts, {case.other(victim)} acts with a strength of {directed.intruder:.2f} relative to the "
            f"base's outputs, {directed.ratio:.2f} times {victim}'s, {directed.along:+.2f} of it in {victim}'s own "
            "direction."
        )
    return FROM_WEIGHTS


def _measured(outcome: Outcome, policy: Policy) -> str:
    worst = outcome.worst
    limit = worst.limit(Limits.of(policy))
    loss = f"{worst.member} loses {worst.loss:+.2f} nats a token on its own suite{by_weight(worst)}"
    if limit < inf:
        loss += f", where the limit is {limit:.2f}"
    sure = outcome.risk
    if sure.to_json() is None:
        return f"{loss}: one example gives no interval."
    return f"{loss}: the loss of the worse one lies between {sure.low:+.2f} and {sure.high:+.2f} (95 %)."


def by_weight(effect: Effect) -> str:
    """The part of the loss that the member's own weight causes; the others cause the rest."""
    return "" if effect.weight_loss is None else f", of which its own weight causes {effect.weight_loss:+.2f}"


def near_duplicate(numbers: PairMetrics, policy: Policy) -> bool:
    """Whether the two, with their weights, add up in one direction beyond the policy's threshold."""
    near = policy.threshold("near_duplicate")
    return near is not None and numbers.weighted_cosine >= near and numbers.interference > 1


def alike(numbers: PairMetrics) -> bool:
    """Whether they look like one task trained twice, even if a policy sets a lower threshold."""
    return numbers.weighted_cosine >= (THRESHOLDS["near_duplicate"] or 1)


def cancelling(interference: float, energy: float, policy: Policy) -> bool:
    """Whether the sum retains less energy than the policy allows. Without energy nothing can cancel."""
    least = policy.threshold("cancelling")
    return least is not None and energy > 0 and interference < least


def _advice(case: Case, policy: Policy, shares: Mapping[str, float]) -> list[str]:
    advice: list[str] = []
    numbers = case.numbers
    if case.contradict:
        advice.append(_SERVE_APART)
    if near_duplicate(numbers, policy) and alike(numbers):
        advice.append("They do the same: keep one of them, or use their mean (--method mean).")
    if cancelling(numbers.interference, numbers.dominance, policy):
        advice.append(_CANCEL)
    if case.outcome is None:
        return [*advice, *_balanced(case, policy), MEASURE]
    limits = Limits.of(policy)
    verdict = case.outcome.verdict(limits)
    if verdict is Verdict.UNDECIDED:
        advice.append(_more_examples(case.outcome, limits))
    if verdict is Verdict.WARN:
        advice += [*_balanced(case, policy), *_relief(case, case.outcome.victim(limits), limits, shares)]
    return advice


@dataclass(frozen=True, slots=True, kw_only=True)
class SetCase:
    """More than two adapters together. `contradicting` are pairs that require different answers to the same prompts.
    `outcome` is that of the set, None if it was not probed."""

    members: int
    contradicting: Sequence[str]
    cancel: bool
    outcome: Outcome | None
    method: str


def explain_set(case: SetCase, limits: Limits) -> list[str]:
    """Advice for the set as a whole."""
    advice = [f"{pair}: {_SERVE_APART}" for pair in case.contradicting]
    if case.cancel:
        advice.append(_CANCEL)
    if case.outcome is None:
        return [*advice, *of_unmeasured(case.members, case.method)]
    return [*advice, *of_outcome(case.outcome, limits, case.method)]


def of_unmeasured(members: int, method: str) -> list[str]:
    """Advice without a probe."""
    return [MEASURE, MEAN] if members > 2 and method in _SUMS else [MEASURE]


def of_outcome(outcome: Outcome, limits: Limits, method: str) -> list[str]:
    """Advice for more than two adapters together, which may fail although each pair is fine."""
    verdict = outcome.verdict(limits)
    if verdict is Verdict.UNDECIDED:
        return [_more_examples(outcome, limits)]
    return [*_fit(method), FIND, _SHRINK] if verdict is Verdict.WARN else []


def _fit(method: str) -> list[str]:
    return [] if method == FITTED else [f"Fit the combination on the members' own examples: --method {FITTED}."]


def _more_examples(outcome: Outcome, limits: Limits) -> str:
    """The way to get more examples for an open question: some suites have no more."""
    undecided = [
        effect for effect in (*outcome.effects, *outcome.guards) if effect.verdict(limits) is Verdict.UNDECIDED
    ]
    exhausted = [effect for effect in undecided if effect.examples < outcome.k]
    if exhausted:
        first = exhausted[0]
        return f"Undecided: add examples to {first.suite}, which has only {first.examples}, and measure again."
    if outcome.k < USUAL_K:
        return f"Undecided: measure more examples (--probe {USUAL_K})."
    most = 2 * max(outcome.k, USUAL_MOST // 2)
    return f"Undecided: measure more examples (--probe-max {most}), if {undecided[0].suite} has them."


def _relief(case: Case, worst: Effect, limits: Limits, shares: Mapping[str, float]) -> list[str]:
    """Remedies in the order in which they helped on real adapters, where shrinking the sum mostly did more harm. None
    is certain, so each needs another probe."""
    victim, intruder = case.position(worst.member), case.position(case.other(worst.member))
    advice = [] if case.contradict else [*_fit(case.method), FIND]
    if case.factored and worst.verdict(limits) is Verdict.WARN:
        advice.append(f"Protect {worst.member}: --set protect={victim} removes the others from its directions.")
    advice.append(f"Let fewer entries meet: --method {'knots_ties' if case.factored else 'ties'}.")
    concentrated = _concentrated(shares)
    if concentrated is not None:
        where, share, rule = concentrated
        concentration = f"{share:.0%} of what they share lies in {where}"
        advice.append(f"{concentration}: --rule {intruder}:{rule}=0 leaves {case.other(worst.member)} out there.")
    return [*advice, _SHRINK]


def _balanced(case: Case, policy: Policy) -> list[str]:
    dominant = policy.threshold("dominance")
    numbers = case.numbers
    if dominant is None or not dominant <= numbers.dominance < 1:  # 1: the other one is zero or has weight 0
        return []
    energy = case.total.weighted.diagonal()
    louder = int(energy[1] > energy[0])
    factor = float(energy[1 - louder] / energy[louder]) ** 0.5
    name, position = case.names[louder], case.positions[louder]
    return [f"{name} is louder: {factor:.2g} times its weight (number {position}) makes both equally loud."]


def _concentrated(shares: Mapping[str, float]) -> tuple[str, float, str] | None:
    """The kind of module (q_proj, …) or the third of the layers that holds most, as (words, share, rule)."""
    kinds: dict[str, float] = defaultdict(float)
    for module, share in shares.items():
        kinds[module.rpartition(".")[2]] += share
    candidates = [(kind, share, kind) for kind, share in kinds.items()] if len(kinds) > 1 else []
    candidates += _thirds(shares)
    best = max(candidates, key=lambda one: one[1], default=None)
    return best if best and best[1] >= _CONCENTRATED else None


def _thirds(shares: Mapping[str, float]) -> Sequence[tuple[str, float, str]]:
    by_layer: dict[int, float] = defaultdict(float)
    if len({tower_of(module) for module in shares} - {""}) > 1:  # layers of one number have nothing in common
        return []
    for module, share in shares.items():
        layer = layer_of(module)
        if layer is not None:
            by_layer[layer] += share
    count = max(by_layer, default=0) + 1
    if count < 3:
        return []
    cuts = [round(count * third / 3) for third in range(4)]
    return [
        (
            f"layers {begin} to {end - 1}",
            sum(share for layer, share in by_layer.items() if begin <= layer < end),
            f"{begin}-{end - 1}",
        )
        for begin, end in pairwise(cuts)
    ]
