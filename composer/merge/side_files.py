"""The files of a merged checkpoint besides weights, config and index: the base's, with the tokenizer that it needs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.findings import Finding, Severity
from composer.formats.adapters.tokenizers import ChosenTokenizer, Tokenizer, chosen_tokenizer, read_tokenizer
from composer.formats.checkpoints.checkpoint import contained
from composer.formats.checkpoints.side_files import side_files
from composer.merge.grown import Vocabulary

_LISTED = 5


@dataclass(frozen=True, slots=True)
class SideFiles:
    """The files beside the weights, by name, and remarks about the tokenizer among them."""

    files: dict[str, Path]
    tokenizer: ChosenTokenizer
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        return self.tokenizer.to_json()


def planned_side_files(
    base: Path, adapters: Sequence[LoadedAdapter], vocabulary: Vocabulary, *, as_before: bool = False
) -> SideFiles:
    """The side files of a merge into the base. `as_before`: chosen as in merges whose note names no tokenizer: the
    adapter's only for a grown vocabulary.

    Raises Mismatch for two tokenizers that differ, and for trained tokens that no tokenizer has.
    """
    if as_before:
        grown = read_tokenizer(vocabulary.grown_by) if vocabulary.grown_by else None
        chosen = ChosenTokenizer(grown if grown and grown.files else None, grown if grown and grown.template else None)
    else:
        chosen = chosen_tokenizer(base, [(adapter.name, adapter.path) for adapter in adapters])
        _refuse_lost_tokens(chosen.vocabulary or read_tokenizer(base), adapters)
    files = {name: contained(base, name) for name in side_files(base) if name not in chosen.replaced} | chosen.files
    return SideFiles(files, chosen, tuple(_findings(base, chosen, vocabulary)))


def _refuse_lost_tokens(tokenizer: Tokenizer, adapters: Sequence[LoadedAdapter]) -> None:
    """Raises Mismatch if an adapter trains tokens that the merged model could not read or write: rows of a padded
    vocabulary, without the tokenizer that names them."""
    if tokenizer.tokens is None:
        return
    known = set(tokenizer.tokens.values())
    for adapter in adapters:
        if lost := sorted({row for rows in adapter.config.token_indices.values() for row in rows} - known):
            listed = ", ".join(map(str, lost[:_LISTED])) + (", …" if len(lost) > _LISTED else "")
            raise Mismatch(
                "tokens_without_tokenizer",
                f"{adapter.name} trains the tokens {listed}, which no tokenizer has: the merged model could not "
                "produce them.",
                subject=adapter.name,
                next_step="Save the tokenizer that it was trained with beside the adapter (tokenizer.save_pretrained).",
            )


def _findings(base: Path, chosen: ChosenTokenizer, vocabulary: Vocabulary) -> Iterator[Finding]:
    own = chosen.vocabulary
    if own is not None:
        grows = f"The vocabulary grows to {vocabulary.rows} rows. " if vocabulary.rows else ""
        message = f"{grows}The tokenizer is that of {own.name}, which has other tokens than the base's."
        yield Finding("grown_vocabulary" if grows else "adapter_tokenizer", Severity.NOTICE, "tokenizer", message)
    elif vocabulary.rows:
        message = (
            f"The vocabulary grows to {vocabulary.rows} rows. The adapter has no tokenizer, and the base's lacks the "
            "new tokens: save the tokenizer there."
        )
        yield Finding("no_tokenizer", Severity.WARNING, "tokenizer", message)
    elif not read_tokenizer(base).has_vocabulary:
        message = f"{base.name} has no tokenizer, so the merged checkpoint has none either."
        yield Finding("no_tokenizer", Severity.NOTICE, base.name, message)
    if chosen.template is not None:
        message = f"The chat template is that of {chosen.template.name}, not the base's."
        yield Finding("adapter_template", Severity.NOTICE, "chat_template", message)
    if chosen.loses_template:
        message = "The chosen tokenizer has no chat template; the other one's is in its tokenizer_config.json."
        yield Finding("no_chat_template", Severity.WARNING, "chat_template", message)
