"""`adapter_config.json`: every field that changes what an adapter does, and the exact rank and alpha of a module."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, TypeVar, cast

from composer.errors import InvalidFile, NotSupported
from composer.formats.patterns import compiled, matches_end
from composer.text import LONE_SURROGATE, shown

_Value = TypeVar("_Value")
_CONFIG_FILE = "adapter_config.json"
_CONFIG_BYTES = 10_000_000
_TEXT_CHARS = 1_000
_MOST_LISTED = 10

# Flag -> why the plain low-rank formula would be wrong. At most one may be set; storing such an adapter is fine.
_VARIANTS = {
    "use_dora": "DoRA rescales the rows of the whole weight",
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens, which no weight can express",
    "use_qalora": "QA-LoRA pools its input and fits a GPTQ base",
    "use_bdlora": "block-diagonal factors are not read yet",
    "kasa_config": "KaSA was trained on a truncated base",
    "arrow_config": "Arrow routes between adapters by input",
    "layer_replication": "layer replication repeats layers that the base does not have",
    "megatron_config": "Megatron layers are sharded over files",
    "target_parameters": "parameters targeted by name (fused experts) are not read yet",
    "trainable_token_indices": "trained token rows are not read yet",
    "lora_bias": "a bias of lora_B is not read yet",
}
# Training settings that leave no trace in the merged weight, and settings that are read below.
_KNOWN = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out", "bias", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "init_lora_weights", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "velora_config", "monteclora_config", "ensure_weight_tying",
})  # fmt: skip
_IDENTITY = ("peft_version", "base_model_name_or_path", "revision")
_PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A parsed config. `raw` is the whole JSON object; `rank_pattern` and `alpha_pattern` keep its order, which
    matters.

    Only `peft_type` and the identity hints mean anything when `peft_type` is not LORA.
    """

    peft_type: str
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    bias: str
    target_modules: tuple[str, ...] | str | None
    modules_to_save: tuple[str, ...]
    init: str
    raw: Mapping[str, Any]
    exclude_modules: tuple[str, ...] | str | None = None

    def rank_for(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_for(self, module: str) -> float:
        return _first_match(self.alpha_pattern, module, self.alpha)

    def scale_for(self, module: str) -> float:
        """s of delta = s * B @ A: alpha / r, with rsLoRA alpha / sqrt(r) (arXiv 2312.03732)."""
        rank = self.rank_for(module)
        return self.alpha_for(module) / (sqrt(rank) if self.use_rslora else rank)

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(flag for flag in _VARIANTS if self.raw.get(flag))

    @property
    def variant(self) -> str:
        """`lora`, `rslora`, `dora`, or the name of the flag or method that makes it another one."""
        if self.peft_type != "LORA":
            return self.peft_type.lower()
        if self.flags:
            return "dora" if self.flags[0] == "use_dora" else self.flags[0]
        return "rslora" if self.use_rslora else "lora"

    def unsupported(self) -> str | None:
        """Why this adapter cannot be merged or combined, or None when it can."""
        if self.peft_type != "LORA":
            return f"{self.peft_type} is not a LoRA"
        if self.flags:
            return f"{self.flags[0]}: {_VARIANTS[self.flags[0]]}"
        if self.init not in _PLAIN_INITS:
            return (
                f"init_lora_weights={self.init}: it changed the base at the start, so the factors do not fit the base"
            )
        return None

    @property
    def base_model_name_or_path(self) -> str | None:
        return cast(str | None, self.raw.get("base_model_name_or_path"))

    @property
    def peft_version(self) -> str | None:
        return cast(str | None, self.raw.get("peft_version"))


def parse_config(content: bytes, subject: str = _CONFIG_FILE) -> AdapterConfig:
    """Config from the file's bytes. Raises InvalidFile for what is malformed, NotSupported for an unknown setting."""
    raw = _json_object(content, subject)
    peft_type = raw.get("peft_type")
    if not isinstance(peft_type, str):
        raise _bad(subject, "peft_type is missing")
    for name in ("peft_type", *_IDENTITY):
        _check_text(raw.get(name), name, subject)
    if peft_type != "LORA":
        return AdapterConfig(peft_type, 0, 0.0, False, {}, {}, False, "none", None, (), "true", raw)
    unknown = sorted(key for key, value in raw.items() if value and key not in _KNOWN and key not in _VARIANTS)
    if unknown:
        listed = ", ".join(shown(key) for key in unknown[:_MOST_LISTED])
        more = f" and {len(unknown) - _MOST_LISTED} more" if len(unknown) > _MOST_LISTED else ""
        message = f"{subject} has settings that this version does not know: {listed}{more}."
        raise NotSupported(
            "unknown_config", message, subject=subject, next_step="They may change the result; update, or remove them."
        )
    flags = [flag for flag in _VARIANTS if raw.get(flag)]
    if len(flags) > 1:
        raise NotSupported("two_variants", f"{subject} sets {' and '.join(flags)} together.", subject=subject)
    rank = _positive_int(raw.get("r", 8), "r", subject)
    return AdapterConfig(
        peft_type=peft_type,
        rank=rank,
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", subject),
        use_rslora=_flag(raw, "use_rslora", subject),
        rank_pattern={
            key: _positive_int(value, f"rank_pattern.{key}", subject)
            for key, value in _pattern(raw, "rank_pattern", subject)
        },
        alpha_pattern={
            key: _number(value, f"alpha_pattern.{key}", subject)
            for key, value in _pattern(raw, "alpha_pattern", subject)
        },
        fan_in_fan_out=_flag(raw, "fan_in_fan_out", subject),
        bias=_bias(raw, subject),
        target_modules=_targets(raw, "target_modules", subject),
        modules_to_save=_names(raw.get("modules_to_save") or [], "modules_to_save", subject),
        init=_init(raw.get("init_lora_weights", True)),
        raw=raw,
        exclude_modules=_targets(raw, "exclude_modules", subject),
    )


def pattern_matches(key: str, module: str) -> bool:
    """PEFT's rule: the key is a regex for the end of the module path, beginning at a dot."""
    return matches_end(key, module)


def _first_match(pattern: Mapping[str, _Value], module: str, default: _Value) -> _Value:
    return next((value for key, value in pattern.items() if pattern_matches(key, module)), default)


def _bad(subject: str, why: str) -> InvalidFile:
    return InvalidFile("bad_config", f"{subject} is not a valid adapter config: {why}.", subject=subject)


def _json_object(content: bytes, subject: str) -> dict[str, Any]:
    if len(content) > _CONFIG_BYTES:
        raise _bad(subject, f"it has more than {_CONFIG_BYTES} bytes")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad(subject, "it is not JSON") from error
    if not isinstance(value, dict):
        raise _bad(subject, "it is not a JSON object")
    return cast(dict[str, Any], value)


def _check_text(value: object, name: str, subject: str) -> None:
    if value is None:
        return
    if not isinstance(value, str) or LONE_SURROGATE.search(value):
        raise _bad(subject, f"{name} is not text")
    if len(value) > _TEXT_CHARS:
        raise _bad(subject, f"{name} has more than {_TEXT_CHARS:,} characters")


def _positive_int(value: object, name: str, subject: str) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise _bad(subject, f"{name} is {shown(value)}, not a positive whole number")
    return value


def _number(value: object, name: str, subject: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30 or not isfinite(value):
        raise _bad(subject, f"{name} is not a finite number")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str, subject: str) -> bool:
    value = raw.get(name) or False
    if not isinstance(value, bool):
        raise _bad(subject, f"{name} is {shown(value)}, not true or false")
    return value


def _pattern(raw: Mapping[str, Any], name: str, subject: str) -> list[tuple[str, object]]:
    value: object = raw.get(name) or {}
    if not isinstance(value, dict):
        raise _bad(subject, f"{name} is not an object")
    pattern = cast(dict[str, object], value)
    for key in pattern:
        _check_regex(key, name, subject)
    return list(pattern.items())


def _check_regex(text: str, name: str, subject: str) -> None:
    _check_text(text, name, subject)
    try:
        compiled(text)
    except ValueError as error:
        raise _bad(subject, f"{name} has the pattern {text[:200]!r}, and {error}") from error


def _bias(raw: Mapping[str, Any], subject: str) -> str:
    bias: object = raw.get("bias") or "none"
    if bias not in ("none", "lora_only", "all"):
        raise _bad(subject, f"bias is {shown(bias)}, not none, lora_only or all")
    return str(bias)


def _names(value: object, name: str, subject: str) -> tuple[str, ...]:
    names = cast(list[object], value) if isinstance(value, list) else [None]
    if not all(isinstance(item, str) for item in names):
        raise _bad(subject, f"{name} is not a list of names")
    for item in names:
        _check_text(item, name, subject)
    return tuple(cast(list[str], names))


def _targets(raw: Mapping[str, Any], name: str, subject: str) -> tuple[str, ...] | str | None:
    value: object = raw.get(name)
    if isinstance(value, str):
        _check_regex(value, name, subject)
        return value
    return None if value is None else _names(value, name, subject)


def _init(value: object) -> str:
    return str(value).lower() if isinstance(value, bool | str) else str(value is not None).lower()
