"""Adapters in layouts other than PEFT's: their tensors by module, and their facts without a base."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, cast

import numpy as np

from composer.errors import InvalidFile, NotSupported
from composer.formats.adapters.config.config import AdapterConfig, parse_config
from composer.formats.adapters.config.types import KRONECKER
from composer.formats.adapters.facts import AdapterFacts, read_adapter
from composer.formats.adapters.layouts import (
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
from composer.formats.checkpoints.checkpoint import Architecture, contained, read_json
from composer.formats.checkpoints.files import LocalFile, read_range
from composer.formats.checkpoints.header import Header, TensorEntry, read_header
from composer.formats.checkpoints.numeric import NUMPY_DTYPES, as_float64
from composer.formats.untrusted import printable

_MLX_SCALE = 20.0
_METADATA = "lora_adapter_metadata"
# Suffix of a key -> part of a module; the parts have PEFT's orientation, except for mlx, whose parts are transposed.
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
# MLX uses the same names for an expert's tensors in every model, where some checkpoints have Mixtral's names.
_MLX_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Known parts, and why they are not converted.
_PARTS_REFUSED = {
    ".dora_scale": "trainers disagree on the axis of its norm",
    ".lora_mid.weight": "it is a Tucker decomposition",
    ".hada_t1": "it is a Tucker decomposition",
    ".lokr_t2": "it is a Tucker decomposition",
}
_KOHYA_ROOT = re.compile(r"^lora_(?:unet|te\d?|transformer)_|^lora_")


@dataclass(frozen=True, slots=True)
class ForeignModule:
    """The tensors of one module. `module` is the base's path, for MLX's stack of experts the first one's; `parts` maps
    A, B, alpha, w1_a, … to keys. `scale` is None if alpha / r is the scale."""

    module: str
    parts: Mapping[str, str]
    scale: float | None


@dataclass(frozen=True, slots=True)
class Foreign:
    """An adapter of another layout, matched with a base by name; its tensors are in the file `weights_path`."""

    layout: str
    weights_path: Path
    header: Header
    modules: list[ForeignModule]


def read_foreign(path: Path, architecture: Architecture | None) -> Foreign:
    """Reads an adapter: every tensor by module of the base, or by the file's own names without a base.

    Raises NotSupported for a layout or part that is refused by name, InvalidFile listing the keys that are unknown or
    match no module of the base, and what `read_adapter` raises for PEFT's layout.
    """
    layout = recognise(path).layout
    if layout in REFUSED:
        raise another_layout(path.name, layout)
    if layout == PEFT:
        if path.is_dir():
            read_adapter(path)  # says what is missing
        raise NotSupported("layout_peft", f"{path.name} is in PEFT's layout already.", subject=path.name)
    settings: dict[str, Any] = {}
    if path.is_dir():
        if layout == MLX:
            settings = _mlx_settings(path)
        path = cast(Path, weights_in(path))
    header = read_header(contained(path.parent, path.name))
    grouped = _grouped(header, layout, path.name)
    named = _names(grouped, layout, architecture, path.name) if architecture else {raw: raw for raw in grouped}
    scale, configs = _scale(settings, layout), _configs(header) if layout == DIFFUSERS else {}
    modules = [
        ForeignModule(named[raw], parts, None if "alpha" in parts else _scale_of(raw, parts, header, configs, scale))
        for raw, parts in grouped.items()
    ]
    return Foreign(layout, path, header, modules)


def _mlx_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path / CONFIG_FILE, "missing_config", "MLX writes it beside the weights.")
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise NotSupported(
            "mlx_full",
            f"{path.name} was trained with fine_tune_type {printable(kind)}: it holds full weights, not an adapter.",
            subject=CONFIG_FILE,
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
                    f"{subject} cannot be converted: it has {key}, and {why}.",
                    subject=key,
                    next_step="Merge it where it was trained, or train a plain LoRA.",
                )
        suffix = next((suffix for suffix in _PARTS[layout] if key.endswith(suffix)), None)
        if suffix is None:
            unknown.append(key)
            continue
        grouped[key.removesuffix(suffix)][_PARTS[layout][suffix]] = key
    _refuse_listed(unknown, subject, "unknown keys")
    return grouped


def _names(grouped: Mapping[str, object], layout: str, architecture: Architecture, subject: str) -> dict[str, str]:
    """Maps the file's names of modules to the base's paths."""
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
    resolved: dict[str, str] = {}
    lost: list[str] = []
    for raw in grouped:
        hits = known.get(raw, set()) or (known.get(root.sub("", raw, count=1), set()) if root else set[str]())
        if len(hits) == 1:
            resolved[raw] = next(iter(hits))
        else:
            lost.append(raw)
    _refuse_listed(lost, subject, f"modules that the base ({architecture.model_type}) does not have, or has several of")
    return resolved


def _scale(settings: Mapping[str, Any], layout: str) -> float:
    """The scale of a module's delta if no tensor states it: from MLX's config, otherwise 1."""
    if layout != MLX:
        return 1.0
    stated: object = settings.get("lora_parameters") or {}
    value: object = cast("dict[str, object]", stated).get("scale", _MLX_SCALE) if isinstance(stated, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise InvalidFile(
            "bad_config",
            f"lora_parameters.scale is {printable(value)}, not a number.",
            subject=CONFIG_FILE,
            next_step="Write the number that the adapter was trained with.",
        )
    return float(value)


def _configs(header: Header) -> dict[str, AdapterConfig]:
    """Maps components to PEFT configs, as diffusers keeps them in the metadata (`transformer.lora_alpha`); {} if there
    are none. Raises InvalidFile for a malformed one, and NotSupported for a setting that changes the meaning of the
    tensors."""
    try:
        stated: object = json.loads(header.metadata.get(_METADATA, "{}"))
    except (ValueError, RecursionError):
        stated = None
    if not isinstance(stated, dict):
        message, next_step = f"{_METADATA} must be a JSON object.", "Export the adapter again."
        raise InvalidFile("bad_config", message, subject=_METADATA, next_step=next_step)
    fields: dict[str, dict[str, object]] = defaultdict(dict)
    for name, value in cast("dict[str, object]", stated).items():
        component, _, field = name.rpartition(".")
        fields[component][field] = value
    resolved: dict[str, AdapterConfig] = {}
    for component, own in fields.items():
        subject = f"{_METADATA} of {component}" if component else _METADATA
        config = parse_config(json.dumps({**own, "peft_type": "LORA"}).encode(), subject)
        if config.flags or config.unsupported():
            message = f"{subject} says {', '.join(config.flags) or config.init}: this is not a plain LoRA."
            next_step = "Merge it where it was trained, or train a plain LoRA."
            raise NotSupported("diffusers_variant", message, subject=subject, next_step=next_step)
        resolved[component] = config
    return resolved


def _scale_of(
    raw: str, parts: Mapping[str, str], header: Header, configs: Mapping[str, AdapterConfig], otherwise: float
) -> float:
    """The alpha of a module without its own. Raises InvalidFile if the configs leave it open."""
    if not configs or "A" not in parts:
        return otherwise
    component, _, module = raw.partition(".")
    if component not in configs:
        component, module = next(iter(configs)), raw
        if len(configs) > 1 or (component and DIFFUSERS_ROOT.match(raw)):
            message = f"{raw} belongs to none of {', '.join(map(repr, configs))}, so its alpha is not known."
            next_step = "Export the adapter again, with the metadata of all its parts."
            raise InvalidFile("bad_config", message, subject=_METADATA, next_step=next_step)
    config, rank = configs[component], next(iter(header.tensors[parts["A"]].shape), 0)
    if rank == 0 or ("r" in config.raw and config.rank_for(module) != rank):
        message = f"{raw} has the rank {rank}; {_METADATA} states {config.rank_for(module)}."
        raise InvalidFile("rank_mismatch", message, subject=raw)
    return config.alpha_for(module) / (sqrt(rank) if config.use_rslora else rank)


def _refuse_listed(names: list[str], subject: str, what: str) -> None:
    if names:
        listed = ", ".join(repr(name[:200]) for name in names[:10])
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise InvalidFile("unknown_keys", f"{subject} has {what}: {listed}{more}.", subject=names[0][:200])


# The parts whose first side is the rank; a LoKr with two full sides has none of them, and no rank.
_RANKED = ("A", "w1_b", "lokr_w1_b", "lokr_w2_b")


def foreign_facts(foreign: Foreign) -> AdapterFacts:
    """Facts in PEFT's terms: an alpha for each scale. `targets` are ends of names, for kohya the part after the layer.
    Raises InvalidFile for an alpha that is not a finite number, which `convert` refuses too."""
    entries = foreign.header.tensors.values()
    parts = {part for module in foreign.modules for part in module.parts}
    kind = "loha" if "w1_a" in parts else "lokr" if any(part.startswith("lokr_") for part in parts) else "lora"
    ranks = {module.module: _rank(foreign, module) for module in foreign.modules}
    alphas = {module.module: _alpha(foreign, module, ranks[module.module]) for module in foreign.modules}
    dtypes: Counter[str] = Counter()
    for entry in entries:
        dtypes[entry.dtype] += entry.size_bytes
    return AdapterFacts(
        type=kind,
        variant="dora" if "magnitude" in parts else kind,
        rank_max=max(ranks.values(), default=0),
        alpha=Counter(alphas.values()).most_common(1)[0][0] if alphas else 0.0,
        targets=tuple(sorted({_target(module.module) for module in foreign.modules})),
        modules=len(foreign.modules),
        parameters=sum(entry.spec.elements for entry in entries),
        size_bytes=foreign.header.size_bytes,
        dtype=dtypes.most_common(1)[0][0] if dtypes else "F32",
        modules_to_save=(),
        use_rslora=False,
        ranks=ranks,
        alphas=alphas,
        base_model_name_or_path=None,
        peft_version=None,
    )


def _rank(foreign: Foreign, module: ForeignModule) -> int:
    part = next((part for part in _RANKED if part in module.parts), None)
    if part is None:
        return 0
    shape = foreign.header.tensors[module.parts[part]].shape
    if foreign.layout == MLX and len(shape) == 2:  # transposed, but for a stack of experts
        return shape[1]
    return shape[-2] if len(shape) == 3 else shape[0] if shape else 0


def _alpha(foreign: Foreign, module: ForeignModule, rank: int) -> float:
    """The module's alpha, or the one that its scale implies."""
    key = module.parts.get("alpha")
    stated = None if key is None else _number(foreign.weights_path, foreign.header.tensors[key])
    if stated is not None and not isfinite(stated):
        message = f"{key} is not a finite number."
        raise InvalidFile("bad_alpha", message, subject=module.module)
    return (1.0 if module.scale is None else module.scale) * rank if stated is None else stated


def _number(path: Path, entry: TensorEntry) -> float | None:
    """The single number of a tensor; None if it has not exactly one."""
    if entry.spec.elements != 1 or entry.dtype not in NUMPY_DTYPES:
        return None
    stored = np.frombuffer(read_range(LocalFile(path), entry.begin, entry.end), dtype=NUMPY_DTYPES[entry.dtype])
    return float(as_float64(stored, entry.dtype)[0])


def _target(name: str) -> str:
    return name.rpartition(".")[2] if "." in name else re.split(r"_\d+_", name)[-1]
