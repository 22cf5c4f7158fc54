"""Converts an adapter in another layout to PEFT's, exactly, with all scales folded in."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from composer.deltas.delta import Layout, LowRank
from composer.deltas.stored import MappedFile, map_tensor
from composer.deltas.variants.load import place_or_refuse
from composer.errors import InvalidFile, NotSupported
from composer.export.kronecker import Kronecker, as_peft, kronecker, misfit
from composer.export.peft import peft_form, write_adapter, write_files
from composer.export.peft_layout import PeftModule
from composer.formats.adapters.config.config import PLAIN_INITS
from composer.formats.adapters.config.types import KRONECKER
from composer.formats.adapters.facts import WEIGHTS_FILE, read_adapter
from composer.formats.adapters.foreign import Foreign, ForeignModule, read_foreign
from composer.formats.adapters.layouts import MLX
from composer.formats.adapters.placement.naming import (
    PEFT_PREFIX,
    TIED_HEAD,
    Target,
    find_weight,
    is_embedding,
    is_head,
)
from composer.formats.adapters.placement.result import CONV1D_MODELS, shape_text
from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.checkpoints.hashing import hash_file
from composer.methods.structural import pair_for_head

_OF_THE_START = {"loftq_config", "corda_config", "lora_ga_config"}


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """The result of a conversion. `layout` is the source's."""

    layout: str
    modules: int
    rank_max: int
    out_dir: str
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def convert(path: Path, out_dir: Path, architecture: Architecture) -> ConvertReport:
    """Reads the adapter at `path` (a directory or a file), places it on a base, and writes it as a PEFT adapter.

    Raises what `read_foreign` and `write_adapter` raise, and InvalidFile for factors that do not fit the base.
    """
    foreign = read_foreign(path, architecture)
    weights = foreign.weights_path
    source = {"layout": foreign.layout, "file": weights.name, "digest": hash_file(weights)}
    note = {"made": "convert", "source": source}
    if any(part in KRONECKER for module in foreign.modules for part in module.parts):
        return _convert_kronecker(foreign, architecture, out_dir, note)
    deltas = [delta for module in foreign.modules for delta in _deltas(foreign, module, architecture)]
    fields: dict[str, Any] = {"fan_in_fan_out": architecture.model_type in CONV1D_MODELS, "task_type": "CAUSAL_LM"}
    # DoRA's m (O), with norms over the inputs of each output, in MLX as in PEFT.
    parts = {module.module: module.parts for module in foreign.modules}
    magnitudes = {module: _tensor(foreign, own["magnitude"]) for module, own in parts.items() if "magnitude" in own}
    form = peft_form(deltas)
    if magnitudes:
        form = replace(form, wrapped=[_with_magnitude(module, magnitudes) for module in form.wrapped])
    fields["use_dora"] = bool(magnitudes)
    size = write_adapter(form, out_dir, fields, note)
    return ConvertReport(foreign.layout, len(deltas), max(delta.rank for delta in deltas), str(out_dir), size)


def convert_rebased(path: Path, out_dir: Path, architecture: Architecture) -> ConvertReport:
    """Writes a LoRA initialized from its base (PiSSA, arXiv 2404.02948, OLoRA, …) as a plain LoRA for the residual base
    W - s B_0 A_0. `architecture` must be that residual base's, which cannot be checked.

    Raises what `read_adapter` raises, NotSupported for an adapter that already fits its base, and Mismatch for tensors
    that do not fit this base.
    """
    adapter = read_adapter(path)
    init, config = adapter.config.init, replace(adapter.config, init="true")
    if config.peft_type != "LORA" or init in PLAIN_INITS:
        message = f"{adapter.name} did not change its base at the start of training, so it has no residual base."
        raise NotSupported("not_rebased", message, subject=adapter.name)
    placed = place_or_refuse(replace(adapter, config=config), architecture, "converted")
    file = MappedFile.open(adapter.weights_path)
    tensors = {key: file.tensor(entry) for key, entry in adapter.header.tensors.items()}
    written = {name: value for name, value in config.raw.items() if name not in _OF_THE_START}
    source = {"layout": init, "file": WEIGHTS_FILE, "digest": hash_file(adapter.weights_path)}
    size = write_files(tensors, {**written, "init_lora_weights": True}, out_dir, {"made": "convert", "source": source})
    rank = max((module.rank for module in placed.adapted), default=0)
    return ConvertReport(init, len(placed.adapted), rank, str(out_dir), size)


def _convert_kronecker(
    foreign: Foreign, architecture: Architecture, out_dir: Path, note: Mapping[str, Any]
) -> ConvertReport:
    """Writes PEFT's LoKr, a separate type, since no low-rank factors are equal to it."""
    tensors, config = as_peft([_kronecker(foreign, module, architecture) for module in foreign.modules])
    keyed = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in tensors.items()}
    size = write_files(keyed, {**config, "task_type": "CAUSAL_LM"}, out_dir, note)
    rank = max(config["r"], *config["rank_pattern"].values(), 0)
    return ConvertReport(foreign.layout, len(foreign.modules), rank, str(out_dir), size)


def _kronecker(foreign: Foreign, module: ForeignModule, architecture: Architecture) -> Kronecker:
    """The module as a LoKr. Raises NotSupported for a layer without LoKr in PEFT, or beside modules of another type,
    and InvalidFile for one that does not fit the base."""
    path = module.module
    others = sorted(part for part in module.parts if part not in KRONECKER and part != "alpha")
    if others or not any(part in KRONECKER for part in module.parts):
        message = (
            f"{path} has {', '.join(others) or 'an alpha alone'}, but other modules have a LoKr: PEFT allows one type."
        )
        raise NotSupported("mixed_types", message, subject=path)
    target = _target(path, architecture)
    if is_embedding(path) or architecture.model_type in CONV1D_MODELS:
        message = f"{path} is not a linear layer, and PEFT has no LoKr for it."
        raise NotSupported("lokr_layer", message, subject=path)
    tensors = {part: _tensor(foreign, key) for part, key in module.parts.items() if part != "alpha"}
    converted = kronecker(path, tensors, _alpha(foreign, module))
    _refuse_misfit(path, converted.size, architecture.tensors[target.weight].shape)
    return converted


def _with_magnitude(module: PeftModule, magnitudes: Mapping[str, torch.Tensor]) -> PeftModule:
    """The module with its magnitude. PEFT has magnitudes for all modules or none, and its norm for embeddings differs
    from MLX's."""
    m_O, B_OR = magnitudes.get(module.name), module.tensors.get(f"{module.name}.lora_B.weight")
    if m_O is None or B_OR is None:
        message = f"{module.name} has no magnitude (DoRA) that PEFT can hold, but other modules have one."
        raise NotSupported("dora", message, subject=module.name)
    if m_O.shape != B_OR.shape[:1]:
        message = f"{module.name} has a magnitude of shape {list(m_O.shape)} for {B_OR.shape[0]} outputs."
        raise InvalidFile("shape_mismatch", message, subject=module.name, next_step="Export the adapter again.")
    return replace(module, tensors={**module.tensors, f"{module.name}.lora_magnitude_vector": m_O})


def _deltas(foreign: Foreign, module: ForeignModule, architecture: Architecture) -> list[LowRank]:
    A, B = _factors(foreign, module)
    if A.dim() == 3:  # experts, in order
        # MLX stacks experts; on disk each has its own tensor.
        paths = [module.module.replace(".experts.0.", f".experts.{number}.") for number in range(A.shape[0])]
    else:
        paths, A, B = [module.module], A[None], B[None]
    scale = _scale(foreign, module, A.shape[1])
    placed = [_placed_pair(path, A[number], B[number], scale, architecture) for number, path in enumerate(paths)]
    alone = not any(is_head(other.module) for other in foreign.modules)
    if foreign.layout == MLX and placed[0].tied and is_embedding(module.module) and alone:
        # There the embedding is also the head (LoRAEmbedding.as_linear), including its delta.
        twin = replace(placed[0], twin=True)
        return [twin, pair_for_head(twin, TIED_HEAD)]
    return placed


def _factors(foreign: Foreign, module: ForeignModule) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) in PEFT's orientation, R x I and O x R; with experts E x R x I and E x O x R.

    Raises InvalidFile for parts that do not fit together.
    """
    parts = {part: _tensor(foreign, key) for part, key in module.parts.items() if part != "alpha"}
    if "w1_a" in parts:
        return _hadamard(module, parts)
    if not {"A", "B"} <= parts.keys():
        there = ", ".join(sorted(module.parts))
        raise _missing(module, f"has only {there}")
    A, B = parts["A"], parts["B"]
    if foreign.layout == MLX and A.dim() == 2:
        A, B = A.T, B.T
    if A.dim() == 4 and A.shape[2:] == (1, 1):  # a linear layer trained as a 1 x 1 convolution
        A, B = A.flatten(1), B.flatten(1)
    fits = A.dim() == B.dim() and A.dim() in (2, 3) and A.shape[-2] == B.shape[-1] > 0
    if not fits or (A.dim() == 3 and A.shape[0] != B.shape[0]):
        shapes = f"{list(A.shape)} and {list(B.shape)}"
        raise misfit("shape_mismatch", module.module, f"has factors of shape {shapes}")
    return A, B


def _missing(module: ForeignModule, what: str) -> InvalidFile:
    next_step = "Export the adapter again: a module needs all of its factors."
    return InvalidFile("missing_pair", f"{module.module} {what}.", subject=module.module, next_step=next_step)


def _hadamard(module: ForeignModule, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """LoHa as a LoRA of rank r^2, exactly: (a b) * (c d) = Σ_ij (a_i * c_j)(b_i * d_j), columns and rows by element."""
    try:
        a, b, c, d = (parts[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    except KeyError as error:
        raise _missing(module, f"has no {error.args[0]}") from error
    shapes = [list(part.shape) for part in (a, b, c, d)]
    rank = a.shape[-1] if a.dim() == 2 else 0
    wanted = [[shapes[0][0], rank], [rank, shapes[1][-1]]] if rank and b.dim() == 2 else []
    if shapes != wanted * 2:
        raise misfit("shape_mismatch", module.module, f"has factors of shapes {shapes}, which do not form a product")
    if rank**2 > min(len(a), b.shape[1]):  # the factors would be larger than the matrix
        message = (
            f"{module.module} is a LoHa of rank {rank}: a LoRA of rank {rank**2:,} would be larger than its matrix."
        )
        raise NotSupported("loha_rank", message, subject=module.module)
    B = (a[:, :, None] * c[:, None, :]).flatten(1)
    A = (b[:, None, :] * d[None, :, :]).flatten(0, 1)
    return A, B


def _scale(foreign: Foreign, module: ForeignModule, rank: int) -> float:
    """alpha / r; for LoHa, r is the rank of each factor, and the rank here is its square."""
    if "w1_a" in module.parts:
        rank = round(rank**0.5)
    if (alpha := _alpha(foreign, module)) is not None:
        return alpha / rank
    return 1.0 if module.scale is None else module.scale


def _alpha(foreign: Foreign, module: ForeignModule) -> float | None:
    """The module's own alpha, if it has one."""
    if "alpha" not in module.parts:
        return None
    alpha = _tensor(foreign, module.parts["alpha"])
    if alpha.numel() != 1 or not bool(alpha.isfinite().all()):
        message = f"{module.parts['alpha']} is not a finite number."
        raise InvalidFile("bad_alpha", message, subject=module.module)
    return float(alpha)


def _placed_pair(path: str, A: torch.Tensor, B: torch.Tensor, scale: float, architecture: Architecture) -> LowRank:
    target = _target(path, architecture)
    layout = Layout.EMBEDDING if is_embedding(path) else Layout.LINEAR
    if architecture.model_type in CONV1D_MODELS and layout is Layout.LINEAR:
        layout = Layout.CONV1D
    delta = LowRank(
        module=path,
        weight=target.weight,
        layout=layout,
        A=A.float().contiguous(),
        B=B.float().contiguous(),
        scale=scale,
        tied=target.tied,
    )
    _refuse_misfit(path, delta.stored_shape, architecture.tensors[target.weight].shape)
    return delta


def _target(path: str, architecture: Architecture) -> Target:
    target = find_weight(path, "weight", architecture)
    if not isinstance(target, Target):
        message = f"{path} is not a tensor of the base."
        next_step = "Name the base it was trained on."
        raise InvalidFile("unmatched_tensor", message, subject=path, next_step=next_step)
    return target


def _refuse_misfit(path: str, made_for: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if made_for != expected:
        what = f"is made for {shape_text(made_for)}; the base's is {shape_text(expected)}"
        raise misfit("shape_mismatch", path, what)


def _tensor(foreign: Foreign, key: str) -> torch.Tensor:
    # A copy, since a view would keep a mapping of the file for each tensor.
    return map_tensor(foreign.weights_path, foreign.header.tensors[key]).to(torch.float32, copy=True)
