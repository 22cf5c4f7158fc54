"""Structural checks: combinations that are impossible regardless of values. Returns findings, never raises them."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from composer.deltas.delta import Additive, Delta, Layout, LowRank, Replacement, RowwiseDelta
from composer.deltas.variants.load import LoadedAdapter
from composer.findings import Finding, Severity
from composer.formats.adapters.placement.naming import is_head, is_vocabulary
from composer.formats.recipes.methods import MethodSettings, Tied

_Touch = tuple[str, Delta]  # adapter name, what it does


def structural(loaded: Sequence[LoadedAdapter], settings: MethodSettings) -> list[Finding]:
    """Finds hard conflicts between adapters, and between an adapter and a tied weight.

    Error codes: replacement_conflict, replacement_and_delta, two_rescale, changed_base, token_conflict, tied_weight,
    tied_both_sides, vocabulary_mismatch, shape_conflict. Notices: tied_shared, tied_untied. A single adapter can
    conflict with itself: a fully saved tensor that also has a low-rank pair.
    """
    tied = resolve_tied(loaded, settings)
    touches: dict[tuple[str, str], list[_Touch]] = defaultdict(list)
    for adapter in loaded:
        for delta in adapter.deltas:
            if tied != "untie" and is_tied_duplicate(delta):
                continue
            # Untied, head and embedding are two tensors; shared, they are one.
            side = delta.module if tied == "untie" and delta.tied else ""
            touches[delta.weight, side].append((adapter.name, delta))
    findings: list[Finding] = []
    for (weight, _), touching in touches.items():
        findings += _check_weight(weight, touching, in_order=settings.in_order)
    one_sided = [
        (name, delta)
        for touching in touches.values()
        for name, delta in touching
        if delta.tied and (tied == "untie" or not delta.twin)
    ]
    return _check_tied(one_sided, tied) + findings  # the first of several findings names the fix


def resolve_tied(loaded: Sequence[LoadedAdapter], settings: MethodSettings) -> Tied:
    """The setting, with `auto` resolved: `untie` if the two sides will differ, since the merged model would otherwise
    not be the adapted one; `shared` if not."""
    if settings.tied != "auto":
        return settings.tied
    return "untie" if any(delta.tied and not delta.twin for adapter in loaded for delta in adapter.deltas) else "shared"


def is_tied_duplicate(delta: Delta) -> bool:
    """Whether this is the head's side of a change that the embedding's side already makes to the same tensor."""
    return delta.twin and is_head(delta.module)


def _check_weight(weight: str, touching: list[_Touch], *, in_order: bool) -> list[Finding]:
    replacing = [(name, delta) for name, delta in touching if isinstance(delta, Replacement)]
    adding: list[tuple[str, Additive]] = [
        (name, delta) for name, delta in touching if not isinstance(delta, Replacement)
    ]
    if replacing and adding:
        who = f"{replacing[0][0]} replaces {weight} and {adding[0][0]} adds to it"
        return [_error("replacement_and_delta", replacing[0][1].module, f"{who}; the sum has no meaning.")]
    findings = [
        finding for first, other in itertools.pairwise(replacing) if (finding := _check_replacements(first, other))
    ]
    slots: dict[int, list[tuple[str, Additive]]] = defaultdict(list)  # each expert of a stack is a slot of its own
    for name, delta in adding:
        slots[delta.begin].append((name, delta))
    return findings + [finding for slot in slots.values() for finding in _check_slot(weight, slot, in_order=in_order)]


def _check_slot(weight: str, adding: Sequence[tuple[str, Additive]], *, in_order: bool) -> list[Finding]:
    shapes = [(name, delta.stored_shape) for name, delta in adding]  # two adapters may have the same name
    if len({shape for _, shape in shapes}) > 1:
        code = "vocabulary_mismatch" if is_vocabulary(adding[0][1].module) else "shape_conflict"
        sizes = ", ".join(f"{name}: {' x '.join(map(str, shape))}" for name, shape in shapes)
        turned = all(sorted(shape) == sorted(shapes[0][1]) for _, shape in shapes)
        # PEFT saves fan_in_fan_out as false for GPT-2 if lm_head is targeted too, although c_attn is not a Linear.
        why = " Their configs disagree on its layout (fan_in_fan_out); a base settles it." if turned else ""
        message = f"The adapters were trained for different shapes of {weight}: {sizes}.{why}"
        return [_error(code, adding[0][1].module, message)]
    return _check_order(weight, adding, in_order=in_order) + _check_rows(weight, adding)


def _check_rows(weight: str, adding: Sequence[tuple[str, Additive]]) -> list[Finding]:
    """Refuses rows that two adapters both retrained: only one of them can be used."""
    setting = [(name, delta) for name, delta in adding if isinstance(delta, RowwiseDelta) and delta.sets_rows]
    for (name, combination), (other_name, other) in itertools.combinations(setting, 2):
        shared = sorted(combination.sets_rows & other.sets_rows)
        if shared:
            message = f"{name} and {other_name} both retrained token {shared[0]} of {weight} ({len(shared)} in all)."
            return [_error("token_conflict", combination.module, message)]
    return []


def _check_order(weight: str, adding: Sequence[tuple[str, Additive]], *, in_order: bool) -> list[Finding]:
    """Refuses two deltas that each rescale the base's weight, since their order is unknown unless the user states one
    (`in_order`), and a delta that drops a part of the weight that another was trained on."""
    alone = [(name, delta) for name, delta in adding if isinstance(delta, RowwiseDelta) and delta.alone]
    if alone and len({name for name, _ in adding}) > 1:
        name, delta = alone[0]
        message = f"{name} drops directions of {weight} (KaSA) that the other adapters were trained with."
        return [_error("changed_base", delta.module, message)]
    reading = [(name, delta) for name, delta in adding if isinstance(delta, RowwiseDelta) and delta.rescales]
    if len(reading) < 2 or in_order:
        return []
    names = " and ".join(name for name, _ in reading)
    message = f"{names} each rescale {weight} (DoRA, OFT, …): the result depends on their order."
    return [_error("two_rescale", reading[0][1].module, message)]


def _check_replacements(first: tuple[str, Replacement], other: tuple[str, Replacement]) -> Finding | None:
    (first_name, one), (other_name, two) = first, other
    if one.tensor.shape != two.tensor.shape:
        code = "vocabulary_mismatch" if is_vocabulary(one.module) else "replacement_conflict"
        shapes = f"{list(one.tensor.shape)} and {list(two.tensor.shape)}"
        message = f"{first_name} and {other_name} both save {one.weight}, with shapes {shapes}."
        return _error(code, one.module, message)
    if one.tensor.dtype != two.tensor.dtype or not torch.equal(one.tensor, two.tensor):
        message = f"{first_name} and {other_name} both save all of {one.weight}, with different values."
        return _error("replacement_conflict", one.module, message)
    return None


def _check_tied(touching: list[_Touch], tied: str) -> list[Finding]:
    if not touching:
        return []
    modules = sorted({delta.module for _, delta in touching})
    name, first = touching[0]
    if tied == "refuse":
        message = f"{name} changes {first.module}, whose tensor {first.weight} is both output head and input embedding."
        return [
            _error(
                "tied_weight",
                first.module,
                f"{message} Set tied=untie (each side gets its own tensor) or tied=shared (both change, as in PEFT).",
            )
        ]
    if tied == "untie":
        message = f"The output head gets its own tensor: {' and '.join(modules)} changed."
        return [Finding("tied_untied", Severity.NOTICE, first.module, message)]
    if len(modules) > 1:
        message = (
            f"{' and '.join(modules)} share one tensor and both are changed, which is only possible with tied=untie."
        )
        return [_error("tied_both_sides", modules[0], message)]
    message = f"{first.module} is changed in the tensor shared by embedding and head, so the other side changes too."
    return [Finding("tied_shared", Severity.NOTICE, first.module, message)]


def _error(code: str, subject: str, message: str) -> Finding:
    return Finding(code, Severity.ERROR, subject, message)


# The two sides of a tied tensor: the output head's deltas when head and input embedding are, or were, one tensor.


def heads_alike(loaded: Sequence[LoadedAdapter]) -> dict[str, str]:
    """Tied tensor -> its head, if every adapter changes both sides alike. Both are combined once, as the embedding,
    even if they become two tensors: a random mask, or a basis of one side's inputs, would make them differ."""
    deltas = [delta for adapter in loaded for delta in adapter.deltas]
    twins = {delta.weight: delta.module for delta in deltas if is_tied_duplicate(delta)}
    # Without a base, only a twin is known to be tied: another adapter's one-sided delta names its own tensor.
    apart = {delta.weight for delta in deltas if not delta.twin}
    return {weight: head for weight, head in twins.items() if not {weight, f"{head}.weight"} & apart}


def for_head(delta: Delta, head: str) -> Delta:
    """An embedding's delta, addressed to the head that was tied to it."""
    if isinstance(delta, LowRank):
        return pair_for_head(delta, head)
    own = replace(delta, module=head, weight=f"{head}.weight")
    return replace(own, layout=Layout.LINEAR) if isinstance(own, RowwiseDelta) else own


def pair_for_head(delta: LowRank, head: str) -> LowRank:
    """An embedding's pair for its head, whose inputs are the embedding's outputs."""
    own = replace(delta, module=head, weight=f"{head}.weight", layout=Layout.LINEAR)
    return replace(own, A=delta.B.T, B=delta.A.T)


def on_own_head(delta: Delta) -> Delta:
    """The delta of a tied output head, addressed to its own tensor; any other delta unchanged."""
    return replace(delta, weight=f"{delta.module}.weight") if delta.tied and is_head(delta.module) else delta
