"""Modules that the config targets and the file has no tensors for: a layer that was lost when the adapter was saved.

PEFT warns and leaves such a module as it is, and servers load the rest silently.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from composer.findings import Finding, Severity
from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.adapters.placement.naming import is_embedding, is_vocabulary, split_key
from composer.formats.adapters.placement.result import FULL_KINDS, OTHER_PATHS, Placement
from composer.formats.adapters.placement.targeting import surely_targeted

CODE = "missing_modules"
_LISTED = 3
_SPARSE = 4
"""An adapter of fewer than one layer in this number was trained on chosen layers."""
_LAYER = re.compile(r"(?<=\.)(\d{1,9})(?=\.)")
_NOT_LINEAR = re.compile(r"embed|norm|conv", re.IGNORECASE)
"""Modules with a matrix that `all-linear` does not mean."""


def missing_modules(placement: Placement) -> list[Finding]:
    """A warning that names the modules of the base that the config surely targets, and that the file lacks. Without a
    base, a notice about layers that lack what most layers have."""
    if placement.architecture is None:
        gaps = list(_gaps({split_key(key).module for key in placement.header.tensors}))
        return [_finding(gaps, Severity.NOTICE, "others of its layers have them")] if gaps else []
    if any(finding.code == OTHER_PATHS for finding in placement.findings):
        return []  # trained on another model: what this base has besides was never targeted
    adapted = {placed.weight for placed in placement.modules if placed.kind not in FULL_KINDS}
    adapted |= {piece.weight for placed in placement.modules for piece in placed.pieces}
    lost = [
        path
        for name, entry in placement.architecture.tensors.items()
        if len(entry.shape) == 2 and name not in adapted and ".experts." not in name
        if _is_targeted(placement.config, path := name.removesuffix(".weight"))
    ]
    return [_finding(lost, Severity.WARNING, "the base has them, and target_modules matches them")] if lost else []


def _is_targeted(config: AdapterConfig, path: str) -> bool:
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return not is_vocabulary(path) and not _NOT_LINEAR.search(path) and surely_targeted(config, path)
    return not (is_embedding(path) and isinstance(targets, str)) and surely_targeted(config, path)


def _finding(lost: list[str], severity: Severity, why: str) -> Finding:
    listed = ", ".join(lost[:_LISTED]) + (f" and {len(lost) - _LISTED} more" if len(lost) > _LISTED else "")
    message = f"The file has no tensors for {listed}: {why}. Their training is lost."
    return Finding(CODE, severity, lost[0], message, float(len(lost)))


def _gaps(modules: Iterable[str]) -> Iterator[str]:
    """The modules that a few layers between the first and the last lack. If most layers lack them, such as attention in
    a hybrid model, the model is built that way."""
    layers: dict[str, dict[int, str]] = defaultdict(dict)
    seen: set[int] = set()
    for module in modules:
        if match := _LAYER.search(module):
            layers[_LAYER.sub("{}", module, count=1)][int(match[1])] = module
            seen.add(int(match[1]))
    if not seen or max(seen) >= _SPARSE * len(seen):
        return
    for pattern, own in sorted(layers.items()):
        lost = sorted(set(range(min(seen), max(seen) + 1)) - own.keys())
        if 0 < len(lost) < len(own):
            yield from (pattern.replace("{}", str(layer)) for layer in lost)
