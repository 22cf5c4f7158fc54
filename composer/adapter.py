"""Deltas -> one ordinary PEFT adapter on disk, every scale folded in: alpha is the rank, so s = 1."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from composer.delta import Computed, Delta, Layout, LowRank, Replacement
from composer.errors import NotSupported, RefusedOutput
from composer.formats.facts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.header import FLOAT_DTYPES, TensorSpec, encode_header, parse_header
from composer.formats.naming import PEFT_PREFIX, split_key
from composer.methods.linear import side_by_side
from composer.output import NOTE_FILE, write_json, writing_aside
from composer.tensors import DTYPE_NAMES, tensor_bytes

_SPARE_BYTES = 1 << 20


def write_adapter(
    deltas: Sequence[Delta], out_dir: Path, targets: Sequence[str], fields: Mapping[str, Any], note: Mapping[str, Any]
) -> int:
    """Write the deltas to the directory `out_dir`, in float32; return the size of the weights file.

    `targets` become `target_modules`, `fields` further fields of the config, `note` what lies beside it. Raises
    NotSupported for a delta that no LoRA can hold, RefusedOutput for a directory that exists or a value that is not
    finite.
    """
    deltas = one_a_place(deltas)
    _refuse_others(deltas)
    tensors = _tensors(deltas)
    _refuse_not_finite(tensors)
    specs = {key: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    head = encode_header(specs, {"format": "pt"})
    size = len(head) + sum(spec.size_bytes for spec in specs.values())
    with writing_aside(out_dir, size + _SPARE_BYTES) as aside:
        with (aside / WEIGHTS_FILE).open("wb") as file:
            file.write(head)
            for name in parse_header(head, size).tensors:
                file.write(tensor_bytes(tensors[name]))
        write_json(aside / CONFIG_FILE, {**_config(deltas), "target_modules": list(targets), **fields})
        write_json(aside / NOTE_FILE, note)
    return size


def pairs_of(deltas: Sequence[Delta]) -> list[LowRank]:
    return [delta for delta in deltas if isinstance(delta, LowRank)]


def one_a_place(deltas: Sequence[Delta]) -> list[Delta]:
    """A sum of low-rank deltas as one: an adapter holds one pair a place."""
    places: dict[tuple[str, int], list[LowRank]] = defaultdict(list)
    for delta in pairs_of(deltas):
        places[delta.weight, delta.begin].append(delta)
    summed = [one for own in places.values() for one in side_by_side(own, [1.0] * len(own))]
    return [*(delta for delta in deltas if not isinstance(delta, LowRank)), *summed]


def _refuse_others(deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if isinstance(delta, Computed):
            message = f"What is added to {delta.module} has no factors, so no LoRA can hold it."
            next_step = "Cut it to a rank (rank=32 or energy=0.99), or merge it into the base."
            raise NotSupported("no_factors", message, subject=delta.module, next_step=next_step)
        if isinstance(delta, LowRank) and (delta.stacked or not delta.weight.endswith(".weight")):
            message = f"{delta.module} is an expert of a stack or a packed attention, which is not written yet."
            raise NotSupported("experts", message, subject=delta.module, next_step="Merge it into the base.")


def _tensors(deltas: Sequence[Delta]) -> dict[str, torch.Tensor]:
    """PEFT's key -> tensor."""
    targeted = {delta.module for delta in pairs_of(deltas)}
    tensors: dict[str, torch.Tensor] = {}
    for delta in deltas:
        path = f"{PEFT_PREFIX}{delta.module}"
        if isinstance(delta, Replacement):
            wrapped = ".base_layer" if delta.module in targeted else ""
            tensors[f"{path}{wrapped}.{delta.weight.rsplit('.', 1)[-1]}"] = delta.tensor
        elif isinstance(delta, LowRank) and delta.layout is Layout.EMBEDDING:
            tensors |= {f"{path}.lora_embedding_A": delta.A_RI, f"{path}.lora_embedding_B": delta.B_OR}
        elif isinstance(delta, LowRank):
            ones = (1,) * len(delta.kernel)
            A, B = delta.A_RI, delta.B_OR
            if delta.kernel:
                A, B = A.reshape(delta.rank, -1, *delta.kernel), B.reshape(*B.shape, *ones)
            tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    return tensors


def _refuse_not_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if DTYPE_NAMES[tensor.dtype] in FLOAT_DTYPES and not bool(torch.isfinite(tensor).all()):
            message = f"{key} would have a NaN or an infinite value."
            raise RefusedOutput("not_finite", message, subject=split_key(key).module, next_step="Lower the weights.")


def _config(deltas: Sequence[Delta]) -> dict[str, Any]:
    pairs = pairs_of(deltas)
    if not pairs:
        raise NotSupported("no_pairs", "There is no low-rank pair to write: nothing that an adapter could hold.")
    rank = Counter(delta.rank for delta in pairs).most_common(1)[0][0]
    ranks = {f"^{delta.module}": delta.rank for delta in pairs if delta.rank != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "bias": _bias(deltas),
        "modules_to_save": _whole_modules(deltas) or None,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _bias(deltas: Sequence[Delta]) -> str:
    targeted = {delta.module for delta in pairs_of(deltas)}
    biased = {d.module for d in deltas if isinstance(d, Replacement) and d.weight.endswith(".bias")}
    if not biased:
        return "none"
    return "lora_only" if biased <= targeted else "all"


def _whole_modules(deltas: Sequence[Delta]) -> list[str]:
    return sorted({d.module for d in deltas if isinstance(d, Replacement) and not d.weight.endswith(".bias")})
