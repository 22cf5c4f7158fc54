"""Every tensor of an adapter on the base tensor it acts on, by full path and shape. What does not fit is a finding."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from composer.errors import NotSupported
from composer.findings import Finding, Severity
from composer.formats.checkpoint import Architecture
from composer.formats.config import AdapterConfig, pattern_matches
from composer.formats.header import Header
from composer.formats.naming import PEFT_PREFIX, Target, find_weight, has_prefix, is_head, split_key
from composer.formats.patterns import matches_whole
from composer.formats.targeting import surely_untargeted

# transformers' models that are built of Conv1D, which stores W as inputs x outputs.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_FACTORS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
FACTOR_PARTS = frozenset({*_FACTORS, *_FACTORS.values()})
_PAIR_PARTS = FACTOR_PARTS | {"magnitude", "lora_A_bias", "lora_B_bias"}
LOW_RANK_KINDS = frozenset({"linear", "conv1d", "embedding"})


@dataclass(frozen=True, slots=True)
class PlacedModule:
    """A module of the adapter and the checkpoint tensor `weight` it acts on.

    `kind` is linear, conv1d or embedding (a low-rank pair), replacement (a tensor saved whole) or base_copy (PEFT's
    copy of a base weight beside an adapted embedding). `parts` maps lora_A, lora_B, magnitude, … or a parameter's
    name to the key in the file. `shape` is the base tensor's, as stored. Rank, alpha and scale are 0 where there is
    no low-rank pair.
    """

    module: str
    weight: str
    kind: str
    tied: bool
    rank: int
    alpha: float
    scale: float
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Placed:
    modules: list[PlacedModule]
    findings: list[Finding]

    @property
    def low_rank(self) -> list[PlacedModule]:
        return [module for module in self.modules if module.kind in LOW_RANK_KINDS]


@dataclass
class _Placement:
    config: AdapterConfig
    header: Header
    architecture: Architecture | None
    modules: list[PlacedModule] = field(default_factory=list[PlacedModule])
    findings: list[Finding] = field(default_factory=list[Finding])

    def error(self, code: str, subject: str, message: str) -> None:
        """A key without a module, such as `lora_A`, is a subject too."""
        self.findings.append(Finding(code, Severity.ERROR, subject or "(no module)", message))

    def shape(self, key: str) -> tuple[int, ...]:
        return self.header.tensors[key].shape


def place(config: AdapterConfig, header: Header, architecture: Architecture | None, subject: str = "adapter") -> Placed:
    """Match every tensor of the adapter with a base tensor.

    Without an architecture only the adapter's own shapes are checked and weights get their in-memory names. Error
    findings: unmatched_tensor, wrong_prefix, shape_mismatch, rank_mismatch, missing_pair, duplicate_tensor,
    duplicate_target, no_target, untargeted_tensor, pattern_unused, unsupported_layer, empty_adapter. Raises
    NotSupported for what is not a LoRA.
    """
    if config.peft_type != "LORA":
        message = f"{subject} is of type {config.peft_type}; only LORA adapters are read."
        raise NotSupported("adapter_type", message, subject=subject)
    placement = _Placement(config, header, architecture)
    grouped = _group(placement)
    for module, parts in grouped.items():
        _place_factors(placement, module, parts)
        _place_whole_tensors(placement, module, parts)
    _check_prefix(placement, list(grouped), subject)
    _check_twice(placement)
    _check_config_is_used(placement)
    return Placed(placement.modules, placement.findings)


def _group(placement: _Placement) -> dict[str, dict[str, str]]:
    """Module -> part -> key, in file order."""
    keys = list(placement.header.tensors)
    if has_prefix(keys) and not all(key.startswith(PEFT_PREFIX) for key in keys):
        odd = next(key for key in keys if not key.startswith(PEFT_PREFIX))
        placement.error("wrong_prefix", odd, f"{odd} lacks the prefix {PEFT_PREFIX!r} that other keys have.")
    grouped: dict[str, dict[str, str]] = defaultdict(dict)
    for key in keys:
        split = split_key(key)
        if split.part == "ignored":
            continue
        twin = grouped[split.module].setdefault(split.part, key)
        if twin != key:
            placement.error("duplicate_tensor", key, f"{key} and {twin} are the same part of one module.")
    return grouped


def _place_factors(placement: _Placement, module: str, parts: Mapping[str, str]) -> None:
    found = {part: key for part, key in parts.items() if part in _PAIR_PARTS}
    if not found:
        return
    for a, b in _FACTORS.items():
        if (a in found) != (b in found):
            there, missing = (a, b) if a in found else (b, a)
            placement.error("missing_pair", module, f"{module} has {there} ({found[there]}) but no {missing}.")
            return
    pair = next(((a, b) for a, b in _FACTORS.items() if a in found), None)
    if pair is None:
        placement.error("missing_pair", module, f"{module} has {', '.join(found)} but no lora_A and lora_B.")
        return
    a_shape, b_shape = (placement.shape(found[part]) for part in pair)
    if len(a_shape) != 2 or len(b_shape) != 2:
        message = (
            f"{module} has factors of shape {_x(a_shape)} and {_x(b_shape)}; only matrices are read, no convolutions."
        )
        placement.error("unsupported_layer", module, message)
        return
    if a_shape[0] != b_shape[1] or a_shape[0] != placement.config.rank_for(module):
        expected = placement.config.rank_for(module)
        message = f"{module} has rank {a_shape[0]} in A and {b_shape[1]} in B; the config says {expected}."
        placement.error("rank_mismatch", module, message)
        return
    target = _find(placement, module, "weight", next(iter(found.values())))
    if target is not None:
        _add_low_rank(placement, module, target, found)


def _add_low_rank(placement: _Placement, module: str, target: Target, found: Mapping[str, str]) -> None:
    config = placement.config
    embedding = "lora_embedding_A" in found
    prefix = "lora_embedding_" if embedding else "lora_"
    outputs, inputs = placement.shape(found[f"{prefix}B"])[0], placement.shape(found[f"{prefix}A"])[1]
    kind = "embedding" if embedding else _linear_kind(placement, module, target, (outputs, inputs))
    shape = (outputs, inputs) if kind == "linear" else (inputs, outputs)
    if not _fits(placement, module, target, shape):
        return
    magnitude = found.get("magnitude")
    if magnitude is not None and placement.header.tensors[magnitude].spec.elements != outputs:
        message = f"{module} has a magnitude of shape {_x(placement.shape(magnitude))} for {outputs} outputs."
        placement.error("shape_mismatch", module, message)
        return
    rank, alpha, scale = config.rank_for(module), config.alpha_for(module), config.scale_for(module)
    placement.modules.append(
        PlacedModule(module, target.weight, kind, target.tied, rank, alpha, scale, shape, found, target.rule)
    )


def _linear_kind(placement: _Placement, module: str, target: Target, shape: tuple[int, int]) -> str:
    """How the base stores the weight. The model type decides, since a square weight looks the same both ways."""
    architecture, config = placement.architecture, placement.config
    if is_head(module):
        return "linear"
    if architecture is None:
        return "conv1d" if config.fan_in_fan_out else "linear"
    if architecture.model_type in CONV1D_MODELS:
        return "conv1d"
    transposed = architecture.tensors[target.weight].shape == shape[::-1] != shape
    return "conv1d" if config.fan_in_fan_out and transposed else "linear"


def _place_whole_tensors(placement: _Placement, module: str, parts: Mapping[str, str]) -> None:
    for part, key in parts.items():
        if part in _PAIR_PARTS:
            continue
        parameter = part.removeprefix("base_layer.")
        target = _find(placement, module, parameter, key)
        shape = placement.shape(key)
        if target is None or not _fits(placement, f"{module}.{parameter}", target, shape):
            continue
        kind = "base_copy" if part == "base_layer.weight" else "replacement"
        placement.modules.append(
            PlacedModule(module, target.weight, kind, target.tied, 0, 0.0, 0.0, shape, {part: key}, target.rule)
        )


def _find(placement: _Placement, module: str, parameter: str, key: str) -> Target | None:
    if placement.architecture is None:
        return Target(f"{module}.{parameter}", False)
    found = find_weight(module, parameter, placement.architecture)
    if isinstance(found, Target):
        return found
    what = f"could be any of {', '.join(found)}" if found else "is no tensor of the base"
    placement.error("unmatched_tensor", module or key, f"{key}: {module}.{parameter} {what}.")
    return None


def _fits(placement: _Placement, subject: str, target: Target, shape: tuple[int, ...]) -> bool:
    if placement.architecture is None:
        return True
    expected = placement.architecture.tensors[target.weight].shape
    if shape != expected:
        placement.error(
            "shape_mismatch",
            subject,
            f"{subject} is made for {_x(shape)}; the base's {target.weight} is {_x(expected)}.",
        )
    return shape == expected


def _check_prefix(placement: _Placement, modules: list[str], subject: str) -> None:
    """When nothing matches, one finding that shows both sides says more than a hundred unmatched tensors."""
    if not placement.header.tensors:
        placement.error("empty_adapter", subject, f"{subject} has no tensors.")
    unmatched = [finding for finding in placement.findings if finding.code == "unmatched_tensor"]
    if placement.modules or not unmatched or placement.architecture is None:
        return
    first = next(iter(placement.header.tensors))
    example = next((name for name in placement.architecture.tensors if name.endswith("proj.weight")), "")
    example = example or next(iter(placement.architecture.tensors), "")
    expected = f"{PEFT_PREFIX}{example.removesuffix('.weight')}.lora_A.weight"
    message = f"No tensor matches the base: keys look like {first!r}, where the base expects {expected!r}."
    placement.findings[:] = [finding for finding in placement.findings if finding.code != "unmatched_tensor"]
    placement.error("wrong_prefix", next(filter(None, modules), first), message)


def _check_twice(placement: _Placement) -> None:
    seen: dict[str, str] = {}
    for placed in placement.modules:
        if placed.kind == "base_copy" or placed.tied:
            continue
        other = seen.setdefault(placed.weight, placed.module)
        if other != placed.module:
            placement.error(
                "duplicate_target", placed.module, f"{placed.module} and {other} are both the tensor {placed.weight}."
            )


def _check_config_is_used(placement: _Placement) -> None:
    """The config's own words must be true of the tensors: PEFT would silently ignore what they miss."""
    config = placement.config
    pairs = set(_low_rank_modules(placement))
    if not pairs and placement.findings:
        return
    targets = config.target_modules
    if (
        isinstance(targets, str)
        and targets != "all-linear"
        and not any(matches_whole(targets, module) for module in pairs)
    ):
        placement.error("no_target", targets, f"No tensor belongs to a module that target_modules {targets!r} matches.")
    for target in targets if isinstance(targets, tuple) else ():
        if not any(module == target or module.endswith(f".{target}") for module in pairs):
            placement.error(
                "no_target", target, f"target_modules names {target!r}, but no tensor belongs to such a module."
            )
    for placed in placement.modules:
        if placed.kind in LOW_RANK_KINDS and surely_untargeted(config, placed.module):
            message = f"{placed.module} has factors, but the config does not target it: PEFT would ignore them."
            placement.error("untargeted_tensor", placed.module, message)
    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if not any(pattern_matches(key, module) for module in pairs):
                placement.error("pattern_unused", key, f"{name} has {key!r}, which matches no module.")


def _low_rank_modules(placement: _Placement) -> Iterator[str]:
    """Modules with factors, also those that did not fit: they are reported once, not again as a missing target."""
    for key in placement.header.tensors:
        split = split_key(key)
        if split.part in _PAIR_PARTS:
            yield split.module


def _x(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
