"""Rounds values to the output's dtype, as a `Rounding` specifies."""

import hashlib

import numpy as np
import torch

from composer.formats.recipes.rounding import Mode, Rounding

_LANES = 16  # 16-bit numbers in one block of Philox 4x64
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's 23, in normal numbers
_SMALLEST_NORMAL_FLOAT16 = 2.0**-14
_STEPS_FLOAT16 = 2.0**24  # of a subnormal float16 in 1


def round_into(rounding: Rounding, out: torch.Tensor, exact: torch.Tensor, name: str, begin: int) -> None:
    """Rounds `exact`, the values of tensor `name` from element `begin` on, into `out`."""
    if rounding.mode is Mode.NEAREST or out.dtype not in _DROPPED_BITS:
        out.copy_(exact)
    else:
        _round_by_chance(out, exact.float(), _chances(rounding.seed, name, begin, exact.numel()).reshape(exact.shape))


def _chances(seed: int, name: str, begin: int, count: int) -> torch.Tensor:
    """Uniform integers below 2^16, one per value, as int32; any part of a tensor can be made separately."""
    key = hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    first = begin // _LANES
    blocks = -(-(begin + count) // _LANES) - first
    raw = np.random.Philox(key=int.from_bytes(key, "little"), counter=first).random_raw(blocks * 4)
    skipped = begin - first * _LANES
    return torch.from_numpy(raw.view(np.uint16)[skipped : skipped + count].astype(np.int32))


def _round_by_chance(out: torch.Tensor, exact: torch.Tensor, chances: torch.Tensor) -> None:
    """Adds a random amount below one step to the magnitude and truncates to `out`: exact in integers.

    NaN and infinity are unchanged, since nothing is added to them.
    """
    dropped = _DROPPED_BITS[out.dtype]
    chances = torch.where(exact.isfinite(), chances >> (16 - dropped), 0)
    bits = (exact.view(torch.int32) + chances) & -(1 << dropped)
    rounded = bits.view(torch.float32)
    if out.dtype is torch.float16:
        small = exact.abs() < _SMALLEST_NORMAL_FLOAT16
        steps = (exact.abs() * _STEPS_FLOAT16 + chances * 2.0**-dropped).floor() / _STEPS_FLOAT16
        rounded = torch.where(small, steps.copysign(exact), rounded)
    out.copy_(rounded)
