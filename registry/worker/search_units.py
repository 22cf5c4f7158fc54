"""A search spread over nodes: each unit is one pass, some examples under one combination."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from composer.formats.recipes.suite import Suite
from composer.formats.recipes.weights import parse_weight
from registry.formats.manifest import ManifestFile
from registry.transfer.publishing import materialise
from registry.worker.engine.units import Count, Node, Result, Task, Unit, always_intact
from registry.worker.node_models import base_checkpoint, from_rows, loaded_base, needs_of_model, to_rows
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.conflicts.evidence.bench import Pass
    from composer.evaluation.measure import Measured
    from composer.optimize.passes import PassRunner
    from composer.optimize.problem import Problem

_NAME_CHARS = 60


def document(problem: "Problem", base: str, files: Sequence[Sequence[ManifestFile]]) -> bytes:
    """The problem as nodes read it: suites and settings, adapters by their files."""
    members = [
        {
            "name": one.adapter.name,
            "weight": one.weight.to_json(),
            "suite": one.suite.to_json(),
            "files": to_rows(own),
        }
        for one, own in zip(problem.members, files, strict=True)
    ]
    effort = {"search": problem.effort.search, "confirm": problem.effort.confirm, "seed": problem.effort.seed}
    content = {
        "base": base,
        "members": members,
        "guards": [guard.to_json() for guard in problem.guards],
        "effort": effort,
        "as_adapter": problem.as_adapter,
    }
    return json.dumps(content, sort_keys=True).encode()


class SpreadSearch:
    """Runs the passes of one problem on the engine, for `composer.optimize`."""

    def __init__(
        self,
        held: JobRun,
        problem: "Problem",
        base: str,
        *,
        hints: dict[str, Any],
        files: Sequence[Sequence[ManifestFile]],
        progress: Callable[[int], None],
    ) -> None:
        self._held, self._base, self._hints, self._progress = held, base, hints, progress
        self._problem = held.engine.share(document(problem, base, files))

    def measure(self, wanted: "Pass") -> "Sequence[Measured]":
        """The results of one pass. Raises the error of a combination that cannot be made."""
        for _, result in self._mapped([wanted]):
            return _measured(result)
        raise AssertionError("an engine yields every unit")

    def spread(self, passes: "Sequence[Pass]") -> "Iterator[tuple[Pass, Sequence[Measured]]]":
        """Yields the passes that can be run, with their results."""
        for one, result in self._mapped(passes):
            if "cannot" not in result:
                yield one, _measured(result)

    def _mapped(self, passes: "Sequence[Pass]") -> "Iterator[tuple[Pass, Result]]":
        units = {self._unit(one).name: (self._unit(one), one) for one in passes}
        needs = needs_of_model(self._base, self._hints)
        for unit, result in self._held.engine.map(
            SEARCH, [unit for unit, _ in units.values()], needs, self._held.check
        ):
            one = units[unit.name][1]
            self._progress(0 if "cannot" in result else len(one.asked))
            yield one, result

    def _unit(self, wanted: "Pass") -> Unit:
        asked = [[suite, example] for _, suite, example in wanted.keys]
        content = {"problem": self._problem, "who": wanted.who, "asked": asked}
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
        return Unit(name=f"{wanted.who[:_NAME_CHARS]} {digest}", content=content, hints=self._hints)


def _measured(result: Result) -> "list[Measured]":
    from composer.errors import Mismatch, NotSupported
    from composer.evaluation.measure import Measured

    if "cannot" in result:
        kind = {"Mismatch": Mismatch, "NotSupported": NotSupported}[result["cannot"].pop("kind")]
        raise kind(**result["cannot"])
    return [Measured(nats, tokens, exact) for nats, tokens, exact in result["measured"]]


def _run(node: Node, unit: Unit, _count: Count) -> Result:
    from composer.errors import Mismatch, NotSupported

    problem = unit.content["problem"]
    runner = node.kept("search", problem, lambda: _opened(node, problem, unit.hints))
    try:
        measured = runner(unit.content["who"], [(suite, example) for suite, example in unit.content["asked"]])
    except (Mismatch, NotSupported) as error:  # a result too: this combination cannot be made
        named = {"code": error.code, "message": error.message, "subject": error.subject, "next_step": error.next_step}
        return {"cannot": {"kind": type(error).__name__, **named}}
    return {"measured": [[one.nats, one.tokens, one.exact] for one in measured]}


def _opened(node: Node, problem: str, hints: Mapping[str, Any]) -> "PassRunner":
    """The problem's base and adapters."""
    from composer.deltas.variants.load import load_deltas
    from composer.optimize.passes import PassRunner
    from composer.optimize.problem import Effort, Member, Problem

    content = json.loads(node.shared(problem))
    base = content["base"]
    architecture = base_checkpoint(node, base, hints).architecture

    def member(number: int, row: dict[str, Any]) -> Member:
        directory = node.kept_directory(f"{problem[:16]}-{number}")
        materialise(node.store, from_rows(row["files"]), directory)
        adapter = replace(load_deltas(directory, architecture), name=row["name"])
        return Member(adapter=adapter, suite=Suite.from_json(row["suite"]), weight=parse_weight(row["weight"]))

    return PassRunner(
        Problem(
            load=lambda: loaded_base(node, base, hints),
            members=[member(number, row) for number, row in enumerate(content["members"])],
            guards=[Suite.from_json(guard) for guard in content["guards"]],
            effort=Effort(**content["effort"]),
            as_adapter=content["as_adapter"],
        )
    )


SEARCH = Task(name="search", version=1, run=_run, intact=always_intact)
