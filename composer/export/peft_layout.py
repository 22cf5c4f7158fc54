"""Low-rank deltas in PEFT's layout: one pair for each wrapped module, and one for each wrapped stack of experts.

Shapes: O outputs, I inputs, R rank, E experts.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from composer.deltas.delta import ExpertSlice, Layout, LowRank
from composer.errors import NotSupported
from composer.formats.adapters.placement.experts import nested_names
from composer.methods.basis import Pair


@dataclass(frozen=True, slots=True)
class PeftModule:
    """A module or parameter that PEFT wraps under one name, with one rank. `name` is used in targets and patterns: a
    module or (with
    `is_parameter`) a parameter. `tensors` are its factors by key, without the prefix, with all scales folded in."""

    name: str
    rank: int
    tensors: dict[str, torch.Tensor]
    is_parameter: bool = False


def wrapped(deltas: Sequence[LowRank], least: int = 0) -> list[PeftModule]:
    """The deltas, one per slot with scale 1, as PEFT wraps them; ranks below `least` are padded with zeros. Raises
    NotSupported for an expert with its own pair in a layer with a stack, and for two tensors with one key."""
    modules: dict[str, list[LowRank]] = defaultdict(list)
    stacks: dict[str, list[tuple[ExpertSlice, LowRank]]] = defaultdict(list)
    for delta in deltas:
        if delta.stacked:
            stacks[delta.stacked.parameter].append((delta.stacked, delta))
        else:
            modules[delta.module.rpartition(".")[0] if delta.nested else delta.module].append(delta)
    split = {_layer_of(delta.weight) for own in stacks.values() for expert, delta in own if expert.experts > 1}
    for delta in (delta for own in modules.values() for delta in own):
        if _layer_of(delta.weight) in split - {None}:
            message = f"{delta.module} is an expert with its own pair, in a layer whose other experts are stacked."
            raise NotSupported("experts", message, subject=delta.module)
    paths = nested_names(stacks)
    return [
        *(_module(name, own, least) for name, own in modules.items()),
        *(_stack(name, paths[name], own, least) for name, own in stacks.items()),
    ]


def by_key(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors by key. Raises NotSupported for two tensors with one key: a file would keep only the last."""
    by_name: dict[str, torch.Tensor] = {}
    for key, tensor in tensors:
        if key in by_name:
            message = f"{key} would name two tensors, but an adapter can hold only one."
            raise NotSupported("two_for_one_key", message, subject=key)
        by_name[key] = tensor
    return by_name


def _layer_of(weight: str) -> str | None:
    """The experts' layer for an expert's own tensor (`….experts.3.w1.weight`)."""
    *layer, expert, _, last = ("", "", *weight.split("."))
    return ".".join(layer) if last == "weight" and expert.isdigit() else None


def _module(name: str, deltas: Sequence[LowRank], least: int) -> PeftModule:
    """A module's own pair; for a packed attention, together with its output projection's, which has the same rank."""
    rank = max(least, *(delta.rank for delta in deltas))
    return PeftModule(name, rank, by_key(pair for delta in deltas for pair in _pair(name, delta, rank)))


def _pair(name: str, delta: LowRank, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    B_OR, A_RI = _of_rank((delta.B_OR, delta.A_RI), rank)
    if delta.layout is Layout.EMBEDDING:
        yield f"{name}.lora_embedding_A", A_RI
        yield f"{name}.lora_embedding_B", B_OR
        return
    path = name
    if delta.nested:
        path, B_OR = f"{name}.base_layer.{delta.module.rpartition('.')[2]}", B_OR / 2
    if delta.kernel:
        ones = (1,) * len(delta.kernel)
        A_RI, B_OR = A_RI.reshape(rank, -1, *delta.kernel), B_OR.reshape(*B_OR.shape, *ones)
    yield f"{path}.lora_A.weight", A_RI
    yield f"{path}.lora_B.weight", B_OR


def _stack(name: str, path: str, deltas: Sequence[tuple[ExpertSlice, LowRank]], least: int) -> PeftModule:
    """A (E R x I) with the expert as slow index, B (O x R E) with the expert as fast index; R is the largest rank."""
    expert, first = deltas[0]
    parts: list[list[tuple[int, Pair]]] = [[] for _ in range(expert.experts)]
    for where, delta in deltas:
        parts[where.expert].append((where.first, (delta.B_OR, delta.A_RI)))
    pairs = [_expert(own, expert.outputs, first.A_RI.shape[1]) for own in parts]
    rank = max(least, *(A_RI.shape[0] for _, A_RI in pairs))
    padded = [_of_rank(pair, rank) for pair in pairs]
    A_XI = torch.cat([A_RI for _, A_RI in padded])
    B_OX = torch.stack([B_OR for B_OR, _ in padded], dim=2).flatten(1)
    return PeftModule(name, rank, {f"{path}.lora_A.weight": A_XI, f"{path}.lora_B.weight": B_OX}, is_parameter=True)


def _expert(parts: Sequence[tuple[int, Pair]], outputs: int, inputs: int) -> Pair:
    """Joins the pairs for parts of an expert's outputs (gate and up, if the checkpoint splits them): with the same rank
    if they share A, else concatenated. An expert without pairs has rank 0."""
    B_OR, A_RI = torch.zeros(outputs, 0), torch.zeros(0, inputs)
    for first, (own_B, own_A) in parts:
        begin = B_OR.shape[1]
        if own_A.shape == A_RI.shape and torch.equal(own_A, A_RI):
            begin = 0
        else:
            A_RI, B_OR = torch.cat([A_RI, own_A]), pad(B_OR, (0, own_A.shape[0]))
        B_OR[first : first + own_B.shape[0], begin:] = own_B
    return B_OR, A_RI


def _of_rank(pair: Pair, rank: int) -> Pair:
    """The same product, padded with zero directions."""
    B_OR, A_RI = pair
    missing = rank - A_RI.shape[0]
    if not missing:
        return pair
    return pad(B_OR, (0, missing)), pad(A_RI, (0, 0, 0, missing))
