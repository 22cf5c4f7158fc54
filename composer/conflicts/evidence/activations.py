"""The effect of each adapter on the activations on another one's examples: weaker evidence than a probe, but without
suites.

The best predictor of damage is how strongly the intruder acts on the victim's inputs, |Δ_j x| / |W x|. Over 66 pairs
(docs/methods/study.md), on the members' own examples with completions, its rank correlation with the loss of the worse
member is 0.79; that of its ratio to the victim's own strength is 0.31. A mean over the modules that either touches
ranks worse (0.70, and -0.29 instead of 0.48 on fresh adapters), because a large victim dilutes a small intruder.

Shapes: T adapters, N tokens, I inputs and O outputs of a module, R the sum of the ranks; B examples of P positions.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from threading import Lock

import torch
from torch import nn

from composer.deltas.delta import Delta, Layout, LowRank
from composer.errors import Mismatch
from composer.evaluation.hooks import Deltas, acting_factor, module_of
from composer.evaluation.measure import Encoded, encode_prompt
from composer.evaluation.model import LoadedModel
from composer.evaluation.observe import ForwardPass, observe

MAX_PROMPTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Directed:
    """An intruder j compared with a victim i, on the inputs x that each module gets from the victim's examples.

    `ratio` is |Δ_j x| / |Δ_i x|. `along` is the signed part of Δ_j x in the direction of Δ_i x and `across` the rest,
    both over |Δ_i x|. Squares are summed over tokens and modules, each module's divided by its own |W x|^2, so that
    modules with larger activations do not count more. `victim` and `intruder` are the roots of those sums of
    (|Δ x| / |W x|)^2, which exceed 1 where many modules change. `modules` are the shares of the intruder's energy.
    A pair's numbers do not depend on the rest of the set. A victim that does nothing has ratio 0: there is nothing to
    overwrite.
    """

    ratio: float
    along: float
    across: float
    victim: float
    intruder: float
    modules: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Activations:
    """The numbers of every ordered pair (victim, intruder); `prompts` were run for each victim."""

    prompts: int
    directed: Mapping[tuple[str, str], Directed]

    def worse(self, a: str, b: str) -> tuple[str, Directed]:
        """The victim on whose inputs the other one acts more strongly, with the numbers."""
        return max(((a, self.directed[a, b]), (b, self.directed[b, a])), key=lambda one: one[1].intruder)


@dataclass(frozen=True, slots=True)
class _Energy:
    """One module: Σ <Δ_i x, Δ_j x> over the tokens (T x T, float64), Σ |W x|^2, and the adapters that touch it."""

    inner: torch.Tensor
    base: float
    touching: frozenset[int]


def activation_interference(
    loaded: LoadedModel, examples: Sequence[Encoded], victim: Deltas, intruder: Deltas
) -> Directed:
    """Compares the intruder's deltas with the victim's on the victim's examples, with the victim active. No weights.

    Deltas without factors, convolutions and fused experts are left out. Raises what `deltas_applied` raises.
    """
    both = [list(victim), list(intruder)]
    return _directed(_energies(loaded, examples, both[0], both), 0, 1)


def activations(
    loaded: LoadedModel, members: Mapping[str, Deltas], prompts: Sequence[str], chat: bool | None = None
) -> Activations:
    """Compares all ordered pairs, with one pass over the prompts per member, its deltas (weights included) active.

    If `chat` is None, each prompt is a user turn if the base has a chat template. Raises Mismatch without prompts.
    """
    if not prompts:
        raise Mismatch("no_prompts", "Activations need at least one prompt.", subject="prompts")
    as_turn = loaded.tokenizer.chat_template is not None if chat is None else chat
    ids = [tuple(encode_prompt(loaded, prompt, as_turn)) for prompt in prompts]
    examples = [Encoded(token_ids, len(token_ids)) for token_ids in ids]
    names, deltas = list(members), [list(own) for own in members.values()]
    directed: dict[tuple[str, str], Directed] = {}
    for i, victim in enumerate(names):
        energies = _energies(loaded, examples, deltas[i], deltas)
        directed |= {(victim, names[j]): _directed(energies, i, j) for j in range(len(names)) if j != i}
    return Activations(len(prompts), directed)


def _directed(energies: Mapping[str, _Energy], i: int, j: int) -> Directed:
    either = {module: energy for module, energy in energies.items() if not energy.touching.isdisjoint((i, j))}
    relative = {module: energy.inner / energy.base for module, energy in either.items() if energy.base > 0}
    if not relative:
        return Directed(ratio=0.0, along=0.0, across=0.0, victim=0.0, intruder=0.0, modules={})
    total = torch.stack(list(relative.values())).sum(0)
    own, other, common = (float(total[index]) for index in ((i, i), (j, j), (i, j)))
    shares = {module: float(energy[j, j]) / other for module, energy in relative.items()} if other > 0 else {}
    victim, intruder = sqrt(max(own, 0.0)), sqrt(max(other, 0.0))
    if own <= 0:
        return Directed(ratio=0.0, along=0.0, across=0.0, victim=victim, intruder=intruder, modules=shares)
    along = common / own
    across = sqrt(max(0.0, other / own - along**2))
    return Directed(
        ratio=sqrt(other / own), along=along, across=across, victim=victim, intruder=intruder, modules=shares
    )


def _energies(
    loaded: LoadedModel, examples: Sequence[Encoded], active: Deltas, adapters: Sequence[Iterable[Delta]]
) -> dict[str, _Energy]:
    watches = _watches(loaded.model, adapters)
    observe(loaded, examples, active, watches)
    return {path: watch.energy() for path, watch in watches.items()}


class _Watch:
    """Accumulates the second moment of the hidden values A x of one module's adapters, concatenated: R x R."""

    def __init__(self, module: nn.Module, deltas: Sequence[tuple[int, LowRank]], count: int) -> None:
        self._path, self._layout, self._count = deltas[0][1].module, deltas[0][1].layout, count
        self._owner = torch.tensor([index for index, delta in deltas for _ in range(delta.rank)])
        self._A_RI = torch.cat([delta.A_RI.float() for _, delta in deltas])
        B_OR = torch.cat([acting_factor(module, delta) for _, delta in deltas], dim=1)
        self._gram = B_OR.T @ B_OR
        self._moment = torch.zeros_like(self._gram)
        self._base = 0.0
        self._lock = Lock()

    def __call__(self, seen: ForwardPass, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        A_RI = self._A_RI.to(output.device)
        if self._layout is Layout.EMBEDDING:
            H_NR = seen.rows(nn.functional.embedding(inputs[0], A_RI.T), self._path)
        else:
            H_NR = seen.rows(inputs[0], self._path).float() @ A_RI.T
        W_NO = seen.rows(output, self._path).float()
        moment, base = (H_NR.T @ H_NR).double().cpu(), float(W_NO.square().sum())
        with self._lock:  # examples run side by side
            self._moment = self._moment + moment
            self._base += base

    def energy(self) -> _Energy:
        """Σ <Δ_i x, Δ_j x>, computed as the sum of the entries of (B_i^T B_j) * (Σ A_i x x^T A_j^T)."""
        Z_RT = torch.nn.functional.one_hot(self._owner, self._count).double()
        inner = Z_RT.T @ (self._gram * self._moment) @ Z_RT
        return _Energy(inner, self._base, frozenset(self._owner.tolist()))


def _watches(model: nn.Module, adapters: Sequence[Iterable[Delta]]) -> dict[str, _Watch]:
    deltas: dict[str, list[tuple[int, LowRank]]] = defaultdict(list)
    for index, adapter in enumerate(adapters):
        for delta in adapter:
            if isinstance(delta, LowRank) and _is_seen(model, delta):
                deltas[delta.module].append((index, delta))
    return {path: _Watch(module_of(model, path), own, len(adapters)) for path, own in deltas.items()}


def _is_seen(model: nn.Module, delta: LowRank) -> bool:
    """Whether the delta's module runs on its own; fused experts and projections of packed attention do not."""
    if delta.stacked or delta.nested or delta.kernel:
        return False
    return hasattr(module_of(model, delta.module), "weight")
