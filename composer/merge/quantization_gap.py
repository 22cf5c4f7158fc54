"""How far a 4-bit base is from the full-precision one, where an adapter that was trained on it is merged.

QLoRA (arXiv 2305.14314) trains beside a base in 4 bits. Its deltas are right for that base; merged into the original
one they meet other weights. How far those are apart is measured; what it does to the answers only an evaluation tells.
"""

import os
import re
from collections.abc import Sequence

from composer.delta import Delta, LowRank
from composer.findings import Finding, Severity
from composer.formats.checkpoint import Checkpoint
from composer.formats.header import FLOAT_DTYPES
from composer.merge.nf4 import rounded
from composer.merge.source import Source, source_rows
from composer.variants import LoadedAdapter

_IN_FOUR_BITS = re.compile(r"(?:bnb|nf)-?4-?bit|-4bit|-int4|qlora", re.IGNORECASE)
_WEIGHTS, _ROWS = 6, 32


def quantized_bases(checkpoint: Checkpoint, loaded: Sequence[LoadedAdapter]) -> list[Finding]:
    """A notice for each adapter whose config names a 4-bit base, with |NF4(W) - W| / |W| on sampled rows as measure.

    Nothing is said of a checkpoint that is in 4 bits itself.
    """
    found: list[Finding] = []
    for adapter in loaded:
        named = adapter.config.base_model_name_or_path or ""
        if checkpoint.packed or not _IN_FOUR_BITS.search(named):
            continue
        error, change = _gap(checkpoint, adapter.deltas)
        message = (
            f"{adapter.name} was trained on a base in 4 bits ({named[:80]}) and goes into the full-precision one. On "
            f"sampled rows the two differ by {error:.1%} of the weights, {error / change:.1f} times what the adapter "
            f"changes: evaluate the result, or merge into the 4-bit base itself (--dequantize)."
            if change
            else f"{adapter.name} was trained on a base in 4 bits ({named[:80]}) and goes into the full-precision one."
        )
        found.append(Finding("trained_on_4_bits", Severity.NOTICE, adapter.name, message, error))
    return found


def _gap(checkpoint: Checkpoint, deltas: Sequence[Delta]) -> tuple[float, float]:
    """(|NF4(W) - W|, |Δ|) over |W|, on the first rows of some weights."""
    squares = [0.0, 0.0, 0.0]
    chosen = range(0, len(deltas), max(1, len(deltas) // _WEIGHTS))
    for delta in (deltas[number] for number in chosen):
        if not isinstance(delta, LowRank) or delta.begin:
            continue
        path, entry = checkpoint.locate(delta.weight)
        if entry.dtype not in FLOAT_DTYPES:
            continue
        rows, columns = delta.stored_shape
        file = os.open(path, os.O_RDONLY)
        try:
            W_MN = source_rows(Source(file, entry, columns), 0, min(rows, _ROWS)).float()
        finally:
            os.close(file)
        left, right = delta.stored_factors()
        added_MN = left[: len(W_MN)] @ right
        for place, part in enumerate((rounded(W_MN) - W_MN, added_MN, W_MN)):
            squares[place] += float(part.double().square().sum())
    error, change, whole = squares
    return ((error / whole) ** 0.5, (change / whole) ** 0.5) if whole else (0.0, 0.0)
