"""Runs suites on releases and bases, and records the scores with the result of each example."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from composer.errors import ComposerError, NotSupported
from registry.cli.console import complete, render
from registry.cli.console.connect import base_checkpoint, connected, release_directory, resolved
from registry.cli.console.groups import refuse_idle, root
from registry.cli.console.options import BaseDir, Device, MemoryOption, PriorityOption, wishes
from registry.cli.console.render import JsonFlag
from registry.cli.console.scores import score_table
from registry.cli.evaluation import harness as harnesses
from registry.cli.evaluation import queued_evaluation
from registry.cli.evaluation.harness import ChatTemplate, HarnessChoice, NumFewshot, TaskDirectory, TaskNames
from registry.cli.evaluation.quality import EvaluationTarget, MeasuredScore, release_or_base
from registry.errors import Invalid, NotFound, RegistryError, Usage
from registry.errors.codes import RETRYABLE
from registry.errors.translation import of_composer
from registry.sdk.connection import Connection
from registry.sdk.suites import fetch_suite

if TYPE_CHECKING:
    from composer.deltas.delta import Delta
    from composer.evaluation.evaluate import Result, SuiteScore
    from composer.evaluation.journal import ResultJournal
    from composer.evaluation.model import LoadedModel
    from composer.formats.recipes.suite import Example, Suite
    from composer.formats.sets.adapter_set import SetMember
    from composer.formats.sets.router import Router

_HELP = "See `adaptory eval --help`."


@dataclass(frozen=True, slots=True)
class SuiteRun:
    """One subject on one suite: a subject, a suite, the examples, what an interrupted run has measured, and the phrase
    before each prompt."""

    subject: EvaluationTarget
    suite: "Suite"
    examples: "Sequence[Example]"
    journal: "ResultJournal"
    phrase: str


@root.command("eval")
def evaluate(  # noqa: PLR0913
    what: Annotated[
        list[str],
        typer.Argument(metavar="REF|BASE...", help="Releases, or bases by name.", autocompletion=complete.references),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", help="Name of a suite, or NAME@VERSION. Repeatable.", autocompletion=complete.suites),
    ] = None,
    harness: TaskNames = None,
    harness_path: TaskDirectory = None,
    num_fewshot: NumFewshot = None,
    apply_chat_template: ChatTemplate = False,
    device: Device = "auto",
    base_dir: BaseDir = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of examples; such scores are not recorded.")
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Let a worker of the registry measure, in one job, and wait for it.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="With --queue: wait for the job.")] = True,
    priority: PriorityOption = None,
    memory: MemoryOption = None,
    json: JsonFlag = False,
) -> None:
    """Run suites on releases or bases, and record the scores.

    Each base is loaded once for all its adapters. An interrupted run, started again, continues at the example where it
    stopped.
    """
    names = [name for text in harness or () for name in text.split(",") if name]
    choice = HarnessChoice(names, harness_path, limit, num_fewshot, apply_chat_template)
    choice.refuse_idle(_HELP)
    if not suite and not choice.names:
        raise Usage("nothing_to_run", "Nothing to run.")
    if queue:
        local = {"--device": device != "auto", "--base-dir": base_dir, "--limit": limit}
        why = "with --queue: a worker measures all examples on its own machine"
        refuse_idle(local, why, _HELP)
        _queue(what, suite or [], choice, wishes(priority, memory), wait=wait, json=json)
        return
    of_job = {"--no-wait": not wait, "--priority": priority, "--memory-bytes": memory is not None}
    refuse_idle(of_job, "without --queue", _HELP)
    where = _Where(device, base_dir)
    rows, failed = _evaluated(list(dict.fromkeys(what)), list(dict.fromkeys(suite or ())), choice, where)
    documents = [
        {"subject": name, "recorded": limit is None, "scores": [score.to_json() for score in scores]}
        for name, scores in rows.items()
    ]
    document = documents[0] if len(documents) == 1 else {"items": documents, "next": None}
    render.document(document, json, lambda: _show(rows), failed)


def _evaluated(
    what: Sequence[str], suite_names: Sequence[str], choice: HarnessChoice, where: "_Where"
) -> tuple[dict[str, list[MeasuredScore]], RegistryError | None]:
    """The scores by subject: of the suites, then of the harness' tasks; and why some could not be measured."""
    from registry.transfer.collect import sweep_journals

    with connected() as connection:
        sweep_journals(connection.settings, datetime.now(UTC))
        plan = harnesses.load(choice) if choice.names else None
        suites = [fetch_suite(connection, name) for name in suite_names]
        subjects = [EvaluationTarget(name, *release_or_base(connection, name)) for name in what]
        tasks = [_task(connection, subject, suite, choice.limit) for subject in subjects for suite in suites]
        unmeasured = [task.subject for task in tasks if task.journal.missing(task.examples)]
        models = _Models(connection, subjects if plan else unmeasured, where)
        done, failed = _run(connection, tasks, models, recorded=choice.recorded)
        rows = {name: list[MeasuredScore]() for name in what} | done
        for task in tasks:
            task.journal.discard()
        if plan:
            last = sorted(subjects, key=lambda subject: subject.weights, reverse=True)  # what is in memory comes first
            scored = harnesses.evaluate(connection, choice, plan, last, models.of)
            rows = {name: [*own, *scored[name]] for name, own in rows.items()}
    return rows, failed


def _queue(
    what: Sequence[str],
    suites: Sequence[str],
    choice: HarnessChoice,
    wish: Mapping[str, object],
    *,
    wait: bool,
    json: bool,
) -> None:
    with connected() as connection:
        registered = harnesses.register(connection, harnesses.load(choice)) if choice.names else []
        on = list(dict.fromkeys([*suites, *registered]))
        document = queued_evaluation.queue(connection, list(dict.fromkeys(what)), on, wish, wait=wait)
    failure = queued_evaluation.error_of(document.job, document.state, document.error) if wait else None
    render.document(document, json, lambda: queued_evaluation.show(document), failure)


@dataclass(frozen=True, slots=True)
class _Where:
    """The location of the weights and the device that loads them."""

    device: str
    base_dir: Path | None


def _task(connection: Connection, subject: EvaluationTarget, suite: "Suite", limit: int | None) -> SuiteRun:
    from composer.evaluation.journal import ResultJournal
    from composer.evaluation.scorers.process import open_scorer
    from composer.formats.recipes.phrases import phrased
    from registry.transfer.collect import evaluation_journal

    if suite.task == "generation" and suite.scoring:
        with open_scorer(suite.scoring, connection.settings.enabled_scorers):  # before anything is fetched and measured
            pass
    phrase = subject.phrase_for(connection, suite.name)
    identity = f"{subject.identity} {suite.digest}"
    journal = ResultJournal(evaluation_journal(connection.settings, identity), identity)
    return SuiteRun(subject, suite, phrased(phrase, suite.sample(limit)), journal, phrase)


def _run(
    connection: Connection, tasks: Sequence[SuiteRun], models: "_Models", *, recorded: bool
) -> tuple[dict[str, list[MeasuredScore]], RegistryError | None]:
    """The scores by subject, and the first error. Records the scores of each task as it ends. Everything is fetched
    before the first pass.

    A task that fails does not keep the others from being measured. Raises the error if it is the only task.
    """
    left = sum(len(task.journal.missing(task.examples)) for task in tasks)
    known = sum(len(set(task.examples)) for task in tasks) - left
    if known:
        render.say(f"resumed: {known} of {known + left} examples were measured before")
    rows: dict[str, list[MeasuredScore]] = {task.subject.name: [] for task in tasks}
    failed: list[tuple[SuiteRun, ComposerError]] = []
    label = f"eval {next(iter(rows))}" if len(rows) == 1 else f"eval {len(rows)} subjects"
    with render.progress(label, left, "examples") as done:
        for task in sorted(tasks, key=lambda task: task.subject.weights):
            try:
                measured, results = _measured(connection, task, models, done)
            except ComposerError as error:
                if error.code in RETRYABLE:
                    raise
                task.journal.discard()  # a scorer that was corrected scores all answers again
                if len(tasks) == 1:
                    raise
                failed.append((task, error))
                continue
            scores = [MeasuredScore(score, phrase=task.phrase) for score in measured]
            if recorded:
                examples = {"suite_digest": task.suite.digest, "examples": [result.to_json() for result in results]}
                task.subject.record(connection, scores, [examples])
            rows[task.subject.name] += scores
    return rows, _first(failed, len(tasks))


def _first(failed: "Sequence[tuple[SuiteRun, ComposerError]]", count: int) -> RegistryError | None:
    """The first error, with the release and the suite that it is about."""
    if not failed:
        return None
    task, first = failed[0]
    error = of_composer(first)
    error.detail = (
        f"{task.subject.name} on {task.suite.name}: {error.detail} {len(failed)} of {count} could not be measured."
    )
    return error


class _Models:
    """Fetches the files of all subjects, and loads the weights of one after the other: those in memory stay there for
    all subjects that use them."""

    def __init__(self, connection: Connection, subjects: Sequence[EvaluationTarget], where: _Where) -> None:
        from composer.formats.sets.adapter_set import SET_FILE, read_set

        self._device = where.device
        self._current: tuple[Path, LoadedModel] | None = None
        self._releases = {
            subject.name: release_directory(connection, subject.release) for subject in subjects if subject.release
        }
        bases = {subject.weights: subject.base for subject in subjects if not subject.is_model}
        self._bases = {key: base_checkpoint(base, where.base_dir).path for key, base in bases.items()}
        self._sets = {
            subject.name: read_set(self._releases[subject.name] / SET_FILE) for subject in subjects if subject.is_set
        }
        self._members = {
            (name, part): _member_directory(connection, member)
            for name, known in self._sets.items()
            for part, member in known.members.items()
        }

    def router(self, subject: EvaluationTarget) -> "Router | None":
        """The router of a set."""
        known = self._sets.get(subject.name)
        return known.routes if known else None

    def of(self, subject: EvaluationTarget) -> "tuple[LoadedModel, Sequence[Delta]]":
        """The model in memory and the subject's deltas on it. Raises NotSupported for a set."""
        release = self._releases.get(subject.name)
        if subject.is_set:
            message = f"{subject.name} has several adapters, and this needs one model."
            raise NotSupported("set_on_harness", message, subject=subject.name)
        if release is None or subject.is_model:
            return self._loaded(release or self._bases[subject.weights]), ()
        return self._with(subject, release)

    def of_member(self, subject: EvaluationTarget, name: str) -> "tuple[LoadedModel, Sequence[Delta]]":
        """The model in memory and the deltas of the set's member on it; none for the base."""
        return self._with(subject, self._members.get((subject.name, name)))

    def _with(self, subject: EvaluationTarget, adapter: Path | None) -> "tuple[LoadedModel, Sequence[Delta]]":
        from composer.deltas.variants.load import load_deltas

        loaded = self._loaded(self._bases[subject.weights])
        return loaded, load_deltas(adapter, loaded.architecture).deltas if adapter else ()

    def _loaded(self, directory: Path) -> "LoadedModel":
        from composer.evaluation.model import load_model

        if self._current is None or self._current[0] != directory:
            self._current = None  # two models may not fit in memory
            self._current = (directory, load_model(directory, self._device))
        return self._current[1]


def _member_directory(connection: Connection, member: "SetMember") -> Path:
    """The files of a set's member. Raises NotFound if the caller may not read it, and Invalid if the registry has
    another release under its version."""
    try:
        release = resolved(connection, f"{member.repository}:{member.version}", warned=True)
    except NotFound as error:
        error.detail = f"The set's member {member.repository}:{member.version} is needed: {error.detail}"
        raise
    if release.commit != member.commit:
        detail = f"The set has {member.repository}:{member.version} as {member.commit[:12]}, and the registry does not."
        raise Invalid("other_release", detail, subject=member.repository)
    return release_directory(connection, release)


def _measured(
    connection: Connection, task: SuiteRun, models: _Models, done: Callable[[int], None]
) -> "tuple[list[SuiteScore], list[Result]]":
    from composer.evaluation.evaluate import scores
    from composer.evaluation.journal import examine_rest
    from composer.formats.recipes.phrases import phrased_suite
    from composer.formats.sets.router import routed

    suite = phrased_suite(task.phrase, task.suite) if task.phrase else task.suite

    def run(load: "Callable[[], tuple[LoadedModel, Sequence[Delta]]]", examples: "Sequence[Example]") -> "list[Result]":
        scorers = connection.settings.enabled_scorers
        return examine_rest(load, suite, examples, task.journal, scorers, done)

    subject, router = task.subject, models.router(task.subject)
    if router:
        results = routed(router, task.examples, lambda name, some: run(lambda: models.of_member(subject, name), some))
    else:
        results = run(lambda: models.of(subject), task.examples)
    return scores(task.suite, results), results


def _show(rows: Mapping[str, Sequence[MeasuredScore]]) -> None:
    from registry.sdk.results import Score

    for name, measured in rows.items():
        scores = [
            Score(
                suite=row.score.suite,
                metric=row.score.metric,
                value=row.score.value,
                n=row.score.n,
                stderr=row.score.stderr,
                higher_is_better=row.score.higher_is_better,
                source=row.source,
                phrase=row.phrase or None,
            )
            for row in measured
        ]
        score_table(name, scores)
