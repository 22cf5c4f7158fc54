"""What adapters bring for new tokens: tokenizers that differ, and rows that PEFT does not know."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from composer.errors import Mismatch
from composer.findings import Finding, Severity
from composer.formats.adapters.tokenizers import chosen_tokenizer
from composer.formats.checkpoints.header import read_header

NEW_EMBEDDINGS = ("new_embeddings.safetensors", "new_embeddings.bin")
"""Rows for new tokens in the form that vLLM once read. PEFT has them in the adapter's own file."""


def differing_tokenizers(adapters: Sequence[tuple[str, Path]]) -> list[Finding]:
    """An error for adapters, each with its name and directory, whose tokenizers or chat templates one model cannot
    have."""
    try:
        chosen_tokenizer(None, adapters)
    except Mismatch as error:
        return [Finding(error.code, Severity.ERROR, error.subject, error.message)]
    return []


def new_embeddings(adapters: Sequence[tuple[str, Path]]) -> Iterator[Finding]:
    """A warning for each adapter with rows of new tokens beside its file, which nothing merges or combines."""
    for name, directory in adapters:
        for file in NEW_EMBEDDINGS:
            if not (directory / file).is_file():
                continue
            message = f"{file} of {name} is ignored{_contents(directory / file)}: PEFT has no such file."
            yield Finding("new_embeddings", Severity.WARNING, name, message)


def _contents(path: Path) -> str:
    if path.suffix != ".safetensors":
        return ""
    shapes = [f"{key} {list(entry.shape)}" for key, entry in read_header(path).tensors.items()]
    return f" ({', '.join(shapes[:2])})" if shapes else ""
