"""Suites turned into scores of a base with adapters active, example by example."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import sqrt

from composer.errors import Mismatch
from composer.evaluation.generation import encode_for_generation, generate_batch, generation_batches
from composer.evaluation.hooks import Deltas
from composer.evaluation.measure import (
    Encoded,
    ExampleScore,
    batches_of,
    encode,
    measure_batch,
    ratio,
    run_batches,
    split_prefix,
    spread_batches,
)
from composer.evaluation.model import LoadedModel
from composer.evaluation.prefix import Prefix
from composer.evaluation.scorers.process import open_scorer
from composer.evaluation.scorers.scorer import NO_PYTHON, PythonScorers, Scorer, checked_score
from composer.formats.recipes.suite import Example, Suite
from composer.formats.recipes.tasks import LikelihoodSettings, ScorerChoice
from composer.formats.scores import ScoreDocument

MAX_ANSWER_CHARS = 2_000
"""Kept of an answer, in characters."""


@dataclass(frozen=True, slots=True)
class SuiteScore:
    """One metric of one suite, and the suite's task. `stderr` is over the examples; None if there is only one."""

    suite: str
    suite_digest: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool

    def to_json(self) -> ScoreDocument:
        return ScoreDocument(
            suite=self.suite,
            suite_digest=self.suite_digest,
            task=self.task,
            metric=self.metric,
            value=self.value,
            stderr=self.stderr,
            n=self.n,
            higher_is_better=self.higher_is_better,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """One example under one model: nats over the whole completion, its tokens, and the score of the model's answer,
    from 0 to 1. `answer` is what was generated or chosen, None if teacher-forced; `cut` if the limit ended it."""

    nats: float
    tokens: int
    score: float
    answer: str | None = None
    cut: bool = False

    def to_json(self) -> dict[str, object]:
        """Without fields that have their defaults. A long answer is shortened; NUL becomes a replacement character."""
        document: dict[str, object] = {"nats": self.nats, "tokens": self.tokens, "score": self.score}
        if self.answer is not None:
            document["answer"] = self.answer[:MAX_ANSWER_CHARS].replace("\0", "\ufffd")
        return document | ({"cut": True} if self.cut else {})


Keep = Callable[[Mapping[int, Result]], None]
"""Called with results by the indices of their examples, as batches end. An exception from it ends the pass."""
_Run = Callable[[Sequence[int]], Sequence[Result]]
_Open = Callable[[ScorerChoice], Scorer]


def evaluate(
    loaded: LoadedModel,
    suite: Suite,
    deltas: Deltas = (),
    examples: Sequence[Example] | None = None,
    scorers: PythonScorers = NO_PYTHON,
    keep: Keep | None = None,
) -> list[SuiteScore]:
    """The suite's scores with `deltas` active, of all its examples or of these; see `examine` and `scores`."""
    return scores(suite, examine(loaded, suite, deltas, examples, scorers, keep))


def examine(
    loaded: LoadedModel,
    suite: Suite,
    deltas: Deltas = (),
    examples: Sequence[Example] | None = None,
    scorers: PythonScorers = NO_PYTHON,
    keep: Keep | None = None,
) -> list[Result]:
    """The result of each example, in order, with `deltas` active. `scorers` are the Python scorers that may be used.

    Every task has the loss of the reference completion. The score is 1 if greedy decoding reproduces the completion; if
    its scorer says so of a generated answer; or if the completion is the likeliest choice. The composition of batches
    does not change a result, up to float rounding. Raises what `encode` and `open_scorer` raise, before the first pass.
    """
    asked = suite.examples if examples is None else examples
    prepare = {"generation": _generation, "multiple_choice": _choices}.get(suite.task, _teacher_forced)
    results: dict[int, Result] = {}

    def done(batch: Sequence[int], ended: Sequence[Result]) -> None:
        new = dict(zip(batch, ended, strict=True))
        results.update(new)
        if keep:
            keep(new)

    with ExitStack() as until_done:
        batches, run = prepare(
            loaded, suite, asked, lambda chosen: until_done.enter_context(open_scorer(chosen, scorers))
        )
        run_batches(loaded, deltas, batches, run, done)
    return [results[index] for index in range(len(asked))]


def scores(suite: Suite, results: Sequence[Result]) -> list[SuiteScore]:
    """`nll` in nats per completion token, `accuracy` the mean score of an answer.

    nll is total nats over total tokens, with the standard error of a ratio estimator. That of accuracy is the binomial
    one if every score is 0 or 1, otherwise that of a mean. Raises Mismatch without results.
    """
    if not results:
        message = f"Every example of {suite.name} was used to fit the method: none is left to judge it by."
        raise Mismatch("no_examples_left", message, subject=suite.name)
    n, asked = len(results), (suite.name, suite.digest, suite.task)
    nll, nll_stderr = ratio([result.nats for result in results], [result.tokens for result in results])
    answers = [result.score for result in results]
    accuracy = sum(answers) / n
    accuracy_stderr = ratio(answers, [1] * n)[1]
    if n > 1 and set(answers) <= {0, 1}:
        accuracy_stderr = sqrt(accuracy * (1 - accuracy) / n)
    return [
        SuiteScore(*asked, "nll", nll, nll_stderr, n, higher_is_better=False),
        SuiteScore(*asked, "accuracy", accuracy, accuracy_stderr, n, higher_is_better=True),
    ]


def _teacher_forced(
    loaded: LoadedModel, suite: Suite, examples: Sequence[Example], _open: _Open
) -> tuple[list[list[int]], _Run]:
    prefix, rest = split_prefix(loaded, [encode(loaded, example, suite.chat, suite.ends) for example in examples])

    def run(batch: Sequence[int]) -> list[Result]:
        measured = measure_batch(prefix, [rest[index] for index in batch])
        return [Result(result.nats, result.tokens, float(result.exact)) for result in measured]

    return spread_batches(loaded, rest), run


def _generation(
    loaded: LoadedModel, suite: Suite, examples: Sequence[Example], open_one: _Open
) -> tuple[list[list[int]], _Run]:
    chosen, settings = suite.scoring or ScorerChoice(name="match"), suite.generation
    scorer = open_one(chosen)
    encoded = [encode(loaded, example, suite.chat, suite.ends) for example in examples]
    prompts = [encode_for_generation(loaded, example.prompt, suite.chat, settings) for example in examples]

    def run(batch: Sequence[int]) -> list[Result]:
        measured = _measured(loaded, [encoded[index] for index in batch])
        answers = generate_batch(loaded, [prompts[index] for index in batch], settings)
        return [
            Result(
                result.nats,
                result.tokens,
                checked_score(scorer, chosen.name, answer.text, examples[index], partial(_named, suite)),
                answer.text,
                answer.cut,
            )
            for index, result, answer in zip(batch, measured, answers, strict=True)
        ]

    return generation_batches(loaded, prompts, settings), run


def _named(suite: Suite, example: Example) -> str:
    """An example, by its number in the suite."""
    return f"example {suite.examples.index(example) + 1} of {suite.name} ({example.prompt[:60]!r})"


def _choices(
    loaded: LoadedModel, suite: Suite, examples: Sequence[Example], _open: _Open
) -> tuple[list[list[int]], _Run]:
    per = LikelihoodSettings(**(suite.scoring.settings if suite.scoring else {})).per
    encoded = [
        [encode(loaded, Example(example.prompt, choice), suite.chat, suite.ends) for choice in example.choices]
        for example in examples
    ]

    def run(batch: Sequence[int]) -> list[Result]:
        measured = iter(_measured(loaded, [row for index in batch for row in encoded[index]]))
        return [_likeliest(examples[index], [next(measured) for _ in examples[index].choices], per) for index in batch]

    longest = [max(rows, key=lambda row: len(row.ids)) for rows in encoded]
    return spread_batches(loaded, longest), run


def _likeliest(example: Example, measured: Sequence[ExampleScore], per: str) -> Result:
    """Of equally likely choices, the first one is chosen."""
    lengths = {
        "choice": [1.0] * len(measured),
        "token": [float(result.tokens) for result in measured],
        "character": [float(len(choice)) for choice in example.choices],
    }[per]
    cost = [result.nats / length for result, length in zip(measured, lengths, strict=True)]
    chosen = example.choices[cost.index(min(cost))]
    right = measured[example.choices.index(example.completion)]
    return Result(right.nats, right.tokens, float(chosen == example.completion), chosen)


def _measured(loaded: LoadedModel, encoded: Sequence[Encoded]) -> list[ExampleScore]:
    """Measures like `measure`, in this thread."""
    results: dict[int, ExampleScore] = {}
    for batch in batches_of(encoded, loaded.batch_tokens):
        results.update(zip(batch, measure_batch(Prefix(loaded, ()), [encoded[index] for index in batch]), strict=True))
    return [results[index] for index in range(len(encoded))]
