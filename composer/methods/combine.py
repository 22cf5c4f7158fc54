"""Composition methods: combine the deltas of several adapters into one list of deltas, slot by slot.

A slot is a checkpoint tensor, or one expert's rows of it. Names and settings are in formats/recipes/methods.py. The
steps of the pipeline calibrate -> space -> sparsify -> combine -> compress have their own files in this folder.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from composer.checks.check import zero_result
from composer.deltas.delta import Additive, Delta, LowRank, Replacement, RowwiseDelta, names_of, spilled
from composer.deltas.stored import SpillFile
from composer.deltas.tensors import CPU, torch_threads, workers_on
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.findings import Finding, refuse_errors, zero_deltas
from composer.formats.adapters.facts import WEIGHTS_FILE
from composer.formats.checkpoints.hashing import hash_file
from composer.formats.recipes.methods import (
    AnySettings,
    Combined,
    Compressed,
    Magnitude,
    MethodSettings,
    PeftCombination,
    Regmean,
    Tied,
    parse_settings,
)
from composer.formats.recipes.weights import Weight, divisor, weights_of
from composer.methods.effect import Tally, adds_nothing
from composer.methods.parity import Parity
from composer.methods.pipeline import Selections, SlotDelta, WeightSlot, combine_slot, computes, prepared
from composer.methods.protect import TOGETHER, drop_pages_of, project_out_protected
from composer.methods.regmean import Fit, FitReport, Observe, fit
from composer.methods.spectral import Compression, decomposing
from composer.methods.structural import for_head, heads_alike, is_tied_duplicate, on_own_head, resolve_tied, structural

Result = tuple[list[Additive], Compression | None]


@dataclass(frozen=True, slots=True)
class CombinedDeltas:
    """The deltas to add, and the loss for each compressed module. `findings` are those of `structural` that are not
    errors. `tied` is the resolved setting: with `untie`, the head's deltas address the head's own tensor; a head's
    delta that is also the embedding's is its twin."""

    deltas: list[Delta]
    compressions: list[Compression]
    findings: list[Finding]
    tied: Tied
    fit: FitReport | None = None


def combine_deltas(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    method: str = "stack",
    settings: Mapping[str, object] | None = None,
    observe: Observe | None = None,
    device: torch.device = CPU,
) -> CombinedDeltas:
    """Combines the deltas of all adapters by the method of that name. Raises what `combine_parsed` raises, and
    NotSupported for an unknown method or setting."""
    return combine_parsed(adapters, weights, parse_settings(method, settings), observe, device)


def combine_parsed(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    settings: AnySettings,
    observe: Observe | None = None,
    device: torch.device = CPU,
) -> CombinedDeltas:
    """Combines the deltas of all adapters by the method; replacements are copied.

    Factors are computed on `device`, and kept on the CPU or on disk. A method that decides about single entries
    computes them later, on the device of the weight that they are added to. An untied head's delta addresses its own
    tensor (`<module>.weight`). `observe` gives a fitted method the modules' inputs on each adapter's examples.

    Raises Mismatch for a hard conflict, for a weight that scales a replacement, and for a fitted method without
    `observe`. Raises NotSupported if the method needs factors that are missing.
    """
    given = weights_of(weights)
    if len(adapters) != len(given) or not adapters:
        raise Mismatch("weights", f"There are {len(adapters)} adapters but {len(given)} weights.", subject="weights")
    loaded = participating(adapters, given, settings)
    tied = resolve_tied(loaded, settings)
    settings = settings.with_tied(tied)
    findings = structural(loaded, settings)
    refuse_errors("These adapters cannot be combined", findings)
    findings += _left_out(adapters, loaded)
    loaded = project_out_protected(loaded, given, settings, device)
    fitted = None
    if isinstance(settings, Regmean):
        fitted = _fitted(loaded, given, settings, observe, device)
        loaded, given = fitted.adapters, [Weight()] * len(given)
    heads = {} if settings.pipeline.parity else heads_alike(loaded)  # PEFT combines each side separately
    replaced, slots = _slots(loaded, given, settings, heads)
    tally, names = Tally(settings.factor), [adapter.name for adapter in loaded]
    if isinstance(settings, PeftCombination):
        made = _like_peft(loaded, slots, settings, tally, device)
        deltas = [*replaced, *(delta for delta, _ in made)]
        findings += [*tally.findings(names), *_of_result(settings.method, deltas, loaded)]
        return CombinedDeltas(deltas, [lost for _, lost in made if lost is not None], findings, tied)
    with torch_threads(1), ThreadPoolExecutor(workers_on(device), "combine") as pool:
        if isinstance(settings, Magnitude) and settings.scope == "model":  # otherwise prepared in turn and released
            slots = list(pool.map(lambda slot: prepared(slot.to(device), settings).to(CPU), slots))
        selections = Selections.over(slots, settings, device)
        spill, results = SpillFile(), list[Result]()
        for begin in range(0, len(slots), TOGETHER):
            own = slots[begin : begin + TOGETHER]
            finished = list(pool.map(lambda slot: _run(slot, settings, selections, tally, device), own))
            results += _spill_results(spill, own, finished)
    compressions = [compression for _, compression in results if compression is not None]
    deltas = [*replaced, *(delta for own, _ in results for delta in own)]
    if tied == "untie":
        deltas += [for_head(delta, heads[delta.weight]) for delta in deltas if delta.weight in heads]
    findings += [*tally.findings(names), *_of_result(settings.method, deltas, loaded)]
    return CombinedDeltas(deltas, compressions, findings, tied, fitted.report if fitted else None)


def _of_result(method: str, deltas: Sequence[Delta], loaded: Sequence[LoadedAdapter]) -> list[Finding]:
    return [zero_result(method, [adapter.name for adapter in loaded])] if adds_nothing(deltas) else []


def _fitted(
    loaded: Sequence[LoadedAdapter],
    weights: Sequence[Weight],
    settings: Regmean,
    observe: Observe | None,
    device: torch.device,
) -> Fit:
    if observe is None:
        message = "regmean is fitted on each adapter's examples, and there are none."
        next_step = "Give the base and, for each adapter, a suite or prompts."
        raise Mismatch("needs_examples", message, subject="regmean", next_step=next_step)
    for adapter, weight in zip(loaded, weights, strict=True):
        for delta in (replacement for replacement in adapter.deltas if isinstance(replacement, Replacement)):
            _refuse_scaled(adapter.name, delta, settings.factor * weight.of(*names_of(delta)))
    return fit(loaded, weights, settings, observe, device)


def participating(
    adapters: Sequence[LoadedAdapter], weights: Sequence[Weight], settings: MethodSettings
) -> list[LoadedAdapter]:
    """The adapters with their nonzero deltas. Raises Mismatch for requests that cannot have an effect."""
    _refuse_idle(adapters, weights, settings)
    loaded = [with_deltas(adapter) for adapter in adapters] if settings.replacements == "delta" else adapters
    kept = [without_zero_weights(adapter, weight) for adapter, weight in zip(loaded, weights, strict=True)]
    if not any(len(adapter.deltas) for adapter in kept):
        message = "Every weight is 0: nothing would be added."
        raise Mismatch("nothing_added", message, subject="weights")
    return kept


def _left_out(adapters: Sequence[LoadedAdapter], participating: Sequence[LoadedAdapter]) -> list[Finding]:
    """Findings for adapters whose weights are all 0."""
    idle = [
        adapter for adapter, left in zip(adapters, participating, strict=True) if adapter.deltas and not left.deltas
    ]
    modules = [(adapter.name, {delta.module for delta in adapter.deltas}) for adapter in idle]
    return [finding for name, touched in modules for finding in zero_deltas(name, touched, len(touched))]


def projected_off_protected(
    adapters: Sequence[LoadedAdapter], weights: Sequence[Weight], settings: MethodSettings, device: torch.device = CPU
) -> list[LoadedAdapter]:
    """The adapters projected off the protected ones, as for a combination; deltas with weight 0 remain. Raises what
    `participating` and `project_out_protected` raise."""
    tied = resolve_tied(participating(adapters, weights, settings), settings)
    return project_out_protected(adapters, weights, settings.with_tied(tied), device)


def _run(slot: WeightSlot, settings: Compressed, selections: Selections, tally: Tally, device: torch.device) -> Result:
    with decomposing(slot.module):
        slot = slot.to(device) if computes(settings) else slot
        tally.see(slot.parts)
        slot = prepared(slot, settings)
        tally.see_prepared(slot, settings)
        return combine_slot(slot, settings, selections)


def _spill_results(spill: SpillFile, slots: Sequence[WeightSlot], results: Sequence[Result]) -> list[Result]:
    """Spills the results' own factors to disk and drops the pages of the inputs, so that neither occupies memory,
    however many slots there are."""
    made = [delta for deltas, _ in results for delta in deltas if isinstance(delta, LowRank) and not delta.stored]
    by_identity = dict(zip(map(id, made), spilled(spill, made), strict=True))
    drop_pages_of([part.delta for slot in slots for part in slot.parts])
    return [([by_identity.get(id(delta), delta) for delta in deltas], lost) for deltas, lost in results]


def _refuse_idle(adapters: Sequence[LoadedAdapter], weights: Sequence[Weight], settings: MethodSettings) -> None:
    """Refuses requests that have no effect, which are mistakes: a rule that no module matches, the number of an input
    that does not exist."""
    for position in settings.protect if isinstance(settings, Combined) else ():
        if position > len(adapters):
            message = f"protect names input {position}, but there are {len(adapters)}."
            raise Mismatch("protect_unknown", message, subject="protect")
        adapter, weight = adapters[position - 1], weights[position - 1]
        if not (any(weight.of(*names_of(delta)) for delta in adapter.deltas) if weight.rules else weight.value):
            message = f"protect names {adapter.name}, whose weight is 0, so nothing is protected."
            next_step = "Leave it out of protect, or give it a weight."
            raise Mismatch("protect_idle", message, subject="protect", next_step=next_step)
    for adapter, weight in zip(adapters, weights, strict=True):
        names = {name for delta in adapter.deltas for name in names_of(delta)} if weight.rules else set[str]()
        for rule in weight.rules:
            if not any(map(rule.holds, names)):
                message = f"The rule {rule.to_json()} matches no module of {adapter.name}."
                raise Mismatch("rule_unused", message, subject=adapter.name, next_step="List its modules: inspect.")
            if towers := rule.towers(delta.module for delta in adapter.deltas):
                layers, modules = rule.to_json().get("layers"), rule.modules or ""
                message = f"The rule {rule.to_json()} matches layers of {' and of '.join(towers)} in {adapter.name}."
                one, each = f"{layers}/{towers[0]}.*{modules}", f"{layers}/*{modules}"
                next_step = f"Name one: --rule N:{one}={rule.weight:g}; or all: --rule N:{each}={rule.weight:g}."
                raise Mismatch("rule_ambiguous", message, subject=adapter.name, next_step=next_step)


def without_zero_weights(adapter: LoadedAdapter, weight: Weight) -> LoadedAdapter:
    """The adapter without deltas of weight 0, as if they did not exist. The two sides of a tied weight are not twins if
    rules weight them differently."""
    if weight.value and not weight.rules:
        return adapter
    weighed = [(delta, weight.of(*names_of(delta))) for delta in adapter.deltas]
    sides: dict[str, set[float]] = defaultdict(set)
    for delta, own in weighed:
        if delta.twin:
            sides[delta.weight].add(own)
    kept = [
        replace(delta, twin=False) if delta.twin and len(sides[delta.weight]) > 1 else delta
        for delta, own in weighed
        if own
    ]
    return replace(adapter, deltas=tuple(kept))


def _slots(
    loaded: Sequence[LoadedAdapter],
    weights: Sequence[Weight],
    settings: MethodSettings,
    heads: Mapping[str, str],
) -> tuple[list[Delta], list[WeightSlot]]:
    """(replacements, slots), without those of `heads`; only deltas that equal a head's are still marked as twins."""
    parts: dict[tuple[str, int], list[SlotDelta]] = defaultdict(list)
    replaced: dict[str, Delta] = {}
    for index, (adapter, weight) in enumerate(zip(loaded, weights, strict=True)):
        digest = hash_file(adapter.path / WEIGHTS_FILE) if settings.pipeline.random else ""
        for original in adapter.deltas:
            if is_tied_duplicate(original) and (settings.tied != "untie" or original.weight in heads):
                continue
            delta = on_own_head(original) if settings.tied == "untie" else original
            delta = delta if delta.weight in heads or not delta.twin else replace(delta, twin=False)
            own = weight.of(*names_of(delta))
            if isinstance(delta, Replacement):
                divided = own / divisor(_total(weights, delta)) if settings.divides else own
                _refuse_scaled(adapter.name, delta, settings.factor * divided)
                replaced[delta.weight] = delta
            else:
                key = f"{digest}/{_own_name(delta)}/{delta.begin}"
                parts[delta.weight, delta.begin].append(SlotDelta(index, delta, own, key))
    return list(replaced.values()), [WeightSlot(own, _total(weights, own[0].delta)) for own in parts.values()]


def _own_name(delta: Additive) -> str:
    """The adapter's own name for the tensor, the same with or without a checkpoint (GPT-2's drops a prefix)."""
    if delta.stacked:
        return f"{delta.stacked.parameter}/{delta.stacked.expert}/{delta.stacked.first}"
    return f"{delta.module}.{delta.weight.rpartition('.')[2]}"


def _total(weights: Sequence[Weight], delta: Delta) -> float:
    return sum(weight.of(*names_of(delta)) for weight in weights)


def _like_peft(
    loaded: Sequence[LoadedAdapter],
    slots: Sequence[WeightSlot],
    settings: PeftCombination,
    tally: Tally,
    device: torch.device,
) -> list[tuple[LowRank, Compression | None]]:
    parity, factor = Parity.of(settings, [adapter.config for adapter in loaded]), settings.factor
    made: list[tuple[LowRank, Compression | None]] = []
    for slot in slots:
        tally.see(slot.parts)
        delta, lost = parity.combined([(part.low_rank, part.weight) for part in slot.to(device).parts])
        lost = None if lost is None else lost.times(parity.scale * factor)
        made.append((replace(delta, scale=delta.scale * factor).to(CPU), lost))
    return made


def with_deltas(adapter: LoadedAdapter) -> LoadedAdapter:
    """The adapter with fully saved tensors as differences to the base."""
    deltas = [_as_delta(delta) if isinstance(delta, Replacement) else delta for delta in adapter.deltas]
    return replace(adapter, deltas=tuple(deltas))


def _as_delta(delta: Replacement) -> RowwiseDelta:
    tensor = delta.tensor
    columns = tensor.shape[-1] if tensor.dim() > 1 else 1
    rows_MN = tensor.reshape(-1, columns)

    def rows(W_MN: torch.Tensor, begin: int) -> torch.Tensor:
        return rows_MN[begin : begin + W_MN.shape[0]].to(W_MN) - W_MN

    shape = (rows_MN.shape[0], rows_MN.shape[1])
    return RowwiseDelta(
        module=delta.module,
        weight=delta.weight,
        stored_shape=shape,
        rows=rows,
        reads_base=True,
        tied=delta.tied,
        twin=delta.twin,
    )


def _refuse_scaled(name: str, delta: Replacement, weight: float) -> None:
    if weight != 1:
        message = f"{name} saves all of {delta.weight}, which the effective weight {weight:g} cannot scale."
        next_step = (
            "Give this adapter an effective weight of 1 (after lambda and normalize), or set replacements=delta."
        )
        raise Mismatch("weighted_replacement", message, subject=delta.module, next_step=next_step)
