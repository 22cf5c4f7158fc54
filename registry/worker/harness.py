"""Runs tasks of lm-evaluation-harness. The host needs the extra `eval` and must produce the same task content."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from composer.errors import NotSupported
from composer.formats.recipes.elsewhere import HarnessTask
from registry.transfer.collect import evaluation_journal
from registry.worker.engine.units import Count, Node
from registry.worker.node_files import Row

if TYPE_CHECKING:
    from composer.deltas.delta import Delta
    from composer.evaluation.harness import LoadedTask, Plan, TaskScores
    from composer.evaluation.harness_model import HarnessModel
    from composer.evaluation.model import LoadedModel

_Subject = Callable[[], "tuple[LoadedModel, Sequence[Delta]]"]


class HarnessResult(TypedDict):
    """The scores of a task, and the results of its examples in `metric`."""

    scores: list[Row]
    examples: list[Row]
    metric: str


def measure_task(node: Node, suite: HarnessTask, subject: _Subject, identity: str, progress: Count) -> HarnessResult:
    """Returns the suite's scores and the per-example results. `identity` names the subject. Answers are kept under it,
    so an interrupted task resumes and a group reuses the answers of its tasks. `progress` receives the number of
    documents just finished.

    Raises NotSupported if the harness is missing or produces different task content.
    """
    plan = node.kept("harness", suite.digest, lambda: _plan(node, suite))
    from composer.evaluation.harness import run_group, source
    from composer.evaluation.harness_model import AnswerJournal, HarnessModel

    def run(task: "LoadedTask") -> "TaskScores":
        own = f"{identity} {task.suite.digest}"
        journal = AnswerJournal(evaluation_journal(node.settings, own), own)
        return _run(model, task, deltas, journal, progress)

    loaded, deltas = subject()
    model = HarnessModel(loaded)
    outcomes = {name: run(task) for name, task in plan.tasks.items()}
    tasks = {task.suite.digest: name for name, task in plan.tasks.items()}
    groups = {group.suite.digest: group for group in plan.groups}
    digest = suite.digest
    outcome = outcomes[tasks[digest]] if digest in tasks else run_group(groups[digest], outcomes)
    scores = [{**score.to_json(), "source": source()} for score in outcome.scores]
    return {"scores": scores, "examples": outcome.examples, "metric": outcome.metric}


def _plan(node: Node, suite: HarnessTask) -> "Plan":
    try:
        from composer.evaluation.harness import load_suite

        return load_suite(suite, node.settings.harness_path)
    except ModuleNotFoundError as error:
        raise NotSupported(
            "harness_missing",
            f"{suite.name} is a task of lm-evaluation-harness, which this worker does not have.",
            subject=suite.name,
        ) from error


def _run(
    model: "HarnessModel", task: "LoadedTask", deltas: "Sequence[Delta]", journal: Any, progress: Count
) -> "TaskScores":
    """Runs a task. Reports progress in documents of the suite, although the harness counts requests."""
    from composer.evaluation.harness import run_task

    counted = 0

    def answered(done: int, total: int) -> None:
        nonlocal counted
        documents = max(counted, task.suite.count * done // max(total, 1))
        progress(documents - counted)
        counted = documents

    return run_task(model, task, deltas, journal, answered)
