"""The two sides of a tied tensor: the output head's deltas when head and input embedding are, or were, one tensor."""

from collections.abc import Sequence
from dataclasses import replace

from composer.deltas.delta import Delta, Layout, LowRank, RowwiseDelta
from composer.deltas.variants.load import LoadedAdapter
from composer.formats.adapters.placement.naming import is_head
from composer.methods.structural import is_tied_duplicate


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
