"""Observes the modules of a model: their inputs, and the base's outputs, on some examples with deltas active.

Shapes: B examples of P positions in a batch, N selected tokens.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn

from composer.deltas.tensors import most_threads, torch_threads
from composer.errors import NotSupported
from composer.evaluation.hooks import Deltas, deltas_applied
from composer.evaluation.measure import Encoded, batches_of, padded
from composer.evaluation.model import LoadedModel
from composer.formats.adapters.placement.naming import is_head


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass over the examples `indices`; `tokens` (B x P) selects tokens, none of them padding."""

    indices: tuple[int, ...]
    tokens: torch.Tensor
    is_padded: bool

    def rows(self, values: torch.Tensor, path: str) -> torch.Tensor:
        """Turns B x P x … into N x …, the selected tokens. Returns all rows if a module sees its tokens in another
        shape (an expert's own layer gets those that a router has chosen). Raises NotSupported if these may include
        padding."""
        tokens_BP = self.tokens.to(values.device)
        if values.shape[:2] == tokens_BP.shape:
            return values[tokens_BP]
        if self.is_padded:
            message = f"{path} does not see its tokens as examples x positions, so that padding cannot be left out."
            raise NotSupported("padded", message, subject=path)
        return values.flatten(0, -2)


Watch = Callable[[ForwardPass, tuple[torch.Tensor, ...], torch.Tensor], None]
"""Arguments: pass, a module's inputs, the base's output W x. Called from several threads, in the order of the
modules.
"""

_PASS: ContextVar[ForwardPass] = ContextVar("_PASS")


def observe(
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    active: Deltas,
    watches: Mapping[str, Watch],
    tokens: Sequence[torch.Tensor] | None = None,
) -> None:
    """Runs every example with `active` deltas, and passes each watched module's input and output to its watch.

    The output is the base's, before any delta. `tokens` selects tokens for each example (a boolean vector; all by
    default). Raises what `deltas_applied` and the watches raise.
    """
    looked_at = tokens or [torch.ones(len(example.ids), dtype=torch.bool) for example in examples]
    # Watched before the deltas are applied, whose hooks change the output.
    with ExitStack() as undo:
        for path, watch in watches.items():
            undo.enter_context(loaded.model.get_submodule(path).register_forward_hook(_shown_to(watch)))
        undo.enter_context(deltas_applied(loaded.model, active))
        # The fixed cost of a pass is reading the weights: from memory, next to nothing.
        batches = batches_of(examples, loaded.batch_tokens if loaded.streamed else 1)
        workers = max(1, min(loaded.passes, len(examples)))
        undo.enter_context(torch_threads(max(1, most_threads() // workers)))
        pool = undo.enter_context(ThreadPoolExecutor(workers, "observe"))
        heads = any(is_head(path) for path in watches)
        list(pool.map(lambda batch: _run(loaded, batch, examples, looked_at, with_head=heads), batches))


@torch.inference_mode()
def _run(
    loaded: LoadedModel,
    batch: Sequence[int],
    examples: Sequence[Encoded],
    looked_at: Sequence[torch.Tensor],
    *,
    with_head: bool,
) -> None:
    # The head is the largest matrix; one position is enough unless it is watched.
    sparing = not with_head and "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
    spared = {"logits_to_keep": 1} if sparing else {}
    ids_BP = padded([examples[index] for index in batch])
    tokens_BP = torch.zeros(ids_BP.shape, dtype=torch.bool)
    for row, index in enumerate(batch):
        tokens_BP[row, : len(looked_at[index])] = looked_at[index]
    is_padded = len({len(examples[index].ids) for index in batch}) > 1
    _PASS.set(ForwardPass(tuple(batch), tokens_BP, is_padded))
    loaded.model(input_ids=ids_BP.to(loaded.device), use_cache=False, **spared)


def _shown_to(watch: Watch) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    return lambda _module, inputs, output: watch(_PASS.get(), inputs, output)
