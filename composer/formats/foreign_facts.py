"""What an adapter of another layout says of itself, without a base: for a look before it is converted. No torch."""

import re
from collections import Counter
from collections.abc import Iterable
from math import isfinite
from pathlib import Path

import numpy as np

from composer.errors import InvalidFile
from composer.formats.facts import AdapterFacts
from composer.formats.floats import NUMPY_DTYPES, as_float64
from composer.formats.foreign import Foreign, ForeignModule
from composer.formats.header import TensorEntry
from composer.formats.layouts import MLX

# The parts whose first side is the rank; a LoKr whose sides are both whole has none of them, and no rank.
_RANKED = ("A", "w1_b", "lokr_w1_b", "lokr_w2_b")


def foreign_facts(foreign: Foreign) -> AdapterFacts:
    """In the words of PEFT: an alpha for each scale. `targets` are ends of names, of kohya's all behind the layer.

    Raises InvalidFile for an alpha that is no finite number, which `convert` would not take either.
    """
    entries = foreign.header.tensors.values()
    parts = {part for module in foreign.modules for part in module.parts}
    kind = "loha" if "w1_a" in parts else "lokr" if any(part.startswith("lokr_") for part in parts) else "lora"
    ranks = {module.module: _rank(foreign, module) for module in foreign.modules}
    alphas = {module.module: _alpha(foreign, module, ranks[module.module]) for module in foreign.modules}
    dtypes: Counter[str] = Counter()
    for entry in entries:
        dtypes[entry.dtype] += entry.size_bytes
    return AdapterFacts(
        type=kind,
        variant="dora" if "magnitude" in parts else kind,
        rank_max=max(ranks.values(), default=0),
        alpha=_most_common(alphas.values()),
        targets=tuple(sorted({_target(module.module) for module in foreign.modules})),
        modules=len(foreign.modules),
        parameters=sum(entry.spec.elements for entry in entries),
        size_bytes=foreign.header.size_bytes,
        dtype=dtypes.most_common(1)[0][0] if dtypes else "F32",
        modules_to_save=(),
        use_rslora=False,
        ranks=ranks,
        alphas=alphas,
        base_model_name_or_path=None,
        peft_version=None,
    )


def _rank(foreign: Foreign, module: ForeignModule) -> int:
    part = next((part for part in _RANKED if part in module.parts), None)
    if part is None:
        return 0
    shape = foreign.header.tensors[module.parts[part]].shape
    if foreign.layout == MLX and len(shape) == 2:  # transposed, but for a stack of experts
        return shape[1]
    return shape[-2] if len(shape) == 3 else shape[0] if shape else 0


def _alpha(foreign: Foreign, module: ForeignModule, rank: int) -> float:
    """The module's own, or the one that its scale stands for."""
    key = module.parts.get("alpha")
    stated = None if key is None else _number(foreign.weights_path, foreign.header.tensors[key])
    if stated is not None and not isfinite(stated):
        message = f"{key} is no finite number."
        raise InvalidFile("bad_alpha", message, subject=module.module, next_step="Export the adapter again.")
    return (1.0 if module.scale is None else module.scale) * rank if stated is None else stated


def _number(path: Path, entry: TensorEntry) -> float | None:
    """The one number of a tensor, None where it is not one."""
    if entry.spec.elements != 1 or entry.dtype not in NUMPY_DTYPES:
        return None
    with path.open("rb") as file:
        file.seek(entry.begin)
        found = np.frombuffer(file.read(entry.size_bytes), dtype=NUMPY_DTYPES[entry.dtype])
    return float(as_float64(found, entry.dtype)[0])


def _most_common(numbers: Iterable[float]) -> float:
    counts = Counter(numbers)
    return counts.most_common(1)[0][0] if counts else 0.0


def _target(name: str) -> str:
    return name.rpartition(".")[2] if "." in name else re.split(r"_\d+_", name)[-1]
