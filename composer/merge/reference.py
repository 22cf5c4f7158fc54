"""The deltas with which the base in memory should answer as its merged checkpoint does."""

from collections.abc import Sequence
from dataclasses import dataclass

from composer.deltas.delta import Delta, names_of
from composer.deltas.variants.load import LoadedAdapter
from composer.formats.adapters.placement.naming import is_head
from composer.formats.recipes.methods import AnySettings, effective_weights
from composer.formats.recipes.weights import Weight
from composer.methods.combine import CombinedDeltas, participating
from composer.methods.join import times
from composer.methods.retention import is_sum
from composer.methods.structural import for_head, heads_alike


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReference:
    """`deltas` on the base, whose vocabulary grows to `vocabulary_rows` (0: it does not grow). Of a sum they are the
    adapters' own, times their weights, so that the combination is checked too; otherwise those of the combination.
    `impossible` says why no deltas describe the result; empty if they do."""

    words: str
    deltas: Sequence[Delta]
    vocabulary_rows: int = 0
    impossible: str = ""


def reference_of(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    settings: AnySettings,
    combined: CombinedDeltas,
    vocabulary_rows: int,
    *,
    dequantized: bool,
) -> MergeReference:
    """The reference of a merge of `combined`, which the method made of the adapters. `dequantized`: into a base whose
    weights the merge decodes."""
    words = "the base with its adapters" if len(adapters) > 1 else "the base with the adapter"
    if dequantized:
        return MergeReference(words=words, deltas=(), impossible="the base is quantized, and the merge decodes it.")
    shared = [finding for finding in combined.findings if finding.code == "tied_shared"]
    if shared:
        why = "with tied=shared a change of one side of the tied tensor acts on both, which no adapter in memory does"
        return MergeReference(words=words, deltas=(), impossible=f"{why}.")
    if is_sum(settings) and not settings.in_order:
        own = effective_weights(weights, settings)
        members = participating(adapters, own, settings)
        deltas = [
            times(delta, weight.of(*names_of(delta)))
            for member, weight in zip(members, own, strict=True)
            for delta in member.deltas
        ]
        return MergeReference(words=words, deltas=deltas, vocabulary_rows=vocabulary_rows)
    heads = heads_alike(adapters) if combined.tied == "shared" else {}
    twins = [
        for_head(delta, heads[delta.weight])
        for delta in combined.deltas
        if delta.weight in heads and not is_head(delta.module)
    ]
    return MergeReference(
        words="the base with the combined adapter", deltas=[*combined.deltas, *twins], vocabulary_rows=vocabulary_rows
    )
