"""Tasks of lm-evaluation-harness on a worker that has the extra `eval`, if it makes the same content of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import NotSupported
from composer.formats.recipes.elsewhere import HarnessTask

if TYPE_CHECKING:
    from composer.deltas.delta import Delta
    from composer.evaluation.harness import LoadedTask, Outcome, Plan
    from composer.evaluation.harness_model import HarnessModel
    from composer.evaluation.model import LoadedModel

Row = dict[str, Any]


@dataclass(slots=True)
class Harness:
    """Loads each task once, from a directory of YAML files or those of the harness."""

    directory: Path | None
    _plans: "dict[str, Plan]" = field(default_factory=dict[str, "Plan"])

    def measure(
        self,
        suite: HarnessTask,
        subject: "Callable[[], tuple[LoadedModel, Sequence[Delta]]]",
        journal: Callable[[str], tuple[Path, str]],
        progress: Callable[[int], None],
    ) -> "tuple[list[Row], Outcome]":
        """The suite's scores. `journal` gives the file of what is answered of a suite by its digest, and the identity
        of its rows; `progress` gets the number of documents just done.

        Raises NotSupported without the harness, and if it makes other content of the task.
        """
        plan = self._plan(suite)
        from composer.evaluation.harness import run_group, source
        from composer.evaluation.harness_model import HarnessModel

        loaded, deltas = subject()
        model = HarnessModel(loaded)
        outcomes = {name: _run(model, one, deltas, journal, progress) for name, one in plan.tasks.items()}
        tasks = {one.suite.digest: name for name, one in plan.tasks.items()}
        groups = {one.suite.digest: one for one in plan.groups}
        digest = suite.digest
        outcome = outcomes[tasks[digest]] if digest in tasks else run_group(groups[digest], outcomes)
        return [{**score.to_json(), "source": source()} for score in outcome.scores], outcome

    def _plan(self, suite: HarnessTask) -> "Plan":
        if suite.digest not in self._plans:
            try:
                from composer.evaluation.harness import load_suite

                self._plans[suite.digest] = load_suite(suite, self.directory)
            except ModuleNotFoundError as error:
                raise NotSupported(
                    "harness_missing",
                    f"{suite.name} is a task of lm-evaluation-harness, which this worker does not have.",
                    subject=suite.name,
                ) from error
        return self._plans[suite.digest]


def _run(
    model: "HarnessModel",
    task: "LoadedTask",
    deltas: "Sequence[Delta]",
    journal: Callable[[str], tuple[Path, str]],
    progress: Callable[[int], None],
) -> "Outcome":
    """Runs a task. Reports progress in documents of the suite, although the harness counts requests."""
    from composer.evaluation.harness import run_task
    from composer.evaluation.harness_model import AnswerJournal

    counted = 0

    def answered(done: int, total: int) -> None:
        nonlocal counted
        documents = max(counted, task.suite.count * done // max(total, 1))
        progress(documents - counted)
        counted = documents

    return run_task(model, task, deltas, AnswerJournal(*journal(task.suite.digest)), answered)
