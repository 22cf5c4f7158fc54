"""What each adapter does to the activations on another one's examples: weaker evidence than a probe; no suites.

What predicts damage best is how strongly the intruder acts at all on the victim's inputs, |Δ_j x| / |W x|: over 66
pairs (docs/study.md), on the members' own examples with completions, its rank correlation with the loss of the worse
member is 0.79, that of the ratio to the victim's own strength 0.31. A mean over the modules that either touches ranks
worse (0.70, and -0.29 for 0.48 on fresh adapters): a large victim dilutes a small intruder.

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
from composer.evaluation.evaluate import Encoded, encode_prompt
from composer.evaluation.hooks import Deltas, acting_factor, module_of
from composer.evaluation.model import LoadedModel
from composer.evaluation.observe import Pass, observe

MAX_PROMPTS = 1000


@dataclass(frozen=True, slots=True)
class Directed:
    """An intruder j beside a victim i, on inputs x that the victim's examples give each module.

    `ratio` |Δ_j x| / |Δ_i x|; `along` the part of Δ_j x in the direction of Δ_i x, signed, and `across` the rest, both
    over |Δ_i x|. Squares are summed over tokens and modules, each module's over its own |W x|^2: a module does not
    count more because its activations are larger. `victim` and `intruder` are the roots of those sums of
    (|Δ x| / |W x|)^2, which exceed 1 where many modules are changed; `modules` are the shares of the intruder's energy.
    A pair's numbers are the same whoever else is in the set. A victim that does nothing has the ratio 0: there is
    nothing to overwrite.
    """

    ratio: float
    along: float
    across: float
    victim: float
    intruder: float
    modules: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Activations:
    """Of every ordered pair (victim, intruder); `prompts` were run for each victim."""

    prompts: int
    directed: Mapping[tuple[str, str], Directed]

    def worse(self, a: str, b: str) -> tuple[str, Directed]:
        """The victim of the two on whose inputs the other acts more strongly."""
        return max(((a, self.directed[a, b]), (b, self.directed[b, a])), key=lambda one: one[1].intruder)


@dataclass(frozen=True, slots=True)
class _Energy:
    """Of one module: Σ <Δ_i x, Δ_j x> over the tokens (T x T, float64), Σ |W x|^2, and which adapters touch it."""

    inner: torch.Tensor
    base: float
    touching: frozenset[int]


def activation_interference(
    loaded: LoadedModel, examples: Sequence[Encoded], victim: Deltas, intruder: Deltas
) -> Directed:
    """The intruder's deltas on the victim's examples, with the victim active. Both are taken as they are, unweighted.

    Deltas without factors, convolutions and fused experts are left out. Raises what `applied` raises.
    """
    both = [list(victim), list(intruder)]
    return _directed(_energies(loaded, examples, both[0], both), 0, 1)


def activations(
    loaded: LoadedModel, members: Mapping[str, Deltas], prompts: Sequence[str], chat: bool | None = None
) -> Activations:
    """All ordered pairs: for each member one pass over the prompts, with its deltas (weights folded in) active.

    `chat` None is a user turn where the base has a template. Raises Mismatch for no prompt.
    """
    if not prompts:
        raise Mismatch(
            "no_prompts",
            "Activations need at least one prompt.",
            subject="prompts",
            next_step="Give one, or ask for the weight checks alone.",
        )
    as_turn = loaded.tokenizer.chat_template is not None if chat is None else chat
    ids = [tuple(encode_prompt(loaded, prompt, as_turn)) for prompt in prompts]
    examples = [Encoded(one, len(one)) for one in ids]
    names, deltas = list(members), [list(own) for own in members.values()]
    found: dict[tuple[str, str], Directed] = {}
    for i, victim in enumerate(names):
        energies = _energies(loaded, examples, deltas[i], deltas)
        found |= {(victim, names[j]): _directed(energies, i, j) for j in range(len(names)) if j != i}
    return Activations(len(prompts), found)


def _directed(energies: Mapping[str, _Energy], i: int, j: int) -> Directed:
    either = {module: one for module, one in energies.items() if not one.touching.isdisjoint((i, j))}
    relative = {module: one.inner / one.base for module, one in either.items() if one.base > 0}
    if not relative:
        return Directed(0.0, 0.0, 0.0, 0.0, 0.0, {})
    total = torch.stack(list(relative.values())).sum(0)
    own, other, common = (float(total[place]) for place in ((i, i), (j, j), (i, j)))
    shares = {module: float(one[j, j]) / other for module, one in relative.items()} if other > 0 else {}
    victim, intruder = sqrt(max(own, 0.0)), sqrt(max(other, 0.0))
    if own <= 0:
        return Directed(0.0, 0.0, 0.0, victim, intruder, shares)
    along = common / own
    across = sqrt(max(0.0, other / own - along**2))
    return Directed(sqrt(other / own), along, across, victim, intruder, shares)


def _energies(
    loaded: LoadedModel, examples: Sequence[Encoded], active: Deltas, adapters: Sequence[Iterable[Delta]]
) -> dict[str, _Energy]:
    watches = _watches(loaded.model, adapters)
    observe(loaded, examples, active, watches)
    return {path: watch.energy() for path, watch in watches.items()}


class _Watch:
    """The second moment of the hidden values A x of one module's adapters, all side by side: R x R."""

    def __init__(self, module: nn.Module, deltas: Sequence[tuple[int, LowRank]], count: int) -> None:
        self._path, self._layout, self._count = deltas[0][1].module, deltas[0][1].layout, count
        self._owner = torch.tensor([index for index, delta in deltas for _ in range(delta.rank)])
        self._A_RI = torch.cat([delta.A_RI.float() for _, delta in deltas])
        B_OR = torch.cat([acting_factor(module, delta) for _, delta in deltas], dim=1)
        self._gram = B_OR.T @ B_OR
        self._moment = torch.zeros_like(self._gram)
        self._base = 0.0
        self._lock = Lock()

    def __call__(self, seen: Pass, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
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
        """<Δ_i x, Δ_j x> summed = Σ over the entries of (B_i^T B_j) * (Σ A_i x x^T A_j^T)."""
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
    """Does the delta's module run on its own? A fused expert and the projections of a packed attention do not."""
    if delta.stacked or delta.nested or delta.kernel:
        return False
    return hasattr(module_of(model, delta.module), "weight")
