"""Tokenizers and chat templates that adapters bring: the one that a combination or a merged model needs.

Trainers save the tokenizer beside the adapter, mostly the base's own. If it has other tokens or another template, the
adapter was trained with them, and cannot be used without them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from composer.errors import Mismatch
from composer.formats.checkpoints.checkpoint import contained
from composer.formats.checkpoints.side_files import side_files

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
TOKENIZER_FILES = (*VOCABULARY_FILES, CONFIG_FILE, "special_tokens_map.json", TEMPLATE_FILE)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer beside an adapter or a base, with a `name` for messages: the paths of its files by name, the ids of
    its tokens, and its chat template, empty if it has none. `tokens` is None without a file that lists them, and
    `digest` covers files that cannot be read that way."""

    name: str
    files: Mapping[str, Path]
    tokens: Mapping[str, int] | None
    digest: str
    template: str

    @property
    def has_vocabulary(self) -> bool:
        return any(name in self.files for name in VOCABULARY_FILES)

    def extends(self, other: "Tokenizer") -> bool:
        """Whether every token of the other one has the same id here."""
        if self.tokens is None or other.tokens is None:
            return self.digest == other.digest
        return other.tokens.items() <= self.tokens.items()


_NONE = Tokenizer("", {}, None, "", "")


@dataclass(frozen=True, slots=True)
class ChosenTokenizer:
    """The owners of a result's vocabulary and template; None for the base's. `loses_template`: the base's, or another
    adapter's, lies in a file that the vocabulary's owner has too."""

    vocabulary: Tokenizer | None = None
    template: Tokenizer | None = None
    loses_template: bool = False

    @property
    def files(self) -> dict[str, Path]:
        """The files that replace the base's, by name."""
        own = {} if self.vocabulary is None else dict(self.vocabulary.files)
        if self.template is None or self.template is self.vocabulary:
            return own
        names = (TEMPLATE_FILE,) if own else (TEMPLATE_FILE, CONFIG_FILE)
        return own | {name: self.template.files[name] for name in names if name in self.template.files}

    @property
    def replaced(self) -> frozenset[str]:
        """The files of the base that the result does not have, unless `files` has them."""
        if self.vocabulary is None:
            return frozenset({TEMPLATE_FILE} if self.template else ())
        keeps = self.template is None and not self.vocabulary.template
        return frozenset(TOKENIZER_FILES) - ({TEMPLATE_FILE} if keeps else set())

    def to_json(self) -> dict[str, str | None]:
        """By part, the name of the adapter that it comes from."""
        parts = {"vocabulary": self.vocabulary, "template": self.template}
        return {part: owner.name if owner else None for part, owner in parts.items()}


def read_tokenizer(directory: Path, name: str = "") -> Tokenizer:
    """The tokenizer in the directory of a checkpoint or an adapter. Files whose content does not fit their name are
    compared by their bytes."""
    there = set(side_files(directory))
    files = {file: contained(directory, file) for file in TOKENIZER_FILES if file in there}
    content = _json(files.get("tokenizer.json"))
    tokens = _tokens(content) if content else None
    digest = hashlib.sha256()
    for file in VOCABULARY_FILES:
        if file in files:
            digest.update(file.encode() + b"\0" + files[file].read_bytes())
    return Tokenizer(name or directory.name, files, tokens, digest.hexdigest(), _template(files))


def chosen_tokenizer(base: Path | None, adapters: Sequence[tuple[str, Path]]) -> ChosenTokenizer:
    """The tokenizer that a result of these adapters needs, each with its name and directory. Without a base, that of
    the adapters.

    Chooses the vocabulary of the adapter whose tokens extend those of all others, and the template that the adapters
    have. Raises Mismatch naming two adapters that differ otherwise: one model has one tokenizer.
    """
    own = _NONE if base is None else read_tokenizer(base)
    brought = [tokenizer for tokenizer in (read_tokenizer(path, name) for name, path in adapters) if tokenizer.files]
    vocabulary = _largest([tokenizer for tokenizer in brought if tokenizer.has_vocabulary])
    templated = [tokenizer for tokenizer in brought if tokenizer.template]
    for other in templated[1:]:
        if other.template != templated[0].template:
            raise _differ(templated[0], other, "different chat templates")
    template = templated[0] if templated else None
    if vocabulary is not None and vocabulary.extends(own) and own.extends(vocabulary):
        vocabulary = None
    if template is not None and template.template == own.template:
        template = None
    expected = template.template if template else own.template
    chosen = ChosenTokenizer(vocabulary, template)
    kept = {name: path for name, path in own.files.items() if name not in chosen.replaced}
    return replace(chosen, loses_template=_template(kept | chosen.files) != expected)


def _largest(tokenizers: Sequence[Tokenizer]) -> Tokenizer | None:
    largest: Tokenizer | None = None
    for candidate in tokenizers:
        if largest is None or (candidate.extends(largest) and not largest.extends(candidate)):
            largest = candidate
        elif not largest.extends(candidate):
            raise _differ(largest, candidate, "different tokenizers")
    return largest


def _differ(one: Tokenizer, other: Tokenizer, what: str) -> Mismatch:
    names = f"{one.name} and {other.name}"
    return Mismatch("tokenizers_differ", f"{names} were trained with {what}, and one model has one.", subject=names)


def _tokens(content: Mapping[str, Any]) -> dict[str, int] | None:
    """The id of each token, of a tokenizer.json; None for one whose model has no list of tokens."""
    model = _object(content.get("model"))
    listed: object = model.get("vocab")
    if isinstance(listed, list):  # Unigram: [token, score]
        pairs = [cast("list[Any]", pair) for pair in cast("list[object]", listed) if isinstance(pair, list) and pair]
        listed = {str(pair[0]): at for at, pair in enumerate(pairs)}
    if not isinstance(listed, dict):
        return None
    tokens = {token: number for token, number in cast("dict[str, Any]", listed).items() if isinstance(number, int)}
    added: object = content.get("added_tokens")
    for row in map(_object, cast("list[object]", added) if isinstance(added, list) else []):
        token, number = row.get("content"), row.get("id")
        if isinstance(token, str) and isinstance(number, int):
            tokens[token] = number
    return tokens


def _object(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _template(files: Mapping[str, Path]) -> str:
    """The chat template as transformers reads it: a file of its own comes before the config's field."""
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].read_text(encoding="utf-8", errors="replace")
    stated = (_json(files.get(CONFIG_FILE)) or {}).get("chat_template")
    return stated if isinstance(stated, str) else json.dumps(stated, sort_keys=True) if stated else ""


def _json(path: Path | None) -> dict[str, Any] | None:
    """The object in a file; None for none, or for something else."""
    if path is None:
        return None
    try:
        content: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None
