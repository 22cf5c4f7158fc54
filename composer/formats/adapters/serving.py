"""The servers that load an adapter unchanged, with reasons and fixes for the others, from the servers' sources. What
does not depend on a server's start options is computed once (`judge`) and can be kept: a bit for each server and the
reasons of those that refuse. `loads` then combines it with a server's rank limit.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from composer.errors import NotSupported
from composer.formats.adapters.config.config import REBASED_INITS, AdapterConfig
from composer.formats.adapters.facts import AdapterFacts
from composer.formats.adapters.placement.naming import PEFT_PREFIX, is_raw, lacks_prefix
from composer.formats.adapters.placement.result import GROUPED, OTHER_PATHS, PlacementResult

SERVERS = ("vllm", "sglang", "lorax", "llamacpp", "peft")
"""The servers; bit i of a mask stands for SERVERS[i]. Masks are stored: new servers are only appended."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
PROFILES = ("vllm:<max_lora_rank>", "sglang", "lorax", "llamacpp", "peft")

_FOLD = "fold: rewrite scales into plain factors (combine with one adapter does it)"
_FOLD_RANKS = "fold: rewrite scales into plain factors of one rank (combine with one adapter and --rank {} does it)"
_RENAME = "rename: write it with PEFT's own keys (combine with one adapter does it)"
_TRUNCATE = "truncate: lower the rank with the error stated"
_MERGE = "merge: bake it into a checkpoint"


@dataclass(frozen=True, slots=True)
class ServerProfile:
    """A server with its start options. `max_rank` is None if it sets no known limit."""

    server: str
    max_rank: int | None = None

    @property
    def bit(self) -> int:
        """The server's bit in a mask of servers."""
        return 1 << SERVERS.index(self.server)

    def __str__(self) -> str:
        return self.server if self.max_rank is None else f"{self.server}:{self.max_rank}"


@dataclass(frozen=True, slots=True)
class Loading:
    """Whether this server loads the adapter and serves it as trained. `way_out` has a fix for each reason that has
    one."""

    profile: str
    loads: bool
    reasons: tuple[str, ...]
    way_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"reasons": list(self.reasons), "way_out": list(self.way_out)}


def parse_profile(text: str) -> ServerProfile:
    """Parses `vllm:<max_lora_rank>` (`vllm` is `vllm:16`, its default), `sglang`, `lorax`, `llamacpp`, `peft`. Raises
    NotSupported for any other, and for a max_lora_rank that vLLM does not accept."""
    server, colon, limit = text.partition(":")
    if server not in SERVERS or (colon and server != "vllm"):
        message = f"Unknown profile {text[:80]!r}."
        raise NotSupported(
            "unknown_profile", message, subject=text[:80], next_step=f"Use one of {', '.join(PROFILES)}."
        )
    if server != "vllm":
        return ServerProfile(server)
    if colon and limit not in map(str, VLLM_RANKS):
        message = f"Unknown profile {text[:80]!r}: max_lora_rank must be one of {', '.join(map(str, VLLM_RANKS))}."
        raise NotSupported(
            "unknown_profile", message, subject=text[:80], next_step=f"Use one of {', '.join(PROFILES)}."
        )
    return ServerProfile(server, int(limit) if colon else VLLM_DEFAULT_RANK)


def judge(
    config: AdapterConfig, facts: AdapterFacts, placed: PlacementResult
) -> tuple[int, dict[str, dict[str, list[str]]]]:
    """(mask, {server: {reasons, way_out}}): the servers that load it if its rank is within their limit, and why the
    others do not. The dict is JSON, which `loads` reads."""
    other = [] if config.peft_type == "LORA" else _other_type(config)
    unknown, bare, raw = [*_unknown(placed), *_elsewhere(placed)], _bare(config, placed), _raw(config, placed)
    common = (other or _common(config, facts, placed)) + unknown + raw
    most = VLLM_RANKS[-1]
    too_large = f"rank {facts.rank_max} is above {most}, the highest max_lora_rank there is"
    problems = {
        "vllm": common + ([(too_large, _TRUNCATE)] if facts.rank_max > most else []),
        "sglang": common,
        "lorax": common + bare,
        "llamacpp": (other or _llamacpp(config, facts, placed)) + unknown + raw,
        "peft": unknown + bare + (raw if _raw_beside_pairs(placed) else []),
    }
    mask = sum(1 << bit for bit, server in enumerate(SERVERS) if not problems[server])
    refusals = {
        server: {
            "reasons": [reason for reason, _ in reasons],
            "way_out": list(dict.fromkeys(way for _, way in reasons if way)),
        }
        for server, reasons in problems.items()
        if reasons
    }
    return mask, refusals


def loads(servers: int, refusals: Mapping[str, Any], rank_max: int, profile: ServerProfile) -> Loading:
    """The verdict for one server from the result of `judge`; only here is the rank compared."""
    refused: Mapping[str, Any] = refusals.get(profile.server, {})
    reasons: list[str] = list(refused.get("reasons", []))
    ways: list[str] = list(refused.get("way_out", []))
    if not servers & profile.bit and not reasons:
        reasons.append("it was released before this was judged: push it again as the next version")
    if profile.max_rank is not None and rank_max > profile.max_rank:
        reasons.append(f"rank {rank_max} is above max_lora_rank {profile.max_rank}")
        ways.append(_TRUNCATE)
    return Loading(str(profile), not reasons, tuple(reasons), tuple(dict.fromkeys(ways)))


def loads_in(config: AdapterConfig, facts: AdapterFacts, placed: PlacementResult, profile: str) -> Loading:
    """`judge` and `loads` for an adapter directory. Raises NotSupported for an unknown profile."""
    asked = parse_profile(profile)
    return loads(*judge(config, facts, placed), facts.rank_max, asked)


def _other_type(config: AdapterConfig) -> list[tuple[str, str]]:
    """Reasons that hold for all of these servers, which load only LoRA."""
    return [(f"{config.peft_type} is refused: only LoRA is loaded", "" if config.unsupported() else _MERGE)]


def _unknown(placed: PlacementResult) -> list[tuple[str, str]]:
    unknown = [finding.subject for finding in placed.findings if finding.code == "unmatched_tensor"]
    return [(f"tensors match nothing that is known ({unknown[0]})", "")] if unknown else []


def _elsewhere(placed: PlacementResult) -> list[tuple[str, str]]:
    if not any(finding.code == OTHER_PATHS for finding in placed.findings):
        return []
    return [("its paths are those of another model: where the base has its modules, servers do not look", _MERGE)]


def _bare(config: AdapterConfig, placed: PlacementResult) -> list[tuple[str, str]]:
    """PEFT and LoRAX need full keys; vLLM and the conversion to GGUF accept keys without PEFT's prefix."""
    if not lacks_prefix(_keys(placed)):
        return []
    return [(f"keys lack the prefix {PEFT_PREFIX!r}: they are left out, and the base is served", _renamed(config))]


def _raw(config: AdapterConfig, placed: PlacementResult) -> list[tuple[str, str]]:
    """vLLM and the conversion to GGUF raise at such keys."""
    raw = any(map(is_raw, _keys(placed)))
    return [("keys with the adapter's name in them (.default) are refused", _renamed(config))] if raw else []


def _raw_beside_pairs(placed: PlacementResult) -> bool:
    """PEFT accepts such keys for factors, and raises at those of trained tokens and of fully saved tensors."""
    beside = (module for module in placed.modules if module.kind in ("replacement", "tokens"))
    return any(is_raw(key) for module in beside for key in module.parts.values())


def _keys(placed: PlacementResult) -> list[str]:
    return [key for module in placed.modules for key in module.parts.values()]


def _renamed(config: AdapterConfig) -> str:
    """The fix that rewrites keys as PEFT's; only plain pairs can be rewritten."""
    if config.unsupported():
        return ""
    return _RENAME if config.peft_type == "LORA" and not config.flags else _MERGE


def _common(config: AdapterConfig, facts: AdapterFacts, placed: PlacementResult) -> list[tuple[str, str]]:
    """vLLM, and what is known about SGLang and LoRAX: plain pairs, one scale for all modules."""
    problems: list[tuple[str, str]] = []
    if config.flags:
        problems.append((f"{facts.variant} is refused", "" if config.unsupported() else _MERGE))
    if config.init.startswith((*REBASED_INITS, "loftq")):
        problems.append(
            (
                f"init_lora_weights={config.init} is refused: its factors fit a changed base",
                "convert it to a plain LoRA with PEFT",
            )
        )
    saved_in_full = sorted(
        {
            module.module
            for module in placed.modules
            if module.kind == "replacement" and not all(part.endswith("bias") for part in module.parts)
        }
    )
    if saved_in_full and not (len(saved_in_full) == 1 and saved_in_full[0].split(".")[-1] in ("classifier", "score")):
        problems.append((f"modules_to_save is refused ({', '.join(saved_in_full)})", _MERGE))
    if config.bias != "none":
        problems.append((f"bias={config.bias} is refused", _MERGE))
    if _convolutions(placed):
        problems.append(("convolutions are refused", _MERGE))
    if extra := _extra_parts(placed):
        problems.append((f"tensors beside lora_A and lora_B are refused ({extra})", ""))
    plain = config.alpha / (config.rank**0.5 if config.use_rslora else config.rank)
    if len({module.scale for module in placed.low_rank}) > 1:
        problems.append(
            ("modules have different scales (rank_pattern, alpha_pattern), and the server reads one", _FOLD)
        )
    elif placed.low_rank and abs(placed.low_rank[0].scale - plain) > 1e-9:
        problems.append(
            ("the pattern's scale is not the one that r and lora_alpha give, which the server reads", _FOLD)
        )
    return problems


def _llamacpp(config: AdapterConfig, facts: AdapterFacts, placed: PlacementResult) -> list[tuple[str, str]]:
    """The converter to GGUF keeps one lora_alpha and divides by each tensor's rank."""
    problems: list[tuple[str, str]] = []
    if config.use_rslora or any(module.alpha != config.alpha for module in placed.low_rank):
        # Folded, every scale is 1, which needs another alpha for another rank.
        ranks = {module.rank for module in placed.low_rank}
        way_out = _FOLD if len(ranks) == 1 else _FOLD_RANKS.format(max(ranks))
        problems.append(("the conversion keeps one lora_alpha: rsLoRA and alpha_pattern come out wrong", way_out))
    if (
        facts.variant == "dora"
        or config.bias != "none"
        or any(module.kind == "replacement" for module in placed.modules)
    ):
        problems.append(("the conversion refuses DoRA, bias and modules_to_save", _MERGE))
    elif extra := _extra_parts(placed):
        problems.append((f"the conversion refuses tensors beside lora_A and lora_B ({extra})", ""))
    elif config.flags and facts.variant != "alora_invocation_tokens":
        problems.append((f"{facts.variant} is not converted", "" if config.unsupported() else _MERGE))
    if _convolutions(placed):
        problems.append(("the conversion knows no convolutions", _MERGE))
    if any(module.tied and module.module.endswith("lm_head") for module in placed.low_rank):
        problems.append(("the conversion refuses an lm_head that is tied to the embedding", _MERGE))
    return problems


def _convolutions(placed: PlacementResult) -> bool:
    """Also grouped ones, which cannot be placed."""
    grouped = any(finding.code == GROUPED for finding in placed.findings)
    return grouped or any(module.kind == "convolution" for module in placed.modules)


def _extra_parts(placed: PlacementResult) -> str:
    """Contents of the tensors without a flag in the config: a copy of a base weight."""
    return ", ".join(sorted({part for module in placed.modules if module.kind == "base_copy" for part in module.parts}))
