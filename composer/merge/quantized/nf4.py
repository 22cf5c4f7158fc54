"""Decodes weights in 4-bit NormalFloat as stored by bitsandbytes (QLoRA, arXiv 2305.14314).

Each byte has two values, the first in the upper half; each block of consecutive values has a scale: value =
quant_map[4 bits] * absmax[block]. With double quantization, the scales are bytes themselves:
absmax = nested_quant_map[byte] * nested_absmax[block of blocks] + nested_offset.
"""

from collections.abc import Callable

import torch

from composer.deltas.stored import stored_tensor
from composer.formats.checkpoints.quantized import Locate, Nf4
from composer.merge.io.source import Decoded

BLOCK = 64
# The 16 quantiles of a normal distribution that NF4 has, arXiv 2305.14314, appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def decoded(locate: Locate, packed: Nf4) -> Decoded:
    """The values of one weight, a few rows at a time in float32; written in the dtype before quantization."""
    columns = packed.shape[1]

    def part(suffix: str) -> torch.Tensor:
        return stored_tensor(*locate(f"{packed.name}{suffix}"))

    def rows(begin: int, end: int) -> torch.Tensor:
        first, last = begin * columns, end * columns
        halves = part("").reshape(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
        codes, levels = torch.arange(256), part(".quant_map").float()
        pairs = torch.stack([levels[codes >> 4], levels[codes & 0xF]], dim=1)  # 256 x 2: the two values of each byte
        values = pairs.index_select(0, halves.int()).reshape(-1)
        block = first // packed.block
        scales = _scales(part, packed, block, -(-last // packed.block)).repeat_interleave(packed.block)
        values = values[first % 2 :][: last - first]
        return values.mul_(scales[first - block * packed.block :][: last - first]).reshape(end - begin, columns)

    return Decoded(packed.shape, rows, packed.dtype)


def _scales(part: Callable[[str], torch.Tensor], packed: Nf4, first: int, last: int) -> torch.Tensor:
    absmax = part(".absmax")[first:last]
    if packed.nested_block is None:
        return absmax.float()
    outer = part(".nested_absmax").float()[torch.arange(first, last) // packed.nested_block]
    return part(".nested_quant_map").float()[absmax.long()] * outer + packed.nested_offset


def rounded(W_MN: torch.Tensor) -> torch.Tensor:
    """Float32 rows rounded to NF4 in blocks of 64, as in the base that QLoRA trains on."""
    flat = W_MN.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.tensor(LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(blocks / scale, middles)]
    return (nearest * scale).reshape(-1)[: len(flat)].reshape(W_MN.shape)
