"""Adapters that are not in PEFT's layout: what a directory or file is, and its tensors by module. No torch.

kohya        `lora_te_…lora_down.weight`, `.lora_up.weight`, `.alpha`; LyCORIS' `hada_*` beside it
diffusers    `transformer.….lora_A.weight` or `.lora.down.weight`, alpha in the metadata or a tensor
mlx          adapters.safetensors with `lora_a`, `lora_b` transposed and a scale in adapter_config.json
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from composer.errors import InvalidFile, NotSupported
from composer.formats.checkpoint import Architecture, contained, missing_weights, read_json
from composer.formats.facts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.header import Header, read_header
from composer.formats.naming import PEFT_PREFIX
from composer.text import shown

PEFT, KOHYA, DIFFUSERS, MLX = "peft", "kohya", "diffusers", "mlx"
MLX_FILE = "adapters.safetensors"
_MLX_SCALE = 20.0
_MAGIC = {b"GGUF": "gguf"}
# layout -> why it is not read, and the way out.
REFUSED = {
    "gguf": (
        "its names and the rows of q and k are those of llama.cpp",
        "Convert the PEFT adapter that it was made from.",
    ),
    "nemo": (
        "Megatron interleaves the heads in fused weights",
        "Export it to Hugging Face PEFT with NeMo's own script.",
    ),
    "megatron": (
        "Megatron interleaves the heads in fused weights",
        "Export it to Hugging Face PEFT where it was trained.",
    ),
    "torchtune": ("it is a pickle, with q and k permuted in Meta's format", "Save it with torchtune's PEFT format."),
}

# Suffix of a key -> part of a module; the parts have PEFT's orientation but for mlx, whose are transposed.
_PARTS = {
    KOHYA: {
        ".lora_down.weight": "A", ".lora_up.weight": "B", ".lora_A.weight": "A", ".lora_B.weight": "B",
        ".alpha": "alpha",
        ".hada_w1_a": "w1_a", ".hada_w1_b": "w1_b", ".hada_w2_a": "w2_a", ".hada_w2_b": "w2_b",
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
    ".lokr_w1": "a Kronecker product has no short factors",
    ".lokr_w1_a": "a Kronecker product has no short factors",
}
_KOHYA_ROOT = re.compile(r"^lora_(?:unet|te\d?|transformer)_|^lora_")
_DIFFUSERS_ROOT = re.compile(r"^(?:unet|transformer|text_encoder(?:_\d)?)\.")


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


def recognise(path: Path) -> str:
    """The layout of an adapter directory or file: peft, kohya, diffusers, mlx, or one of those that are refused.

    Raises InvalidFile for what is none of them.
    """
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise InvalidFile(
            "missing_directory", f"{path} is not there.", subject=str(path), next_step="Name a directory that is there."
        )
    if (path / MLX_FILE).is_file():
        return MLX
    if (path / CONFIG_FILE).is_file() and not _single(path):
        return PEFT
    if (path / "config.json").is_file():
        message = f"{path.name} is a checkpoint, a whole model and no adapter."
        raise InvalidFile("a_checkpoint", message, subject=str(path), next_step="Name an adapter's directory.")
    for file in sorted(path.iterdir()):
        if file.suffix in (".gguf", ".nemo") or re.fullmatch(r"adapter_.*\.pt", file.name):
            return _of_file(file)
    file = _single(path)
    if file is None:
        raise missing_weights(path, WEIGHTS_FILE)
    return _of_file(file)


def _single(path: Path) -> Path | None:
    """The one safetensors file of a directory that is not named as PEFT names it."""
    found = [file for file in sorted(path.glob("*.safetensors")) if file.name != WEIGHTS_FILE]
    return found[0] if len(found) == 1 and not (path / WEIGHTS_FILE).is_file() else None


def _of_file(path: Path) -> str:
    if path.suffix == ".nemo":
        return "nemo"
    if re.fullmatch(r"adapter_.*\.pt", path.name):
        return "torchtune"
    with path.open("rb") as file:
        if layout := _MAGIC.get(file.read(4)):
            return layout
    header = read_header(contained(path.parent, path.name))
    keys = list(header.tensors)
    if any(".linear_in." in key or ".linear_out." in key for key in keys):
        return "megatron"
    if any(key.startswith("lora_") for key in keys):
        return KOHYA
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        return PEFT
    if any(_DIFFUSERS_ROOT.match(key) or ".lora.down." in key or ".lora_A." in key for key in keys):
        return DIFFUSERS
    raise InvalidFile(
        "unknown_layout",
        f"{path.name} is no adapter in a layout that is known; its keys look like {shown(keys[0] if keys else '')}.",
        subject=path.name,
        next_step=f"Known are {PEFT}, {KOHYA}, {DIFFUSERS} and {MLX}.",
    )


def read_foreign(path: Path, architecture: Architecture) -> Foreign:
    """Every tensor of the adapter by module of the base. Raises NotSupported for a layout or part that is refused by
    name, InvalidFile listing the keys that nothing is known of or that match no module of the base.
    """
    layout = recognise(path)
    if layout in REFUSED:
        why, way_out = REFUSED[layout]
        raise NotSupported(f"layout_{layout}", f"{path.name} is {layout}: {why}.", subject=path.name, next_step=way_out)
    if layout == PEFT:
        raise NotSupported(
            "layout_peft", f"{path.name} is in PEFT's layout already.", subject=path.name, next_step="Use it as it is."
        )
    settings: dict[str, Any] = {}
    if path.is_dir():
        if layout == MLX:
            settings = _mlx_settings(path)
        path = path / MLX_FILE if layout == MLX else cast(Path, _single(path))
    header = read_header(contained(path.parent, path.name))
    grouped = _grouped(header, layout, path.name)
    named = _names(grouped, layout, architecture, path.name)
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
    root = {KOHYA: _KOHYA_ROOT, DIFFUSERS: _DIFFUSERS_ROOT}.get(layout)
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
