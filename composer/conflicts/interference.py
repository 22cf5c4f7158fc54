"""What each adapter does to the activations on another one's examples: weaker evidence than a probe; no suites.

What predicts damage best is how strongly the intruder acts at all on the victim's inputs, |Δ_j x| / |W x|: over 66
pairs (docs/study.md), on the members' own examples with completions, its rank correlation with the loss of the worse
member is 0.79, that of the ratio to the victim's own strength 0.31. A mean over the modules that either touches ranks
worse (0.70, and -0.29 for 0.48 on fresh adapters): a large victim dilutes a small intruder.

Shapes: T adapters, N tokens, I inputs and O outputs of a module, R the sum of the ranks; B examples of P positions.
"""

import inspect
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import sqrt
from threading import Lock

import torch
from torch import nn

from composer.applied import Deltas, acting_factor, applied, module_of
from composer.delta import Delta, Layout, LowRank
from composer.errors import Mismatch, NotSupported
from composer.evaluate import Encoded, batches_of, encode_prompt, padded
from composer.formats.naming import is_head
from composer.model import LoadedModel
from composer.tensors import torch_threads

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
    # Watched before the deltas are put on, whose hooks change the output: what is seen is the base's W x.
    with ExitStack() as undo:
        for path, watch in watches.items():
            undo.enter_context(_watched(loaded.model.get_submodule(path), watch))
        undo.enter_context(applied(loaded.model, active))
        # What one pass costs beside its tokens is reading the weights: from memory, next to nothing.
        batches = batches_of(examples, loaded.batch_tokens if loaded.streamed else 1)
        workers = min(loaded.passes, len(examples))
        undo.enter_context(torch_threads(max(1, (os.cpu_count() or 1) // workers)))
        pool = undo.enter_context(ThreadPoolExecutor(workers, "watch"))
        heads = any(is_head(path) for path in watches)
        list(pool.map(lambda batch: _run(loaded, [examples[index] for index in batch], whole=heads), batches))
    return {path: watch.energy() for path, watch in watches.items()}


_TOKENS: ContextVar[torch.Tensor] = ContextVar("_TOKENS")  # B x P: what is no padding in this thread's forward pass


@torch.inference_mode()
def _run(loaded: LoadedModel, batch: Sequence[Encoded], whole: bool) -> None:
    # The head is the largest matrix; one position is enough where nobody looks at what it gets.
    sparing = not whole and "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
    spared = {"logits_to_keep": 1} if sparing else {}
    ids_BP = padded(batch)
    lengths_B1 = torch.tensor([[len(one.ids)] for one in batch])
    _TOKENS.set(torch.arange(ids_BP.shape[1]) < lengths_B1)
    loaded.model(input_ids=ids_BP.to(loaded.device), use_cache=False, **spared)


def _tokens_of(values: torch.Tensor, path: str) -> torch.Tensor:
    """B x P x … as N x …, without the padding. Raises NotSupported where a module sees padded tokens in another shape:
    an expert's own layer, say, that gets those which a router has chosen."""
    tokens_BP = _TOKENS.get().to(values.device)
    if values.shape[:2] == tokens_BP.shape:
        return values[tokens_BP]
    if not tokens_BP.all():
        message = f"{path} does not see its tokens as examples x positions, so that padding cannot be left out."
        raise NotSupported(
            "padded", message, subject=path, next_step="Give one prompt, or measure where the base fits in memory."
        )
    return values.flatten(0, -2)


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

    def __call__(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        A_RI = self._A_RI.to(output.device)
        if self._layout is Layout.EMBEDDING:
            H_NR = _tokens_of(nn.functional.embedding(inputs[0], A_RI.T), self._path)
        else:
            H_NR = _tokens_of(inputs[0], self._path).float() @ A_RI.T
        W_NO = _tokens_of(output, self._path).float()
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


@contextmanager
def _watched(module: nn.Module, watch: _Watch) -> Iterator[None]:
    handle = module.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
