"""A second device on every machine, `second`: it computes on the CPU, but refuses what a GPU would refuse.

Its tensors mix with the CPU's in no operation but copies and indices, and have no NumPy view. What runs on it with the
same result as on the CPU leaves nothing behind on the CPU; whether the kernels of a GPU agree, only a GPU shows.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "second"
_MAY_MIX = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")
"""Copies, and indices, which CUDA takes from the CPU too."""
_BELOW_PYTHON = ("copy_", "detach", "alias", "lift_fresh")
"""Operators that torch calls with our tensors after it has left Python, as in `torch.tensor(values, device=...)`."""


class _OnSecondDevice(torch.Tensor):
    """A tensor of the second device; `values` is the CPU's tensor behind it, of the same shape and strides."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "_OnSecondDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        made.values = values
        return made

    def __repr__(self, **_options: object) -> str:
        return f"second({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operator on the values behind our tensors. Fails where a GPU would."""
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    ours = {id(one.values): one for one in given if isinstance(one, _OnSecondDevice)}
    others = [one for one in given if not isinstance(one, _OnSecondDevice) and one.dim()]
    name = func.overloadpacket.__name__
    if ours and others and name not in _MAY_MIX:
        raise RuntimeError(f"{func} mixes tensors of {NAME} with the CPU's")
    target = kwargs.get("device")
    here = bool(ours) if target is None else torch.device(target).type == NAME
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map(lambda one: one.values if isinstance(one, _OnSecondDevice) else one, (args, kwargs))
    with torch.inference_mode(False), torch.no_grad():
        results = func(*args, **kwargs)
        if name == "copy_":
            return given[0]
        return tree_map(partial(_placed, here=here, ours=ours), results)


def _placed(result: Any, *, here: bool, ours: Mapping[int, torch.Tensor]) -> Any:
    """A result on the device where it belongs. What an operator changed in place keeps its tensor."""
    if not isinstance(result, torch.Tensor):
        return result
    if here:
        return ours[id(result)] if id(result) in ours else _OnSecondDevice(result)
    return result.clone() if id(result) in ours else result


_registered: list[torch.library.Library] = []


def register() -> None:
    """Makes `second` known to torch, once in a process."""
    if _registered:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    for name in _BELOW_PYTHON:
        some.impl(name, partial(_run, getattr(torch.ops.aten, name).default), "PrivateUse1")
    _registered.extend((every, some))
