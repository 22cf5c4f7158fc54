"""The modules of a model that is built, bounded by the tensors of its checkpoint."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache

from torch.nn.modules.module import register_module_module_registration_hook

from composer.errors import InvalidFile
from composer.formats.checkpoints.checkpoint import Checkpoint

_MODULES, _MODULES_A_TENSOR = 1_000, 16
"""Limit on a model's modules: a constant, and an allowance for each tensor. Llama has 1.5 per tensor."""


class _Building(threading.local):
    """Of each thread: how many more modules it may build; None without a bound."""

    left: int | None = None


_building = _Building()


@contextmanager
def modules_bounded(checkpoint: Checkpoint) -> Generator[None]:
    """Raises InvalidFile in the block as soon as this thread builds a model of many more modules than the checkpoint
    has tensors, whatever field of the configuration states them."""
    _count_modules()
    before, _building.left = _building.left, _MODULES + _MODULES_A_TENSOR * len(checkpoint.architecture.tensors)
    try:
        yield
    finally:
        _building.left = before


@cache
def _count_modules() -> None:
    """Installs the counter, once per process: torch calls its hooks in all threads that build models."""

    def count(_module: object, _name: str, _added: object) -> None:
        if _building.left is None:
            return
        _building.left -= 1
        if _building.left < 0:
            raise InvalidFile(
                "bad_config",
                "config.json: the model would have many times as many modules as the checkpoint has tensors.",
                subject="config.json",
                next_step="Take config.json from where the weights are from.",
            )

    register_module_module_registration_hook(count)
