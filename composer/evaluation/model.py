"""A base that runs suites and prompts: in memory, or streamed from disk if it does not fit."""

import os
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from composer.deltas.tensors import execution_device, torch_device
from composer.errors import InvalidFile
from composer.evaluation.memory import free_bytes
from composer.evaluation.templates import with_budget
from composer.formats.checkpoints.bounds import refuse_growing_text, refuse_larger_than_its_tensors
from composer.formats.checkpoints.checkpoint import Architecture, Checkpoint, open_checkpoint
from composer.formats.checkpoints.staging import ADAPTER_FILE

# Padded tokens in one forward pass. On a CPU small enough that a suite of 32 examples keeps several cores busy; where
# each pass reads the weights from the disk, large enough that reading them serves many tokens.
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}
_STREAMED_TOKENS = 8192
_WEIGHTS_SHARE = 0.8  # of the free memory; the rest is for activations, logits and other processes
_KEPT_SHARE = 0.5  # of it, when weights are streamed through the other half
_SAID = 300
"""The most characters of an error of transformers to show."""
# Explicitly off: otherwise transformers asks on the terminal whether to run it.
_GIVEN: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer and its checkpoint's architecture.

    `streamed`: not all of its weights are in memory. Each forward pass reads the others from the checkpoint, a layer at
    a time, so only one pass may run at once, and parameters cannot be changed.
    """

    model: Any  # transformers' classes are imported when a model is loaded, not for annotations
    tokenizer: Any
    architecture: Architecture
    streamed: bool = False

    @property
    def device(self) -> torch.device:
        """The device of a forward pass's input."""
        return execution_device(self.model)

    @property
    def passes(self) -> int:
        """Maximum number of concurrent forward passes."""
        return 1 if self.streamed or self.device.type != "cpu" else len(os.sched_getaffinity(0))

    @property
    def batch_tokens(self) -> int:
        """Maximum padded tokens of one pass."""
        return _STREAMED_TOKENS if self.streamed else BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])


def load_model(
    directory: Path | str,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    *,
    exact: bool = False,
) -> LoadedModel:
    """Loads a Hugging Face checkpoint for evaluation. Runs no code from the checkpoint and downloads nothing.

    `device` auto is CUDA if there is one. `dtype` None is the checkpoint's own, or float32 if the device has no
    arithmetic in it, or for `exact` arithmetic, and the larger weights fit. Weights that need more than `memory` bytes
    of the device are streamed (None: most of what is free there now). Raises composer's errors for a checkpoint that
    cannot be read, and InvalidFile if transformers refuses the model or its tokenizer, or would make up weights.
    """
    # An import from `transformers` itself makes Pyright read its 400 models, which takes a third of its time.
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM
    from transformers.utils import logging

    checkpoint = open_checkpoint(Path(directory))
    refuse_larger_than_its_tensors(checkpoint)
    refuse_growing_text(checkpoint.path)
    _refuse_adapter_beside(checkpoint.path)
    chosen = torch_device(device)
    limit = int(_free_bytes(chosen) * _WEIGHTS_SHARE) if memory is None else memory
    in_float32 = dtype is None and (exact or _is_emulated(checkpoint, chosen))
    if in_float32 and _weight_bytes(checkpoint, torch.float32) <= limit:
        dtype = torch.float32
    streamed = _weight_bytes(checkpoint, dtype) > limit
    device_map = _device_map(chosen, limit) if streamed else {}
    # transformers draws a progress bar even if stderr is not a terminal.
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(checkpoint.path)
    with _loading(checkpoint.path), modules_bounded(checkpoint):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=dtype or "auto", output_loading_info=True, **_GIVEN, **device_map
        )
    model, loading = loaded
    if missing := loading["missing_keys"]:  # drawn at random: the same model would answer differently each time
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _not_loadable(checkpoint.path, f"as a causal language model it lacks {min(missing)}{others}.")
    return LoadedModel(
        model.eval() if streamed else model.eval().to(chosen), tokenizer, checkpoint.architecture, streamed
    )


def load_tokenizer(directory: Path) -> Any:
    """Loads the tokenizer in a checkpoint's directory; its template runs under a budget. Raises InvalidFile if
    transformers refuses it."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    with _loading(directory):
        return with_budget(AutoTokenizer.from_pretrained(directory, **_GIVEN), directory.name)


@contextmanager
def _loading(directory: Path) -> Generator[None]:
    """Raises InvalidFile for whatever transformers raises in the block about the directory's files."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, InvalidFile):
        raise  # the first two are not the checkpoint's fault
    except Exception as error:  # tokenizers raises a plain Exception for a damaged file
        raise _not_loadable(directory, f"transformers cannot load it: {_first_line(error, directory)}") from error


def _first_line(error: Exception, directory: Path) -> str:
    """The message of transformers without its list of all models, and without the path, which pages would show."""
    if "trust_remote_code" in str(error):
        return "it has code of its own, which is not executed (trust_remote_code)"
    line = (str(error).splitlines() or [type(error).__name__])[0].replace(str(directory), directory.name)
    return line if len(line) <= _SAID else f"{line[:_SAID]}…"


def _not_loadable(directory: Path, why: str) -> InvalidFile:
    return InvalidFile("model_not_loadable", f"{directory}: {why}", subject=str(directory))


def _refuse_adapter_beside(directory: Path) -> None:
    """Raises InvalidFile for an adapter beside the model: transformers would apply it, and the measured model would not
    be the one of the weights' digest."""
    if (directory / ADAPTER_FILE).exists():
        raise InvalidFile(
            "two_checkpoints",
            f"{directory.name} has an adapter beside its model, which transformers would apply to it ({ADAPTER_FILE}).",
            subject=ADAPTER_FILE,
        )


def multiplies_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in this dtype. A CPU without them takes up to a hundred
    times as long as in float32: one with AVX2 alone reached 0.9 GFLOP/s in bfloat16 and 75 in float32."""
    if device.type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():
        return dtype not in (torch.bfloat16, torch.float16)
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _is_emulated(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether most weights have a 16-bit dtype that the device has no arithmetic for."""
    sizes: Counter[str] = Counter()
    for header in checkpoint.shards.values():
        for entry in header.tensors.values():
            sizes[entry.dtype] += entry.size_bytes
    stored = {"BF16": torch.bfloat16, "F16": torch.float16}.get(sizes.most_common(1)[0][0]) if sizes else None
    return stored is not None and not multiplies_in(stored, device)


def _weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    entries = [entry for header in checkpoint.shards.values() for entry in header.tensors.values()]
    if dtype is None:
        return sum(entry.size_bytes for entry in entries)
    return sum(entry.spec.elements for entry in entries) * dtype.itemsize


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()


def _device_map(device: torch.device, limit: int) -> dict[str, object]:
    """Places layers on the device while they fit, then in the host's memory, and leaves the rest in the checkpoint."""
    kept = int(limit * _KEPT_SHARE)
    if device.type == "cpu":
        return {"device_map": "auto", "max_memory": {"cpu": kept}}
    host = int(_free_bytes(torch.device("cpu")) * _WEIGHTS_SHARE * _KEPT_SHARE)
    return {"device_map": "auto", "max_memory": {device.index or 0: kept, "cpu": host}}


# The modules of a model that is built, bounded by the tensors of its checkpoint.
_MODULES, _MODULES_A_TENSOR = 1_000, 16
"""Limit on a model's modules: a constant, and an allowance for each tensor. Llama has 1.5 per tensor."""


class _Building(threading.local):
    """The number of modules that each thread may still build; None for no limit."""

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
                next_step="Take config.json from the same source as the weights.",
            )

    register_module_module_registration_hook(count)
