"""Searches and probes as units: each is one pass, some examples under one combination."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.suite import Suite
from composer.formats.recipes.weights import parse_weight
from registry.worker.combine_units import CalibrationRow, calibration_of, calibration_rows, member_rows
from registry.worker.composition import CompositionRun
from registry.worker.engine.units import BaseHints, Count, Node, Task, Unit, always_intact
from registry.worker.node_files import MemberRow, Row, loaded_adapter, share_architecture, shared_architecture
from registry.worker.node_models import base_hints, loaded_base, needs_of_model
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.conflicts.evidence.bench import Pass, PassRunner
    from composer.evaluation.measure import ExampleScore
    from composer.evaluation.model import LoadedModel
    from composer.optimize.problem import SearchMember, SearchProblem

_NAME_CHARS = 60
Named = tuple[str, str, list[list[str]]]
"""A pass: the names of its deltas and of their fit, and the digests [suite, example] of each example."""
Progress = Callable[[int], None]
"""Called with the number of examples just measured."""


def search_passes(held: JobRun, work: CompositionRun, problem: "SearchProblem", progress: Progress) -> "Passes":
    """Prepares the passes of a search."""
    suites = [member.suite for member in problem.members]
    return _passes(held, work, suites, problem.guards, how_to_search(problem), progress)


def how_to_search(problem: "SearchProblem") -> Row:
    """The part of a passes document that describes the search."""
    effort = {"search": problem.effort.search, "confirm": problem.effort.confirm, "seed": problem.effort.seed}
    phrases = [member.phrase for member in problem.members]
    given = {"phrases": phrases} if any(phrases) else {}
    return {"for": "search", "effort": effort, "as_adapter": problem.as_adapter, **given}


def probe_passes(
    held: JobRun, work: CompositionRun, suites: Sequence[Suite], guards: Sequence[Suite], progress: Progress
) -> "Passes":
    """Prepares the passes of a probe, which measures each input on its suite."""
    fitted = work.settings.pipeline.fitted
    rows = calibration_rows(work.calibration_sets(held)) if fitted else None
    how = {"for": "probe", "method": work.lock.method, "settings": work.lock.settings, "calibration": rows}
    return _passes(held, work, suites, guards, how, progress)


class SuitedRow(MemberRow):
    """A member with the suite that it is measured on."""

    suite: Mapping[str, Any]


class PassContent(TypedDict):
    """The content that all passes of a document share; `architecture` is the key of another."""

    base: str
    architecture: str
    members: list[SuitedRow]
    guards: list[Mapping[str, Any]]


class SearchPasses(PassContent):
    """The passes of a search."""

    effort: Row
    as_adapter: bool
    phrases: NotRequired[list[str]]


class ProbePasses(PassContent):
    """The passes of a probe."""

    method: str
    settings: Row
    calibration: list[CalibrationRow] | None


class PassUnit(TypedDict):
    """One pass; `document` is the key of its shared content."""

    document: str
    who: str
    asked: list[list[str]]


class Measured(TypedDict):
    measured: list[tuple[float, int, bool]]


class Impossible(TypedDict):
    """The error of a combination that cannot be made."""

    cannot: dict[str, str]


PassResult = Measured | Impossible


def _passes(
    held: JobRun,
    work: CompositionRun,
    suites: Sequence[Suite],
    guards: Sequence[Suite],
    how: Row,
    progress: Progress,
) -> "Passes":
    rows: list[SuitedRow] = [
        {**row, "name": name, "suite": suite.to_json()}
        for row, name, suite in zip(member_rows(work), work.names, suites, strict=True)
    ]
    architecture = share_architecture(held.engine.node, work.architecture)
    shared: PassContent = {
        "base": work.lock.base,
        "architecture": architecture,
        "members": rows,
        "guards": [guard.to_json() for guard in guards],
    }
    document = {**shared, **how}
    return Passes(held, document, base_hints(work.locations, work.base_bytes), progress)


class Passes:
    """Runs the passes of one document on the engine; implements `Elsewhere` for a search. The document has the `base`,
    its `architecture` (a key), the `members` (files, suites and weights), the `guards`, and the passes' purpose
    (`for`)."""

    def __init__(self, held: JobRun, document: Row, hints: BaseHints, progress: Progress) -> None:
        self._held, self._base, self._hints, self._progress = held, document["base"], hints, progress
        self._document = held.engine.node.share(json.dumps(document, sort_keys=True).encode())

    def measure(self, wanted: "Pass") -> "Sequence[ExampleScore]":
        ((_, result),) = self.run([named(wanted)])
        return measured_of(result)

    def spread(self, passes: "Sequence[Pass]") -> "Iterator[tuple[Pass, Sequence[ExampleScore]]]":
        by_row = {json.dumps(named(wanted)): wanted for wanted in passes}
        for row, result in self.run([named(wanted) for wanted in passes]):
            if "cannot" not in result:
                yield by_row[json.dumps(row)], measured_of(result)

    def run(self, wanted: Sequence[Named]) -> Iterator[tuple[Named, PassResult]]:
        """Yields each pass with its result as it ends: `measured`, or the reason why its combination `cannot` be
        made."""
        units = {unit.name: (unit, row) for row in wanted for unit in [self._unit(row)]}
        needs = needs_of_model(self._base, self._hints)
        for unit, result in self._held.engine.map(PASS, [unit for unit, _ in units.values()], needs, self._held.check):
            _, row = units[unit.name]
            self._progress(0 if "cannot" in result else len(row[-1]))
            yield row, result

    def _unit(self, wanted: Named) -> Unit:
        who, fit, asked = wanted
        content: PassUnit = {"document": self._document, "who": who, "asked": asked}
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
        return Unit(name=f"{who[:_NAME_CHARS]} {digest}", content=content, hints=self._hints, near=fit)


def named(wanted: "Pass") -> Named:
    """Serializes a pass for units."""
    return wanted.who, wanted.fit, [[suite, example] for _, suite, example in wanted.keys]


def measured_of(result: PassResult) -> "list[ExampleScore]":
    """Returns the per-example results of a pass. Raises the error if its combination cannot be made."""
    from composer.errors import Mismatch, NotSupported
    from composer.evaluation.measure import ExampleScore

    if "cannot" in result:
        kinds, row = {"Mismatch": Mismatch, "NotSupported": NotSupported}, dict(result["cannot"])
        raise kinds[row.pop("kind")](**row)
    return [ExampleScore(nats, tokens, exact) for nats, tokens, exact in result["measured"]]


def _run(node: Node, unit: Unit, _count: Count) -> PassResult:
    from composer.errors import Mismatch, NotSupported

    content = cast(PassUnit, unit.content)
    key, hints = content["document"], cast(BaseHints, unit.hints)
    runner = node.kept("passes", key, lambda: _opened(node, key, hints))
    try:
        measured = runner(content["who"], [(suite, example) for suite, example in content["asked"]])
    except (Mismatch, NotSupported) as error:  # a result too: this combination cannot be made
        named = {"code": error.code, "message": error.message, "subject": error.subject, "next_step": error.next_step}
        return {"cannot": {"kind": type(error).__name__, **named}}
    return {"measured": [(example.nats, example.tokens, example.exact) for example in measured]}


def _opened(node: Node, key: str, hints: BaseHints) -> "PassRunner":
    """Loads the document's base and adapters for its passes."""
    document: Row = json.loads(node.shared(key))
    content = cast(PassContent, document)
    members = [_member(node, content, row) for row in content["members"]]
    guards = [Suite.from_json(guard) for guard in content["guards"]]
    if document["for"] == "search":
        return _search(node, cast(SearchPasses, document), hints, members, guards)
    return _probe(node, cast(ProbePasses, document), hints, members, guards)


def _member(node: Node, content: PassContent, row: SuitedRow) -> "SearchMember":
    from composer.optimize.problem import SearchMember

    adapter = loaded_adapter(node, row, shared_architecture(node, content["architecture"]))
    return SearchMember(adapter=adapter, suite=Suite.from_json(row["suite"]), weight=parse_weight(row["weight"]))


def _search(
    node: Node, content: SearchPasses, hints: BaseHints, members: "Sequence[SearchMember]", guards: Sequence[Suite]
) -> "PassRunner":
    from composer.optimize.combiner import pass_runner
    from composer.optimize.problem import SearchEffort, SearchProblem

    return pass_runner(
        SearchProblem(
            load=lambda: loaded_base(node, content["base"], hints),
            members=[
                replace(member, phrase=phrase)
                for member, phrase in zip(members, content.get("phrases") or [""] * len(members), strict=True)
            ],
            guards=guards,
            effort=SearchEffort(**content["effort"]),
            as_adapter=content["as_adapter"],
        ),
        node.check,
    )


def _probe(
    node: Node, content: ProbePasses, hints: BaseHints, members: "Sequence[SearchMember]", guards: Sequence[Suite]
) -> "PassRunner":
    from composer.conflicts.evidence.bench import Probed, Runner
    from composer.conflicts.evidence.probe import by_method, pass_runner

    def load() -> "LoadedModel":
        return loaded_base(node, content["base"], hints)

    settings = parse_settings(content["method"], content["settings"])
    calibration = calibration_of(load, content["base"], content["calibration"], settings, len(members))
    probed = [Probed(member.name, member.loaded.deltas, member.weight, member.suite) for member in members]
    combine = by_method([member.loaded for member in members], settings, calibration, load().device)
    return pass_runner(Runner(load, node.check), probed, guards, combine)


PASS = Task(name="pass", version=3, run=_run, intact=always_intact)
