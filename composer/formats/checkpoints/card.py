"""The model card: the YAML between two lines of `---` at the start of a README.md, and the provenance in it.

A card is untrusted. It is read with bounds, and without aliases (a few lines of them expand to gigabytes). Unusable
parts are findings, never errors: no release should fail because of its README.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from math import isfinite
from typing import Any, cast

import yaml

from composer.errors import InvalidFile
from composer.findings import Finding, Severity
from composer.formats.recipes.phrases import problem_of_phrase
from composer.formats.recipes.suite import NAME
from composer.formats.untrusted import LONE_SURROGATE, MAX_HYPERPARAMETERS, MAX_ITEMS, MAX_TEXT, printable

CARD_FILE = "README.md"
FRONT_MATTER_BYTES = 65_536
MAX_DEPTH = 20

TEXTS = (
    "trainer", "run_url", "code_commit", "base_license", "license", "license_link", "library_name", "base_model",
    "imported_from", "imported_endpoint",
)  # fmt: skip
"""Fields of the provenance that are one short text."""
FIELDS = (*TEXTS, "data", "hyperparameters", "tags", "phrases")
_LICENSE_CHARS = 100
_COMMIT_DIGITS = 64
_SAMPLE = ("name", "digest", "license")
_FENCE = re.compile(rb"---[ \t]*\r?\n")
_END = re.compile(rb"^(?:---|\.\.\.)[ \t]*\r?$", re.MULTILINE)
_POWER = re.compile(r"[+-]?\d{1,20}[eE][+-]?\d{1,3}")  # 1e-4, which YAML 1.1 reads as text

_INTEGER_TAG = "tag:yaml.org,2002:int"
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
Scalar = str | int | float | bool


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 0123456 as an octal number and 1:30 as ninety. Here they are text, such as a commit."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, _INTEGER if tag == _INTEGER_TAG else pattern) for tag, pattern in known]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_mapping(text: str, subject: str) -> dict[str, Any]:
    """A YAML mapping whose keys are text, read with the bounds of a front matter. Raises InvalidFile."""
    value = load_bounded(text, subject)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in cast("dict[object, object]", value)):
        raise _bad(subject, "it is not a mapping of names")
    return cast("dict[str, Any]", value)


def load_bounded(text: str, subject: str) -> object:
    """A YAML document, read with the bounds of a front matter. Raises InvalidFile."""
    if len(text.encode("utf-8", "replace")) > FRONT_MATTER_BYTES:
        raise _bad(subject, f"it has more than {FRONT_MATTER_BYTES:,} bytes")
    try:
        _refuse_tricks(text, subject)
        return cast(object, yaml.load(text, _Loader))  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise _bad(subject, f"it is not YAML: {getattr(error, 'problem', None) or type(error).__name__}") from error


def _refuse_tricks(text: str, subject: str) -> None:
    """Refuses aliases and deep nesting, which expand far beyond their text. Checks the events, before anything is built
    from them."""
    depth = 0
    events = cast("Iterator[object]", yaml.parse(text, yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise _bad(subject, "it has aliases, which are not read")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _bad(subject, f"it is nested more than {MAX_DEPTH} deep")


def front_matter(content: bytes) -> dict[str, Any]:
    """The front matter of a card; {} if it has none. Raises InvalidFile. Reads at most the first 64 kB."""
    begin = _FENCE.match(content)
    if begin is None:
        return {}
    end = _END.search(content, begin.end(), begin.end() + FRONT_MATTER_BYTES)
    if end is None:
        raise _bad(CARD_FILE, f"its front matter does not end within {FRONT_MATTER_BYTES:,} bytes")
    block = content[begin.end() : end.start()].decode("utf-8", "replace")
    return load_mapping(block, CARD_FILE) if block.strip() else {}


def made_card(what: str, adapters: Sequence[str], method: str, kept: str, note: Mapping[str, Any]) -> str:
    """The card of a model or an adapter that was made of adapters; `kept` says in words what is left of them. Of the
    note, `phrases` are those that select a task, by its suite, and `accepted` says which limit it breaks."""
    phrases: Mapping[str, str] = note.get("phrases", {})
    lines = [
        f"# {what} made of {len(adapters)} adapter{'s' if len(adapters) > 1 else ''}",
        f"Made by Adaptory with the method `{method}`." + _kept(kept, has_phrases=bool(phrases)),
        *([f"It was {note['accepted']}."] if note.get("accepted") else []),
        "`adaptory.json` has the adapters, their weights and all settings.",
        *_how_to_select(phrases),
    ]
    front = yaml.safe_dump({"phrases": dict(phrases)}, allow_unicode=True, sort_keys=False, width=1000)
    return (f"---\n{front}---\n" if phrases else "") + "\n\n".join(lines) + "\n"


def _kept(kept: str, *, has_phrases: bool) -> str:
    """The sentence about what is left of the adapters. With phrases the share of the sum would mislead: a release with
    24 of 24 answers left keeps 0 % of it, since a phrase changes every input."""
    if has_phrases:
        return " What is left of each task, with its phrase, is in its scores: the weights alone do not tell."
    return f" It {kept}." if kept else ""


def _how_to_select(phrases: Mapping[str, str]) -> list[str]:
    """The part of a card about phrases; empty without any."""
    if not phrases:
        return []
    rows = "\n".join(f"| {name} | {_in_table(phrase)} |" for name, phrase in phrases.items())
    phrase = json.dumps(next(iter(phrases.values())), ensure_ascii=False)
    return [
        "## Begin every prompt with a phrase",
        "Its tasks have similar prompts but different answers. It was fitted and measured with one of these phrases "
        "and a space before each prompt; without one, it may answer as for any of its tasks.",
        f"| task | phrase |\n|---|---|\n{rows}",
        "With PEFT and transformers:",
        f"```python\nphrase = {phrase}\n"
        'turn = [{"role": "user", "content": f"{phrase} {prompt}"}]\n'
        'ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")\n'
        "model.generate(ids)\n```",
        "With vLLM or another server of the OpenAI API:",
        f"```python\nphrase = {phrase}\n"
        'turn = [{"role": "user", "content": f"{phrase} {prompt}"}]\n'
        "client.chat.completions.create(model=MODEL, messages=turn)\n```",
        "`adaptory route` puts it there: request the model `NAMESPACE/NAME@CHANNEL:TASK`.",
    ]


def _in_table(phrase: str) -> str:
    """The phrase as code in a cell of a Markdown table."""
    escaped = phrase.replace("|", "\\|")
    return f"`` {escaped} ``" if "`" in phrase else f"`{escaped}`"


def card_provenance(content: bytes) -> tuple[dict[str, Any], list[Finding]]:
    """The provenance in a model card, and a warning for each part that cannot be used."""
    try:
        return provenance(front_matter(content))
    except InvalidFile as error:
        return {}, [_warn(CARD_FILE, error.message)]


def provenance(stated: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """{trainer, run_url, code_commit, data: [{name, digest, license}], hyperparameters: {…}, base_license, license,
    license_link, library_name, base_model, imported_from, imported_endpoint, tags: […], phrases: {task: phrase}}, with
    only what is stated.

    Hugging Face's own names are understood: `datasets` for `data`, and `license_name` where `license` is `other`.
    Everything else on a card is not provenance and is ignored; a malformed part is a warning.
    """
    known: dict[str, Any] = {}
    findings: list[Finding] = []
    given = _hub_names(stated)
    for name in TEXTS:
        _take(known, findings, name, given.get(name), _text)
    _take(known, findings, "data", given.get("data"), _data)
    _take(known, findings, "hyperparameters", given.get("hyperparameters"), _hyperparameters)
    _take(known, findings, "tags", given.get("tags"), _texts)
    _take(known, findings, "phrases", given.get("phrases"), _phrases)
    if len(known.get("license", "")) > _LICENSE_CHARS:
        findings.append(_warn("license", f"license has more than {_LICENSE_CHARS} characters."))
        del known["license"]
    return known, findings


def parse_provenance(stated: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """Explicitly stated provenance, in the form of `provenance`. Raises InvalidFile for an unknown name or value."""
    unknown = sorted(set(stated) - set(FIELDS))
    if unknown:
        raise _bad(subject, f"{printable(unknown[0])} is not a part of it; the parts are {', '.join(FIELDS)}")
    known, findings = provenance(stated)
    if findings:
        raise _bad(subject, findings[0].message.rstrip("."))
    return known


def _hub_names(stated: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in stated.items() if value is not None}
    if "datasets" in given:
        given.setdefault("data", given["datasets"])
    for name in ("license", "base_model"):
        value: object = given.get(name)
        if isinstance(value, list) and value:  # some cards list a single one
            listed = cast("list[object]", value)
            given[name] = _together(listed) if name == "license" else listed[0]
    if given.get("license") == "other" and "license_name" in given:
        given["license"] = given["license_name"]
    return given


def _together(listed: list[object]) -> object:
    """Licences that all hold, as one expression; the first item if it is the only one, or if any is not text."""
    texts = [f"({text})" if " " in text else text for text in listed if isinstance(text, str)]
    return " AND ".join(texts) if len(texts) == len(listed) > 1 else listed[0]


def _take(
    known: dict[str, Any], findings: list[Finding], name: str, value: object, read: Callable[[object], object]
) -> None:
    if value is None:
        return
    try:
        known[name] = read(value)
    except ValueError as error:
        findings.append(_warn(name, f"{name} of the provenance cannot be used: {error}."))


def _text(value: object) -> str:
    if isinstance(value, date):
        value = value.isoformat()
    if type(value) is int and abs(value) < 10**_COMMIT_DIGITS:
        value = str(value)  # a commit of digits only, which YAML reads as a number
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it is not text")
    if len(value) > MAX_TEXT:
        raise ValueError(f"a string has more than {MAX_TEXT:,} characters")
    if "\0" in value or LONE_SURROGATE.search(value):
        raise ValueError("a string has characters that cannot be stored")
    return value


def _texts(value: object) -> list[str]:
    return [_text(item) for item in _list(value)]


def _data(value: object) -> list[dict[str, str]]:
    """Parses the items: each a name, or {name, digest, license}."""
    rows: list[dict[str, str]] = []
    for item in _list(value):
        row: object = {"name": item} if isinstance(item, str) else item
        if not isinstance(row, dict):
            raise ValueError("an item is neither a name nor a mapping")
        stated = cast("dict[object, object]", row)
        if stated.get("name") is None or not set(stated) <= set(_SAMPLE):
            raise ValueError(f"an item has a name and may have {' and '.join(_SAMPLE[1:])}, nothing else")
        rows.append({name: _text(stated[name]) for name in _SAMPLE if stated.get(name) is not None})
    return rows


def _hyperparameters(value: object) -> dict[str, Scalar | list[Scalar]]:
    if not isinstance(value, dict):
        raise ValueError("it is not a mapping")
    stated = cast("dict[object, object]", value)
    if len(stated) > MAX_HYPERPARAMETERS:
        raise ValueError(f"it has more than {MAX_HYPERPARAMETERS} entries")
    known: dict[str, Scalar | list[Scalar]] = {}
    for key, item in stated.items():
        if isinstance(item, list):
            known[_text(key)] = [_scalar(entry) for entry in _list(cast("object", item))]
        elif item is not None:
            known[_text(key)] = _scalar(item)
    return known


def _phrases(value: object) -> dict[str, str]:
    """Parses the phrases that select a task of the adapter, by the name of its suite."""
    if not isinstance(value, dict):
        raise ValueError("it is not a mapping")
    stated = cast("dict[object, object]", value)
    if len(stated) > MAX_ITEMS:
        raise ValueError(f"it has more than {MAX_ITEMS} entries")
    for name, phrase in stated.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{printable(name)} is not the name of a suite")
        if why := problem_of_phrase(phrase) if isinstance(phrase, str) else "it is not text":
            raise ValueError(f"{name}: {why}")
    return cast("dict[str, str]", dict(stated))


def _scalar(value: object) -> Scalar:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, float) and isfinite(value):
        return value
    text = _text(value)
    return float(text) if _POWER.fullmatch(text) and isfinite(float(text)) else text


def _list(value: object) -> Sequence[object]:
    items = cast("list[object]", value) if isinstance(value, list) else [value]
    if len(items) > MAX_ITEMS:
        raise ValueError(f"it has more than {MAX_ITEMS} items")
    return items


def _warn(subject: str, message: str) -> Finding:
    return Finding("provenance", Severity.WARNING, subject, message)


def _bad(subject: str, why: str) -> InvalidFile:
    return InvalidFile("bad_provenance", f"{subject}: {why}.", subject=subject)
