"""The inputs of matrices that one module stacks: a layer's fused experts, or a router's own weight.

Shapes: T tokens of a pass, N selected tokens that the router sends to an expert, I inputs, O outputs.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from composer.errors import NotSupported
from composer.evaluation.observe import ForwardPass

_FIRST = {"gate_up_proj", "up_proj"}
_SECOND = "down_proj"


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter of `owner` whose inputs can be observed, with the base's values before any delta."""

    owner: nn.Module
    path: str
    values: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module, path: str) -> "Stack | None":
        """None if the inputs cannot be observed: experts whose class does not follow transformers' common interface, a
        bias, weights that are not in memory."""
        owner_path, _, name = path.rpartition(".")
        owner = model.get_submodule(owner_path)
        values = owner._parameters.get(name)
        if values is None or values.is_meta:
            return None
        known = {*_FIRST, _SECOND} if hasattr(owner, "_apply_gate") else {"weight"}
        return cls(owner, path, values.detach()) if name in known and values.ndim in (2, 3) else None

    def rows(self, seen: ForwardPass, inputs: tuple[Any, ...], expert: int) -> torch.Tensor:
        """N x I, the inputs of the expert's matrix. `inputs` are the owner's: hidden states, then the experts of each
        token."""
        hidden_TI = cast(torch.Tensor, inputs[0]).flatten(0, -2)
        chosen_T = seen.tokens.flatten().to(hidden_TI.device)
        if len(chosen_T) != len(hidden_TI):
            message = f"{self.path} sees {len(hidden_TI)} of {len(chosen_T)} tokens, and it is not known which."
            raise NotSupported("tokens_dropped", message, subject=self.path)
        if self.values.ndim == 3:
            chosen_T = chosen_T & (inputs[1].reshape(len(hidden_TI), -1) == expert).any(1)
        rows_NI = hidden_TI[chosen_T]
        return self._between(rows_NI, expert) if self.path.endswith(f".{_SECOND}") else rows_NI

    def energy(self, rows_NI: torch.Tensor, expert: int) -> float:
        """Σ |W x|² over the rows, with the base's own weight."""
        return float(self._times(rows_NI, self.values, expert).float().square().sum())

    def _between(self, rows_NI: torch.Tensor, expert: int) -> torch.Tensor:
        """The output of an expert's first half, with the deltas that are active at the moment."""
        owner: Any = self.owner
        name = "gate_up_proj" if owner.has_gate else "up_proj"
        hidden_NO = self._times(rows_NI, getattr(owner, name), expert)
        if owner.has_bias:
            hidden_NO = hidden_NO + getattr(owner, f"{name}_bias")[expert]
        return owner._apply_gate(hidden_NO) if owner.has_gate else owner.act_fn(hidden_NO)

    def _times(self, rows_NI: torch.Tensor, stack: torch.Tensor, expert: int) -> torch.Tensor:
        W = stack[expert] if stack.ndim == 3 else stack
        return rows_NI @ (W if getattr(self.owner, "is_transposed", False) else W.T)
