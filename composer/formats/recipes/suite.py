"""Evaluation suites: what a model is asked and the one answer that counts; YAML and JSONL, versioned by content.

name: sql-exact
kind: target                # target: what an adapter is for; guard: what must not get worse
description: one line
chat: true                  # the prompt is one user turn in the base's chat template; false: plain text
ends: true                  # a model should stop after the completion; false: it may go on, as after a cut answer
examples: sql-exact.jsonl   # lines {"prompt": ..., "completion": ...}, beside this file; or the list itself
metrics: {rouge_l: higher}  # optional: which way is better of metrics that `adaptory eval` does not measure
"""

import hashlib
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Literal, cast

import yaml

from composer.errors import InvalidFile
from composer.formats.untrusted import LONE_SURROGATE, printable, read_text

Kind = Literal["target", "guard"]

MAX_FILE_BYTES = 64 * 2**20
MAX_EXAMPLES = 100_000
MAX_TEXT_CHARS = 100_000
_SUITE = "A suite has name, kind and examples of {prompt, completion}."
_EXAMPLE = "Write {prompt: …, completion: …}."
FIELDS = ("name", "kind", "description", "chat", "ends", "examples", "metrics")
_OPTIONAL = ("description", "ends", "metrics")
# No dot: a score is addressed as `suite.metric`.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
METRIC = re.compile(r"[a-z_][a-z0-9_]{0,63}")
MAX_METRICS = 100
BETTER = {"higher": True, "lower": False}


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the completion that is scored. Neither is empty."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Suite:
    """A named set of examples. Two suites are the same version exactly when their `digest` is the same.

    With `ends` the end-of-sequence token after each completion is scored too. `metrics` says of each whether a higher
    value is better. It isn't part of the digest: it says how scores are read, not how they are measured, so that
    correcting it keeps them.
    """

    name: str
    kind: Kind
    description: str
    chat: bool
    examples: tuple[Example, ...]
    ends: bool = True
    metrics: Mapping[str, bool] = field(default_factory=dict[str, bool])

    @cached_property
    def digest(self) -> str:
        """sha256, in hex, of `content` written as canonical JSON: file names, formatting and key order don't enter."""
        text = json.dumps(self.content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def sample(self, count: int | None, without: Container[Example] = ()) -> tuple[Example, ...]:
        """`count` examples chosen by the suite's digest: the same ones everywhere, and k of them contain any fewer.

        None, or more than there are, gives all in their own order. Those in `without` are left out.
        """
        left = [index for index, example in enumerate(self.examples) if example not in without]
        if count is None or count >= len(left):
            return tuple(self.examples[index] for index in left)

        def lot(index: int) -> bytes:
            return hashlib.sha256(f"{self.digest}:{index}".encode()).digest()

        return tuple(self.examples[index] for index in sorted(left, key=lot)[:count])

    @property
    def content(self) -> dict[str, object]:
        """What is measured, as JSON: all but `metrics`. Without `ends` where that is true, as suites were written when
        there was no such field."""
        examples = [{"prompt": example.prompt, "completion": example.completion} for example in self.examples]
        return {
            "name": self.name,
            "kind": self.kind,
            "description": self.description,
            "chat": self.chat,
            **({} if self.ends else {"ends": False}),
            "examples": examples,
        }

    def to_json(self) -> dict[str, object]:
        better = {metric: "higher" if higher else "lower" for metric, higher in self.metrics.items()}
        return self.content | ({"metrics": better} if better else {})

    @classmethod
    def from_json(cls, document: object, subject: str = "suite") -> "Suite":
        """The suite that `to_json` wrote. Raises InvalidFile naming `subject` and the field."""
        fields = _fields(document, subject)
        rows = fields["examples"]
        if not isinstance(rows, list):
            raise InvalidFile(
                "suite_field",
                f"{subject}: examples must be a list.",
                subject=subject,
                next_step=_SUITE,
            )
        listed = cast("list[object]", rows)
        places = [f"{subject}, example {number}" for number in range(1, len(listed) + 1)]
        return _suite(fields, list(zip(places, listed, strict=True)), subject)


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two suites, by the names they were given, that ask `shared` prompts alike and want other completions for
    `different` of them, which is `share` of the smaller one's prompts."""

    a: str
    b: str
    shared: int
    different: int
    share: float


def contradicting_suites(suites: Mapping[str, Suite]) -> list[Contradiction]:
    """Every pair of suites that wants different completions for a same prompt: one model cannot give both.

    A prompt that a suite asks twice is contradicted where no completion is in both suites.
    """
    wanted = {name: _completions(suite) for name, suite in suites.items()}
    contradictions: list[Contradiction] = []
    for (a, of_a), (b, of_b) in combinations(wanted.items(), 2):
        shared = of_a.keys() & of_b.keys()
        different = sum(of_a[prompt].isdisjoint(of_b[prompt]) for prompt in shared)
        if different:
            share = different / min(len(of_a), len(of_b))
            contradictions.append(Contradiction(a, b, len(shared), different, share))
    return contradictions


def _completions(suite: Suite) -> dict[tuple[bool, str], set[str]]:
    """By how and what is asked."""
    completions: dict[tuple[bool, str], set[str]] = {}
    for example in suite.examples:
        completions.setdefault((suite.chat, example.prompt), set()).add(example.completion)
    return completions


def parse_suite(path: Path | str) -> Suite:
    """Read a suite's YAML, and the JSONL beside it when `examples` names one.

    Raises InvalidFile naming file and line: not readable, not YAML or JSON, unknown or missing field, a size over the
    limits above, or an examples path that leaves the suite's directory.
    """
    path = Path(path)
    try:
        document: object = yaml.safe_load(read_text(path, MAX_FILE_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise InvalidFile(
            "suite_yaml", f"{place}: not valid YAML: {problem}.", subject=str(path), next_step="Correct that line."
        ) from error
    fields = _fields(document, str(path))
    if not isinstance(fields["examples"], str):
        return Suite.from_json(fields, str(path))
    if "\0" in fields["examples"] or not _is_text(fields["examples"], least=1):
        raise InvalidFile(
            "suite_field",
            f"{path}: examples names no file that there can be.",
            subject=str(path),
            next_step="Name a file beside the suite.",
        )
    relative = Path(fields["examples"])
    if relative.is_absolute() or ".." in relative.parts:
        raise InvalidFile(
            "suite_field",
            f"{path}: examples names {relative}, outside the suite's directory.",
            subject=str(path),
            next_step="Put the examples beside the suite and name them by a relative path.",
        )
    return _suite(fields, _jsonl(path.parent / relative), str(path))


def _jsonl(path: Path) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON strings may contain.
    for number, line in enumerate(read_text(path, MAX_FILE_BYTES).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}:{number}", json.loads(line)))
        except (ValueError, RecursionError) as error:  # a plain ValueError: a number of over 4300 digits
            problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise InvalidFile(
                "suite_json",
                f"{path}:{number}: not valid JSON: {problem}.",
                subject=str(path),
                next_step="Correct that line: JSON Lines has one object a line.",
            ) from error
    return rows


def _fields(document: object, subject: str) -> Mapping[str, object]:
    if not isinstance(document, dict):
        raise InvalidFile(
            "suite_field",
            f"{subject}: a suite is a mapping.",
            subject=subject,
            next_step=_SUITE,
        )
    fields = cast("dict[str, object]", document)
    unknown = sorted(printable(key) for key in fields if key not in FIELDS)
    missing = [key for key in FIELDS if key not in fields and key not in _OPTIONAL]
    if unknown or missing:
        problem = f"unknown field {unknown[0]}" if unknown else f"field {missing[0]} is missing"
        raise InvalidFile(
            "suite_field", f"{subject}: {problem}.", subject=subject, next_step=f"The fields are {', '.join(FIELDS)}."
        )
    return fields


def _suite(fields: Mapping[str, object], rows: list[tuple[str, object]], subject: str) -> Suite:
    name, kind, chat = fields["name"], fields["kind"], fields["chat"]
    description, ends = fields.get("description", ""), fields.get("ends", True)
    checks = {
        "name must be lower-case letters, digits, - and _, at most 64": isinstance(name, str) and NAME.fullmatch(name),
        "kind must be target or guard": kind in ("target", "guard"),
        "chat must be true or false": isinstance(chat, bool),
        "ends must be true or false": isinstance(ends, bool),
        "description must be text": _is_text(description, least=0),
        f"examples must be 1 to {MAX_EXAMPLES}": 1 <= len(rows) <= MAX_EXAMPLES,
    }
    for rule, holds in checks.items():
        if not holds:
            raise InvalidFile(
                "suite_field",
                f"{subject}: {rule}.",
                subject=subject,
                next_step=_SUITE,
            )
    examples = tuple(_example(row, place) for place, row in rows)
    metrics = _metrics(fields.get("metrics", {}), subject)
    return Suite(str(name), cast("Kind", kind), str(description), bool(chat), examples, bool(ends), metrics)


def _metrics(value: object, subject: str) -> dict[str, bool]:
    stated = cast("dict[object, object]", value) if isinstance(value, dict) else None
    if stated is not None and len(stated) <= MAX_METRICS:
        known = {m: BETTER[b] for m, b in stated.items() if isinstance(m, str) and isinstance(b, str) and b in BETTER}
        if len(known) == len(stated) and all(map(METRIC.fullmatch, known)):
            return known
    raise InvalidFile(
        "suite_field",
        f"{subject}: metrics must map at most {MAX_METRICS} names (lower-case letters, digits, _) to higher or lower.",
        subject=subject,
        next_step="Write which way is better, as in metrics: {rouge_l: higher, seconds: lower}.",
    )


def _is_text(value: object, least: int) -> bool:
    return isinstance(value, str) and least <= len(value) <= MAX_TEXT_CHARS and not LONE_SURROGATE.search(value)


def _example(row: object, place: str) -> Example:
    if not isinstance(row, dict):
        raise InvalidFile(
            "suite_example",
            f"{place}: an example is a mapping.",
            subject=place,
            next_step=_EXAMPLE,
        )
    texts = cast("dict[str, object]", row)
    if texts.keys() != {"prompt", "completion"}:
        found = ", ".join(sorted(map(printable, texts))[:4]) or "nothing"
        raise InvalidFile(
            "suite_example",
            f"{place}: an example has prompt and completion; found {found}.",
            subject=place,
            next_step=_EXAMPLE,
        )
    for key, text in texts.items():
        if not _is_text(text, least=1):
            limit = f"text of 1 to {MAX_TEXT_CHARS} characters"
            raise InvalidFile(
                "suite_example",
                f"{place}: {key} must be {limit}.",
                subject=place,
                next_step=_EXAMPLE,
            )
    return Example(str(texts["prompt"]), str(texts["completion"]))
