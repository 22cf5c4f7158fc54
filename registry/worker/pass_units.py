"""Searches and probes spread over nodes: each unit is one pass, some examples under one combination."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.suite import Suite
from composer.formats.recipes.weights import parse_weight
from registry.transfer.publishing import materialise
from registry.worker.composition import CompositionRun
from registry.worker.engine.units import Count, Node, Result, Task, Unit, always_intact
from registry.worker.fit_units import calibration_of, calibration_rows
from registry.worker.node_files import Row, from_rows, to_rows
from registry.worker.node_models import base_checkpoint, base_hints, loaded_base, needs_of_model
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.conflicts.evidence.bench import Pass, PassRunner
    from composer.conflicts.examine import Evidence
    from composer.deltas.variants.load import LoadedAdapter
    from composer.evaluation.measure import Measured
    from composer.evaluation.model import LoadedModel
    from composer.optimize.problem import Member, Problem

_NAME_CHARS = 60


def _document(work: CompositionRun, members: "Sequence[Member]", guards: Sequence[Suite], how: Row) -> bytes:
    """What passes combine, as nodes read it: the base, and adapters by their files, with their suites and weights.
    `how` says what the passes are for."""
    rows = [
        {"name": one.adapter.name, "weight": one.weight.to_json(), "suite": one.suite.to_json(),
         "files": to_rows(files)}
        for one, files in zip(members, work.files, strict=True)
    ]  # fmt: skip
    content = {"base": work.lock.base, "members": rows, "guards": [guard.to_json() for guard in guards]}
    return json.dumps({**content, **how}, sort_keys=True).encode()


class SpreadPasses:
    """Runs the passes of one document on the engine: `Elsewhere` for a search or a probe."""

    def __init__(self, held: JobRun, work: CompositionRun, document: bytes, progress: Callable[[int], None]) -> None:
        self._held, self._base, self._progress = held, work.lock.base, progress
        self._hints = base_hints(work.locations, work.base_bytes)
        self._document = held.engine.node.share(document)

    def measure(self, wanted: "Pass") -> "Sequence[Measured]":
        ((_, result),) = self._mapped([wanted])
        return _measured(result)

    def spread(self, passes: "Sequence[Pass]") -> "Iterator[tuple[Pass, Sequence[Measured]]]":
        for one, result in self._mapped(passes):
            if "cannot" not in result:
                yield one, _measured(result)

    def _mapped(self, passes: "Sequence[Pass]") -> "Iterator[tuple[Pass, Result]]":
        units = {self._unit(one).name: (self._unit(one), one) for one in passes}
        needs = needs_of_model(self._base, self._hints)
        for unit, result in self._held.engine.map(PASS, [unit for unit, _ in units.values()], needs, self._held.check):
            one = units[unit.name][1]
            self._progress(0 if "cannot" in result else len(one.asked))
            yield one, result

    def _unit(self, wanted: "Pass") -> Unit:
        asked = [[suite, example] for _, suite, example in wanted.keys]
        content = {"document": self._document, "who": wanted.who, "asked": asked}
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
        return Unit(name=f"{wanted.who[:_NAME_CHARS]} {digest}", content=content, hints=self._hints)


def search_elsewhere(
    held: JobRun, work: CompositionRun, problem: "Problem", progress: Callable[[int], None]
) -> SpreadPasses | None:
    """Runs a search's passes on the nodes of an engine that has some; None for this process."""
    if not held.engine.spreads:
        return None
    effort = {"search": problem.effort.search, "confirm": problem.effort.confirm, "seed": problem.effort.seed}
    how = {"for": "search", "effort": effort, "as_adapter": problem.as_adapter}
    return SpreadPasses(held, work, _document(work, problem.members, problem.guards, how), progress)


def probe_elsewhere(
    held: JobRun, work: CompositionRun, adapters: "Sequence[LoadedAdapter]", evidence: "Evidence"
) -> SpreadPasses | None:
    """Runs a probe's passes on the nodes of an engine that has some. None for this process, and without a probe."""
    from composer.optimize.problem import Member

    suites = [suite for suite in evidence.suites if suite is not None]
    if not held.engine.spreads or not evidence.k or len(suites) < len(adapters):
        return None
    members = [
        Member(adapter=adapter, suite=suite, weight=locked.weighted)
        for adapter, suite, locked in zip(adapters, suites, work.lock.inputs, strict=True)
    ]
    rows = calibration_rows(evidence.calibration.sets) if evidence.calibration is not None else None
    how = {"for": "probe", "method": work.lock.method, "settings": work.lock.settings, "calibration": rows}
    document = _document(work, members, evidence.guards, how)
    return SpreadPasses(held, work, document, evidence.progress or (lambda _count: None))


def _measured(result: Result) -> "list[Measured]":
    from composer.errors import Mismatch, NotSupported
    from composer.evaluation.measure import Measured

    if "cannot" in result:
        kind = {"Mismatch": Mismatch, "NotSupported": NotSupported}[result["cannot"].pop("kind")]
        raise kind(**result["cannot"])
    return [Measured(nats, tokens, exact) for nats, tokens, exact in result["measured"]]


def _run(node: Node, unit: Unit, _count: Count) -> Result:
    from composer.errors import Mismatch, NotSupported

    document = unit.content["document"]
    runner = node.kept("passes", document, lambda: _opened(node, document, unit.hints))
    try:
        measured = runner(unit.content["who"], [(suite, example) for suite, example in unit.content["asked"]])
    except (Mismatch, NotSupported) as error:  # a result too: this combination cannot be made
        named = {"code": error.code, "message": error.message, "subject": error.subject, "next_step": error.next_step}
        return {"cannot": {"kind": type(error).__name__, **named}}
    return {"measured": [[one.nats, one.tokens, one.exact] for one in measured]}


def _opened(node: Node, document: str, hints: Mapping[str, Any]) -> "PassRunner":
    """The base and adapters of the document, ready for its passes."""
    content: Row = json.loads(node.shared(document))
    members = [_member(node, content, f"{document[:16]}-{number}", hints, row) for number, row in
               enumerate(content["members"])]  # fmt: skip
    guards = [Suite.from_json(guard) for guard in content["guards"]]
    runner = {"search": _search, "probe": _probe}[content["for"]]
    return runner(node, content, hints, members, guards)


def _member(node: Node, content: Row, name: str, hints: Mapping[str, Any], row: Row) -> "Member":
    from composer.deltas.variants.load import load_deltas
    from composer.optimize.problem import Member

    directory = node.kept_directory(name)
    materialise(node.store, from_rows(row["files"]), directory)
    architecture = base_checkpoint(node, content["base"], hints).architecture
    adapter = replace(load_deltas(directory, architecture), name=row["name"])
    return Member(adapter=adapter, suite=Suite.from_json(row["suite"]), weight=parse_weight(row["weight"]))


def _search(
    node: Node, content: Row, hints: Mapping[str, Any], members: "Sequence[Member]", guards: Sequence[Suite]
) -> "PassRunner":
    from composer.optimize.combiner import pass_runner
    from composer.optimize.problem import Effort, Problem

    return pass_runner(
        Problem(
            load=lambda: loaded_base(node, content["base"], hints),
            members=members,
            guards=guards,
            effort=Effort(**content["effort"]),
            as_adapter=content["as_adapter"],
        )
    )


def _probe(
    node: Node, content: Row, hints: Mapping[str, Any], members: "Sequence[Member]", guards: Sequence[Suite]
) -> "PassRunner":
    from composer.conflicts.evidence.bench import Probed, Runner
    from composer.conflicts.evidence.probe import by_method, pass_runner

    def load() -> "LoadedModel":
        return loaded_base(node, content["base"], hints)

    settings = parse_settings(content["method"], content["settings"])
    calibration = calibration_of(load, content["base"], content["calibration"], settings)
    probed = [Probed(one.adapter.name, one.adapter.deltas, one.weight, one.suite) for one in members]
    combine = by_method([one.adapter for one in members], settings, calibration, load().device)
    return pass_runner(Runner(load), probed, guards, combine)


PASS = Task(name="pass", version=1, run=_run, intact=always_intact)
