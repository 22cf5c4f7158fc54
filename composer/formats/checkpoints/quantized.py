"""bitsandbytes' 4-bit weights in a checkpoint: which tensors belong together and what they represent. No torch."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from composer.errors import InvalidFile
from composer.formats.checkpoints.files import StoredFile, read_range
from composer.formats.checkpoints.header import TensorEntry, TensorSpec

NF4_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4_STATE)
_STATE_BYTES = 10_000
_FLOAT32_END = 2**128
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_STORAGE = {"U8", *_DTYPES.values()}

Locate = Callable[[str], tuple[StoredFile, TensorEntry]]


@dataclass(frozen=True, slots=True)
class Nf4:
    """The packed weight `name`: `shape` and `dtype` are those before packing, `block` is the number of values per
    scale."""

    name: str
    shape: tuple[int, int]
    dtype: str
    block: int
    nested_block: int | None
    nested_offset: float

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)


def is_part(name: str) -> bool:
    """Whether a tensor only helps to decode another one."""
    return name.endswith(_PARTS)


def nf4_weights(names: Iterable[str], locate: Locate) -> dict[str, Nf4]:
    """The packed weights of a checkpoint by name. Raises InvalidFile naming one with an unusable description."""
    known = set(names)
    weights: dict[str, Nf4] = {}
    for name in sorted(known):
        if name.endswith(NF4_STATE):
            weight = name.removesuffix(NF4_STATE)
            weights[weight] = _described(weight, known, locate)
    return weights


def _described(name: str, known: set[str], locate: Locate) -> Nf4:
    file, entry = locate(f"{name}{NF4_STATE}")
    if entry.dtype != "U8" or entry.size_bytes > _STATE_BYTES:
        raise _bad(name, "its quantization state is not a short string")
    content = read_range(file, entry.begin, entry.end)
    try:
        state: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _bad(name, "its quantization state is not JSON") from error
    if not isinstance(state, dict):
        raise _bad(name, "its quantization state is not an object")
    stated = cast("dict[str, Any]", state)
    shape = cast("list[Any]", stated.get("shape") if isinstance(stated.get("shape"), list) else [])
    is_matrix = len(shape) == 2 and all(type(side) is int and 0 < side < 2**31 for side in shape)
    dtype = _DTYPES.get(str(stated.get("dtype")))
    if not is_matrix or dtype is None or not _positive(stated, "blocksize"):
        raise _bad(name, "its quantization state lacks a known shape, dtype or block size")
    packed = Nf4(name, (shape[0], shape[1]), dtype, stated["blocksize"], *_nested(name, stated))
    _check_sizes(packed, known, locate)
    return packed


def _nested(name: str, stated: Mapping[str, Any]) -> tuple[int | None, float]:
    if "nested_blocksize" not in stated:
        return None, 0.0
    offset = stated.get("nested_offset")
    number = type(offset) in (int, float) and abs(cast(float, offset)) < _FLOAT32_END
    if not _positive(stated, "nested_blocksize") or not number:
        raise _bad(name, "its quantization state lacks a nested block size or offset")
    return stated["nested_blocksize"], float(cast(float, offset))


def _check_sizes(packed: Nf4, known: set[str], locate: Locate) -> None:
    values = packed.shape[0] * packed.shape[1]
    blocks = -(-values // packed.block)
    wanted = {".quant_map": ("F32", 16)}
    if packed.nested_block is None:
        wanted[".absmax"] = ("F32", blocks)
    else:
        wanted |= {".absmax": ("U8", blocks), ".nested_quant_map": ("F32", 256)}
        wanted[".nested_absmax"] = ("F32", -(-blocks // packed.nested_block))
    for suffix in ("", *wanted):
        tensor = f"{packed.name}{suffix}"
        if tensor not in known:
            raise _bad(packed.name, f"{tensor} is missing")
        _, entry = locate(tensor)
        if suffix:
            fits = (entry.dtype, entry.spec.elements) == wanted[suffix]
        else:  # the bytes, whatever dtype they are stored as (bnb_4bit_quant_storage)
            fits = entry.dtype in _STORAGE and entry.size_bytes == -(-values // 2)
        if not fits:
            raise _bad(packed.name, f"{tensor} does not have the size that its quantization state requires")


def _positive(stated: Mapping[str, Any], name: str) -> bool:
    value = stated.get(name)
    return type(value) is int and 0 < value < 2**31


def _bad(name: str, why: str) -> InvalidFile:
    return InvalidFile("bad_quantization", f"{name} cannot be decoded: {why}.", subject=name)
