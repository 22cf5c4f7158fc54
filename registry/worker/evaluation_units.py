"""Units of an evaluation. Each measures a slice of a suite's examples on a base, with or without an adapter."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypedDict, cast

from composer.formats.recipes.elsewhere import HarnessTask
from composer.formats.recipes.suite import Example, Suite
from registry.errors import Unavailable
from registry.formats.manifest import ManifestFile
from registry.transfer.collect import evaluation_journal
from registry.worker.composition import ProgressCount
from registry.worker.engine.protocol import Needs
from registry.worker.engine.units import BaseHints, Count, Node, Task, Unit, always_intact
from registry.worker.harness import HarnessResult, measure_task
from registry.worker.node_files import Row, fetched, to_rows
from registry.worker.node_models import base_checkpoint, base_hints, loaded_base, needs_of_model
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.deltas.delta import Delta
    from composer.evaluation.evaluate import Result as ExampleResult
    from composer.evaluation.model import LoadedModel


class SubjectContent(TypedDict):
    """The subject's part of a unit's content."""

    base: str
    files: list[list[Any]]
    model: bool


class SliceContent(SubjectContent):
    """A slice of a suite's examples, and the package of its scorer; `suite` is the key of a shared document."""

    suite: str
    package: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """The subject of a measurement: a base (its digest and how to find it), alone or with the adapter in `files`; or,
    if `model` is set, the merged model in `files`."""

    base: str
    hints: BaseHints
    files: Sequence[ManifestFile] = ()
    model: bool = False

    @property
    def needs(self) -> Needs:
        """The needs of a unit that measures the subject. A merged model's dtype, and so its size, may differ from its
        base's."""
        if not self.model:
            return needs_of_model(self.base, self.hints)
        return needs_of_model(None, base_hints((), sum(file.size_bytes for file in self.files)))

    @property
    def content(self) -> SubjectContent:
        return {"base": self.base, "files": to_rows(self.files), "model": self.model}


def examine(
    held: JobRun, examined: Examined, suite: Suite, examples: Sequence[Example], progress: ProgressCount
) -> "list[ExampleResult]":
    """Measures the examples and returns their results in order. Raises as `composer.evaluation.evaluate.examine`
    does."""
    from composer.evaluation.evaluate import Result as ExampleResult
    from composer.evaluation.scorers.scorer import package_of

    document = suite.to_json() | {"examples": [example.to_json() for example in examples]}
    scorer = {"scorers": held.resources.settings.scorers, "package": package_of(suite.scoring)}
    shared = held.engine.node.share(json.dumps(document, sort_keys=True).encode())
    size, before = held.engine.slice_examples, progress.done
    units = [
        Unit(
            name=f"{suite.name}, examples {begin + 1} to {end}",
            content={**examined.content, **scorer, "suite": shared, "begin": begin, "end": end},
            hints=examined.hints,
        )
        for begin in range(0, len(examples), size)
        for end in [min(begin + size, len(examples))]
    ]
    results: dict[int, list[ExampleResult]] = {}
    for unit, result in held.engine.map(EVALUATE, units, examined.needs, progress):
        results[unit.content["begin"]] = [ExampleResult(**row) for row in result["results"]]
        progress.reached(before + sum(map(len, results.values())))
    return [measured for begin in sorted(results) for measured in results[begin]]


def token_evidence(held: JobRun, examined: Examined, suite: Suite) -> list[Row]:
    """The evidence of an adapter on a suite; see `composer.evaluation.measure`."""
    content = {
        **examined.content,
        "suite": held.engine.node.share(json.dumps(suite.to_json(), sort_keys=True).encode()),
    }
    unit = Unit(name=f"evidence on {suite.name}", content=content, hints=examined.hints)
    ((_, result),) = held.engine.map(EVIDENCE, [unit], examined.needs, held.check)
    return result["examples"]


def run_harness(held: JobRun, examined: Examined, task: HarnessTask, progress: ProgressCount) -> HarnessResult:
    """Runs a task of lm-evaluation-harness. Returns its `scores`, and the `examples` for their `metric`. Raises what
    `measure_task` raises."""
    before, code = progress.done, {"job": held.job_id}  # the code of a task is not part of its content
    content = {**examined.content, **code, "suite": held.engine.node.share(json.dumps(task.to_json()).encode())}
    unit = Unit(name=task.name, content=content, hints=examined.hints)
    ((_, result),) = held.engine.map(HARNESS, [unit], examined.needs, progress)
    progress.reached(before + task.count)
    return result


def _run(node: Node, unit: Unit, count: Count) -> dict[str, list[Row]]:
    from composer.evaluation.journal import ResultJournal, examine_rest
    from composer.evaluation.scorers.scorer import package_of

    content = cast(SliceContent, unit.content)
    suite = Suite.from_json(json.loads(node.shared(content["suite"])))
    if (package := package_of(suite.scoring)) != content["package"]:
        raise Unavailable(
            "engine_node_differs",
            f"A node has {package or 'no package'} for the scorer of {suite.name}, and the worker has "
            f"{content['package'] or 'none'}.",
            subject=suite.name,
            next_step="Install the same version of the scorer's package on every node and worker.",
        )
    examples, key = suite.examples[content["begin"] : content["end"]], EVALUATE.key(unit)
    journal = ResultJournal(evaluation_journal(node.settings, key), key)
    count(len(examples) - len(journal.missing(examples)))
    scorers = node.settings.enabled_scorers
    results = examine_rest(lambda: _subject(node, unit), suite, examples, journal, scorers, count)
    journal.discard()
    return {"results": [asdict(result) for result in results]}


def _run_evidence(node: Node, unit: Unit, count: Count) -> dict[str, list[Row]]:
    from composer.evaluation.measure import token_evidence

    count(0)
    suite = Suite.from_json(json.loads(node.shared(unit.content["suite"])))
    loaded, deltas = _subject(node, unit)
    return {"examples": token_evidence(loaded, suite, deltas)}


def _run_harness(node: Node, unit: Unit, count: Count) -> HarnessResult:
    task = HarnessTask.model_validate(json.loads(node.shared(unit.content["suite"])))
    named = {name: unit.content[name] for name in ("base", "files", "model", "job")}
    return measure_task(node, task, lambda: _subject(node, unit), json.dumps(named), count)


def _subject(node: Node, unit: Unit) -> "tuple[LoadedModel, Sequence[Delta]]":
    """Loads the model to measure and its deltas. A process keeps one model: the base or a merged one."""
    from composer.deltas.variants.load import load_deltas
    from composer.evaluation.model import load_model

    content, hints = cast(SubjectContent, unit.content), cast(BaseHints, unit.hints)
    base, files = content["base"], content["files"]
    key = hashlib.sha256(json.dumps([base, files]).encode()).hexdigest()[:16]

    def deltas() -> "Sequence[Delta]":
        return load_deltas(fetched(node, files), base_checkpoint(node, base, hints).architecture).deltas

    if content["model"]:
        return node.kept("model", key, lambda: load_model(fetched(node, files))), ()
    return loaded_base(node, base, hints), node.kept("deltas", key, deltas) if files else ()


EVALUATE = Task(name="evaluate", version=1, run=_run, intact=always_intact)
EVIDENCE = Task(name="evidence", version=1, run=_run_evidence, intact=always_intact)
HARNESS = Task(name="harness", version=1, run=_run_harness, intact=always_intact)
