"""Adapters that are not in PEFT's layout: their tensors by module. No torch."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from composer.errors import InvalidFile, NotSupported
from composer.formats.checkpoint import Architecture, contained, read_json
from composer.formats.facts import read_adapter
from composer.formats.header import Header, read_header
from composer.formats.layouts import (
    CONFIG_FILE,
    DIFFUSERS,
    DIFFUSERS_ROOT,
    KOHYA,
    MLX,
    PEFT,
    REFUSED,
    another_layout,
    recognise,
    weights_in,
)
from composer.formats.types import KRONECKER
from composer.text import shown

_MLX_SCALE = 20.0
# Suffix of a key -> part of a module; the parts have PEFT's orientation but for mlx, whose are transposed.
_PARTS = {
    KOHYA: {
        ".lora_down.weight": "A", ".lora_up.weight": "B", ".lora_A.weight": "A", ".lora_B.weight": "B",
        ".alpha": "alpha",
        ".hada_w1_a": "w1_a", ".hada_w1_b": "w1_b", ".hada_w2_a": "w2_a", ".hada_w2_b": "w2_b",
        **{f".{part}": part for part in KRONECKER},
    },
    DIFFUSERS: {
        ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora.down.weight": "A", ".lora.up.weight": "B",
        ".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha",
    },
    MLX: {".lora_a": "A", ".lora_b": "B", ".m": "magnitude"},
}  # fmt: skip
# MLX calls an expert's own tensors alike in every model, where some checkpoints have Mixtral's names.
_MLX_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# What is known, and why it is not converted.
_PARTS_REFUSED = {
    ".dora_scale": "trainers disagree on the axis of its norm",
    ".lora_mid.weight": "it is a Tucker decomposition",
    ".hada_t1": "it is a Tucker decomposition",
    ".lokr_t2": "it is a Tucker decomposition",
}
_KOHYA_ROOT = re.compile(r"^lora_(?:unet|te\d?|transformer)_|^lora_")


@dataclass(frozen=True, slots=True)
class ForeignModule:
    """`module` is the base's path, for MLX's stack of experts the first one's; `parts` maps A, B, alpha, w1_a, … to
    keys. `scale` is None where alpha / r is."""

    module: str
    parts: Mapping[str, str]
    scale: float | None


@dataclass(frozen=True, slots=True)
class Foreign:
    """An adapter of another layout, placed on a base by name; its tensors are in the file `weights_path`."""

    layout: str
    weights_path: Path
    header: Header
    modules: list[ForeignModule]


def read_foreign(path: Path, architecture: Architecture | None) -> Foreign:
    """Every tensor of the adapter by module of the base, or by the file's own names without one.

    Raises NotSupported for a layout or part that is refused by name, InvalidFile listing the keys that nothing is known
    of or that match no module of the base, and what `read_adapter` raises of PEFT's layout.
    """
    layout = recognise(path)
    if layout in REFUSED:
        raise another_layout(path.name, layout)
    if layout == PEFT:
        if path.is_dir():
            read_adapter(path)  # says what is missing
        raise NotSupported(
            "layout_peft", f"{path.name} is in PEFT's layout already.", subject=path.name, next_step="Use it as it is."
        )
    settings: dict[str, Any] = {}
    if path.is_dir():
        if layout == MLX:
            settings = _mlx_settings(path)
        path = cast(Path, weights_in(path))
    header = read_header(contained(path.parent, path.name))
    grouped = _grouped(header, layout, path.name)
    named = _names(grouped, layout, architecture, path.name) if architecture else {raw: raw for raw in grouped}
    scale = _scale(settings, layout)
    modules = [ForeignModule(named[raw], parts, None if "alpha" in parts else scale) for raw, parts in grouped.items()]
    return Foreign(layout, path, header, modules)


def _mlx_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path / CONFIG_FILE, "missing_config", "MLX writes it beside the weights.")
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise NotSupported(
            "mlx_full",
            f"{path.name} was trained with fine_tune_type {shown(kind)}: it holds whole weights, no adapter.",
            subject=CONFIG_FILE,
            next_step="Release it as a model.",
        )
    return settings


def _grouped(header: Header, layout: str, subject: str) -> dict[str, dict[str, str]]:
    grouped: dict[str, dict[str, str]] = defaultdict(dict)
    unknown: list[str] = []
    for key in header.tensors:
        for suffix, why in _PARTS_REFUSED.items():
            if key.endswith(suffix):
                raise NotSupported(
                    f"part_{suffix.strip('.')}",
                    f"{subject} cannot be converted: {key} is there, and {why}.",
                    subject=key,
                    next_step="Merge it where it was trained, or train a plain LoRA.",
                )
        suffix = next((suffix for suffix in _PARTS[layout] if key.endswith(suffix)), None)
        if suffix is None:
            unknown.append(key)
            continue
        grouped[key.removesuffix(suffix)][_PARTS[layout][suffix]] = key
    _refuse_listed(unknown, subject, "keys that nothing is known of")
    return grouped


def _names(grouped: Mapping[str, object], layout: str, architecture: Architecture, subject: str) -> dict[str, str]:
    """The file's name of a module -> the base's path."""
    paths = {name.removesuffix(".weight") for name in architecture.tensors if name.endswith(".weight")}
    if architecture.tied:
        paths.add("lm_head")
    known: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        known[path].add(path)
        if layout == MLX and ".experts.0." in path:  # whose experts are one stack
            block, _, name = path.partition(".experts.0.")
            known[f"{block}.switch_mlp.{_MLX_EXPERTS.get(name, name)}"].add(path)
        if layout == KOHYA:
            known[path.replace(".", "_")].add(path)
        # Trainers name modules from the model, or from the part of it that they load.
        for root in ("model.", "language_model.", "transformer."):
            rest = path.removeprefix(root)
            known[rest if layout != KOHYA else rest.replace(".", "_")].add(path)
    root = {KOHYA: _KOHYA_ROOT, DIFFUSERS: DIFFUSERS_ROOT}.get(layout)
    found: dict[str, str] = {}
    lost: list[str] = []
    for raw in grouped:
        hits = known.get(raw, set()) or (known.get(root.sub("", raw, count=1), set()) if root else set[str]())
        if len(hits) == 1:
            found[raw] = next(iter(hits))
        else:
            lost.append(raw)
    _refuse_listed(lost, subject, f"modules that the base ({architecture.model_type}) does not have, or has several of")
    return found


def _scale(settings: Mapping[str, Any], layout: str) -> float:
    """What a module's delta is multiplied by where no tensor says: as MLX's config does, else by 1."""
    if layout != MLX:
        return 1.0
    stated: object = settings.get("lora_parameters") or {}
    value: object = cast("dict[str, object]", stated).get("scale", _MLX_SCALE) if isinstance(stated, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise InvalidFile(
            "bad_config",
            f"lora_parameters.scale is {shown(value)}, no number.",
            subject=CONFIG_FILE,
            next_step="Write the number that the adapter was trained with.",
        )
    return float(value)


def metadata_alpha(header: Header) -> float | None:
    """lora_alpha that diffusers keeps in the file's metadata, when it is there and is a number."""
    try:
        stated: object = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return None
    values = cast("dict[str, object]", stated).items() if isinstance(stated, dict) else ()
    found = [value for name, value in values if name.split(".")[-1] == "lora_alpha" and type(value) in (int, float)]
    return float(cast(float, found[0])) if len(found) == 1 else None


def _refuse_listed(names: list[str], subject: str, what: str) -> None:
    if names:
        listed = ", ".join(repr(name[:200]) for name in names[:10])
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise InvalidFile(
            "unknown_keys",
            f"{subject} has {what}: {listed}{more}.",
            subject=names[0][:200],
            next_step="Convert it with the tool that wrote it, or report the layout.",
        )
