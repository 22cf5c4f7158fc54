"""Reports whether adapters can be combined, how much they interfere, and on which evidence. Hard conflicts refuse. A
probe is measured damage: it ends `ok`, `undecided` or `warn`, and without one the verdict is `unmeasured`. Numbers from
activations or weights explain and locate. Those without a measured threshold are shown, and only a policy can make them
fail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from composer.checks.bases import names_of
from composer.checks.check import check, zero_result
from composer.conflicts.advice import Case, EvidenceKind, Explanation, SetCase, cancelling, explain, explain_set
from composer.conflicts.comparison import Compared, Layer, Rounded, compare_all, rounded_at
from composer.conflicts.evidence.activations import Activations, Directed
from composer.conflicts.evidence.interval import Interval
from composer.conflicts.evidence.outcome import Limits, Outcome
from composer.conflicts.evidence.probe import ProbeResult
from composer.conflicts.findings import (
    of_adapters,
    of_cancelling,
    of_contradictions,
    of_dropped,
    of_outcome,
    of_pair,
    of_retention,
    of_rounding,
    weak_evidence,
)
from composer.conflicts.metrics import PairMetrics, SetMetrics, rounded_for_json
from composer.conflicts.view import SCHEMA
from composer.deltas.lowrank import PairSums
from composer.deltas.tensors import torch_threads
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.findings import HARD, Finding, Severity, Verdict, next_step
from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.recipes.methods import AnySettings, effective_weights, parse_settings
from composer.formats.recipes.policy import Policy
from composer.formats.recipes.suite import Contradiction
from composer.formats.recipes.weights import Weight, weights_of
from composer.merge.rounding_loss import total
from composer.methods.combine import combine_parsed, participating, projected_off_protected, with_deltas
from composer.methods.retention import Retention, is_sum, retention_of, too_large, unknown
from composer.methods.spectral import total_loss
from composer.methods.structural import structural

MAX_ROWS = 20_000
"""Module rows in the JSON, over all pairs. Beyond this, each pair keeps the modules with the largest shares."""

_NOTHING_LEFT = 1e-9
"""A retention below this is rounding."""
_UNITS = {"probe": "nats per token", "activations": "strength beside the base's activations", "weights": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two adapters. `risk` depends on the evidence. Probe: the loss of the worse one in nats per token, within
    `interval`. Activations: how strongly one acts on the other's inputs. Weights alone: None."""

    a: str
    b: str
    verdict: Verdict
    risk: float | None
    risk_stderr: float | None
    interval: Interval | None
    evidence: EvidenceKind
    explanation: Explanation
    numbers: PairMetrics
    layers: Mapping[Layer, PairMetrics]
    modules: Mapping[str, PairMetrics]
    outcome: Outcome | None

    def to_json(self, limits: Limits, most: int = MAX_ROWS) -> dict[str, object]:
        """The pair with at most `most` modules, largest shares first if some are cut."""
        ends = (self.interval and self.interval.to_json()) or {"low": None, "high": None}
        listed = list(self.explanation.shares)[:most] if len(self.modules) > most else list(self.modules)
        return {
            "a": self.a,
            "b": self.b,
            "verdict": str(self.verdict),
            "risk": None if self.risk is None else rounded_for_json(self.risk),
            "risk_unit": _UNITS[self.evidence],
            "risk_stderr": self.risk_stderr,
            "risk_low": ends["low"],
            "risk_high": ends["high"],
            "evidence": self.evidence,
            **self.explanation.to_json(),
            **self.numbers.to_json(),
            "layers": _layer_rows(self.layers),
            "modules": [{"module": module, **self.modules[module].to_json()} for module in listed],
            "probe": self.outcome.to_json(limits) if self.outcome else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedAdapter:
    """One adapter of the set: its share of the weighted energy, what the method retains of it, and its modules."""

    name: str
    weight: Weight
    share: float
    retention: float | None
    modules: Sequence[str]

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "weight": self.weight.to_json(),
            "share": rounded_for_json(self.share),
            "retention": None if self.retention is None else rounded_for_json(self.retention),
            "modules": [{"module": module} for module in self.modules],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ConflictReport:
    """The members, every pair, the set together, and the findings as judged by the policy. The verdict is the worst
    of the pairs, of the findings, and of the whole set if it was measured. `by_default` has the findings and the
    verdict of the same numbers without the policy. `advice` is for the whole set."""

    members: tuple[ComparedAdapter, ...]
    pairs: tuple[Pair, ...]
    together: SetMetrics
    layers: Mapping[Layer, SetMetrics]
    modules: Mapping[str, SetMetrics]
    findings: tuple[Finding, ...]
    evidence: ProbeResult | Activations | None
    verdict: Verdict
    by_default: tuple[Sequence[Finding], Verdict]
    limits: Limits
    method: str
    advice: tuple[str, ...]
    kept: Retention

    @property
    def probe(self) -> ProbeResult | None:
        return self.evidence if isinstance(self.evidence, ProbeResult) else None

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, in the shape of the contract."""
        most = max(1, MAX_ROWS // max(1, len(self.pairs)))
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "adapters": [member.to_json() for member in self.members],
            "pairs": [pair.to_json(self.limits, most) for pair in self.pairs],
            "whole": {
                **self.together.to_json(),
                "shares": {member.name: rounded_for_json(member.share) for member in self.members},
                "layers": _layer_rows(self.layers),
                "modules": [{"module": module, **numbers.to_json()} for module, numbers in self.modules.items()],
                "probe": self.probe.overall.to_json(self.limits) if self.probe else None,
                "advice": list(self.advice),
                "kept": None if self.kept.of_sum is None else rounded_for_json(self.kept.of_sum),
                "kept_words": self.kept.words,
            },
            "activations": _activations_json(self.evidence),
            "findings": [finding.to_json() for finding in self.findings],
            "by_default": {
                "verdict": str(self.by_default[1]),
                "findings": [
                    finding.to_json() for finding in self.by_default[0] if finding.severity is not Severity.NOTICE
                ],
            },
        }


# All products are small. On busy cores, two threads took 9 s for 2 s of work, mostly waiting for each other.
@torch_threads(1)
def conflicts(  # noqa: PLR0913
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    method: AnySettings | None = None,
    *,
    evidence: ProbeResult | Activations | None = None,
    base: Checkpoint | None = None,
    policy: Policy | None = None,
    contradictions: Sequence[Contradiction] = (),
    base_names: Sequence[str] = (),
) -> ConflictReport:
    """Compares adapters by module, by layer and in total, from their factors. Evidence decides the risk.

    `weights` are the user's; the method's own factors are applied here. `contradictions` are those of the members'
    suites, by adapter name. `base_names` are the names of a registered base. With `base`, the deltas are compared in
    size with the base weights, from sampled rows.
    Deltas without factors are left out, and a finding names them.
    Conflicts are findings, never exceptions. Raises Mismatch only for a wrong call (no adapter, a name twice, a missing
    weight, all weights 0), and whatever `combine_parsed` raises if the method cannot combine these adapters.
    """
    names, rules = [adapter.name for adapter in adapters], policy or Policy()
    _check_names(names, len(weights))
    settings = method or parse_settings("stack")
    hard = structural(participating(adapters, weights_of(weights), settings), settings)
    if settings.replacements == "delta":
        adapters = [with_deltas(adapter) for adapter in adapters]
    blocked = any(finding.code in HARD for finding in hard)
    taking_part = adapters if blocked else projected_off_protected(adapters, weights_of(weights), settings)
    compared = compare_all(taking_part, effective_weights(weights, settings))
    rounded = rounded_at(compared, base) if base else {}
    retention, little = _retention(adapters, weights, settings, blocked=blocked)
    members = tuple(_member(compared, index, retention) for index in range(len(names)))
    by_prompts = of_contradictions(contradictions, rules)
    both = list(combinations(range(len(names)), 2))
    pairs = tuple(_pair(compared, indices, evidence, by_prompts, rules, settings.method) for indices in both)
    own_names = names_of(base.path, base.config) if base else []
    together = check(adapters, [*base_names, *own_names])
    nothing = [zero_result(settings.method, names)] if _is_zero(retention) else []
    own = of_adapters(adapters, compared, weights_of(weights))
    fixed = [*hard, *together, *nothing, *own, *of_rounding(rounded), *little]
    numbers = _Numbers(members, pairs, compared.total, fixed, contradictions, evidence)
    judged, verdict = numbers.judged(rules)
    advice = _advice(pairs, compared.total, judged, evidence, rules, settings.method)
    return ConflictReport(
        members=members,
        pairs=pairs,
        together=_together(compared.total, *rounded.values()),
        layers={layer: _together(deltas) for layer, deltas in compared.layers.items()},
        modules={
            name: _together(deltas, *filter(None, [rounded.get(name)])) for name, deltas in compared.modules.items()
        },
        findings=tuple(judged),
        evidence=evidence,
        verdict=verdict,
        by_default=numbers.judged(Policy()),
        limits=Limits.of(rules),
        method=settings.method,
        advice=tuple(dict.fromkeys(advice)),
        kept=retention,
    )


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The measured and computed numbers. `fixed` are the findings that have no threshold."""

    members: Sequence[ComparedAdapter]
    pairs: Sequence[Pair]
    total: PairSums
    fixed: Sequence[Finding]
    contradictions: Sequence[Contradiction]
    evidence: ProbeResult | Activations | None

    def judged(self, rules: Policy) -> tuple[list[Finding], Verdict]:
        """The findings and the verdict under a policy."""
        names = [member.name for member in self.members]
        findings = [
            *of_contradictions(self.contradictions, rules),
            *self.fixed,
            *of_dropped(rules),
            *weak_evidence([(pair.a, pair.b, pair.evidence) for pair in self.pairs]),
            *(
                finding
                for pair in self.pairs
                for finding in of_pair((pair.a, pair.b), pair.numbers, pair.outcome, rules)
            ),
            *of_retention({member.name: member.retention for member in self.members}, rules),
        ]
        if len(names) > 2:
            findings += of_cancelling(names, self.total.interference(), sum(self.total.shares()), rules)
            findings += of_outcome(self.evidence.overall, rules) if isinstance(self.evidence, ProbeResult) else []
        measured = [_of_evidence(self.evidence, rules, outcome) for outcome in (None, *(p.outcome for p in self.pairs))]
        return rules.judged(findings), rules.verdict(findings, Verdict.worst(measured))


def _layer_rows(layers: Mapping[Layer, PairMetrics] | Mapping[Layer, SetMetrics]) -> list[dict[str, object]]:
    return [{"tower": tower, "layer": layer, **numbers.to_json()} for (tower, layer), numbers in layers.items()]


def _advice(
    pairs: Sequence[Pair],
    total: PairSums,
    findings: Sequence[Finding],
    evidence: ProbeResult | Activations | None,
    policy: Policy,
    method: str,
) -> list[str]:
    """Advice for the whole set: first for errors and warnings that a setting or a file resolves, then for the set or,
    if that needs none, for the pairs that do not end `ok`. For two adapters, the pair is the set."""
    loud = [finding for finding in findings if finding.severity is not Severity.NOTICE]
    fixes = [f"{finding.subject}: {fix}" for finding in loud if (fix := next_step(finding.code, ""))]
    if len(pairs) == 1:
        return [*fixes, *pairs[0].explanation.advice]
    if not pairs:
        return fixes
    case = SetCase(
        members=len(total.shares()),
        contradicting=[finding.subject for finding in findings if finding.code == "same_prompts"],
        cancel=cancelling(total.interference(), sum(total.shares()), policy),
        outcome=evidence.overall if isinstance(evidence, ProbeResult) else None,
        method=method,
    )
    together = explain_set(case, Limits.of(policy))
    harmed = [pair for pair in pairs if pair.verdict not in (Verdict.OK, Verdict.UNMEASURED)]
    return [
        *fixes,
        *(together or [f"{pair.a} + {pair.b}: {line}" for pair in harmed for line in pair.explanation.advice]),
    ]


def _check_names(names: Sequence[str], weights: int) -> None:
    if not names or len(set(names)) < len(names) or len(names) != weights:
        message = f"A conflict check needs adapters with different names and one weight each, not {names}."
        raise Mismatch("conflict_members", message, subject="adapters")


def _of_evidence(evidence: ProbeResult | Activations | None, policy: Policy, pair: Outcome | None = None) -> Verdict:
    """The verdict on a pair, or on the whole set, before its findings are counted."""
    if not isinstance(evidence, ProbeResult):
        return Verdict.UNMEASURED
    outcome = pair or evidence.overall
    return Verdict.UNDECIDED if outcome.is_open(Limits.of(policy)) else Verdict.OK


def _together(compared: PairSums, *rounded: Rounded) -> SetMetrics:
    survival = total(loss.survival for loss in rounded)
    return SetMetrics(
        interference=compared.interference(), lost_share=survival.lost_share if survival.entries else None
    )


def _retention(
    adapters: Sequence[LoadedAdapter], weights: Sequence[Weight | float], settings: AnySettings, *, blocked: bool
) -> tuple[Retention, list[Finding]]:
    """The retention of the adapters by the method, and its findings, as notices: what they mean for the answers is
    measured here or not known. Not known for a fitted method, whose result depends on the examples, or for too many
    entries."""
    effective, pipeline = effective_weights(weights, settings), settings.pipeline
    dense = pipeline.space == "full" or bool(pipeline.parity)
    if blocked or pipeline.fitted or (dense and too_large(adapters)):
        return unknown(adapters, effective), []
    if is_sum(settings):  # combining them could raise, where a report has a finding
        return retention_of(adapters, weights, settings), []
    combined = combine_parsed(adapters, weights, settings)
    kept = retention_of(adapters, weights, settings, combined)
    little = kept.findings(settings.method, total_loss(combined.compressions))
    return kept, [replace(finding, severity=Severity.NOTICE) for finding in little]


def _is_zero(retention: Retention) -> bool:
    """Whether the method's result has nothing of any adapter, measured on the result."""
    shares = [member.retention for member in retention.members]
    return all(share is not None and abs(share) < _NOTHING_LEFT for share in shares)


def _member(compared: Compared, index: int, kept: Retention) -> ComparedAdapter:
    return ComparedAdapter(
        name=compared.names[index],
        weight=compared.weights[index],
        share=compared.total.shares()[index],
        retention=kept.members[index].retention,
        modules=[module for module in compared.modules if module in compared.touched[index]],
    )


def _pair(
    compared: Compared,
    indices: tuple[int, int],
    evidence: ProbeResult | Activations | None,
    by_prompts: Sequence[Finding],
    policy: Policy,
    method: str,
) -> Pair:
    a, b = (compared.names[index] for index in indices)
    total = compared.total.pick(*indices)
    picked = {module: deltas.pick(*indices) for module, deltas in compared.modules.items()}
    shared = {module: sums for module, sums in picked.items() if sums.norm(0) and sums.norm(1)}
    numbers = PairMetrics.of(total)
    outcome = evidence.pair(a, b) if isinstance(evidence, ProbeResult) else None
    directed = evidence.worse(a, b) if isinstance(evidence, Activations) else None
    contradicting = [finding for finding in by_prompts if finding.subject == f"{a} + {b}"]
    case = Case(
        names=(a, b),
        positions=(indices[0] + 1, indices[1] + 1),
        numbers=numbers,
        total=total,
        modules=shared,
        outcome=outcome,
        directed=directed,
        factored=compared.factored,
        contradict=bool(policy.judged(contradicting)),
        method=method,
    )
    kind, risk = _risk(outcome, directed)
    findings = [*contradicting, *of_pair((a, b), numbers, outcome, policy)]
    return Pair(
        a=a,
        b=b,
        verdict=policy.verdict(findings, _of_evidence(evidence, policy, outcome)),
        risk=risk,
        risk_stderr=outcome.worst.loss_stderr if outcome else None,
        interval=outcome.risk if outcome else None,
        evidence=kind,
        explanation=explain(case, policy),
        numbers=numbers,
        layers={layer: PairMetrics.of(sums.pick(*indices)) for layer, sums in compared.layers.items()},
        modules={module: PairMetrics.of(sums) for module, sums in shared.items()},
        outcome=outcome,
    )


def _risk(outcome: Outcome | None, directed: tuple[str, Directed] | None) -> tuple[EvidenceKind, float | None]:
    if outcome is not None:
        return "probe", outcome.worst.loss
    if directed is not None:
        return "activations", directed[1].intruder
    return "weights", None


def _activations_json(evidence: ProbeResult | Activations | None) -> dict[str, object] | None:
    if not isinstance(evidence, Activations):
        return None
    rows: list[dict[str, object]] = []
    for (victim, intruder), directed in evidence.directed.items():
        numbers = {name: rounded_for_json(value) for name, value in asdict(directed).items() if name != "modules"}
        modules = [{"module": module, "share": rounded_for_json(share)} for module, share in directed.modules.items()]
        rows.append({"on": victim, "of": intruder, **numbers, "modules": modules})
    return {"prompts": evidence.prompts, "directed": rows}
