"""Several adapters -> one ordinary PEFT adapter, every scale folded in, s = 1: exactly, or cut to a rank."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from composer.checks import structural
from composer.delta import Computed, Delta, Layout, LowRank, Replacement
from composer.errors import NotSupported, RefusedOutput
from composer.findings import Finding, Severity
from composer.formats.checkpoint import Architecture
from composer.formats.facts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.header import FLOAT_DTYPES, TensorSpec, encode_header, parse_header
from composer.formats.naming import PEFT_PREFIX, split_key
from composer.hashing import hash_file
from composer.methods import Compression, combine_deltas
from composer.methods.linear import side_by_side
from composer.output import NOTE_FILE, write_json, writing_aside
from composer.settings import parse_settings
from composer.tensors import DTYPE_NAMES, tensor_bytes
from composer.variants import LoadedAdapter, load_deltas
from composer.weights import Weight, parse_weight

_SPARE_BYTES = 1 << 20
_SHARED_FIELDS = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What was written. `ranks` counts modules by rank; `compressions` say what each module lost to a rank."""

    out_dir: str
    modules: int
    ranks: Mapping[int, int]
    replacements: int
    size_bytes: int
    compressions: tuple[Compression, ...]
    findings: tuple[Finding, ...]

    @property
    def lost(self) -> float:
        """|Δ - Δ'| / |Δ| over the whole model; 0 where nothing was compressed."""
        norm = sum(one.norm**2 for one in self.compressions)
        return (sum(one.error**2 for one in self.compressions) / norm) ** 0.5 if norm else 0.0

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(one) | {"relative": one.relative} for one in self.compressions]
        return asdict(self) | {"compressions": rows, "lost": self.lost}


def combine(
    adapters: Sequence[tuple[Path, Weight | float]],
    out_dir: Path,
    architecture: Architecture | None = None,
    method: str = "stack",
    settings: Mapping[str, object] | None = None,
    note: Mapping[str, Any] | None = None,
) -> CombineReport:
    """Write the combination of (adapter directory, weight) pairs as one PEFT adapter in float32.

    Its delta is the method's: exactly, with a rank up to the sum of the ranks, or cut to the settings' rank or share of
    the energy, with the error of each module in the report. Alpha equals the rank (so s = 1, no rsLoRA), patterns say
    where ranks differ. Without an architecture adapters are matched by their own module names and shapes only. Raises
    NotSupported for a method of full space without a rank, and what a merge raises.
    """
    parsed = parse_settings(method, settings or {})
    loaded = [load_deltas(path, architecture) for path, _ in adapters]
    # An adapter leaves the weights alone, so a tied tensor has two sides here whatever a merge would do with it.
    combined = combine_deltas(loaded, [weight for _, weight in adapters], method, {**parsed, "tied": "untie"})
    deltas = _one_a_place(combined.deltas)
    _refuse_computed(deltas)
    tensors = _tensors(deltas)
    config = _config(loaded, deltas)
    specs = {key: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    _refuse_not_finite(tensors)
    head = encode_header(specs, {"format": "pt"})
    size = len(head) + sum(spec.size_bytes for spec in specs.values())
    with writing_aside(out_dir, size + _SPARE_BYTES) as aside:
        with (aside / WEIGHTS_FILE).open("wb") as file:
            file.write(head)
            for name in parse_header(head, size).tensors:
                file.write(tensor_bytes(tensors[name]))
        write_json(aside / CONFIG_FILE, config)
        write_json(aside / NOTE_FILE, _note(loaded, [weight for _, weight in adapters], method, parsed, note))
    pairs = _pairs(deltas)
    return CombineReport(
        out_dir=str(out_dir),
        modules=len(pairs),
        ranks=dict(Counter(delta.rank for delta in pairs)),
        replacements=len(deltas) - len(pairs),
        size_bytes=size,
        compressions=tuple(combined.compressions),
        findings=(*structural(loaded, {"tied": "untie"}), *_dropped_copies(loaded)),
    )


def _one_a_place(deltas: Sequence[Delta]) -> list[Delta]:
    """A sum of low-rank deltas as one: an adapter holds one pair a place."""
    places: dict[tuple[str, int], list[LowRank]] = defaultdict(list)
    for delta in _pairs(deltas):
        places[delta.weight, delta.begin].append(delta)
    summed = [one for own in places.values() for one in side_by_side(own, [1.0] * len(own))]
    return [*(delta for delta in deltas if not isinstance(delta, LowRank)), *summed]


def _pairs(deltas: Sequence[Delta]) -> list[LowRank]:
    return [delta for delta in deltas if isinstance(delta, LowRank)]


def _refuse_computed(deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if isinstance(delta, Computed):
            message = f"What is added to {delta.module} has no factors, so no LoRA can hold it."
            next_step = "Cut it to a rank (rank=32 or energy=0.99), or merge it into the base."
            raise NotSupported("no_factors", message, subject=delta.module, next_step=next_step)


def _tensors(deltas: Sequence[Delta]) -> dict[str, torch.Tensor]:
    """PEFT's key -> tensor."""
    targeted = {delta.module for delta in _pairs(deltas)}
    tensors: dict[str, torch.Tensor] = {}
    for delta in deltas:
        path = f"{PEFT_PREFIX}{delta.module}"
        if isinstance(delta, Replacement):
            wrapped = ".base_layer" if delta.module in targeted else ""
            tensors[f"{path}{wrapped}.{delta.weight.rsplit('.', 1)[-1]}"] = delta.tensor
        elif isinstance(delta, LowRank) and delta.layout is Layout.EMBEDDING:
            tensors |= {f"{path}.lora_embedding_A": delta.A_RI, f"{path}.lora_embedding_B": delta.B_OR}
        elif isinstance(delta, LowRank):
            tensors |= {f"{path}.lora_A.weight": delta.A_RI, f"{path}.lora_B.weight": delta.B_OR}
    return tensors


def _refuse_not_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if DTYPE_NAMES[tensor.dtype] in FLOAT_DTYPES and not bool(torch.isfinite(tensor).all()):
            message = f"{key} would have a NaN or an infinite value."
            raise RefusedOutput("not_finite", message, subject=split_key(key).module, next_step="Lower the weights.")


def _config(loaded: Sequence[LoadedAdapter], deltas: Sequence[Delta]) -> dict[str, Any]:
    pairs = _pairs(deltas)
    if not pairs:
        raise NotSupported("no_pairs", "None of the adapters has a low-rank pair: there is nothing to combine.")
    rank = Counter(delta.rank for delta in pairs).most_common(1)[0][0]
    ranks = {f"^{delta.module}": delta.rank for delta in pairs if delta.rank != rank}
    first = loaded[0].config.raw
    config: dict[str, Any] = {name: first.get(name) for name in _SHARED_FIELDS}
    return config | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "fan_in_fan_out": any(adapter.config.fan_in_fan_out for adapter in loaded),
        "bias": _bias(deltas),
        "target_modules": _targets(loaded, pairs),
        "modules_to_save": _whole_modules(deltas) or None,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _targets(loaded: Sequence[LoadedAdapter], pairs: Sequence[LowRank]) -> list[str]:
    """The adapters' own target names where their union means exactly these modules; otherwise every module by its path.

    Short names are what servers and people read. They are only true when no adapter chose among layers in another
    way: a module that is wrapped without tensors would load as an untrained pair. They do not cover a head that
    weight tying wrapped together with the embedding.
    """
    paths = sorted(delta.module for delta in pairs)
    chosen = ("exclude_modules", "layers_to_transform", "layers_pattern")
    names: set[str] = set()
    for adapter in loaded:
        targets = adapter.config.target_modules
        if not isinstance(targets, tuple) or any(adapter.config.raw.get(field) for field in chosen):
            return paths
        names.update(targets)
    covered = all(any(f".{path}".endswith(f".{name}") for name in names) for path in paths)
    return sorted(names) if covered else paths


def _bias(deltas: Sequence[Delta]) -> str:
    targeted = {delta.module for delta in _pairs(deltas)}
    biased = {d.module for d in deltas if isinstance(d, Replacement) and d.weight.endswith(".bias")}
    if not biased:
        return "none"
    return "lora_only" if biased <= targeted else "all"


def _whole_modules(deltas: Sequence[Delta]) -> list[str]:
    return sorted({d.module for d in deltas if isinstance(d, Replacement) and not d.weight.endswith(".bias")})


def _note(
    loaded: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    method: str,
    settings: Mapping[str, object],
    note: Mapping[str, Any] | None,
) -> dict[str, Any]:
    inputs = [
        {"name": one.name, "weight": parse_weight(weight).to_json(), "digest": hash_file(one.path / WEIGHTS_FILE)}
        for one, weight in zip(loaded, weights, strict=True)
    ]
    return {
        "made": "combine",
        "adapters": inputs,
        "method": method,
        "settings": dict(settings),
        "note": dict(note or {}),
    }


def _dropped_copies(loaded: Sequence[LoadedAdapter]) -> list[Finding]:
    message = "The adapter's copy of this base weight was left out, unchecked: combining does not read the base."
    return [Finding("base_copy_dropped", Severity.NOTICE, name, message) for one in loaded for name in one.base_copies]
