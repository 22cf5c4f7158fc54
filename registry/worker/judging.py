"""Measures a composition's candidate beside its inputs, and evaluates its gates."""

from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from composer.formats.recipes.phrases import phrased, reworded
from composer.formats.recipes.recipe import CONFIRM
from composer.formats.recipes.suite import Example, Suite
from composer.formats.scores import ScoreDocument
from registry.domain.channels.policy import gates
from registry.domain.channels.policy.gates import GateScore, Scores
from registry.formats.manifest import ManifestFile
from registry.wire.work import CandidateScore, InputScore, MeasuredValue, RewordedAnswers

if TYPE_CHECKING:
    from composer.evaluation.evaluate import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The subject of a measurement: an adapter on the base, a merged model or a set, with its files in the store.
    Without files, the base itself."""

    files: Sequence[ManifestFile] = ()
    merged: bool = False
    is_set: bool = False


BASE = Subject()
Examine = Callable[[Subject, Suite, Sequence[Example]], "Sequence[Result]"]
"""(subject, suite, examples) -> the result of each example, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedInput:
    """An input: its recorded scores by suite digest and metric, its own suite and its files."""

    repository: str
    version: str
    suite: str | None
    recorded: Mapping[tuple[str, str], GateScore]
    subject: Subject


class CandidateGate(NamedTuple):
    """The outcome of a gate for a candidate. One that is not `required` only warns."""

    result: gates.GateResult
    required: bool

    @property
    def fails(self) -> bool:
        return self.required and not self.result.passed

    def to_json(self) -> dict[str, Any]:
        return {**self.result.to_json(), "required": self.required}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """The suites to measure a candidate on, without the examples in `used`, on which the method was fitted.
    `base_scored` are the digests of the suites on which the base has recorded scores."""

    suites: Sequence[Suite]
    used: Container[Example]
    examine: Examine
    base_scored: Container[str] = frozenset[str]()

    def count(self, suite: Suite) -> int:
        """The number of the suite's examples that the candidate is measured on."""
        return len(suite.sample(None, self.used))

    def examples(self, members: Sequence[JudgedInput]) -> int:
        """The total number of examples that the candidate, the base and the members are measured on."""
        measured = [*self.suites, *self.on_base, *(suite for _, suite in self.missing(members))]
        return sum(map(self.count, measured))

    @property
    def on_base(self) -> list[Suite]:
        """The suites on which the base is measured: those from which examples are left out, since its recorded scores
        cover all of them, and guards without a recorded score."""
        return [
            suite
            for suite in self.suites
            if self.count(suite) < len(suite.examples)
            or (suite.kind == "guard" and suite.digest not in self.base_scored)
        ]

    def scores(self, subject: Subject, suite: Suite) -> list[CandidateScore]:
        """Evaluates the subject on the suite's remaining examples."""
        return self.measured(subject, suite)[0]

    def measured(
        self, subject: Subject, suite: Suite, phrase: str = ""
    ) -> "tuple[list[CandidateScore], Sequence[Result]]":
        """Evaluates like `scores`, with the phrase before each prompt, and also returns the per-example results."""
        from composer.evaluation.evaluate import scores

        results = self.examine(subject, suite, phrased(phrase, suite.sample(None, self.used)))
        rows = [CandidateScore(**score.to_json()) for score in scores(suite, results)]
        return [{**row, "phrase": phrase} for row in rows] if phrase else rows, results

    def reworded(
        self, candidate: Subject, member: JudgedInput, suite: Suite, phrase: str = ""
    ) -> RewordedAnswers | None:
        """The number of the member's answers to reworded prompts that the candidate gives too;
        None for a suite without chat."""
        asked = reworded(suite, suite.sample(CONFIRM, self.used))
        if asked is None:
            return None
        alone = self.examine(member.subject, asked, asked.examples)
        ours = self.examine(candidate, asked, phrased(phrase, asked.examples))
        kept = [own.score == 1 for own, other in zip(ours, alone, strict=True) if other.score == 1]
        return {"answered": len(kept), "still_answered": sum(kept)}

    def missing(self, members: Sequence[JudgedInput]) -> list[tuple[JudgedInput, Suite]]:
        """Lists what to measure for the inputs: each on its own suite, on guards and on suites that belong to no input,
        unless a score on exactly these examples is recorded."""
        owned = {member.suite for member in members}
        return [
            (member, suite)
            for member in members
            for suite in self.suites
            if suite.kind == "guard" or suite.name == member.suite or suite.name not in owned
            if not self.known(member, suite)
        ]

    def known(self, member: JudgedInput, suite: Suite) -> dict[str, GateScore]:
        """The input's measured scores, by metric, on exactly the examples that the candidate is measured on."""
        count = self.count(suite)
        if count < len(suite.examples):
            return {}
        recorded = [(metric, score) for (digest, metric), score in member.recorded.items() if digest == suite.digest]
        return {metric: score for metric, score in recorded if score.n == count and not score.reported}


def with_inputs(
    candidate: Sequence[CandidateScore], examination: Examination, members: Sequence[JudgedInput]
) -> list[CandidateScore]:
    """Adds to each of the candidate's scores those of the inputs on the same examples and, on `on_base`, that of the
    base. Scores that are not recorded are measured now. `own_suite` marks the input's own suite."""
    beside: dict[tuple[str, str], list[InputScore]] = {}
    missing = examination.missing(members)
    for member in members:
        for suite in examination.suites:
            rows = [(metric, score, True) for metric, score in examination.known(member, suite).items()]
            if (member, suite) in missing:
                measured = examination.scores(member.subject, suite)
                rows = [(row["metric"], _measured(row, row), False) for row in measured]
            for metric, score, recorded in rows:
                beside.setdefault((suite.digest, metric), []).append(
                    {
                        "repository": member.repository,
                        "version": member.version,
                        "value": score.value,
                        "stderr": score.stderr,
                        "n": score.n,
                        "recorded": recorded,
                        "own_suite": suite.name == member.suite,
                    }
                )
    rows = [row for suite in examination.on_base for row in examination.scores(BASE, suite)]
    on_base = {(row["suite_digest"], row["metric"]): row for row in rows}
    compared: list[CandidateScore] = []
    for row in candidate:
        key = (row["suite_digest"], row["metric"])
        compared.append({**row, "inputs": beside.get(key, [])})
        if base := on_base.get(key):
            compared[-1]["base"] = MeasuredValue(value=base["value"], stderr=base["stderr"], n=base["n"])
    return compared


def with_rewordings(
    rows: Sequence[CandidateScore],
    candidate: Subject,
    examination: Examination,
    members: Sequence[JudgedInput],
    phrases: Mapping[str, str],
) -> list[CandidateScore]:
    """Adds to the candidate's accuracy on each input's own suite how many answers it keeps in other words."""
    suites = {suite.name: suite for suite in examination.suites}
    answers = {
        member.suite: examination.reworded(candidate, member, suites[member.suite], phrases.get(member.suite, ""))
        for member in members
        if member.suite in suites
    }
    return [
        {**row, "reworded": kept} if row["metric"] == "accuracy" and (kept := answers.get(row["suite"])) else row
        for row in rows
    ]


def judge(
    rules: Mapping[str, bool], rows: Sequence[CandidateScore], base: Scores, guards: Set[str]
) -> list[CandidateGate]:
    """Evaluates each rule, which is `required` or only warns. `base` holds the base's recorded scores; scores on
    exactly the candidate's examples replace them. `guards` names the guard suites."""
    candidate = {(row["suite"], row["metric"]): _measured(row, row) for row in rows}
    members: dict[tuple[str, str], dict[tuple[str, str], GateScore]] = {}
    for row in rows:
        for input_row in row.get("inputs", []):
            own = members.setdefault((input_row["repository"], input_row["version"]), {})
            own[row["suite"], row["metric"]] = _measured(input_row, row)
    same = {(row["suite"], row["metric"]): _measured(row["base"], row) for row in rows if "base" in row}
    inputs = gates.best_of(list(members.values()))
    against = gates.Baselines(base={**base, **same}, inputs=inputs, guards=guards)
    results = gates.judge(gates.parse_rules(list(rules)), candidate, against)
    return [CandidateGate(result, required) for result, required in zip(results, rules.values(), strict=True)]


def _measured(value: MeasuredValue | ScoreDocument, of: CandidateScore) -> GateScore:
    """The value as a score of the candidate's metric."""
    return GateScore(value["value"], value["stderr"], value["n"], of["higher_is_better"])
