"""A second device on every machine, `second`: it computes on the CPU, but refuses what a GPU would refuse. Its tensors
mix with the CPU's only in copies and as indices, and have no NumPy view. Code that runs on it with the CPU's results
leaves nothing behind on the CPU; whether the kernels of a GPU agree, only a GPU shows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = "second"
_MAY_MIX = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")
"""Copies, and indices, which CUDA accepts from the CPU too."""
_BELOW_PYTHON = ("copy_", "detach", "alias", "lift_fresh")
"""Operators that torch calls with our tensors after it has left Python, as in `torch.tensor(values, device=...)`."""


CALLS: Counter[str] = Counter()
"""The number of calls of each operator on the second device, in any thread."""


class _OnSecondDevice(torch.Tensor):
    """A tensor of the second device; `host` is the CPU's tensor behind it, of the same shape and strides."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "_OnSecondDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        made.host = host
        return made

    def __repr__(self, **_options: object) -> str:
        return f"{NAME}({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and _is_composite(func):  # outside of it, torch has done it
            return func.decompose(*args, **(kwargs or {}))
        return _run(func, *args, **(kwargs or {}))


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operator on the tensors behind ours. Fails where a GPU would."""
    given: list[torch.Tensor] = []
    asked: list[bool] = []
    on_host = [_on_host(arg, given, asked) for arg in args]
    named = {name: _on_host(kwarg, given, asked) for name, kwarg in kwargs.items()}
    ours = {id(tensor.host): tensor for tensor in given if isinstance(tensor, _OnSecondDevice)}
    name = func.overloadpacket.__name__
    if (
        ours
        and name not in _MAY_MIX
        and any(argument.dim() and not isinstance(argument, _OnSecondDevice) for argument in given)
    ):
        raise RuntimeError(f"{func} mixes tensors of {NAME} with the CPU's")
    CALLS[name] += bool(ours)
    with torch.inference_mode(False), torch.no_grad():
        results = _histogram(*on_host, **named) if name == "histc" else func(*on_host, **named)
        if name == "copy_":
            return given[0]
        return _placed(results, here=asked[0] if asked else bool(ours), ours=ours)


def _histogram(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Supports integers too, like a GPU: a mixture of experts counts its tokens with it."""
    return torch.histc(tensor.double(), *args, **kwargs).to(tensor.dtype)


def _on_host(argument: Any, given: list[torch.Tensor], asked: list[bool]) -> Any:
    """The argument for the CPU. Adds its tensors to `given`, and for a device whether it is ours to `asked`; written by
    hand, since torch's own trees took two thirds of an operator's time."""
    if isinstance(argument, torch.Tensor):
        given.append(argument)
        return argument.host if isinstance(argument, _OnSecondDevice) else argument
    if isinstance(argument, (list, tuple)):
        return [_on_host(item, given, asked) for item in argument]
    if isinstance(argument, torch.device):
        asked.append(argument.type == NAME)
        return torch.device("cpu")
    return argument


def _placed(result: Any, *, here: bool, ours: Mapping[int, torch.Tensor]) -> Any:
    """Results on the device where they belong. What an operator changed in place keeps its tensor."""
    if isinstance(result, torch.Tensor):
        if here:
            return ours[id(result)] if id(result) in ours else _OnSecondDevice(result)
        return result.clone() if id(result) in ours else result
    if isinstance(result, (list, tuple)):
        return type(result)(_placed(item, here=here, ours=ours) for item in result)
    return result


class NoArithmeticOnCpu(TorchDispatchMode):
    """Refuses products and decompositions of the CPU's tensors in this thread, so that code for a device runs on it."""

    REFUSED = ("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "_linalg_svd", "linalg_qr", "linalg_cholesky_ex")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.REFUSED:
            devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            assert "cpu" not in devices, f"{func} on the CPU"
        return func(*args, **(kwargs or {}))


_registered: list[torch.library.Library] = []


def register() -> None:
    """Makes `second` known to torch, once in a process."""
    if _registered:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    # Trainers in this process query each accelerator that torch knows for its autocast, even to disable it.
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    for name in _BELOW_PYTHON:
        some.impl(name, partial(_run, getattr(torch.ops.aten, name).default), "PrivateUse1")
    _registered.extend((every, some))
