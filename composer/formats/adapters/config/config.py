"""`adapter_config.json`: every field that changes what an adapter does, and the exact rank and alpha of a module."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any, cast

from composer.errors import InvalidFile, NotSupported
from composer.formats.adapters.config.by_path import ByPath, is_plain
from composer.formats.adapters.config.parts import Options
from composer.formats.adapters.config.patterns import compiled
from composer.formats.adapters.config.types import MERGE_NEXT, REFUSED, TYPES, AdapterType
from composer.formats.untrusted import LONE_SURROGATE, DuplicateKey, has_more_values, printable, reject_duplicate_keys

_CONFIG_FILE = "adapter_config.json"
CONFIG_BYTES = 10_000_000
_CHOOSING_CHARS = 4_000  # each is tried on each module
_CONFIG_VALUES = 300_000  # three names for each of 90,000 modules
_TEXT_CHARS = 1_000
_MOST_LISTED = 10

# Flag -> why it cannot be merged exactly; empty if the variant is supported. At most one may be set.
_VARIANTS = {
    "use_dora": "",
    "use_bdlora": "",
    "kasa_config": "",
    "lora_bias": "",
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens, which no weight can express",
    "use_qalora": "QA-LoRA pools its input and fits a GPTQ base",
    "arrow_config": "Arrow routes between adapters by input",
    "layer_replication": "layer replication repeats layers that the base does not have",
    "megatron_config": "Megatron layers are sharded over files",
}
# Settings that may accompany any of them.
_ADDITIONS = ("target_parameters", "trainable_token_indices")
# Settings of all types.
_COMMON = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "fan_in_fan_out", "bias", "runtime_config",
})  # fmt: skip
# LORA's: training settings that leave no trace in the merged weight, and settings that are read below.
_KNOWN = _COMMON | frozenset({
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "monteclora_config", "ensure_weight_tying",
})  # fmt: skip
_IDENTITY = ("peft_version", "base_model_name_or_path", "revision")
_CONVERT_INIT = (
    "Convert it with PEFT: save_pretrained(directory, path_initial_model_for_weight_conversion=…) writes a plain LoRA. "
    "Where the changed base was saved: adaptory convert ADAPTER --base THAT_BASE --residual-base -o OUT."
)
REBASED_INITS = ("pissa", "olora", "corda", "lora_ga")  # and longer names that begin so; they change the base
PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})  # they leave the base alone


@dataclass(frozen=True, slots=True)
class RefusedType:
    """The reason why an adapter cannot be merged exactly, and the remedy for its owner."""

    reason: str
    way_out: str = MERGE_NEXT


@dataclass(frozen=True, slots=True)
class Blocks:
    """Block-diagonal factors (BD-LoRA): a module whose path contains one of the names has such an A (`inner`) or B."""

    count: int
    inner: tuple[str, ...]
    outer: tuple[str, ...]

    def side(self, module: str) -> str:
        """`A`, `B`, or empty for a plain pair."""
        return "A" if any(name in module for name in self.inner) else "B" * any(name in module for name in self.outer)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A parsed config. `raw` is the entire JSON object; `rank_pattern` and `alpha_pattern` keep its order, which
    matters.

    For types other than LoRA, rank and alpha are 0 if the type has none, and `options` are the settings that types.py
    names. For a refused type only `peft_type` and the identity hints are meaningful. `token_indices` maps an
    embedding's name (empty: the input embedding) to the rows that are trained separately.
    """

    peft_type: str
    raw: Mapping[str, Any]
    rank: int = 0
    alpha: float = 0.0
    use_rslora: bool = False
    rank_pattern: ByPath[int] = field(default_factory=lambda: ByPath[int]({}))
    alpha_pattern: ByPath[float] = field(default_factory=lambda: ByPath[float]({}))
    fan_in_fan_out: bool = False
    bias: str = "none"
    target_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] = ()
    init: str = "true"
    exclude_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    blocks: Blocks | None = None
    options: Options = field(default_factory=dict[str, bool | int | float | str])
    option_patterns: Mapping[str, ByPath[int]] = field(default_factory=dict[str, ByPath[int]])

    def options_for(self, module: str) -> Options:
        """The type's options for a module, after the patterns."""
        patterns = self.option_patterns.items()
        return {**self.options, **{name: own.first(module, self.options[name]) for name, own in patterns}}

    def rank_for(self, module: str) -> int:
        """The rank of a module, after `rank_pattern`."""
        return self.rank_pattern.first(module, self.rank)

    def alpha_for(self, module: str) -> float:
        """The alpha of a module, after `alpha_pattern`."""
        return self.alpha_pattern.first(module, self.alpha)

    def scale_for(self, module: str) -> float:
        """s of delta = s * B @ A: alpha / r, with rsLoRA alpha / sqrt(r) (arXiv 2312.03732)."""
        rank = self.rank_for(module)
        return self.alpha_for(module) / (sqrt(rank) if self.use_rslora else rank)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The rows of this embedding that are trained separately, in stored order."""
        named = (rows for name, rows in self.token_indices.items() if not name or f".{module}".endswith(f".{name}"))
        return next(named, ())

    @property
    def flags(self) -> tuple[str, ...]:
        """The variants and additions that the config turns on, such as `use_dora`."""
        return tuple(flag for flag in (*_VARIANTS, *_ADDITIONS) if self.raw.get(flag))

    @property
    def variant(self) -> str:
        """`lora`, `rslora`, `dora`, or the name of another variant's flag or method."""
        if self.peft_type != "LORA":
            return self.peft_type.lower()
        if self.flags:
            return "dora" if self.flags[0] == "use_dora" else self.flags[0]
        return "rslora" if self.use_rslora else "lora"

    def unsupported(self) -> RefusedType | None:
        """The reason why this adapter cannot be merged or combined; None if it can."""
        if self.peft_type != "LORA":
            return _refused_type(self)
        for flag in self.flags:
            if _VARIANTS.get(flag):
                return RefusedType(f"{flag}: {_VARIANTS[flag]}")
        if self.init == "loftq":
            reason = "init_lora_weights=loftq: its factors make up for the error of the quantized base, not of this one"
            return RefusedType(reason, "Serve it on the quantized base that it was trained on.")
        if self.init in PLAIN_INITS:
            return None
        changed = "it" if self.init.startswith(REBASED_INITS) else "this version does not know it, and it may have"
        reason = f"init_lora_weights={self.init[:80]}: {changed} changed the base at the start"
        return RefusedType(f"{reason}, so that the factors do not fit it", _CONVERT_INIT)

    @property
    def base_model_name_or_path(self) -> str | None:
        return cast(str | None, self.raw.get("base_model_name_or_path"))

    @property
    def peft_version(self) -> str | None:
        return cast(str | None, self.raw.get("peft_version"))


def parse_config(content: bytes, subject: str = _CONFIG_FILE) -> AdapterConfig:
    """Parses a config from the file's bytes. Raises InvalidFile for a malformed one, and NotSupported for an unknown
    setting."""
    raw = _json_object(content, subject)
    peft_type = raw.get("peft_type")
    if not isinstance(peft_type, str):
        raise _bad(subject, "peft_type is missing")
    for name in ("peft_type", *_IDENTITY):
        _check_text(raw.get(name), name, subject)
    if peft_type != "LORA":
        return _other_type(raw, peft_type, subject)
    _refuse_unknown(raw, {*_KNOWN, *_VARIANTS, *_ADDITIONS}, subject)
    stated = {"use_dora", "lora_bias", "use_qalora"}  # the others hold settings
    flags = [flag for flag in _VARIANTS if (_flag(raw, flag, subject) if flag in stated else raw.get(flag))]
    if len(flags) > 1:
        message, next_step = f"{subject} sets {' and '.join(flags)} together.", "Leave the one it was trained with."
        raise NotSupported("two_variants", message, subject=subject, next_step=next_step)
    return AdapterConfig(
        peft_type,
        raw,
        rank=_positive_int(raw.get("r", 8), "r", subject),
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", subject),
        use_rslora=_flag(raw, "use_rslora", subject),
        rank_pattern=_counts(raw, "rank_pattern", subject),
        alpha_pattern=_alphas(raw, subject),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out", subject),
        bias=_bias(raw, "lora", subject),
        target_modules=_targets(raw, "target_modules", subject),
        modules_to_save=_names(raw.get("modules_to_save") or [], "modules_to_save", subject),
        init=_init(raw.get("init_lora_weights", True)),
        exclude_modules=_targets(raw, "exclude_modules", subject),
        target_parameters=_names(raw.get("target_parameters") or [], "target_parameters", subject),
        token_indices=_token_indices(raw.get("trainable_token_indices"), "trainable_token_indices", subject),
        blocks=_blocks(raw.get("use_bdlora"), subject),
    )


def _other_type(raw: dict[str, Any], peft_type: str, subject: str) -> AdapterConfig:
    if peft_type not in TYPES:
        return AdapterConfig(peft_type, raw)
    kind = TYPES[peft_type]
    (rank, rank_default), (alpha, alpha_default) = kind.rank, kind.alpha
    patterns = [f"{name}_pattern" for name in (*kind.by_module, *(("rank", "alpha") if kind.patterns else ()))]
    _refuse_unknown(raw, {*_COMMON, "init_weights", rank, alpha, *kind.options, *kind.ignored, *patterns}, subject)
    tokens = raw.get("token_indices") if peft_type == "TRAINABLE_TOKENS" else None
    return AdapterConfig(
        peft_type,
        raw,
        rank=_positive_int(raw.get(rank, rank_default), rank, subject) if rank else 0,
        alpha=_number(raw.get(alpha, alpha_default), alpha, subject) if alpha else 0.0,
        rank_pattern=_counts(raw, "rank_pattern", subject) if kind.patterns else ByPath({}),
        alpha_pattern=_alphas(raw, subject) if kind.patterns else ByPath({}),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out", subject),
        bias=_bias(raw, peft_type.lower(), subject),
        target_modules=_targets(raw, "target_modules", subject),
        modules_to_save=_names(raw.get("modules_to_save") or [], "modules_to_save", subject),
        exclude_modules=_targets(raw, "exclude_modules", subject),
        token_indices=_token_indices(tokens, "token_indices", subject),
        options={name: _option(raw, name, kind, subject) for name in kind.options},
        option_patterns={name: _counts(raw, f"{name}_pattern", subject) for name in kind.by_module},
    )


def _refused_type(config: AdapterConfig) -> RefusedType | None:
    if config.peft_type not in TYPES:
        why = REFUSED.get(config.peft_type, "this version does not know it")
        return RefusedType(f"{printable(config.peft_type)}: {why}", "Serve it with PEFT itself, or train a LoRA.")
    option, why = TYPES[config.peft_type].needs
    if not option or config.options[option]:
        return None
    return RefusedType(f"{config.peft_type}: {why}", f"Save it with {option}=True.")


def _bad(subject: str, why: str) -> InvalidFile:
    message, next_step = f"{subject} is not a valid adapter config: {why}.", "Save the adapter again with PEFT."
    return InvalidFile("bad_config", message, subject=subject, next_step=next_step)


def _json_object(content: bytes, subject: str) -> dict[str, Any]:
    if len(content) > CONFIG_BYTES:
        raise _bad(subject, f"it has more than {CONFIG_BYTES} bytes")
    if has_more_values(content, _CONFIG_VALUES):
        raise _bad(subject, f"it has more than {_CONFIG_VALUES:,} values")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise _bad(subject, f"it {error}" if isinstance(error, DuplicateKey) else "it is not JSON") from error
    if not isinstance(value, dict):
        raise _bad(subject, "it is not a JSON object")
    return cast(dict[str, Any], value)


def _refuse_unknown(raw: Mapping[str, Any], known: Set[str], subject: str) -> None:
    unknown = sorted(key for key, value in raw.items() if value and key not in known)
    if not unknown:
        return
    listed = ", ".join(printable(key) for key in unknown[:_MOST_LISTED])
    more = f" and {len(unknown) - _MOST_LISTED} more" if len(unknown) > _MOST_LISTED else ""
    message = f"{subject} has settings that this version does not know: {listed}{more}."
    raise NotSupported(
        "unknown_config", message, subject=subject, next_step="They may change the result; update, or remove them."
    )


def _check_text(value: object, name: str, subject: str) -> None:
    if value is None:
        return
    if not isinstance(value, str) or LONE_SURROGATE.search(value):
        raise _bad(subject, f"{name} is not text")
    if len(value) > _TEXT_CHARS:
        raise _bad(subject, f"{name} has more than {_TEXT_CHARS:,} characters")


def _positive_int(value: object, name: str, subject: str) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise _bad(subject, f"{name} is {printable(value)}, not a positive whole number")
    return value


def _integer(value: object, name: str, subject: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _bad(subject, f"{name} is {printable(value)}, not a whole number")
    return value


def _number(value: object, name: str, subject: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30 or not isfinite(value):
        raise _bad(subject, f"{name} is not a finite number")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str, subject: str) -> bool:
    value = raw.get(name) or False
    if not isinstance(value, bool):
        raise _bad(subject, f"{name} is {printable(value)}, not true or false")
    return value


def _pattern(raw: Mapping[str, Any], name: str, subject: str) -> list[tuple[str, object]]:
    value: object = raw.get(name) or {}
    if not isinstance(value, dict):
        raise _bad(subject, f"{name} is not an object")
    pattern = cast(dict[str, object], value)
    if sum(len(key) for key in pattern if not is_plain(key)) > _CHOOSING_CHARS:
        raise _bad(subject, f"{name} has patterns of over {_CHOOSING_CHARS} characters besides plain paths")
    for key in pattern:
        _check_regex(key, name, subject)
    return list(pattern.items())


def _check_regex(text: str, name: str, subject: str) -> None:
    _check_text(text, name, subject)
    try:
        if not is_plain(text):
            compiled(text)
    except ValueError as error:
        raise _bad(subject, f"{name} has the pattern {text[:200]!r}, and {error}") from error


def _bias(raw: Mapping[str, Any], kind: str, subject: str) -> str:
    bias: object = raw.get("bias") or "none"
    if bias not in ("none", f"{kind}_only", "all"):
        raise _bad(subject, f"bias is {printable(bias)}, not none, {kind}_only or all")
    return str(bias)


def _counts(raw: Mapping[str, Any], name: str, subject: str) -> ByPath[int]:
    return ByPath({key: _positive_int(value, f"{name}.{key}", subject) for key, value in _pattern(raw, name, subject)})


def _alphas(raw: Mapping[str, Any], subject: str) -> ByPath[float]:
    name = "alpha_pattern"
    return ByPath({key: _number(value, f"{name}.{key}", subject) for key, value in _pattern(raw, name, subject)})


def _option(raw: Mapping[str, Any], name: str, kind: AdapterType, subject: str) -> bool | int | float | str:
    default, value = kind.options[name], raw.get(name)
    if value is None:
        return default
    if name in kind.choices:
        if value not in kind.choices[name]:
            raise _bad(subject, f"{name} is {printable(value)}, not one of {', '.join(map(str, kind.choices[name]))}")
        return value
    if isinstance(default, bool):
        return _flag(raw, name, subject)
    if isinstance(default, float):
        return _number(value, name, subject)
    return _integer(value, name, subject)


def _blocks(value: object, subject: str) -> Blocks | None:
    if not value:
        return None
    if not isinstance(value, dict):
        raise _bad(subject, "use_bdlora is not an object")
    given = cast("dict[str, object]", value)
    sides = (_names(given.get(f"target_modules_bd_{side}") or [], "use_bdlora", subject) for side in "ab")
    return Blocks(_positive_int(given.get("nblocks", 1), "nblocks", subject), *sides)


def _token_indices(value: object, name: str, subject: str) -> dict[str, tuple[int, ...]]:
    if not value:
        return {}
    groups = cast("dict[str, object]", value) if isinstance(value, dict) else {"": value}
    rows_by_name: dict[str, tuple[int, ...]] = {}
    for key, rows in groups.items():
        if not isinstance(rows, list):
            raise _bad(subject, f"{name} is not a list of token ids")
        listed = [_integer(row, name, subject) for row in cast("list[object]", rows)]
        if len(set(listed)) != len(listed):
            raise _bad(subject, f"{name} names a token twice")
        rows_by_name[key] = tuple(listed)
    return rows_by_name


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
