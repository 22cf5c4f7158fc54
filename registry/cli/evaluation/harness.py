"""`eval --harness`: tasks of lm-evaluation-harness on releases and bases, recorded with the harness' version."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.console import complete, render
from registry.cli.console.groups import refuse_idle
from registry.cli.evaluation.quality import MeasuredScore
from registry.errors import Conflict
from registry.sdk.connection import Connection

if TYPE_CHECKING:
    from composer.deltas.delta import Delta
    from composer.evaluation.harness import Plan, TaskScores
    from composer.evaluation.harness_model import AnswerJournal, HarnessModel
    from composer.evaluation.model import LoadedModel
    from composer.formats.recipes.elsewhere import HarnessTask
    from registry.cli.evaluation.quality import EvaluationTarget


TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--harness",
        metavar="TASK[,TASK]",
        help="Tasks or groups of lm-evaluation-harness (extra `eval`). Repeatable.",
        autocompletion=complete.harness_tasks,
    ),
]
TaskDirectory = Annotated[
    Path | None,
    typer.Option(
        "--harness-path", metavar="DIR", help="Run tasks of the YAML files in DIR, and the code that they name."
    ),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot", metavar="N", min=0, help="Ask --harness tasks after N examples, instead of their own number."
    ),
]
ChatTemplate = Annotated[
    bool, typer.Option("--apply-chat-template", help="Ask --harness tasks in turns of the base's chat template.")
]


@dataclass(frozen=True, slots=True)
class HarnessChoice:
    """The tasks to run, by name, from a directory of YAML files or those of the harness; `limit` is the maximum number
    of documents. `num_fewshot` and `chat` set the form of their prompts."""

    names: Sequence[str]
    directory: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False

    def refuse_idle(self, next_step: str) -> None:
        """Raises Usage for options of running tasks, if there are none."""
        options = {"--harness-path": self.directory, "--num-fewshot": self.num_fewshot is not None}
        if not self.names:
            refuse_idle(options | {"--apply-chat-template": self.chat}, "without --harness", next_step)

    @property
    def recorded(self) -> bool:
        return self.limit is None


def load(choice: HarnessChoice) -> "Plan":
    """Loads the tasks, before anything is fetched and measured."""
    import logging

    from composer.evaluation.harness import Asked, load_tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return load_tasks(choice.names, choice.directory, Asked(choice.num_fewshot, choice.chat))


def evaluate(
    connection: Connection,
    choice: HarnessChoice,
    plan: "Plan",
    subjects: "Sequence[EvaluationTarget]",
    model_of: "Callable[[EvaluationTarget], tuple[LoadedModel, Sequence[Delta]]]",
) -> dict[str, list[MeasuredScore]]:
    """The scores by subject. Records those of each task as it ends; an interrupted run resumes at the request where it
    stopped."""
    if choice.recorded:
        register(connection, plan)
    runs = [_Run(connection, choice, plan, subject, model_of) for subject in subjects]
    scores = {run.subject.name: run.scores() for run in runs}
    for run in runs:
        for journal in run.journals:
            journal.discard()
    return scores


@dataclass(slots=True)
class _Run:
    """All tasks on one subject."""

    connection: Connection
    choice: HarnessChoice
    plan: "Plan"
    subject: "EvaluationTarget"
    model_of: "Callable[[EvaluationTarget], tuple[LoadedModel, Sequence[Delta]]]"
    journals: "list[AnswerJournal]" = field(default_factory=list["AnswerJournal"])

    def scores(self) -> list[MeasuredScore]:
        """Measures and records; returns the scores of tasks, then those of groups."""
        from composer.evaluation.harness import run_group
        from composer.evaluation.harness_model import HarnessModel

        loaded, deltas = self.model_of(self.subject)
        model, outcomes, rows = HarnessModel(loaded), dict[str, "TaskScores"](), list[MeasuredScore]()
        with render.progress(f"eval {self.subject.name}", None) as bar:
            for name in self.plan.tasks:
                outcomes[name] = self._measured(model, name, deltas, bar)
                rows += self._recorded(self.plan.tasks[name].suite, outcomes[name])
        for group in self.plan.groups:
            rows += self._recorded(group.suite, run_group(group, outcomes))
        return rows

    def _measured(
        self, model: "HarnessModel", name: str, deltas: "Sequence[Delta]", bar: render.StepProgress
    ) -> "TaskScores":
        from composer.evaluation.harness import run_task
        from composer.evaluation.harness_model import AnswerJournal
        from registry.transfer.collect import evaluation_journal

        task = self.plan.tasks[name]
        identity = f"{self.subject.identity} {task.suite.digest} {self.choice.limit or 'all'}"
        journal = AnswerJournal(evaluation_journal(self.connection.settings, identity), identity)
        self.journals.append(journal)
        if journal.known:
            render.say(f"resumed: {len(journal.known)} requests of {name} were answered before")

        def progress(done: int, total: int) -> None:
            bar.step(f"{self.subject.name} {name}", done, total, "requests")

        outcome = run_task(model, task, deltas, journal, progress, self.choice.limit)
        for line in outcome.skipped:
            render.say(f"note: {line}")
        return outcome

    def _recorded(self, suite: "HarnessTask", outcome: "TaskScores") -> list[MeasuredScore]:
        """Records the scores, with the results of each document if there are any."""
        from composer.evaluation.harness import source

        rows = [MeasuredScore(score, source()) for score in outcome.scores]
        if self.choice.recorded and rows:
            results = {"suite_digest": suite.digest, "metric": outcome.metric, "examples": outcome.examples}
            self.subject.record(self.connection, rows, [results] if outcome.examples else [])
        return rows


def register(connection: Connection, plan: "Plan") -> list[str]:
    """Registers the tasks and groups as suites; returns their digests."""
    for suite in plan.suites:
        _register(connection, suite)
    return [suite.digest for suite in plan.suites]


def _register(connection: Connection, suite: "HarnessTask") -> None:
    """Registers the task as a suite. If its version labels other documents, it is registered without one."""
    try:
        connection.api.post("/v1/suites", suite.to_json())
    except Conflict as error:
        if error.code != "suite_version_taken":
            raise
        render.say(f"note: {error.detail} This content of {suite.name} is recorded without a version.")
        connection.api.post("/v1/suites", suite.model_copy(update={"version": None}).to_json())
