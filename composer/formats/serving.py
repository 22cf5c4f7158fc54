"""Which servers load an adapter as it is, why not, and the way out: facts read from the servers' sources."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from composer.errors import NotSupported
from composer.formats.config import AdapterConfig
from composer.formats.facts import AdapterFacts
from composer.formats.placement import Placed

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
PROFILES = ("vllm:<max_lora_rank>", "sglang", "lorax", "llamacpp", "peft")
_REBASED_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")

_FOLD = "fold: rewrite scales into plain factors (combine with one adapter does it)"
_TRUNCATE = "truncate: lower the rank with the error stated"
_MERGE = "merge: bake it into a checkpoint"


@dataclass(frozen=True, slots=True)
class Loading:
    """Does this server load the adapter and serve what was trained? `way_out` has one entry a reason that has one."""

    profile: str
    loads: bool
    reasons: tuple[str, ...]
    way_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"reasons": list(self.reasons), "way_out": list(self.way_out)}


def loads_in(config: AdapterConfig, facts: AdapterFacts, placed: Placed, profile: str) -> Loading:
    """Verdict of one profile: `vllm:<max_lora_rank>` (`vllm` is `vllm:16`, its default), `sglang`, `lorax`,
    `llamacpp`, `peft`.

    Raises NotSupported for another profile.
    """
    server, _, limit = profile.partition(":")
    if server not in ("vllm", "sglang", "lorax", "llamacpp", "peft") or (
        limit and (server != "vllm" or not limit.isdecimal())
    ):
        raise NotSupported(
            "unknown_profile", f"There is no profile {profile!r}; there are {', '.join(PROFILES)}.", subject=profile
        )
    if server == "peft":
        problems: list[tuple[str, str]] = []
    elif server == "llamacpp":
        problems = _llamacpp(config, facts, placed)
    else:
        problems = _common(config, facts, placed)
        if server == "vllm":
            problems += _vllm_rank(facts, int(limit or 16))
    return Loading(
        profile,
        not problems,
        tuple(reason for reason, _ in problems),
        tuple(dict.fromkeys(way for _, way in problems if way)),
    )


def _vllm_rank(facts: AdapterFacts, limit: int) -> list[tuple[str, str]]:
    if limit not in VLLM_RANKS:
        return [(f"max_lora_rank must be one of {', '.join(map(str, VLLM_RANKS))}, not {limit}", "")]
    if facts.rank_max > limit:
        return [(f"rank {facts.rank_max} is above max_lora_rank {limit}", _TRUNCATE)]
    return []


def _common(config: AdapterConfig, facts: AdapterFacts, placed: Placed) -> list[tuple[str, str]]:
    """vLLM, and what is known of SGLang and LoRAX: plain pairs, one scale for all modules."""
    problems: list[tuple[str, str]] = []
    if config.flags:
        problems.append(
            (f"{facts.variant} is refused", _MERGE if config.unsupported() is None or facts.variant == "dora" else "")
        )
    if config.init.startswith(_REBASED_INITS):
        problems.append(
            (
                f"init_lora_weights={config.init} is refused: its factors fit a changed base",
                "convert it to a plain LoRA with PEFT",
            )
        )
    whole = sorted(
        {module.module for module in placed.modules if module.kind == "replacement" and not _is_bias(module.parts)}
    )
    if whole and not (len(whole) == 1 and whole[0].split(".")[-1] in ("classifier", "score")):
        problems.append((f"modules_to_save is refused ({', '.join(whole)})", _MERGE))
    if config.bias != "none":
        problems.append((f"bias={config.bias} is refused", _MERGE))
    if len({module.scale for module in placed.low_rank}) > 1:
        problems.append(
            ("modules have different scales (rank_pattern, alpha_pattern), and the server reads one", _FOLD)
        )
    elif placed.low_rank and abs(placed.low_rank[0].scale - _plain_scale(config)) > 1e-9:
        problems.append(
            ("the pattern's scale is not the one that r and lora_alpha give, which the server reads", _FOLD)
        )
    return problems


def _llamacpp(config: AdapterConfig, facts: AdapterFacts, placed: Placed) -> list[tuple[str, str]]:
    """The converter to GGUF keeps one lora_alpha and divides by each tensor's rank."""
    problems: list[tuple[str, str]] = []
    if config.use_rslora or any(module.alpha != config.alpha for module in placed.low_rank):
        problems.append(("the conversion keeps one lora_alpha: rsLoRA and alpha_pattern come out wrong", _FOLD))
    if (
        facts.variant == "dora"
        or config.bias != "none"
        or any(module.kind == "replacement" for module in placed.modules)
    ):
        problems.append(("the conversion refuses DoRA, bias and modules_to_save", _MERGE))
    elif config.flags and facts.variant != "alora_invocation_tokens":
        problems.append((f"{facts.variant} is not converted", ""))
    if any(module.tied and module.module.endswith("lm_head") for module in placed.low_rank):
        problems.append(("the conversion refuses an lm_head that is tied to the embedding", _MERGE))
    return problems


def _plain_scale(config: AdapterConfig) -> float:
    return config.alpha / (config.rank**0.5 if config.use_rslora else config.rank)


def _is_bias(parts: Mapping[str, str]) -> bool:
    return all(part.endswith("bias") for part in parts)
