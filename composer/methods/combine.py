"""Composition methods: the deltas of several adapters become one list of deltas, place by place.

A place is a checkpoint tensor, or one expert's rows of it. Names and settings are in formats/recipes/methods.py; the
steps of the pipeline calibrate -> space -> sparsify -> combine -> compress are files beside this one.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast

import torch

from composer.deltas.delta import Additive, Delta, LowRank, Replacement, RowwiseDelta, mapped, names_of
from composer.deltas.tensors import SpillFile, torch_threads
from composer.deltas.variants.load import LoadedAdapter, refuse_errors
from composer.errors import Mismatch
from composer.findings import Finding, zero_deltas
from composer.formats.adapters.facts import WEIGHTS_FILE
from composer.formats.checkpoints.hashing import hash_file
from composer.formats.recipes.methods import PIPELINES, Pipeline, divides, parse_settings
from composer.formats.recipes.weights import Weight, divisor, weights_of
from composer.methods.effect import Tally
from composer.methods.parity import Parity
from composer.methods.pipeline import Selections, SlotDelta, WeightSlot, combine_slot, prepared
from composer.methods.protect import TOGETHER, drop_pages_of, project_out_protected
from composer.methods.regmean import Fit, FitReport, Observe, fit
from composer.methods.spectral import Compression, decomposing
from composer.methods.structural import is_tied_duplicate, resolve_tied, structural
from composer.methods.tied import for_head, heads_alike, on_own_head

Result = tuple[list[Additive], Compression | None]


@dataclass(frozen=True, slots=True)
class Combination:
    """What is added in the end, and what compression lost, for each module that was compressed. `findings` are those
    of `structural` that are no errors. `tied` is what became of a tied weight: with `untie` its head's deltas are for a
    tensor of its own; one that has the embedding's very delta is its twin."""

    deltas: list[Delta]
    compressions: list[Compression]
    findings: list[Finding]
    tied: str
    fit: FitReport | None = None


def combine_deltas(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    method: str = "stack",
    settings: Mapping[str, object] | None = None,
    observe: Observe | None = None,
) -> Combination:
    """The deltas of all adapters combined by the method; replacements are taken over.

    An untied head's delta names a tensor of its own (`<module>.weight`). `observe` shows a fitted method what the
    modules see on each adapter's examples. Raises Mismatch for a hard conflict, for a weight that scales a replacement
    and for a fitted method without `observe`; NotSupported for an unknown method or setting, and where a method needs
    factors that an adapter does not have.
    """
    parsed = parse_settings(method, settings or {})
    given = weights_of(weights)
    if len(adapters) != len(given) or not adapters:
        raise Mismatch(
            "weights",
            f"{len(adapters)} adapters have {len(given)} weights.",
            subject="weights",
            next_step="Give one weight an adapter.",
        )
    loaded = participating(adapters, given, parsed)
    parsed["tied"] = tied = resolve_tied(loaded, parsed)
    findings = structural(loaded, parsed)
    refuse_errors("These adapters cannot be combined", findings)
    findings += _left_out(adapters, loaded)
    loaded = project_out_protected(loaded, given, parsed)
    pipeline, fitted = PIPELINES[method], None
    if pipeline.fitted:
        fitted = _fitted(loaded, given, parsed, observe)
        loaded, given = fitted.adapters, [Weight()] * len(given)
    heads = {} if pipeline.parity else heads_alike(loaded)  # PEFT combines each side by itself
    replaced, places = _places(loaded, given, method, parsed, heads)
    tally, names = Tally(cast(float, parsed["lambda"])), [adapter.name for adapter in loaded]
    if pipeline.parity:
        made = _like_peft(loaded, places, pipeline.parity, parsed, tally)
        deltas, findings = [*replaced, *(delta for delta, _ in made)], findings + tally.findings(names)
        return Combination(deltas, [lost for _, lost in made if lost is not None], findings, tied)
    with torch_threads(1), ThreadPoolExecutor(max(2, os.cpu_count() or 1), "combine") as pool:
        if parsed.get("scope") == "model":  # otherwise each place is prepared when its turn comes, and let go
            places = list(pool.map(lambda place: prepared(pipeline, place, parsed), places))
        selections = Selections.over(places, pipeline, parsed)
        aside, results = SpillFile(), list[Result]()
        for begin in range(0, len(places), TOGETHER):
            own = places[begin : begin + TOGETHER]
            finished = list(pool.map(lambda place: _run(pipeline, place, parsed, selections, tally), own))
            results += _set_aside(aside, own, finished)
    compressions = [compression for _, compression in results if compression is not None]
    deltas = [*replaced, *(delta for own, _ in results for delta in own)]
    if tied == "untie":
        deltas += [for_head(delta, heads[delta.weight]) for delta in deltas if delta.weight in heads]
    findings += tally.findings(names)
    return Combination(deltas, compressions, findings, tied, fitted.report if fitted else None)


def _fitted(
    loaded: Sequence[LoadedAdapter], weights: Sequence[Weight], parsed: Mapping[str, object], observe: Observe | None
) -> Fit:
    if observe is None:
        message = "regmean is fitted on what the base's modules see on each adapter's examples, and there are none."
        next_step = "Give the base and, for each adapter, a suite or prompts."
        raise Mismatch("needs_examples", message, subject="regmean", next_step=next_step)
    for adapter, weight in zip(loaded, weights, strict=True):
        for delta in (one for one in adapter.deltas if isinstance(one, Replacement)):
            _refuse_scaled(adapter.name, delta, cast(float, parsed["lambda"]) * weight.of(*names_of(delta)))
    return fit(loaded, weights, parsed, observe)


def participating(
    adapters: Sequence[LoadedAdapter], weights: Sequence[Weight], parsed: Mapping[str, object]
) -> list[LoadedAdapter]:
    """The adapters as they take part. Raises Mismatch for what was asked for and cannot have an effect."""
    _refuse_idle(adapters, weights, parsed)
    loaded = [with_deltas(adapter) for adapter in adapters] if parsed["replacements"] == "delta" else adapters
    kept = [without_zero_weights(adapter, weight) for adapter, weight in zip(loaded, weights, strict=True)]
    if not any(len(adapter.deltas) for adapter in kept):
        message = "Every weight is 0: nothing would be added."
        raise Mismatch("nothing_added", message, subject="weights", next_step="Give one adapter a weight.")
    return kept


def _left_out(adapters: Sequence[LoadedAdapter], participating: Sequence[LoadedAdapter]) -> list[Finding]:
    """Adapters whose every weight is 0."""
    idle = [one for one, left in zip(adapters, participating, strict=True) if one.deltas and not left.deltas]
    modules = [(one.name, {delta.module for delta in one.deltas}) for one in idle]
    return [finding for name, touched in modules for finding in zero_deltas(name, touched, len(touched))]


def projected_off_protected(
    adapters: Sequence[LoadedAdapter], weights: Sequence[Weight], parsed: Mapping[str, object]
) -> list[LoadedAdapter]:
    """The adapters off the subspaces of protected ones, as they are combined; what has the weight 0 is still there.
    Raises what `used` and `project_out_protected` do."""
    tied = resolve_tied(participating(adapters, weights, parsed), parsed)
    return project_out_protected(adapters, weights, {**parsed, "tied": tied})


def _run(
    pipeline: Pipeline, place: WeightSlot, parsed: Mapping[str, object], selections: Selections, tally: Tally
) -> Result:
    with decomposing(place.module):
        tally.see(place.parts)
        place = prepared(pipeline, place, parsed)
        tally.see_prepared(pipeline, place)
        return combine_slot(pipeline, place, parsed, selections)


def _set_aside(aside: SpillFile, places: Sequence[WeightSlot], results: Sequence[Result]) -> list[Result]:
    """The results with all factors mapped that are not the inputs' own: what waits to be merged takes no memory,
    however many places there are, nor do the inputs that were looked at."""
    inputs = [part.delta for place in places for part in place.parts]
    known = {factor.data_ptr() for one in inputs if isinstance(one, LowRank) for factor in (one.A_RI, one.B_OR)}
    made = [
        delta
        for deltas, _ in results
        for delta in deltas
        if isinstance(delta, LowRank) and not {delta.A_RI.data_ptr(), delta.B_OR.data_ptr()} & known
    ]
    by_identity = dict(zip(map(id, made), mapped(aside, made), strict=True))
    drop_pages_of(inputs)
    return [([by_identity.get(id(delta), delta) for delta in deltas], lost) for deltas, lost in results]


def _refuse_idle(adapters: Sequence[LoadedAdapter], weights: Sequence[Weight], parsed: Mapping[str, object]) -> None:
    """What was asked for and cannot have an effect is a slip: a rule for no module, a number of no input."""
    for position in cast("tuple[int, ...]", parsed.get("protect", ())):
        if position > len(adapters):
            message = f"protect names input {position} of {len(adapters)}."
            raise Mismatch("protect_unknown", message, subject="protect", next_step="Inputs are counted from 1.")
        adapter, weight = adapters[position - 1], weights[position - 1]
        if not (any(weight.of(*names_of(delta)) for delta in adapter.deltas) if weight.rules else weight.value):
            message = (
                f"protect names {adapter.name}, whose weight is 0: it does not take part, and nothing is protected."
            )
            next_step = "Leave it out of protect, or give it a weight."
            raise Mismatch("protect_idle", message, subject="protect", next_step=next_step)
    for adapter, weight in zip(adapters, weights, strict=True):
        names = {name for delta in adapter.deltas for name in names_of(delta)} if weight.rules else set[str]()
        for rule in weight.rules:
            if not any(map(rule.holds, names)):
                message = f"The rule {rule.to_json()} holds for no module of {adapter.name}."
                raise Mismatch("rule_unused", message, subject=adapter.name, next_step="Look at its modules: inspect.")


def without_zero_weights(adapter: LoadedAdapter, weight: Weight) -> LoadedAdapter:
    """Without what has the weight 0: it is as if it were not there. The two sides of a tied weight that rules weigh
    differently are no twins."""
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


def _places(
    loaded: Sequence[LoadedAdapter],
    weights: Sequence[Weight],
    method: str,
    parsed: Mapping[str, object],
    heads: Mapping[str, str],
) -> tuple[list[Delta], list[WeightSlot]]:
    """(replacements, places), without those of `heads`; only what those are the same as is still called a twin."""
    pipeline = PIPELINES[method]
    parts: dict[tuple[str, int], list[SlotDelta]] = defaultdict(list)
    replaced: dict[str, Delta] = {}
    factor = cast(float, parsed["lambda"])
    for index, (adapter, weight) in enumerate(zip(loaded, weights, strict=True)):
        digest = hash_file(adapter.path / WEIGHTS_FILE) if pipeline.random else ""
        for found in adapter.deltas:
            if is_tied_duplicate(found) and (parsed["tied"] != "untie" or found.weight in heads):
                continue
            delta = on_own_head(found) if parsed["tied"] == "untie" else found
            delta = delta if delta.weight in heads or not delta.twin else replace(delta, twin=False)
            own = weight.of(*names_of(delta))
            if isinstance(delta, Replacement):
                divided = own / divisor(_total(weights, delta)) if divides(method, parsed) else own
                _refuse_scaled(adapter.name, delta, factor * divided)
                replaced[delta.weight] = delta
            else:
                key = f"{digest}/{_own_name(delta)}/{delta.begin}"
                parts[delta.weight, delta.begin].append(SlotDelta(index, delta, own, key))
    return list(replaced.values()), [WeightSlot(own, _total(weights, own[0].delta)) for own in parts.values()]


def _own_name(delta: Additive) -> str:
    """The adapter's own name of the tensor, the same with a checkpoint at hand and without: GPT-2's drops a prefix."""
    if delta.stacked:
        return f"{delta.stacked.parameter}/{delta.stacked.expert}/{delta.stacked.first}"
    return f"{delta.module}.{delta.weight.rpartition('.')[2]}"


def _total(weights: Sequence[Weight], delta: Delta) -> float:
    return sum(weight.of(*names_of(delta)) for weight in weights)


def _like_peft(
    loaded: Sequence[LoadedAdapter],
    places: Sequence[WeightSlot],
    combination: str,
    parsed: Mapping[str, object],
    tally: Tally,
) -> list[tuple[LowRank, Compression | None]]:
    parity = Parity.of(combination, [adapter.config for adapter in loaded], parsed)
    factor = cast(float, parsed["lambda"])
    found: list[tuple[LowRank, Compression | None]] = []
    for place in places:
        tally.see(place.parts)
        delta, lost = parity.combined([(part.low_rank, part.weight) for part in place.parts])
        lost = None if lost is None else lost.times(parity.scale * factor)
        found.append((replace(delta, scale=delta.scale * factor), lost))
    return found


def with_deltas(adapter: LoadedAdapter) -> LoadedAdapter:
    """A tensor saved whole as the difference that it makes."""
    deltas = [_as_delta(delta) if isinstance(delta, Replacement) else delta for delta in adapter.deltas]
    return replace(adapter, deltas=tuple(deltas))


def _as_delta(delta: Replacement) -> RowwiseDelta:
    tensor = delta.tensor
    columns = tensor.shape[-1] if tensor.dim() > 1 else 1
    rows_MN = tensor.reshape(-1, columns)

    def rows(W_MN: torch.Tensor, begin: int) -> torch.Tensor:
        return rows_MN[begin : begin + W_MN.shape[0]].to(W_MN) - W_MN

    shape = (rows_MN.shape[0], rows_MN.shape[1])
    return RowwiseDelta(delta.module, delta.weight, shape, rows, reads_base=True, tied=delta.tied, twin=delta.twin)


def _refuse_scaled(name: str, delta: Replacement, weight: float) -> None:
    if weight != 1:
        message = f"{name} saves {delta.weight} whole, which the effective weight {weight:g} cannot scale."
        next_step = "Give this adapter the weight 1, with lambda and normalize counted in, or set replacements=delta."
        raise Mismatch("weighted_replacement", message, subject=delta.module, next_step=next_step)
