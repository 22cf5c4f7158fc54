"""Applies deltas to a model in memory and removes them: in milliseconds if a hook can add a low-rank product.

Shapes: I inputs and O outputs of a module, R rank; a parameter as a matrix is M x N.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from composer.deltas.delta import Additive, Delta, Layout, LowRank, Replacement, RowwiseDelta
from composer.deltas.tensors import execution_device
from composer.errors import Mismatch, NotSupported

Deltas = Iterable[Delta]


@contextmanager
def deltas_applied(model: nn.Module, deltas: Deltas, *, in_weights: bool = False) -> Iterator[None]:
    """Activates `deltas` on the model inside the block; several on one module add up. The model's weights do not
    change.

    A low-rank delta adds scale * (x A^T) B^T to its module's output, in float32 with one rounding to the output's
    dtype. Deltas of experts, convolutions or packed parameters, and computed ones, replace the parameter by a changed
    copy, and so do all of them with `in_weights`. A replacement takes the parameter's place. Each acts on the module
    that it names, so on a tied weight only on that side.

    Raises Mismatch naming a module that is missing or has another shape, and NotSupported naming one of a class that
    deltas cannot be applied to.
    """
    hooked: dict[str, list[LowRank]] = defaultdict(list)
    added: dict[tuple[str, str], list[tuple[Additive, int]]] = defaultdict(list)
    with ExitStack() as undo:
        for delta in deltas:
            if isinstance(delta, Replacement):
                undo.enter_context(_replaced(module_of(model, delta.module), delta))
            elif isinstance(delta, LowRank) and not in_weights and _is_called(model, delta):
                hooked[delta.module].append(delta)
            else:
                path, begin = _path(delta), delta.stacked.begin if delta.stacked else 0
                owner, _, name = path.rpartition(".")
                added[owner, name].append((delta, begin))
        for (path, name), parts in added.items():
            undo.enter_context(_changed(module_of(model, path), name, parts))
        for path, low_rank in hooked.items():
            undo.enter_context(_add(module_of(model, path), low_rank, execution_device(model)))
        yield


def _path(delta: Additive) -> str:
    """The parameter in memory: the module's own, by the name that the tensor has on disk, or the stack of experts."""
    return delta.stacked.parameter if delta.stacked else f"{delta.module}.{delta.weight.rpartition('.')[2]}"


def _is_called(model: nn.Module, delta: LowRank) -> bool:
    """Whether the delta belongs to a module whose own forward returns the product with its weight. An attention's
    packed projections are used by the attention itself, and a router of experts returns scores."""
    if delta.stacked or delta.kernel or not delta.weight.endswith(".weight"):
        return False
    module = module_of(model, delta.module)
    scores = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return not scores and type(module).__name__ != "NonDynamicallyQuantizableLinear"


def module_of(model: nn.Module, path: str) -> nn.Module:
    """Finds a module by its path. Raises Mismatch if the model does not have it."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise _other_base("module_missing", path, f"The model has no module {path}.") from error


def _other_base(code: str, module: str, message: str) -> Mismatch:
    return Mismatch(code, message, subject=module, next_step="Use the base that the adapter was trained on.")


def _in_memory(module: nn.Module, name: str, path: str) -> nn.Parameter | None:
    old = module._parameters.get(name)
    if old is not None and old.is_meta:
        raise NotSupported(
            "streamed", f"{path}'s {name} is changed as a whole, and the base does not fit in memory.", subject=path
        )
    return old


@contextmanager
def _replaced(module: nn.Module, delta: Replacement) -> Iterator[None]:
    name = delta.weight.rpartition(".")[2]
    old = _in_memory(module, name, delta.module)
    if old is None or old.shape != delta.tensor.shape:
        actual = "none" if old is None else f"one of shape {tuple(old.shape)}"
        wanted = f"Replacing {name} of {delta.module} with a tensor of shape {tuple(delta.tensor.shape)}"
        raise _other_base("shape_mismatch", delta.module, f"{wanted}: the model has {actual}.")
    # The entry is swapped, not its values: a tied parameter is one object in two modules, and the other side stays.
    module._parameters[name] = nn.Parameter(delta.tensor.to(old), requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = old


@contextmanager
def _changed(module: nn.Module, name: str, deltas: Sequence[tuple[Additive, int]]) -> Iterator[None]:
    """The parameter with the deltas added in float32 from their first rows on, each computed from the base's own
    value.
    """
    old = _in_memory(module, name, deltas[0][0].module)
    (rows, columns), path = deltas[0][0].stored_shape, deltas[0][0].module
    stacked = any(delta.stacked for delta, _ in deltas)
    needed = max(begin + delta.stored_shape[0] for delta, begin in deltas) * columns
    if old is None or old.numel() % columns or needed > old.numel() or not (stacked or needed == old.numel()):
        actual = "none" if old is None else f"one of shape {tuple(old.shape)}"
        wanted = f"The delta of {path} is for a {name} of {rows} x {columns}"
        raise _other_base("shape_mismatch", path, f"{wanted}: the model has {actual}.")
    W_MN = old.detach().reshape(-1, columns).float()
    changed_MN = W_MN.clone()
    for delta, begin in deltas:
        own = slice(begin, begin + delta.stored_shape[0])
        if isinstance(delta, RowwiseDelta):
            changed_MN[own] += delta.rows(W_MN[own], 0)
        else:
            left, right = delta.to(W_MN.device).stored_factors()
            changed_MN[own] += left @ right
    module._parameters[name] = nn.Parameter(changed_MN.reshape(old.shape).to(old), requires_grad=False)
    try:
        yield
    finally:
        module._parameters[name] = old


def _add(module: nn.Module, parts: Sequence[LowRank], device: torch.device) -> RemovableHandle:
    path, layout = parts[0].module, parts[0].layout
    A_RI = torch.cat([part.A_RI.float() for part in parts])
    B_OR = torch.cat([acting_factor(module, part).float() for part in parts], dim=1)
    _refuse_unlike(module, path, layout, (B_OR.shape[0], A_RI.shape[1]))
    A_RI, B_OR = A_RI.to(device), B_OR.to(device)
    A_IR = A_RI.T.contiguous()

    def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.embedding(inputs[0], A_IR) if layout is Layout.EMBEDDING else inputs[0].float() @ A_IR
        return (output.float() + nn.functional.linear(hidden, B_OR)).to(output.dtype)

    return module.register_forward_hook(add)


def acting_factor(module: nn.Module, delta: LowRank) -> torch.Tensor:
    """B_OR in float64 with all factors on its way to the module's output."""
    # Gemma's embedding scales its output by a number that it rounds to its weight's dtype.
    factor: object = getattr(module, "embed_scale", 1.0)
    if isinstance(factor, torch.Tensor):
        factor = factor.to(next(module.parameters()).dtype)
    return delta.B_OR.double() * (delta.scale * float(cast(float, factor)))


def _refuse_unlike(module: nn.Module, path: str, layout: Layout, shape: tuple[int, int]) -> None:
    """Raises unless the module has the class of the layout, and an O x I delta of `shape` fits its weight."""
    classes = {Layout.LINEAR: nn.Linear, Layout.EMBEDDING: nn.Embedding}
    # transformers' Conv1D is recognized by its name, so that models without it import nothing.
    known = type(module).__name__ == "Conv1D" if layout is Layout.CONV1D else isinstance(module, classes[layout])
    weight = module._parameters.get("weight")
    if not known or weight is None:
        actual = type(module).__name__
        raise NotSupported("module_class", f"{path} is a {actual}: a {layout} delta can't be applied.", subject=path)
    stored = shape if layout is Layout.LINEAR else shape[::-1]
    if tuple(weight.shape) != stored:
        message = f"The delta of {path} is for a weight of shape {stored}, the model's is {tuple(weight.shape)}."
        raise _other_base("shape_mismatch", path, message)
