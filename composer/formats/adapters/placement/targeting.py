"""Whether PEFT would wrap a module. Only then does it load the module's low-rank tensors."""

import re
from typing import cast

from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.adapters.config.patterns import matches_fully
from composer.formats.adapters.placement.naming import is_embedding, is_head

_ANY_LAYER = r"[^.]*"
_PLAIN_NAME = re.compile(r"\w+")


def surely_untargeted(config: AdapterConfig, module: str) -> bool:
    """True if PEFT's rules (check_target_module_exists) leave this module alone. False also if that depends on
    information that is not available here: no target_modules (chosen by model type), parameters targeted by name, and a
    head or embedding that weight tying wraps with the other side."""
    targets = config.target_modules
    if targets is None or config.raw.get("target_parameters"):
        return False
    if config.raw.get("ensure_weight_tying") and (is_head(module) or is_embedding(module)):
        return False
    if config.exclude_modules and _names(config.exclude_modules, module):
        return True
    if isinstance(targets, str):
        # PEFT accepts this word in upper or lower case.
        return targets.lower() != "all-linear" and not matches_fully(targets, module)
    if module in targets:  # a whole path wins over the choice of layers
        return False
    return not _names(targets, module) or _in_another_layer(config, module)


def surely_targeted(config: AdapterConfig, module: str) -> bool:
    """True if PEFT's rules surely wrap this module, which is a linear layer. False also if that depends on information
    that is not available here: targets chosen by model type, or layers by a pattern that cannot be evaluated."""
    targets = config.target_modules
    if targets is None or (config.exclude_modules and _names(config.exclude_modules, module)):
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or matches_fully(targets, module)
    # Layers may be chosen in a way that `surely_untargeted` does not evaluate.
    chosen = bool(config.raw.get("layers_to_transform")) and bool(config.raw.get("layers_pattern"))
    return module in targets or (_names(targets, module) and not chosen and not surely_untargeted(config, module))


def _names(targets: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(targets, str):
        return matches_fully(targets, module)
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _in_another_layer(config: AdapterConfig, module: str) -> bool:
    chosen: object = config.raw.get("layers_to_transform")
    if chosen is None or chosen == []:
        return False
    layers = cast("list[object]", chosen if isinstance(chosen, list) else [chosen])
    given: object = config.raw.get("layers_pattern") or [_ANY_LAYER]
    patterns = cast("list[object]", given if isinstance(given, list) else [given])
    if any(type(layer) is not int for layer in layers):
        return False
    for pattern in patterns:
        text = str(pattern)
        if text != _ANY_LAYER and not _PLAIN_NAME.fullmatch(
            text
        ):  # an untrusted regular expression that cannot be evaluated
            return False
        start = r".*?\." if text == _ANY_LAYER else r"(?:^|.*?\.)"
        match = re.match(rf"{start}{text}\.(\d{{1,9}})\.", module)
        if match:
            return int(match[1]) not in layers
    return True
