"""The examples that a fitted method is fitted on, and the inputs of the base's modules on them.

Shapes: N selected tokens, I inputs of a module, P positions of an example.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import nn

from composer.deltas.delta import Delta, LowRank
from composer.deltas.stored import SpillFile
from composer.evaluation.hooks import module_of
from composer.evaluation.measure import Encoded, encode, encode_prompt
from composer.evaluation.model import LoadedModel
from composer.evaluation.observe import ForwardPass, Watch, observe
from composer.evaluation.stack_inputs import Stack
from composer.formats.recipes.lock import CalibrationDocument
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.phrases import half_reworded, phrased
from composer.formats.recipes.suite import CalibrationSet
from composer.methods.regmean import ModuleInputs

_WAITING_BYTES = 64 << 20
"""Rows are written together once they have this size."""


@dataclass(frozen=True)
class Calibration:
    """The calibration sets, one for each adapter, in order, and those of the guards. `load` returns the base, the same
    one every time, whose weights have the digest `base`; it is None where nothing is kept. At most `settings.tokens` of
    a member's tokens are used, and as many of all guards', chosen by `settings.seed`. `progress` is called with each
    number of finished examples."""

    load: Callable[[], LoadedModel]
    sets: Sequence[CalibrationSet]
    settings: Regmean
    progress: Callable[[int], None] = lambda _count: None
    base: str | None = None
    guards: Sequence[CalibrationSet] = ()

    @property
    def model(self) -> LoadedModel:
        return self.load()

    def to_json(self) -> list[CalibrationDocument]:
        return [examples.to_json() for examples in (*self.sets, *self.guards)]

    @property
    def examples(self) -> int:
        """The examples that one step runs."""
        guards = self.guards if self.settings.guard else ()
        return sum(map(len, (*self.sets, *guards)))

    def pick(self, members: Sequence[int]) -> "Calibration":
        """The calibration of some of the adapters, by their indices."""
        return replace(self, sets=[self.sets[member] for member in members])

    def observe(
        self, member: int | None, active: Sequence[Delta], wanted: Mapping[str, LowRank]
    ) -> Mapping[str, ModuleInputs]:
        """Maps keys to the inputs of the `wanted` deltas' matrices on the examples of the member, or on the guards'
        for None, under `active` deltas. Leaves out those whose inputs cannot be observed. Raises what `encode` and
        `deltas_applied` raise."""
        sets = self.guards if member is None else [self.sets[member]]
        if not sets:
            return {}
        loaded, collector = self.model, _Collector()
        examples = [example for used in sets for example in _encoded(loaded, used)]
        watches: dict[str, Watch] = {}
        stacks: dict[str, dict[str, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
        for key, delta in wanted.items():
            if delta.stacked:
                owner, _, _name = delta.stacked.parameter.rpartition(".")
                stacks[owner][delta.stacked.parameter].append((key, delta.stacked.expert))
            elif _is_linear(module_of(loaded.model, delta.module)):
                watches[delta.module] = collector.watch(key)
        for owner, parameters in stacks.items():
            observed = [(Stack.of(loaded.model, path), keys) for path, keys in parameters.items()]
            watches[owner] = collector.watch_stacks([(stack, keys) for stack, keys in observed if stack])
        observe(loaded, examples, active, watches, _chosen(examples, self.settings.tokens, self.settings.seed))
        self.progress(len(examples))
        return collector.inputs()


@dataclass(slots=True)
class _Rows:
    """Rows of a module's inputs: in memory at first, later mapped from a file."""

    tensor: torch.Tensor


class _RowsOnDisk:
    """Writes rows to a file in large batches: each mapping counts as an open file, and a process may have 1,024."""

    def __init__(self) -> None:
        self._spill, self._lock = SpillFile(), Lock()
        self._waiting: list[_Rows] = []
        self._bytes = 0

    def put(self, rows_NI: torch.Tensor) -> _Rows:
        kept = _Rows(rows_NI.clone())  # the model may change its own in place
        with self._lock:  # examples run side by side
            self._waiting.append(kept)
            self._bytes += kept.tensor.nbytes
            if self._bytes >= _WAITING_BYTES:
                self._write()
        return kept

    def finish(self) -> None:
        with self._lock:
            self._write()

    def _write(self) -> None:
        stored = self._spill.put([rows.tensor for rows in self._waiting])
        for rows, factor in zip(self._waiting, stored, strict=True):
            rows.tensor = factor.tensor
        self._waiting, self._bytes = [], 0


class _Collector:
    """Keeps each module's inputs on disk, in the order of the examples. Modules that get the same tensor in a row (q, k
    and v; gate and up) share them."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[tuple[int, ...], tuple[_Rows, float]]] = defaultdict(dict)
        self._latest: dict[tuple[int, ...], tuple[torch.Tensor, _Rows]] = {}
        self._disk = _RowsOnDisk()

    def watch(self, path: str) -> Watch:
        def keep(seen: ForwardPass, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            energy = float(seen.rows(output, path).float().square().sum())
            latest = self._latest.get(seen.indices)
            if latest is None or latest[0] is not inputs[0]:
                kept = self._disk.put(seen.rows(inputs[0], path).cpu())
                self._latest[seen.indices] = latest = (inputs[0], kept)
            self._parts[path][seen.indices] = (latest[1], energy)

        return keep

    def watch_stacks(self, stacks: Sequence[tuple[Stack, Sequence[tuple[str, int]]]]) -> Watch:
        """For stacked matrices of one module: each with the keys and indices of its experts. The parts of one expert
        (its gate and up projections) have the same inputs, and share the energy of both."""

        def keep(seen: ForwardPass, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            for stack, keys in stacks:
                kept: dict[int, tuple[_Rows, float]] = {}
                for key, expert in keys:
                    if expert not in kept:
                        rows_NI = stack.rows(seen, inputs, expert)
                        kept[expert] = (self._disk.put(rows_NI.cpu()), stack.energy(rows_NI, expert))
                    self._parts[key][seen.indices] = kept[expert]

        return keep

    def inputs(self) -> dict[str, ModuleInputs]:
        self._disk.finish()
        inputs: dict[str, ModuleInputs] = {}
        for path, parts in self._parts.items():
            ordered = [parts[indices] for indices in sorted(parts)]
            inputs[path] = ModuleInputs(tuple(rows.tensor for rows, _ in ordered), sum(energy for _, energy in ordered))
        return inputs


def _encoded(loaded: LoadedModel, used: CalibrationSet) -> list[Encoded]:
    """Encodes prompts; they are user turns if the base has a chat template."""
    if used.suite is not None:
        examples = phrased(used.phrase, half_reworded(used.examples) if used.reworded else used.examples)
        return [encode(loaded, example, used.suite.chat, used.suite.ends) for example in examples]
    chat = loaded.tokenizer.chat_template is not None
    ids = [tuple(encode_prompt(loaded, prompt, chat)) for prompt in used.prompts]
    return [Encoded(token_ids, len(token_ids)) for token_ids in ids]


def _is_linear(module: nn.Module) -> bool:
    """Whether the module is called with its inputs. transformers' Conv1D is recognized by its name; the output
    projection of a packed attention is a linear layer that is never called."""
    name = type(module).__name__
    return name == "Conv1D" or (isinstance(module, nn.Linear) and name != "NonDynamicallyQuantizableLinear")


def _chosen(examples: Sequence[Encoded], most: int, seed: int) -> list[torch.Tensor]:
    """Selects the tokens of each example that are used: all, or `most` of them at random."""
    lengths = [len(example.ids) for example in examples]
    chosen = torch.ones(sum(lengths), dtype=torch.bool)
    if len(chosen) > most:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen[order[most:]] = False
    return list(chosen.split(lengths))
