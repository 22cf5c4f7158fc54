"""Places every tensor of an adapter on the base tensor that it acts on, by full path and shape. Misfits are
findings.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from composer.errors import NotSupported
from composer.findings import Finding, Severity
from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.adapters.config.parts import Size
from composer.formats.adapters.config.patterns import matches_fully
from composer.formats.adapters.config.types import RETIRED_PARTS, TYPES, UNSAVED_PARTS, AdapterType
from composer.formats.adapters.placement.experts import missing_parameters, owner_of
from composer.formats.adapters.placement.missing import missing_modules
from composer.formats.adapters.placement.naming import (
    PEFT_PREFIX,
    SHARED,
    TOKENS,
    Target,
    find_weight,
    is_copy,
    is_raw,
    is_vocabulary,
    lacks_prefix,
    split_key,
)
from composer.formats.adapters.placement.pairs import PAIR_PARTS, place_pair, place_tokens
from composer.formats.adapters.placement.result import (
    FULL_KINDS,
    NORMED_EMBEDDINGS,
    PlacedModule,
    Placement,
    PlacementResult,
    bias_of,
    shape_text,
)
from composer.formats.adapters.placement.targeting import surely_untargeted
from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.checkpoints.header import FLOAT_DTYPES, Header


def place(
    config: AdapterConfig, header: Header, architecture: Architecture | None, subject: str = "adapter"
) -> PlacementResult:
    """Matches every tensor of the adapter with a base tensor. Without an architecture, only the adapter's own shapes
    are checked, and weights get their in-memory names.

    Error findings: unmatched_tensor, wrong_prefix, shape_mismatch, rank_mismatch, bad_dtype, missing_pair,
    missing_part, unflagged_part, duplicate_tensor, duplicate_target, no_target, untargeted_tensor, pattern_unused,
    unsupported_layer, grouped_convolution, empty_adapter. Warnings: other_paths, missing_modules, pattern_unused if
    others of its keys match. Notices: no_prefix, raw_keys, unused_target; missing_modules without an architecture.
    Raises NotSupported for a type that does not change weights, or
    not in a way that its files show.
    """
    if config.peft_type != "LORA" and config.peft_type not in TYPES and (refusal := config.unsupported()):
        message = f"{subject} cannot be read: {refusal.reason}."
        raise NotSupported("adapter_type", message, subject=subject, next_step=refusal.way_out)
    for part in {split_key(key).part for key in header.tensors} & RETIRED_PARTS.keys():
        reason, way_out = RETIRED_PARTS[part]
        message = f"{subject} cannot be read: {reason}."
        raise NotSupported("adapter_type", message, subject=subject, next_step=way_out)
    placement = Placement(config, header, architecture)
    grouped = _group(placement)
    shared = grouped.pop(SHARED, {}) if config.peft_type != "LORA" else {}
    for module, parts in grouped.items():
        if config.peft_type == "LORA":
            place_pair(placement, module, parts)
        else:
            _place_other(placement, module, parts, shared)
        place_tokens(placement, module, parts)
        _place_full_tensors(placement, module, parts)
    used = TYPES[placement.config.peft_type].shared if placement.config.peft_type != "LORA" else ()
    for part, key in shared.items():
        if part not in used:
            placement.error("unmatched_tensor", key, f"{key} is not a part of a {placement.config.peft_type} adapter.")
    _check_prefix(placement, list(grouped), subject)
    _check_dtypes(placement)
    _check_twice(placement)
    _check_looked_up(placement)
    _check_config_is_used(placement)
    if not any(finding.severity is Severity.ERROR for finding in placement.findings):
        placement.findings += missing_modules(placement)
    _note_other_keys(placement, subject)
    return PlacementResult(placement.modules, placement.findings)


def _group(placement: Placement) -> dict[str, dict[str, str]]:
    """Module -> part -> key, in file order."""
    split = [split_key(key) for key in placement.header.tensors]
    bare = [entry for entry in split if not entry.key.startswith(PEFT_PREFIX) and entry.module != SHARED]
    if bare and any(entry.key.startswith(PEFT_PREFIX) for entry in split):
        odd = bare[0].key
        placement.error("wrong_prefix", odd, f"{odd} lacks the prefix {PEFT_PREFIX!r} that other keys have.")
    grouped: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in split:
        if entry.part == "ignored":
            continue
        parts = grouped[entry.module]
        twin = parts.setdefault(entry.part, entry.key)
        if twin == entry.key:
            continue
        parts[entry.part] = min(twin, entry.key, key=is_copy)
        if is_copy(twin) == is_copy(entry.key) or placement.shape(twin) != placement.shape(entry.key):
            placement.error("duplicate_tensor", entry.key, f"{entry.key} and {twin} are the same part of one module.")
    return grouped


def _own_parts(config: AdapterConfig) -> frozenset[str]:
    """The parts that the type keeps for an adapted module, besides fully saved tensors."""
    return frozenset({TOKENS, *(PAIR_PARTS if config.peft_type == "LORA" else TYPES[config.peft_type].parts)})


def _place_other(placement: Placement, module: str, parts: Mapping[str, str], shared: Mapping[str, str]) -> None:
    """Places a module of a type other than LoRA; composer.formats.adapters.config.parts defines what its parts fit."""
    kind = TYPES[placement.config.peft_type]
    own = {part: key for part, key in parts.items() if part in kind.parts}
    if kind.replaces:
        for part, key in own.items():
            _place_replacement(placement, module, part, key)
        return
    parameter = "bias" if kind.only_bias else "weight"
    target = placement.find(module, parameter, next(iter(own.values()))) if own else None
    if target is None:
        return
    if kind.only_bias:
        _place_bias(placement, module, target, own)
        return
    keys = {part: key for part, key in shared.items() if part in kind.shared} | own
    base, layout = placement.base_shape(target), _layout(placement, module, target, own)
    rows, columns = (base[0], prod(base[1:])) if len(base) > 1 else (0, 0)
    size = (rows, columns) if layout == "linear" else (columns, rows)
    shapes = {part: placement.shape(key) for part, key in keys.items()}
    if base and len(base) != 2 and not kind.convolutions:
        kept = f"of {placement.config.peft_type} only matrices are read: merge it with PEFT"
        message = f"{module} is stored as {shape_text(base)}; {kept}."
        placement.error("unsupported_layer", module, message)
        return
    try:
        made_for = kind.fits(shapes, placement.config.options_for(module), size)
    except KeyError as missing:
        why = "".join(f": {reason}" for part, reason in UNSAVED_PARTS.items() if part == missing.args[0])
        placement.error("missing_part", module, f"{module} has {', '.join(own)}, but no {missing.args[0]}{why}.")
    except ValueError as wrong:
        placement.error("shape_mismatch", module, f"{module} has {wrong}.")
    else:
        shape = base or (made_for if layout == "linear" else made_for[::-1])
        placed = PlacedModule(
            module=module,
            weight=target.weight,
            kind="other",
            tied=target.tied,
            shape=shape,
            parts=keys,
            rule=target.rule,
            layout=layout,
        )
        _add_other(placement, placed, size, made_for)


def _place_bias(placement: Placement, module: str, target: Target, own: Mapping[str, str]) -> None:
    """Places a part (1, O) that is added to the module's bias."""
    shape = placement.shape(next(iter(own.values())))
    if len(shape) == 2 and shape[0] == 1 and placement.fits(f"{module}.bias", target, shape[1:]):
        named = {"module": module, "parts": dict(own), "rule": target.rule}
        placement.modules.append(PlacedModule(**named, **bias_of(target, shape[1])))


def _add_other(placement: Placement, placed: PlacedModule, size: Size, made_for: Size) -> None:
    if placement.architecture is not None and made_for != size:
        message = (
            f"{placed.module} is made for {shape_text(made_for)}; the base's {placed.weight} is {shape_text(size)}."
        )
        placement.error("shape_mismatch", placed.module, message)
        return
    placement.modules.append(placed)
    if placement.architecture is None or not _acts_on_bias(placement, TYPES[placement.config.peft_type], placed):
        return
    bias = find_weight(placed.module, "bias", placement.architecture)
    if not isinstance(bias, Target):
        return
    product = [part for part in TYPES[placement.config.peft_type].bias_product if part in placed.parts]
    if product:
        message = (
            f"{placed.module} has a bias, to which {product[0]} adds a product with the base's weight. That is not "
            "read: merge it with PEFT, or train it without."
        )
        placement.error("unsupported_layer", placed.module, message)
    elif placement.fits(f"{placed.module}.bias", bias, size[:1]):
        placement.modules.append(replace(placed, **bias_of(bias, size[0])))


def _layout(placement: Placement, module: str, target: Target, own: Mapping[str, str]) -> str:
    if any("_embedding_" in part for part in own):
        return "embedding"
    # No factors show the orientation, so the model type decides: PEFT ignores a wrong fan_in_fan_out.
    return "conv1d" if placement.transposed(module, target, (0, 0)) else "linear"


def _acts_on_bias(placement: Placement, kind: AdapterType, placed: PlacedModule) -> bool:
    """Whether the type acts on the module's bias. A feed-forward (IA)3 scales inputs, which do not affect a bias."""
    feed_forward = "ia3_l" in placed.parts and placement.shape(placed.parts["ia3_l"])[1] > 1
    return kind.acts_on_bias and not feed_forward


def _place_full_tensors(placement: Placement, module: str, parts: Mapping[str, str]) -> None:
    own = _own_parts(placement.config)
    families = tuple(f"{part.partition('_')[0]}_" for part in own)
    for part, key in parts.items():
        if part in own:
            continue
        if any(name.startswith(families) for name in (*module.split("."), part)):
            message = f"{key} is not a known part of a {placement.config.peft_type} adapter."
            placement.error("unmatched_tensor", module or key, message)
            continue
        _place_replacement(placement, module, part, key)


def _place_replacement(placement: Placement, module: str, part: str, key: str) -> None:
    """Places a tensor that replaces the base's, or PEFT's copy of a base weight."""
    parameter = part.rpartition(".")[2]
    target, shape = placement.find(module, parameter, key), placement.shape(key)
    if target is None or not placement.fits(f"{module}.{parameter}", target, shape):
        return
    kind = "base_copy" if part == "base_layer.weight" else "replacement"
    placed = PlacedModule(
        module=module, weight=target.weight, kind=kind, tied=target.tied, shape=shape, parts={part: key},
        rule=target.rule,
    )  # fmt: skip
    placement.modules.append(placed)


def _check_prefix(placement: Placement, modules: list[str], subject: str) -> None:
    """If nothing matches, one finding that shows both sides replaces a hundred unmatched tensors."""
    if not placement.header.tensors:
        placement.error("empty_adapter", subject, f"{subject} has no tensors.")
    codes = {finding.code for finding in placement.findings}
    if placement.modules or "unmatched_tensor" not in codes or placement.architecture is None:
        return
    if "shape_mismatch" in codes:  # some keys match: it is another base
        return
    first = next(iter(placement.header.tensors))
    names = list(placement.architecture.tensors)
    layer = split_key(first).module.rpartition(".")[2]
    alike = (name for ending in (f".{layer}.weight", "proj.weight", "") for name in names if name.endswith(ending))
    example = next(alike, "")
    expected = f"{PEFT_PREFIX}{example.removesuffix('.weight')}.lora_A.weight"
    message = f"No tensor matches the base: keys look like {first!r}, where the base expects {expected!r}."
    message += placement.renamed_perhaps(filter(None, modules))
    placement.findings[:] = [finding for finding in placement.findings if finding.code != "unmatched_tensor"]
    placement.error("wrong_prefix", next(filter(None, modules), first), message)


def _note_other_keys(placement: Placement, subject: str) -> None:
    """Notices for keys that are accepted here as if PEFT had named them, but not elsewhere."""
    keys = list(placement.header.tensors)
    if lacks_prefix(keys):
        message = f"No key has the prefix {PEFT_PREFIX!r}, without which PEFT itself loads nothing."
        placement.findings.append(Finding("no_prefix", Severity.NOTICE, subject, message))
    raw = [key for key in keys if is_raw(key)]
    if raw:
        message = f"{raw[0]} has the adapter's name in it, as in a raw state dict: it is read without."
        placement.findings.append(Finding("raw_keys", Severity.NOTICE, subject, message))


def _check_dtypes(placement: Placement) -> None:
    """Refuses parts that are not plain floating point, except indices: other dtypes have lost their scale."""
    owners = {
        key: placed.module
        for placed in placement.modules
        for part, key in placed.parts.items()
        if placed.kind not in FULL_KINDS and "indices" not in part
    }
    for key, module in owners.items():
        dtype = placement.header.tensors[key].dtype
        if dtype not in FLOAT_DTYPES:
            message = f"{key} is stored as {dtype}, not as F32, BF16, F16 or F64: save the adapter in one of those."
            placement.error("bad_dtype", module, message)


def _check_twice(placement: Placement) -> None:
    seen: dict[str, str] = {}
    for placed in placement.modules:
        if placed.kind == "base_copy" or placed.tied:
            continue
        other = seen.setdefault(placed.weight, placed.module)
        if other != placed.module:
            placement.error(
                "duplicate_target", placed.module, f"{placed.module} and {other} are both the tensor {placed.weight}."
            )


def _check_looked_up(placement: Placement) -> None:
    if placement.model_type not in NORMED_EMBEDDINGS:
        return
    for placed in placement.modules:
        if placed.kind == "tokens" or placed.layout == "embedding":
            message = (
                f"{placed.module} of {placement.model_type} normalises the rows that it looks up, but not the ones "
                "that PEFT trained: no weight has the same effect. Serve it with PEFT, or train the complete "
                "embedding."
            )
            # Checked first: PEFT saves the norm as well, and its finding would hide this one.
            placement.findings.insert(0, Finding("unsupported_layer", Severity.ERROR, placed.module, message))


def _check_config_is_used(placement: Placement) -> None:
    """Checks that the config's targets hold for the tensors: PEFT would silently ignore missing ones."""
    config = placement.config
    adapted = _adapted_paths(placement)
    if not adapted and config.peft_type != "LORA":
        placement.error("no_target", config.peft_type, f"No tensor is one of a {config.peft_type} adapter.")
    if not adapted and placement.findings:
        return
    _check_targets(placement, adapted)
    _check_saved_modules(placement)
    if config.token_indices and not any(split_key(key).part == TOKENS for key in placement.header.tensors):
        placement.error("no_target", "token_indices", "The config names trained tokens, but no tensor has their rows.")
    for target in missing_parameters(placement):
        message = f"target_parameters names {target!r}, but no tensor belongs to such a parameter."
        placement.error("no_target", target, message)
    for placed in placement.modules:
        wrapped = placed.kind not in (*FULL_KINDS, "tokens", "bias") and placed.module in adapted
        if wrapped and surely_untargeted(config, placed.module):
            message = f"{placed.module} has factors, but the config does not target it: PEFT would ignore them."
            placement.error("untargeted_tensor", placed.module, message)
    _check_patterns(placement, adapted | {placed.module for placed in placement.modules if placed.kind == "experts"})


def _check_targets(placement: Placement, adapted: set[str]) -> None:
    """Checks a list of targets. A general list names modules of many models, and PEFT accepts it if one of them exists.
    No match at all is an error, and so is a module of the base without tensors in the file."""
    targets = placement.config.target_modules
    lacking = _targets_without_tensors(placement.config, adapted)
    some = not isinstance(targets, str) and len(lacking) < len(targets or ())
    for target in lacking:
        message = f"target_modules has {target!r}, but no tensor belongs to a module that it matches"
        if some and not _in_base(placement, target):
            placement.findings.append(Finding("unused_target", Severity.NOTICE, target, f"{message}."))
        else:
            where = "; the base has such a module" if some else ""
            placement.error("no_target", target, f"{message}{where}.")


def _check_saved_modules(placement: Placement) -> None:
    """Finds fully trained modules of the base that the file lacks. PEFT names both `classifier` and `score`, and a
    model has one of them; a head that is tied to the embedding is saved as one of the two."""
    base = placement.architecture
    if base is None:
        return
    saved = {split_key(key).module for key in placement.header.tensors}
    there, known = _as_text(saved), _as_text({name.rpartition(".")[0] for name in base.tensors})
    for name in dict.fromkeys(placement.config.modules_to_save):
        twin = base.tied and is_vocabulary(name) and any(map(is_vocabulary, saved))
        if f".{name}." in known and f".{name}." not in there and not twin:
            message = f"modules_to_save has {name!r}, but no tensor belongs to such a module; the base has one."
            placement.error("no_target", name, message)


def _as_text(modules: set[str]) -> str:
    """An index of module names by their last components, for lookups among many modules."""
    return "\n".join(f".{module}." for module in modules)


def _in_base(placement: Placement, target: str) -> bool:
    """Whether PEFT wraps a module by this name. Not an expert: experts are one parameter in memory, however the file
    stores them."""
    if placement.architecture is None:
        return False
    matrices = (name for name, entry in placement.architecture.tensors.items() if len(entry.shape) > 1)
    paths = (name.removesuffix(".weight") for name in matrices if ".experts." not in name)
    return any(f".{path}".endswith(f".{target}") and not surely_untargeted(placement.config, path) for path in paths)


def _check_patterns(placement: Placement, paths: set[str]) -> None:
    """Checks the keys of patterns. PEFT ignores those that match nothing: a config may be for several models. But if
    none matches, they may be names of another version of transformers, and ignoring them would change the scale."""
    config = placement.config
    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        unused = pattern.unused(paths)
        severity = Severity.ERROR if len(unused) == len(pattern) else Severity.WARNING
        for key in unused:
            message = f"{name} has {key!r}, which matches no module."
            placement.findings.append(Finding("pattern_unused", severity, key, message))


def _targets_without_tensors(config: AdapterConfig, adapted: set[str]) -> list[str]:
    targets = config.target_modules
    if isinstance(targets, str):
        matched = targets == "all-linear" or any(matches_fully(targets, module) for module in adapted)
        return [] if matched else [targets]
    return [
        target
        for target in targets or ()
        if not any(module == target or module.endswith(f".{target}") for module in adapted)
    ]


def _adapted_paths(placement: Placement) -> set[str]:
    """The modules that PEFT wrapped, including misfits: these are reported once, not also as a missing target."""
    own = _own_parts(placement.config)
    split = (split_key(key) for key in placement.header.tensors)
    tokens = placement.config.peft_type == "TRAINABLE_TOKENS"
    own = own if tokens else own - {TOKENS}
    return {owner_of(entry.module) for entry in split if entry.part in own and entry.module != SHARED}
