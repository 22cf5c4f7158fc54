"""The gap between a 4-bit base and the full-precision one, for merging an adapter trained on the former.

QLoRA (arXiv 2305.14314) trains on a 4-bit base. Its deltas fit that base; in the original one they meet different
weights. The difference in weights is measured here; only an evaluation shows its effect on the answers.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from composer.deltas.delta import Delta, LowRank
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import InvalidFile
from composer.findings import Finding, Severity
from composer.formats.checkpoints.card import CARD_FILE, front_matter, provenance
from composer.formats.checkpoints.checkpoint import Checkpoint, contained
from composer.formats.checkpoints.header import FLOAT_DTYPES
from composer.merge.io.source import Source, source_rows
from composer.merge.quantized.nf4 import rounded

_IN_FOUR_BITS = re.compile(r"(?:bnb|nf)-?4-?bit|-4bit|-int4|qlora", re.IGNORECASE)
# A line of the settings that PEFT (before 0.7) and ms-swift list in a model card, or of the config that axolotl adds.
# Prose and code that only show how to load in 4 bits write `load_in_4bit=True`.
_LOADED_IN_FOUR_BITS = re.compile(rb"^(?:- )?load_in_4bit: [Tt]rue[ \t]*(?:#.*)?\r?$", re.MULTILINE)
_CARD_BYTES = 1 << 20
_WEIGHTS, _ROWS = 6, 32


def quantized_bases(checkpoint: Checkpoint, loaded: Sequence[LoadedAdapter]) -> list[Finding]:
    """A notice for each adapter whose files state that it was trained on a 4-bit base, with |NF4(W) - W| / |W| on
    sampled rows as measure.

    Empty for a checkpoint that is in 4 bits itself.
    """
    findings: list[Finding] = []
    for adapter in loaded:
        evidence = "" if checkpoint.packed else _evidence(adapter)
        if not evidence:
            continue
        error, change = _gap(checkpoint, adapter.deltas)
        message = f"{adapter.name} was trained on a 4-bit base ({evidence}) but is merged into the full-precision one."
        if change:
            message += (
                f" On sampled rows the two differ by {error:.1%} of the weights, {error / change:.1f} times what the "
                "adapter changes: evaluate the result, or merge into the 4-bit base itself (--dequantize)."
            )
        findings.append(Finding("trained_on_4_bits", Severity.NOTICE, adapter.name, message, error))
    return findings


def _evidence(adapter: LoadedAdapter) -> str:
    """The evidence for a 4-bit base in the adapter's own files; empty if there is none.

    No pickle is opened. `base_model_relation: quantized` is not evidence: it describes the files beside the card.
    """
    named = adapter.config.base_model_name_or_path or ""
    if _IN_FOUR_BITS.search(named):
        return f"its config names {named[:80]}"
    try:
        card = _card(adapter.path)
        stated, _ = provenance(front_matter(card))
    except InvalidFile:  # a README should not make a merge fail
        return ""
    if _LOADED_IN_FOUR_BITS.search(card):
        return f"its {CARD_FILE} states load_in_4bit"
    if _IN_FOUR_BITS.search(named := stated.get("base_model", "")):
        return f"its {CARD_FILE} names {named[:80]}"
    return f"its {CARD_FILE} has the tag qlora" if "qlora" in map(str.lower, stated.get("tags", ())) else ""


def _card(directory: Path) -> bytes:
    if not (directory / CARD_FILE).is_file():
        return b""
    with contained(directory, CARD_FILE).open("rb") as file:
        return file.read(_CARD_BYTES)


def _gap(checkpoint: Checkpoint, deltas: Sequence[Delta]) -> tuple[float, float]:
    """(|NF4(W) - W|, |Δ|) over |W|, on the first rows of some weights."""
    squares = [0.0, 0.0, 0.0]
    chosen = range(0, len(deltas), max(1, len(deltas) // _WEIGHTS))
    for delta in (deltas[number] for number in chosen):
        if not isinstance(delta, LowRank) or delta.begin:
            continue
        file, entry = checkpoint.locate(delta.weight)
        if entry.dtype not in FLOAT_DTYPES:
            continue
        rows, columns = delta.stored_shape
        W_MN = source_rows(Source(file, entry, columns), 0, min(rows, _ROWS)).float()
        left, right = delta.stored_factors()
        added_MN = left[: len(W_MN)] @ right
        for index, part in enumerate((rounded(W_MN) - W_MN, added_MN, W_MN)):
            squares[index] += float(part.double().square().sum())
    error, change, weight = squares
    return ((error / weight) ** 0.5, (change / weight) ** 0.5) if weight else (0.0, 0.0)
