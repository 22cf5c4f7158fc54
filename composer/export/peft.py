"""Writes deltas as one ordinary PEFT adapter, with all scales folded in: alpha is the rank, so s = 1."""

import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from composer.deltas.delta import Delta, LowRank, Replacement, RowwiseDelta
from composer.deltas.tensors import DTYPE_NAMES
from composer.errors import NotSupported, RefusedOutput
from composer.export.peft_layout import PeftModule, by_key, wrapped
from composer.formats.adapters.facts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.adapters.placement.naming import PEFT_PREFIX, is_head, split_key
from composer.formats.checkpoints.hashing import Identity, refuse_changed
from composer.formats.checkpoints.header import FLOAT_DTYPES
from composer.formats.checkpoints.staging import NOTE_FILE, staged_directory, write_json
from composer.methods.join import stack_factors
from composer.methods.structural import is_tied_duplicate, on_own_head, pair_for_head

_SPARE_BYTES = 1 << 20
_OS_ERROR = re.compile(r"os error ([0-9]{1,4})")
NO_INPUTS: Mapping[Path, Identity] = MappingProxyType({})
NO_FILES: Mapping[str, Path] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter in PEFT's form: wrapped modules, and fully saved tensors. `tied` means that the head's pair is the
    embedding's, for which PEFT has a flag."""

    wrapped: list[PeftModule]
    replacements: list[Replacement]
    tied: bool = False

    @property
    def modules(self) -> list[str]:
        return [module.name for module in self.wrapped if not module.is_parameter]

    @property
    def parameters(self) -> list[str]:
        return [module.name for module in self.wrapped if module.is_parameter]


def peft_form(deltas: Sequence[Delta], *, one_rank: bool = False) -> PeftAdapter:
    """The deltas in PEFT's form. With `one_rank`, every pair is padded with zeros to the highest rank, and no pattern
    is needed. Raises NotSupported for a delta that no LoRA can hold, and if there is no pair to write."""
    refuse_unheld(deltas)
    slots = _as_twins(_one_per_slot(deltas))
    pairs = wrapped(slots)
    if one_rank and len({pair.rank for pair in pairs}) > 1:
        pairs = wrapped(slots, max(pair.rank for pair in pairs))
    if not pairs:
        raise NotSupported(
            "no_pairs", "Nothing to write: an adapter holds low-rank pairs alone, and the result has none."
        )
    full = [delta for delta in deltas if isinstance(delta, Replacement)]
    return PeftAdapter(pairs, full, any(map(is_tied_duplicate, slots)))


def write_adapter(
    form: PeftAdapter,
    out_dir: Path,
    fields: Mapping[str, Any],
    note: Mapping[str, Any],
    inputs: Mapping[Path, Identity] = NO_INPUTS,
    beside: Mapping[str, Path | str] = NO_FILES,
) -> int:
    """Writes the adapter to the directory `out_dir` in float32; returns the size of the weights file.

    `fields` are further fields of the config; unless they override it, the targets are all modules and parameters by
    path. `note` is written beside it, and what is `beside` by name. Raises what `write_files` raises.
    """
    return write_files(_tensors(form), {**_config(form), **fields}, out_dir, note, inputs, beside)


def write_files(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    out_dir: Path,
    note: Mapping[str, Any],
    inputs: Mapping[Path, Identity] = NO_INPUTS,
    beside: Mapping[str, Path | str] = NO_FILES,
) -> int:
    """Writes tensors by PEFT's key, the config, and what is `beside` by name: copies of files, or texts. Returns the
    size of the weights file. Raises RefusedOutput for an existing directory, a value that is not finite, and for
    `inputs` modified meanwhile."""
    for key, tensor in tensors.items():
        if DTYPE_NAMES[tensor.dtype] in FLOAT_DTYPES and not bool(torch.isfinite(tensor).all()):
            message = f"{key} would have a NaN or an infinite value."
            raise RefusedOutput("not_finite", message, subject=split_key(key).module, next_step="Lower the weights.")
    with staged_directory(out_dir, sum(tensor.nbytes for tensor in tensors.values()) + _SPARE_BYTES) as staging:
        _save(tensors, staging / WEIGHTS_FILE)
        write_json(staging / CONFIG_FILE, config)
        write_json(staging / NOTE_FILE, note)
        for name, content in beside.items():
            if isinstance(content, str):
                (staging / name).write_text(content, encoding="utf-8")
            else:
                shutil.copyfile(content, staging / name)
        (staging / WEIGHTS_FILE).chmod(
            (staging / CONFIG_FILE).stat().st_mode
        )  # safetensors makes it readable for the owner only
        refuse_changed(inputs)
    return (out_dir / WEIGHTS_FILE).stat().st_size


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Saves with safetensors, which requires each tensor to be contiguous and in separate memory. Raises OSError."""
    own: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        one = tensor.contiguous()
        own[key] = one.clone() if one.data_ptr() in seen else one
        seen.add(one.data_ptr())
    try:
        save_file(own, path, {"format": "pt"})
    except SafetensorError as error:
        if code := _OS_ERROR.search(str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def _one_per_slot(deltas: Sequence[Delta]) -> list[LowRank]:
    """The deltas with those of one slot summed: an adapter holds one pair per slot."""
    slots: dict[tuple[str, int], list[LowRank]] = defaultdict(list)
    for delta in map(on_own_head, deltas):  # an adapter does not change the weights: a tied tensor has two sides
        if isinstance(delta, LowRank):
            slots[delta.weight, delta.begin].append(delta)
    summed = [delta for own in slots.values() for delta in stack_factors(own, [1.0] * len(own))]
    return [delta for delta in summed if isinstance(delta, LowRank)]


def _as_twins(slots: Sequence[LowRank]) -> list[LowRank]:
    """The deltas with a twin head given its embedding's exact factors, since a scale may be folded into the other
    one."""
    embedding = next((delta for delta in slots if delta.twin and not is_head(delta.module)), None)
    return [
        pair_for_head(embedding, delta.module) if embedding and is_tied_duplicate(delta) else delta for delta in slots
    ]


def refuse_unheld(deltas: Iterable[Delta], *, cut: bool = False, dense: bool = False) -> None:
    """Raises NotSupported for a delta that no LoRA can hold: unchanged, or (`cut`) after a cut to a rank, or (`dense`)
    after a method that makes all deltas dense."""
    for delta in deltas:
        if isinstance(delta, Replacement):
            continue
        if delta.weight.endswith(".bias"):  # whatever its rank: the module's pair belongs to its weight
            message = f"The delta of {delta.weight} is for a bias, which no LoRA pair can hold."
            raise NotSupported("bias_delta", message, subject=delta.module)
        computed = isinstance(delta, RowwiseDelta)
        reading = computed and delta.reads_base
        if reading or dense or (computed and not cut):
            message = f"The delta of {delta.module} has no factors, so no LoRA can hold it."
            next_step = "Merge it into the base, on whose values it depends."
            if not reading:
                next_step = (
                    "Cut it to a rank (rank=32 or energy=0.99; in a recipe `settings: {rank: 32}`), or merge it into "
                    "the base."
                )
            raise NotSupported("no_factors", message, subject=delta.module, next_step=next_step)


def _tensors(form: PeftAdapter) -> dict[str, torch.Tensor]:
    """PEFT's key -> tensor."""
    modules = set(form.modules)

    def key_of(delta: Replacement) -> str:
        inside = ".base_layer" if delta.module in modules else ""
        return f"{delta.module}{inside}.{delta.weight.rsplit('.', 1)[-1]}"

    pairs = ((key, tensor) for module in form.wrapped for key, tensor in module.tensors.items())
    full = ((key_of(delta), delta.tensor) for delta in form.replacements)
    return by_key((f"{PEFT_PREFIX}{key}", tensor) for key, tensor in chain(pairs, full))


def _config(form: PeftAdapter) -> dict[str, Any]:
    rank = Counter(module.rank for module in form.wrapped).most_common(1)[0][0]
    ranks = {f"^{module.name}": module.rank for module in form.wrapped if module.rank != rank}
    full = sorted({delta.module for delta in form.replacements if not delta.weight.endswith(".bias")})
    tying = {"ensure_weight_tying": True} if form.tied else {}
    parameters = {"target_parameters": sorted(form.parameters)} if form.parameters else {}
    return {
        "target_modules": sorted(form.modules),
        **parameters,
        **tying,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "bias": _bias(form),
        "modules_to_save": full or None,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _bias(form: PeftAdapter) -> str:
    biased = {delta.module for delta in form.replacements if delta.weight.endswith(".bias")}
    if not biased:
        return "none"
    return "lora_only" if biased <= set(form.modules) else "all"
