"""Evaluations spread over nodes: each unit is a slice of a suite's examples, on a base with an adapter or without."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.formats.recipes.suite import Example, Suite
from registry.errors import Unavailable
from registry.formats.manifest import ManifestFile
from registry.transfer.publishing import materialise
from registry.worker.engine.protocol import Needs
from registry.worker.engine.units import Count, Node, Result, Task, Unit, always_intact
from registry.worker.node_files import from_rows, to_rows
from registry.worker.node_models import base_checkpoint, base_hints, loaded_base, needs_of_model
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.deltas.delta import Delta
    from composer.evaluation.evaluate import Result as ExampleResult
    from composer.evaluation.model import LoadedModel

SLICE = 32
"""Examples of one unit: seconds of a small model, minutes of a large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What nodes measure: a base, by its digest and where it is, with an adapter of these files, or a `model` of
    them."""

    base: str
    hints: dict[str, Any]
    files: Sequence[ManifestFile] = ()
    model: bool = False

    @property
    def needs(self) -> Needs:
        """Of a unit that measures it. A merged model may have another dtype than its base, and so another size."""
        if not self.model:
            return needs_of_model(self.base, self.hints)
        return needs_of_model(None, base_hints((), sum(file.size_bytes for file in self.files)))


def examine_on_nodes(
    held: JobRun, examined: Examined, suite: Suite, examples: Sequence[Example], progress: Callable[[int], None]
) -> "list[ExampleResult]":
    """The result of each of the examples, in order. `progress` gets the number of examples just done. Raises as
    `composer.evaluation.evaluate.examine` does."""
    from composer.evaluation.evaluate import Result as ExampleResult
    from composer.evaluation.scorers.scorer import package_of

    document = suite.to_json() | {"examples": [example.to_json() for example in examples]}
    measured = {"base": examined.base, "files": to_rows(examined.files), "model": examined.model}
    scorer = {"scorers": held.resources.settings.scorers, "package": package_of(suite.scoring)}
    content = {**measured, **scorer}
    asked = held.engine.node.share(json.dumps(document, sort_keys=True).encode())
    units = [
        Unit(
            name=f"{suite.name}, examples {begin + 1} to {min(begin + SLICE, len(examples))}",
            content={**content, "suite": asked, "begin": begin, "end": min(begin + SLICE, len(examples))},
            hints=examined.hints,
        )
        for begin in range(0, len(examples), SLICE)
    ]
    results: dict[int, list[ExampleResult]] = {}
    for unit, result in held.engine.map(EVALUATE, units, examined.needs, held.check):
        results[unit.content["begin"]] = [ExampleResult(**row) for row in result["results"]]
        progress(len(result["results"]))
    return [one for begin in sorted(results) for one in results[begin]]


def _run(node: Node, unit: Unit, _count: Count) -> Result:
    from composer.evaluation.evaluate import examine
    from composer.evaluation.scorers.scorer import package_of

    content = unit.content
    suite = Suite.from_json(json.loads(node.shared(content["suite"])))
    if (package := package_of(suite.scoring)) != content["package"]:
        raise Unavailable(
            "engine_node_differs",
            f"A node has {package or 'no package'} for the scorer of {suite.name}, and the worker has "
            f"{content['package'] or 'none'}.",
            subject=suite.name,
            next_step="Install the same version of the scorer's package on every node and worker.",
        )
    examples = suite.examples[content["begin"] : content["end"]]
    loaded, deltas = _subject(node, content, unit.hints)
    results = examine(loaded, suite, deltas, examples, node.settings.enabled_scorers)
    return {"results": [asdict(one) for one in results]}


def _subject(node: Node, content: Mapping[str, Any], hints: Mapping[str, Any]) -> "tuple[LoadedModel, Sequence[Delta]]":
    """What is measured: a model, and the deltas on it. A process keeps one model, the base or a merged one."""
    from composer.deltas.variants.load import load_deltas
    from composer.evaluation.model import load_model

    base, files = content["base"], content["files"]
    key = hashlib.sha256(json.dumps([base, files]).encode()).hexdigest()[:16]

    def downloaded() -> Path:
        directory = node.kept_directory(key)
        materialise(node.store, from_rows(files), directory)
        return directory

    def deltas() -> "Sequence[Delta]":
        return load_deltas(downloaded(), base_checkpoint(node, base, hints).architecture).deltas

    if content["model"]:
        return node.kept("model", key, lambda: load_model(downloaded())), ()
    return loaded_base(node, base, hints), node.kept("deltas", key, deltas) if files else ()


EVALUATE = Task(name="evaluate", version=1, run=_run, intact=always_intact)
