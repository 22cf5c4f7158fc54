"""Fused experts: a LoRA on a parameter that stacks all experts of a layer, whether the checkpoint stacks them or not.

PEFT nests its wrappers on the module that holds the parameters: the last one in the module's own order is outermost, so
`experts.base_layer.lora_A` is gate_up_proj and `experts.lora_A` is down_proj when both are targeted.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from composer.formats.adapters.placement.naming import Target, find_weight
from composer.formats.adapters.placement.result import Piece, PlacedModule, Placement, shape_text
from composer.formats.checkpoints.checkpoint import Architecture

# In the order of transformers' modules. Fused name -> names of an expert's own tensors, first rows first.
_SPLIT = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "gate_up_proj_bias": (),
    "gate_proj": (),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
    "down_proj_bias": (),
    "w1": (),
    "v1": (),
    "w2": (),
}
_ORDER = list(_SPLIT)
MAX_EXPERTS = 4096
"""Maximum experts of one parameter: ten times what models have. A pair of rank 1 could claim as many as it has
numbers.
"""
# transformers' stacks that are stored as experts x inputs x outputs.
_TRANSPOSED_MODELS = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


@dataclass(frozen=True, slots=True)
class _Stack:
    """A fused parameter in memory: (E, rows, columns), or (rows, columns). `tensors` are the names of an expert's own,
    in the order of their rows; empty if the checkpoint is fused too."""

    weight: str
    shape: tuple[int, ...]
    tensors: tuple[tuple[str, ...], ...] = ()
    rule: str = ""


def owner_of(module: str) -> str:
    """The module that PEFT wraps, for the nested one that a key names."""
    return module.partition(".base_layer")[0]


def parameter_of(placement: Placement, module: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> str | None:
    """The targeted parameter of this pair: the one that it fits; of several, the one at its depth."""
    owner = owner_of(module)
    names = _targeted(placement, owner)
    fitting = _fitting(placement, owner, names, a_shape, b_shape)
    if len(fitting) == 1:
        return fitting[0]
    depth = module.count(".base_layer")
    return names[len(names) - 1 - depth] if depth < len(names) else None


def _fitting(
    placement: Placement, owner: str, names: list[str], a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> list[str]:
    """Those of the named parameters that the pair's shapes fit."""
    if placement.architecture is None or not len(a_shape) == len(b_shape) == 2:
        return []
    sizes = {a_shape[1], b_shape[0]}
    stacks = {name: find_stack(placement.architecture, owner, name) for name in names}
    return [name for name, stack in stacks.items() if stack and set(stack.shape[-2:]) == sizes]


def _targeted(placement: Placement, owner: str) -> list[str]:
    """The module's parameters that the config names, in the order of the module itself."""
    named: set[str] = set()
    for target in placement.config.target_parameters:
        holder, _, name = target.rpartition(".")
        if holder and f".{owner}".endswith(f".{holder}"):
            named.add(name)
        elif not holder:  # any module's that has one of this name
            known = placement.architecture and find_stack(placement.architecture, owner, name)
            named.update([name] if known or (placement.architecture is None and owner.endswith("experts")) else [])
    return _ordered(named)


def nested_names(parameters: Iterable[str]) -> dict[str, str]:
    """Maps the path of an adapted parameter to the module that its pair's keys name: the inverse of `parameter_of`."""
    owned: dict[str, set[str]] = defaultdict(set)
    for path in parameters:
        owner, _, name = path.rpartition(".")
        owned[owner].add(name)
    return {
        f"{owner}.{name}": owner + ".base_layer" * depth
        for owner, names in owned.items()
        for depth, name in enumerate(reversed(_ordered(names)))
    }


def _ordered(names: Iterable[str]) -> list[str]:
    """The parameters in the module's own order."""
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def place_experts(placement: Placement, module: str, parameter: str, parts: dict[str, str]) -> None:
    """Places a pair of A (E * R, I) and B (O, R * E): one delta per expert, split where the checkpoint splits it."""
    config, owner = placement.config, owner_of(module)
    path = f"{owner}.{parameter}"
    a_shape, b_shape = placement.shape(parts["lora_A"]), placement.shape(parts["lora_B"])
    alike = _fitting(placement, owner, _targeted(placement, owner), a_shape, b_shape)
    if len(alike) > 1 and not set(alike) <= set(_ORDER):
        message = (
            f"{owner} has {', '.join(alike)} of one shape, in an order that is not known here. Merge it with PEFT."
        )
        placement.error("unsupported_layer", owner, message)
        return
    rank, stacked = config.rank_for(path), a_shape[0]
    if len(a_shape) != 2 or len(b_shape) != 2 or stacked != b_shape[1] or stacked % rank:
        placement.error(
            "rank_mismatch",
            path,
            f"{path} has factors of {shape_text(a_shape)} and {shape_text(b_shape)}, rank {rank}.",
        )
        return
    experts, size = stacked // rank, (b_shape[0], a_shape[1])
    if experts > MAX_EXPERTS:
        message = f"{path} has factors of rank {rank} for {experts} experts; more than {MAX_EXPERTS} are not read."
        placement.error("rank_mismatch", path, message)
        return
    stack: _Stack | None = _Stack(path, (experts, *size))
    if placement.architecture is not None:
        stack = find_stack(placement.architecture, owner, parameter)
    if stack is None:
        placement.not_found(owner, parameter, parts["lora_A"])
        return
    transposed = _transposed(placement, stack, size)
    rows, columns = size[::-1] if transposed else size
    wanted = (experts, rows, columns) if len(stack.shape) == 3 else (rows, columns)
    if stack.shape != wanted or (len(wanted) == 2 and experts != 1):
        message = f"{path} is made for {shape_text((experts, rows, columns))}; the base's is {shape_text(stack.shape)}."
        placement.error("shape_mismatch", path, message)
        return
    placement.modules.append(
        PlacedModule(
            module=path,
            weight=stack.weight,
            kind="experts",
            tied=False,
            rank=rank,
            alpha=config.alpha_for(path),
            scale=config.scale_for(path),
            shape=stack.shape,
            parts=parts,
            rule=stack.rule,
            layout="conv1d" if transposed else "linear",
            pieces=tuple(_pieces(stack, experts, size, rows)),
        )
    )


def missing_parameters(placement: Placement) -> list[str]:
    """The targeted parameters without a pair, unless another error was found."""
    placed = [f".{module.module}" for module in placement.modules if module.kind == "experts"]
    targets = () if placement.findings else placement.config.target_parameters
    return [target for target in targets if not any(path.endswith(f".{target}") for path in placed)]


def _pieces(stack: _Stack, experts: int, size: tuple[int, int], rows: int) -> Iterator[Piece]:
    for expert in range(experts):
        if not stack.tensors:
            yield Piece(expert, stack.weight, expert * rows, 0, size[0])
            continue
        step = size[0] // len(stack.tensors[expert])
        for part, weight in enumerate(stack.tensors[expert]):
            yield Piece(expert, weight, 0, part * step, (part + 1) * step)


def _transposed(placement: Placement, stack: _Stack, size: tuple[int, int]) -> bool:
    if len(stack.shape) != 3 or stack.tensors or placement.architecture is None:
        return False
    if size[0] == size[1]:
        return placement.architecture.model_type in _TRANSPOSED_MODELS
    return stack.shape[1:] == size[::-1]


def find_stack(architecture: Architecture, owner: str, parameter: str) -> _Stack | None:
    """The stacked parameter of a layer's experts: one tensor in the checkpoint, or one per expert; None if the base has
    neither."""
    target = find_weight(owner, parameter, architecture)
    if isinstance(target, Target):
        return _Stack(target.weight, architecture.tensors[target.weight].shape, rule=target.rule)
    for names in _SPLIT.get(parameter, ()):
        first = find_weight(f"{owner}.0.{names[0]}", "weight", architecture)
        if isinstance(first, Target):
            prefix = first.weight.removesuffix(f".0.{names[0]}.weight")
            return _unfused(architecture, f"{owner}.{parameter}", prefix, names)
    return None


def _unfused(architecture: Architecture, path: str, prefix: str, names: tuple[str, ...]) -> _Stack | None:
    tensors: list[tuple[str, ...]] = []
    while all(f"{prefix}.{len(tensors)}.{name}.weight" in architecture.tensors for name in names):
        tensors.append(tuple(f"{prefix}.{len(tensors)}.{name}.weight" for name in names))
    shapes = {architecture.tensors[weight].shape for own in tensors for weight in own}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        return None
    return _Stack(path, (len(tensors), len(names) * shape[0], shape[1]), tuple(tensors), "unfused experts")
