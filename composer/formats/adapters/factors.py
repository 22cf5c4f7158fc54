"""An adapter's tensors as numpy arrays, mapped from the file and converted a block at a time. No torch.

Shapes: O outputs and I inputs of a module, R its rank; A is R x I, B is O x R.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from composer.formats.adapters.facts import Adapter
from composer.formats.adapters.placement.result import PlacedModule
from composer.formats.checkpoints.header import FLOAT_DTYPES, TensorEntry
from composer.formats.checkpoints.numeric import NUMPY_DTYPES, Float64, as_float64

BLOCK_ELEMENTS = 1 << 22
MAX_ENERGY = 1e280
"""Maximum energy of one module: sums of such energies are finite, however many modules there are."""


def readable(adapter: Adapter, module: PlacedModule) -> bool:
    """Whether both factors have a format that numpy can read."""
    return all(adapter.header.tensors[key].dtype in FLOAT_DTYPES for key in _pair(module))


def factors(adapter: Adapter, module: PlacedModule) -> tuple[Float64, Float64]:
    """(A, B) of a low-rank module, float64, without its scale; I counts a convolution's kernel."""
    a, b = (adapter.header.tensors[key] for key in _pair(module))
    return as_float64(_matrix(adapter.weights_path, a), a.dtype), as_float64(_matrix(adapter.weights_path, b), b.dtype)


def factor_grams(adapter: Adapter, module: PlacedModule) -> tuple[Float64, Float64]:
    """(A A^T, B^T B), R x R float64."""
    a, b = (adapter.header.tensors[key] for key in _pair(module))
    return _gram(_matrix(adapter.weights_path, a).T, a.dtype), _gram(_matrix(adapter.weights_path, b), b.dtype)


def blocks(path: Path, entry: TensorEntry) -> Iterator[Float64]:
    """All elements of a tensor of any shape, flat, a few million at a time."""
    flat = _mapped(path, entry).reshape(-1)
    for start in range(0, len(flat), BLOCK_ELEMENTS):
        yield as_float64(flat[start : start + BLOCK_ELEMENTS], entry.dtype)


def _pair(module: PlacedModule) -> tuple[str, str]:
    prefix = "lora_embedding_" if module.kind == "embedding" else "lora_"
    return module.parts[f"{prefix}A"], module.parts[f"{prefix}B"]


def _mapped(path: Path, entry: TensorEntry) -> npt.NDArray[Any]:
    return np.memmap(path, dtype=NUMPY_DTYPES[entry.dtype], mode="r", offset=entry.begin, shape=entry.shape)


def _matrix(path: Path, entry: TensorEntry) -> npt.NDArray[Any]:
    return _mapped(path, entry).reshape(entry.shape[0], -1)


def _gram(array: npt.NDArray[Any], dtype: str) -> Float64:
    """M^T M of a matrix, from rows of a bounded size: an embedding's factor has 150,000."""
    gram = np.zeros((array.shape[1], array.shape[1]))
    height = max(1, BLOCK_ELEMENTS // max(1, array.shape[1]))
    for start in range(0, array.shape[0], height):
        block = as_float64(array[start : start + height], dtype)
        gram += block.T @ block
    return gram
