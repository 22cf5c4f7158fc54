"""Examines a set of adapters: gathers the strongest available evidence and builds the report on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from composer.conflicts.evidence.activations import MAX_PROMPTS, Activations, activations
from composer.conflicts.evidence.bench import Elsewhere
from composer.conflicts.evidence.outcome import Limits
from composer.conflicts.evidence.probe import Effort, Probed, ProbeResult, Progress, by_method, probe, weighted
from composer.conflicts.report import ConflictReport, conflicts
from composer.deltas.tensors import CPU
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import InvalidFile
from composer.evaluation.calibration import Calibration
from composer.evaluation.model import LoadedModel
from composer.findings import Severity
from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.recipes.methods import AnySettings, Regmean, effective_weights, parse_settings
from composer.formats.recipes.policy import Policy
from composer.formats.recipes.suite import MAX_TEXT_CHARS, CalibrationSet, Suite, contradicting_suites, used_in
from composer.formats.recipes.weights import Weight, weights_of
from composer.methods.combine import participating, projected_off_protected
from composer.methods.structural import structural


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The measurements that are possible. `load` returns the base when it is needed. With `k` and a suite for each
    adapter, they are probed on `k` to `most` examples, guards included, in this process or `elsewhere`. Otherwise, with
    prompts, their activations are compared. The suites' prompts are always compared. A fitted method is fitted on the
    `calibration` and probed on other examples; without a calibration it is not measured. The probe also leaves out
    examples that are
    in `searched`. `progress` counts the probe's examples. `spent_s` is the time that the probe took so far."""

    load: Callable[[], LoadedModel]
    suites: Sequence[Suite | None] = ()
    guards: Sequence[Suite] = ()
    k: int = 0
    most: int = 0
    prompts: Sequence[str] = ()
    calibration: Calibration | None = None
    searched: Sequence[CalibrationSet] = ()
    progress: Progress | None = None
    elsewhere: Elsewhere | None = None
    spent_s: float = 0.0


def examine(  # noqa: PLR0913
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    method: AnySettings | None = None,
    *,
    evidence: Evidence | None = None,
    base: Checkpoint | None = None,
    policy: Policy | None = None,
    base_names: Sequence[str] = (),
) -> ConflictReport:
    """The conflict report on the strongest available evidence: a probe, activations, or weights alone.

    `base_names` are the names of a registered base. Adapters that cannot be combined at all are not measured. Raises
    what `conflicts`, `probe` and `activations` do.
    """
    how, rules, measured = method or parse_settings("stack"), policy or Policy(), None
    if evidence is not None and len(adapters) > 1:
        parts = participating(adapters, weights_of(weights), how)
        if not any(finding.severity is Severity.ERROR for finding in structural(parts, how)):
            measured = _measured(adapters, weights, how, evidence, rules)
    names = [adapter.name for adapter in adapters]
    suites = dict(zip(names, evidence.suites, strict=False)) if evidence is not None else {}
    contradictions = contradicting_suites({name: suite for name, suite in suites.items() if suite is not None})
    return conflicts(
        adapters,
        weights,
        how,
        evidence=measured,
        base=base,
        policy=rules,
        contradictions=contradictions,
        base_names=base_names,
    )


def parse_prompts(text: str, subject: str = "prompts") -> list[str]:
    """The prompts, one per line; empty lines are ignored. Raises InvalidFile for no prompts, more than MAX_PROMPTS, or
    one longer than MAX_TEXT_CHARS."""
    prompts = [line for line in text.splitlines() if line.strip()]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        message = f"{subject} has {len(prompts)} prompts; 1 to {MAX_PROMPTS} are allowed, one per line."
        raise InvalidFile("bad_prompts", message, subject=subject)
    if (longest := max(map(len, prompts))) > MAX_TEXT_CHARS:
        message = f"{subject} has a prompt of {longest:,} characters; at most {MAX_TEXT_CHARS:,} are allowed."
        raise InvalidFile("bad_prompts", message, subject=subject, next_step="Write shorter prompts, one per line.")
    return prompts


def _measured(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    how: AnySettings,
    evidence: Evidence,
    policy: Policy,
) -> ProbeResult | Activations | None:
    suites = [suite for suite in evidence.suites if suite is not None]
    given = list(zip(adapters, weights, strict=True))
    if evidence.k and len(suites) == len(adapters):
        members = [
            Probed(adapter.name, adapter.deltas, weight, suite)
            for (adapter, weight), suite in zip(given, suites, strict=True)
        ]
        if isinstance(how, Regmean) and evidence.calibration is None:
            return None
        effort = Effort(evidence.k, max(evidence.k, evidence.most), Limits.of(policy))
        device = evidence.load().device if evidence.elsewhere is None else CPU  # remote runners combine there
        combine = by_method(adapters, how, evidence.calibration, device)
        fit = evidence.calibration
        sets = [*evidence.searched, *((*fit.sets, *fit.guards) if fit else ())]
        used_examples = used_in(sets, [*suites, *evidence.guards])
        counted = (used_examples, evidence.progress, evidence.elsewhere)
        probed = probe(evidence.load, members, evidence.guards, effort, combine, *counted)
        return replace(probed, seconds=evidence.spent_s + probed.seconds)
    if evidence.prompts:
        own = effective_weights(weights, how)
        taking_part = projected_off_protected(adapters, weights_of(weights), how, evidence.load().device)
        alone = {
            adapter.name: weighted(adapter.deltas, weight) for adapter, weight in zip(taking_part, own, strict=True)
        }
        return activations(evidence.load(), alone, evidence.prompts)
    return None
