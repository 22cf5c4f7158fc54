"""Evaluation suites: prompts and the one answer that counts for each; YAML and JSONL, versioned by content.

name: sql-exact
version: 1.0.0              # optional: a label of this content
kind: target                # target: what an adapter is for; guard: what must not get worse
description: one line
chat: true                  # the prompt is one user turn in the base's chat template; false: plain text
ends: true                  # a model should stop after the completion; false: it may go on, as after a cut answer
examples: sql-exact.jsonl   # lines {"prompt": ..., "completion": ...}, beside this file; or the list itself
metrics: {rouge_l: higher}  # optional: the better direction of metrics that `adaptory eval` does not measure
task: generation            # teacher_forced by default; multiple_choice: each example has `choices` too
generation: {max_new_tokens: 64, stop: [";"], temperature: 0.7, seed: 1}
evidence: true              # servers may be asked these examples, to prove that they apply a release; default no
scorer: json                # match by default, or one by entry point; {name: ..., settings: {...}}
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Protocol, cast

from pydantic import ConfigDict, FailFast, Field, Strict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from composer.errors import InvalidFile, Mismatch
from composer.formats.recipes.documents import (
    LISTED,
    Document,
    ParsedBy,
    RefusedValues,
    load_yaml,
    path_of,
    problem_of,
    refuse_unknown,
)
from composer.formats.recipes.lock import CalibrationDocument, ExamplesDocument
from composer.formats.recipes.tasks import TEACHER_FORCED, Generation, ScorerChoice, ScorerField, Task, scorer_of
from composer.formats.untrusted import LONE_SURROGATE, MAX_EXAMPLES, read_text

Kind = Literal["target", "guard"]
Better = Literal["higher", "lower"]

MAX_FILE_BYTES = 64 * 2**20
MAX_TEXT_CHARS = 100_000
_SUITE = "A suite has name, kind, chat and examples of {prompt, completion}."
_EXAMPLE = "Write {prompt: …, completion: …}."
# No dot behind the slash: a score is addressed as `suite.metric`.
NAME = re.compile(r"(?!.{65})(?:[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?/)?[a-z0-9][a-z0-9_-]{0,63}")
METRIC = re.compile(r"[a-z_][a-z0-9_]{0,63}")
VERSION = re.compile(r"(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){2}(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?")
MAX_VERSION_CHARS = 80
MAX_METRICS = 100
MAX_CHOICES = 26
LEAST_COST = 0.005
"""In nats a token: a smaller rise of a guard's loss is not called a cost."""


class ScoreLike(Protocol):
    """A score: its value and the number of its examples, 0 if that is not stated."""

    @property
    def value(self) -> float: ...
    @property
    def n(self) -> int: ...


def score_cost(score: ScoreLike, base: ScoreLike) -> str:
    """`guard_cost` of two scores on the same content. A model that was fitted on some of a guard's examples is measured
    on the others, for which the base's score is not a comparison."""
    if score.n and base.n and score.n != base.n:
        return f"measured on {score.n} examples, the base on {base.n}: they do not compare"
    return guard_cost(score.value, base.value)


def guard_cost(loss: float, base: float) -> str:
    """Describes a model's loss on a guard relative to the base's on the same examples, both in nats per token: `costs
    3.3 nats of general ability (base 0.78)`."""
    cost = loss - base
    rounded = f"{cost:.1f}" if cost >= 1 else f"{cost:.2f}"
    words = "no general ability" if cost < LEAST_COST else f"{rounded} nats of general ability"
    return f"costs {words} (base {base:.2f})"


def _named(pattern: re.Pattern[str], expected: str) -> ParsedBy:
    def read(value: object) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(expected)
        return value

    return ParsedBy(read, {"type": "string", "pattern": f"^{pattern.pattern}$"})


Name = Annotated[str, _named(NAME, "NAME or NAMESPACE/NAME of lower-case letters, digits, - and _, at most 64 in all")]
Metric = Annotated[str, _named(METRIC, "a name of lower-case letters, digits and _, at most 64")]
Text = Annotated[str, Strict(), Field(min_length=1, max_length=MAX_TEXT_CHARS)]


def _read_version(value: object) -> str | None:
    if value is None or (isinstance(value, str) and len(value) <= MAX_VERSION_CHARS and VERSION.fullmatch(value)):
        return value
    raise ValueError("a semantic version such as 1.2.0")


VersionLabel = Annotated[
    str | None, ParsedBy(_read_version, {"type": ["string", "null"], "pattern": f"^{VERSION.pattern}$"})
]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Example:
    """One prompt and the completion that is scored. Neither is empty. `choices`, of a multiple-choice suite, has the
    completion among them."""

    prompt: Text
    completion: Text
    choices: Annotated[tuple[Text, ...], Field(max_length=MAX_CHOICES), LISTED] = ()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, document: object) -> object:
        return refuse_unknown(document, ["prompt", "completion", "choices"])

    def to_json(self) -> dict[str, object]:
        document: dict[str, object] = {"prompt": self.prompt, "completion": self.completion}
        return document | {"choices": list(self.choices)} if self.choices else document


class Suite(Document):
    """A named set of examples. Two suites are the same version exactly if their `digest` is the same.

    With `ends` the end-of-sequence token after each completion is scored too. `metrics` states for each whether a
    higher or a lower value is better. The digest excludes it: it affects how scores are read, not how they are
    measured, so a correction keeps them. It excludes `version`, the label of a digest, and every field that has its
    default.
    """

    name: Name
    version: VersionLabel = Field(None, description="A semantic version that labels this content.")
    kind: Kind = Field(description="target: what an adapter is for; guard: what must not get worse.")
    description: Annotated[str, Field(max_length=MAX_TEXT_CHARS)] = ""
    chat: bool = Field(description="Whether a prompt is one user turn in the base's chat template, or plain text.")
    ends: bool = Field(True, description="Whether a model should stop after the completion.")
    examples: Annotated[tuple[Example, ...], FailFast(), Field(min_length=1, max_length=MAX_EXAMPLES), LISTED]
    metrics: Annotated[dict[Metric, Better], Field(max_length=MAX_METRICS)] = Field(
        default_factory=dict[Metric, Better],
        description="The better direction of metrics that `adaptory eval` does not measure.",
    )
    evidence: bool = Field(
        False,
        description="Whether token ids of up to 8 examples may be given to agents, which ask servers for them.",
    )
    task: Task = Field(TEACHER_FORCED, description="The kind of task: a loss, a generated answer, or a choice.")
    generation: Generation = Field(default=Generation(), description="Settings of `task: generation`.")
    scorer: ScorerField | None = Field(None, description="match, json, likelihood, or a Python entry point.")

    @model_validator(mode="after")
    def _check_task(self) -> "Suite":
        if self.task != "generation" and "generation" in self.model_fields_set:
            raise RefusedValues("it is set, and the task is not", "Add `task: generation`.", path=("generation",))
        try:
            scorer_of(self.task, self.scorer)
        except ValidationError as error:
            problem = problem_of(error)
            raise RefusedValues(problem.why, problem.next_step, path=("scorer", "settings", *problem.loc)) from error
        except RefusedValues as refusal:
            raise RefusedValues(str(refusal), refusal.next_step, path=("scorer",)) from refusal
        for index, example in enumerate(self.examples):
            if why := _misfit(self.task, example):
                raise RefusedValues(why, path=("examples", index, "choices"))
        return self

    @property
    def scoring(self) -> ScorerChoice | None:
        """The scorer of answers, without settings that have their defaults; None if teacher-forced."""
        return scorer_of(self.task, self.scorer)

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(self.examples)

    @property
    def higher_is_better(self) -> dict[str, bool]:
        return {metric: better == "higher" for metric, better in self.metrics.items()}

    @cached_property
    def digest(self) -> str:
        """sha256, in hex, of `content` written as canonical JSON: file names, formatting and key order don't enter."""
        text = json.dumps(self.content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def sample(self, count: int | None, without: Container[Example] = ()) -> tuple[Example, ...]:
        """`count` examples chosen by the suite's digest: the same ones everywhere, and a larger count contains a
        smaller one's. None, or more than there are, selects all in their own order. Leaves out those in `without`."""
        left = [index for index, example in enumerate(self.examples) if example not in without]
        if count is None or count >= len(left):
            return tuple(self.examples[index] for index in left)

        def lot(index: int) -> bytes:
            return hashlib.sha256(f"{self.digest}:{index}".encode()).digest()

        return tuple(self.examples[index] for index in sorted(left, key=lot)[:count])

    @property
    def content(self) -> dict[str, object]:
        """The measured content as JSON: all but `version` and `metrics`, and without the defaults of fields that came
        later, so that older suites keep their digests."""
        return {
            "name": self.name,
            "kind": self.kind,
            "description": self.description,
            "chat": self.chat,
            **({} if self.ends else {"ends": False}),
            **({"evidence": True} if self.evidence else {}),
            **self._asked(),
            "examples": [example.to_json() for example in self.examples],
        }

    def _asked(self) -> dict[str, object]:
        """The task, how answers are generated and how they are scored, as far as these are not the defaults."""
        if self.task == TEACHER_FORCED:
            return {}
        asked: dict[str, object] = {"task": self.task}
        if generation := self.generation.model_dump(mode="json", exclude_defaults=True):
            asked["generation"] = generation
        scoring = self.scoring
        if scoring and scoring != scorer_of(self.task, None):
            asked["scorer"] = scoring.model_dump(exclude_defaults=True) if scoring.settings else scoring.name
        return asked

    def to_json(self) -> dict[str, object]:
        labels = {"version": self.version} if self.version else {}
        return self.content | labels | ({"metrics": dict(self.metrics)} if self.metrics else {})

    @classmethod
    def from_json(cls, document: object, subject: str = "suite") -> "Suite":
        """Parses what `to_json` wrote. Raises InvalidFile naming `subject` and the field."""
        return _validated(document, subject, lambda index: f"{subject}, example {index + 1}")


def _misfit(task: Task, example: Example) -> str:
    """The reason why the example's choices do not fit the task; empty if they do."""
    if task != "multiple_choice":
        return "only multiple_choice has choices" if example.choices else ""
    if len(example.choices) < 2:
        return "a multiple-choice example has at least two choices"
    if len(set(example.choices)) < len(example.choices):
        return "two choices are the same"
    return "" if example.completion in example.choices else "the completion is not among the choices"


@dataclasses.dataclass(frozen=True, slots=True)
class Contradiction:
    """Two suites, by name, that share `shared` prompts and have other completions for `different` of them, which is
    `share` of the smaller one's prompts."""

    a: str
    b: str
    shared: int
    different: int
    share: float


def contradicting_suites(suites: Mapping[str, Suite]) -> list[Contradiction]:
    """Every pair of suites that has different completions for the same prompt: one model cannot produce both. A prompt
    that a suite has twice is contradicted if no completion is in both suites."""
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
    """Completions by prompt and its form."""
    completions: dict[tuple[bool, str], set[str]] = {}
    for example in suite.examples:
        completions.setdefault((suite.chat, example.prompt), set()).add(example.completion)
    return completions


def parse_suite(path: Path | str) -> Suite:
    """Reads a suite's YAML, and the JSONL beside it if `examples` names one. Raises InvalidFile naming file and line:
    unreadable, not YAML or JSON, an unknown or missing field, a size over the limits above, or an examples path outside
    the suite's directory."""
    path = Path(path)

    def refusal(place: str, problem: str) -> InvalidFile:
        return InvalidFile("suite_yaml", f"{place}: not valid YAML: {problem}.", subject=str(path))

    document = load_yaml(read_text(path, MAX_FILE_BYTES), str(path), refusal)
    fields = cast("dict[str, object]", document) if isinstance(document, dict) else {}
    examples = fields.get("examples")
    if not isinstance(examples, str):
        return Suite.from_json(cast(object, document), str(path))
    rows = _jsonl(_beside(path, examples))
    content = fields | {"examples": [row for _, row in rows]}
    return _validated(content, str(path), lambda index: rows[index][0])


def _beside(path: Path, name: str) -> Path:
    """The file of that name in the suite's directory."""
    if not name or len(name) > MAX_TEXT_CHARS or "\0" in name or LONE_SURROGATE.search(name):
        raise _bad(f"{path}: examples", "it is not a valid file name", str(path), "Name a file beside the suite.")
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        next_step = "Put the examples beside the suite and name them by a relative path."
        raise _bad(f"{path}: examples", f"{relative} is outside the suite's directory", str(path), next_step)
    return path.parent / relative


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
                "suite_json", f"{path}:{number}: not valid JSON: {problem}.", subject=str(path)
            ) from error
    return rows


def _validated(document: object, subject: str, locate: Callable[[int], str]) -> Suite:
    """Parses a suite; `locate` returns the position of an example by its index. Raises InvalidFile."""
    try:
        return Suite.model_validate(document)
    except ValidationError as error:
        problem = problem_of(error)
        match problem.loc:
            case ("examples", int(index), *rest):
                where, path = locate(index), path_of(tuple(rest))
                message = f"{where}: {path}: {problem.why}." if path else f"{where}: {problem.why}."
                next_step = problem.next_step or _EXAMPLE
                raise InvalidFile("suite_example", message, subject=where, next_step=next_step) from error
            case _:
                raise _bad(problem.at(subject), problem.why, subject, problem.next_step or _SUITE) from error


def _bad(where: str, why: str, subject: str, next_step: str) -> InvalidFile:
    return InvalidFile("suite_field", f"{where}: {why}.", subject=subject, next_step=next_step)


# The examples that a method is fitted on, by digest: a lock names them, and they are not used to judge.


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """The examples that one adapter is fitted on: the first `count` examples of a suite's fixed random order, or
    prompts without answers. A `phrase` is put before each prompt. With `reworded`, every second prompt is in other
    words (composer/formats/recipes/phrases.py)."""

    suite: Suite | None = None
    count: int = 0
    prompts: tuple[str, ...] = ()
    phrase: str = ""
    reworded: bool = False

    @classmethod
    def of_member(cls, suite: Suite, count: int, phrase: str = "") -> "CalibrationSet":
        """The examples that a member is fitted on: a chat also in other words, or the fit may answer little once a
        sentence is put before a prompt."""
        return cls(suite, count, phrase=phrase, reworded=suite.chat and suite.kind != "guard")

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.suite.sample(self.count) if self.suite else ()

    def __len__(self) -> int:
        return len(self.examples) or len(self.prompts)

    def __contains__(self, example: object) -> bool:
        """Whether the example is used, with its answer or as a prompt."""
        if not isinstance(example, Example):
            return False
        prompt = example.prompt.removeprefix(f"{self.phrase} ") if self.phrase else example.prompt
        plain = dataclasses.replace(example, prompt=prompt or example.prompt)
        return example in self.examples or plain in self.examples or example.prompt in self.prompts

    def to_json(self) -> CalibrationDocument:
        """The digests for a lock: sha256 over the canonical JSON of [prompt, completion] or of the prompt."""
        if self.suite is None:
            return {"prompts": [_digest(prompt) for prompt in self.prompts]}
        document = first_examples(self.suite, self.count)
        if self.phrase:
            document["phrase"] = self.phrase
        if self.reworded:
            document["reworded"] = True
        return document


def first_examples(suite: Suite, count: int) -> ExamplesDocument:
    """The first examples of the suite's fixed random order, by digest."""
    used = [example_digest(example) for example in suite.sample(count)]
    return {"suite": suite.name, "suite_digest": suite.digest, "examples": used}


GUARD_EXAMPLES = 16
"""The most examples of a guard suite to fit on."""
LEAST_GUARD_EXAMPLES = 8


def check_guard(name: str, kind: str, examples: int) -> None:
    """Raises Mismatch for a suite of another kind, and for one too small to fit on half of it and judge by the rest."""
    why = f"it is a {kind} suite" if kind != "guard" else f"it has {examples} examples"
    if kind != "guard" or examples < LEAST_GUARD_EXAMPLES:
        raise Mismatch("not_a_guard", f"{name} cannot guard the fit: {why}.", subject=name)


def guard_sets(
    suites: Iterable[Suite], searched: Mapping[str, int] | None = None, most: int | None = None
) -> list[CalibrationSet]:
    """The examples of guard suites on which a fit leaves the base as it is: `most` (GUARD_EXAMPLES by default) and at
    most half of a suite, since the others judge the result. After a search, the number of examples that it fitted its
    choice on, by the suite's digest."""
    counts = [
        (
            suite,
            min(most or GUARD_EXAMPLES, len(suite.examples) // 2)
            if searched is None
            else searched.get(suite.digest, 0),
        )
        for suite in suites
    ]
    return [CalibrationSet(suite, count) for suite, count in counts if count]


def used_in(sets: Iterable[CalibrationSet], suites: Iterable[Suite]) -> frozenset[Example]:
    """The examples of the suites that are in one of the sets: results are judged on the others."""
    known = list(sets)
    return frozenset(
        example for suite in suites for example in suite.examples if any(example in used for used in known)
    )


def example_digest(example: Example) -> str:
    """sha256 over the canonical JSON of [prompt, completion]."""
    return _digest([example.prompt, example.completion])


def _digest(content: object) -> str:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
