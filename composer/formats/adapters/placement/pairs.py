"""LORA's own parts: pairs of factors on every kind of layer, the parts of variants, and trained tokens."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from composer.formats.adapters.placement.experts import owner_of, parameter_of, place_experts
from composer.formats.adapters.placement.naming import TIED_HEAD, TOKENS, Target, is_head, split_key
from composer.formats.adapters.placement.result import GROUPED, PlacedModule, Placement, shape_text

FACTORS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
FACTOR_PARTS = frozenset({*FACTORS, *FACTORS.values()})
# Parts of a pair besides its factors, and the flag without which PEFT ignores them.
_EXTRAS = {"magnitude": "use_dora", "lora_diag": "kasa_config", "lora_B_bias": "lora_bias"}
PAIR_PARTS = FACTOR_PARTS | {*_EXTRAS, "lora_A_bias"}


def place_pair(placement: Placement, module: str, parts: Mapping[str, str]) -> None:
    """Places the pair of a module, if it has one."""
    keys = {part: key for part, key in parts.items() if part in PAIR_PARTS}
    if not keys:
        return
    for a, b in FACTORS.items():
        if (a in keys) != (b in keys):
            there, missing = (a, b) if a in keys else (b, a)
            placement.error("missing_pair", module, f"{module} has {there} ({keys[there]}) but no {missing}.")
            return
    pair = next(((a, b) for a, b in FACTORS.items() if a in keys), None)
    if pair is None:
        placement.error("missing_pair", module, f"{module} has {', '.join(keys)} but no lora_A and lora_B.")
        return
    a_shape, b_shape = (placement.shape(keys[part]) for part in pair)
    parameter = parameter_of(placement, module, a_shape, b_shape) if placement.config.target_parameters else None
    if parameter is not None and pair[0] == "lora_A":
        place_experts(placement, module, parameter, keys)
    elif _is_sound(placement, module, a_shape, b_shape):
        _place_on(placement, module, keys, a_shape, b_shape)


def _is_sound(placement: Placement, module: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> bool:
    """Whether the factors' shapes make a pair of the config's rank."""
    # Two matrices, or a convolution and one with a kernel of a single element.
    if not (2 <= len(a_shape) == len(b_shape) <= 5 and set(b_shape[2:]) <= {1}):
        message = f"{module} has factors of shape {shape_text(a_shape)} and {shape_text(b_shape)}, which make no pair."
        placement.error("unsupported_layer", module, message)
        return False
    owner, blocks = owner_of(module), placement.config.blocks
    rank = placement.config.rank_for(owner)
    cut = blocks.count if blocks is not None and blocks.side(owner) == "B" else 1
    rank_A, rank_B = a_shape[0], b_shape[1] * cut
    if a_shape[2:] and rank_B < rank_A == rank and rank % rank_B == 0:
        message = f"{module} is a convolution in {rank // rank_B} groups, which PEFT itself cannot merge."
        placement.error(GROUPED, module, message)
        return False
    if rank_A != rank_B or rank_A != rank:
        message = f"{module} has rank {rank_A} in A and {rank_B} in B; the config says {rank}."
        placement.error("rank_mismatch", module, message)
        return False
    return True


def _place_on(
    placement: Placement, module: str, keys: dict[str, str], a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> None:
    config, owner = placement.config, owner_of(module)
    # The output projection inside a wrapped attention: `attn.base_layer.out_proj`.
    path, nested = module.replace(".base_layer", ""), module != owner
    target = _target(placement, path, next(iter(keys.values())))
    if target is None:
        return
    side = config.blocks.side(owner) if config.blocks is not None else ""
    outputs, inputs = b_shape[0], prod(a_shape[1:]) * (config.blocks.count if config.blocks and side == "A" else 1)
    kind = _kind(placement, path, target, keys, (outputs, inputs), len(a_shape))
    shape = (inputs, outputs) if kind in ("conv1d", "embedding") else (outputs, inputs)
    shape = (outputs, *a_shape[1:]) if kind == "convolution" else shape
    layout = kind if kind in ("conv1d", "embedding") else "linear"
    if not placement.fits(path, target, shape) or not _extras_fit(placement, path, keys, outputs):
        return
    if side:
        kind = "block_diagonal"
    # PEFT applies the attention's output pair twice, in training as in merging.
    scale = config.scale_for(owner) * (2 if nested else 1)
    placed = PlacedModule(
        module=path,
        weight=target.weight,
        kind=kind,
        tied=target.tied,
        rank=config.rank_for(owner),
        alpha=config.alpha_for(owner),
        scale=scale,
        shape=shape,
        parts=keys,
        rule=target.rule,
        layout=layout,
        nested=nested,
    )
    placement.modules.append(placed)
    if "lora_B_bias" in keys:
        _place_bias(placement, placed, outputs)


def _target(placement: Placement, path: str, key: str) -> Target | None:
    """The name `weight`, or that of an attention's packed weight."""
    packed = f"{path}.in_proj_weight"
    if placement.architecture is not None and packed in placement.architecture.tensors:
        return Target(packed, False)
    return placement.find(path, "weight", key)


def _kind(
    placement: Placement, path: str, target: Target, keys: Mapping[str, str], size: tuple[int, int], dimensions: int
) -> str:
    if "lora_embedding_A" in keys:
        return "embedding"
    if dimensions > 2:
        return "convolution"
    if "lora_diag" in keys:
        return "kasa"
    return "conv1d" if placement.transposed(path, target, size) else "linear"


def _extras_fit(placement: Placement, path: str, keys: Mapping[str, str], outputs: int) -> bool:
    """Checks that tensors and flags agree: PEFT ignores a magnitude without `use_dora`, and invents a missing one."""
    wanted = {part for part, flag in _EXTRAS.items() if flag in placement.config.flags}
    for part in sorted((keys.keys() - FACTOR_PARTS) ^ wanted):
        flag = _EXTRAS.get(part, "no known flag")
        code, has = ("unflagged_part", "has a") if part in keys else ("missing_part", "lacks the")
        placement.error(code, path, f"{path} {has} {part}, which goes with {flag}.")
        return False
    key = keys.get("magnitude")
    if key is None or placement.header.tensors[key].spec.elements == outputs:
        return True
    message = f"{path} has a magnitude of shape {shape_text(placement.shape(key))} for {outputs} outputs."
    placement.error("shape_mismatch", path, message)
    return False


def _place_bias(placement: Placement, pair: PlacedModule, outputs: int) -> None:
    key = pair.parts["lora_B_bias"]
    target = placement.find(pair.module, "bias", key)
    if target is None or not placement.fits(f"{pair.module}.bias", target, (outputs,)):
        return
    if placement.shape(key) != (outputs,):
        message = f"{key} has the shape {shape_text(placement.shape(key))} for {outputs} outputs."
        placement.error("shape_mismatch", pair.module, message)
        return
    placement.modules.append(
        replace(
            pair, weight=target.weight, kind="bias", tied=False, rank=0, alpha=0.0, shape=(outputs,), layout="linear"
        )
    )


def place_tokens(placement: Placement, module: str, parts: Mapping[str, str]) -> None:
    """Places the new rows of an embedding; a head that shares its tensor gets them as well, unless it has saved
    rows.
    """
    key = parts.get(TOKENS)
    target = placement.find(module, "weight", key) if key is not None else None
    if key is None or target is None:
        return
    rows, shape = placement.config.tokens_of(module), placement.shape(key)
    base = placement.base_shape(target) or (0, *shape[1:])
    vocabulary = base[0] or max(rows, default=0) + 1
    if len(shape) != 2 or shape[0] != len(rows) or shape[1:] != base[1:] or max(rows, default=0) >= vocabulary:
        message = (
            f"{module} has {shape_text(shape)} trained rows for {len(rows)} token ids up to {max(rows, default=0)}; "
            f"the base's {target.weight} is {shape_text(base)}."
        )
        placement.error("shape_mismatch", module, message)
        return
    saved = (split_key(name) for name in placement.header.tensors)
    twin = target.tied and not any(entry.part == TOKENS and is_head(entry.module) for entry in saved)
    placed = PlacedModule(
        module=module,
        weight=target.weight,
        kind="tokens",
        tied=target.tied,
        shape=base,
        parts={TOKENS: key},
        rule=target.rule,
        twin=twin,
    )
    placement.modules.append(placed)
    if twin:
        placement.modules.append(replace(placed, module=TIED_HEAD))
