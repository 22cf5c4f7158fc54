"""The conflict report, as a unit that measures nothing itself. It names the passes that it needs; they run as units of
their own, and the report runs again with their results."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn, NotRequired, TypedDict, cast

from composer.conflicts.documents import ReportDocument
from composer.errors import ComposerError
from composer.formats.recipes.lock import Lock
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.policy import read_policy
from composer.formats.recipes.suite import Suite
from composer.formats.recipes.weights import parse_weight
from registry.domain.catalog import bases
from registry.domain.compositions import checks, compositions
from registry.errors.translation import of_composer
from registry.transfer import publishing
from registry.worker.combine_units import CalibrationRow, calibration_of, calibration_sets
from registry.worker.composition import ProgressCount
from registry.worker.engine.units import Count, Node, Task, Unit, always_intact
from registry.worker.node_files import MemberRow, Row, loaded_adapter, share_architecture, shared_architecture, to_rows
from registry.worker.node_models import WITHOUT_MODEL
from registry.worker.pass_units import Named, Passes, PassResult, measured_of, named
from registry.worker.runner import JobKind, JobLost, JobRun

if TYPE_CHECKING:
    from composer.conflicts.evidence.bench import Pass
    from composer.conflicts.examine import Evidence
    from composer.deltas.variants.load import LoadedAdapter
    from composer.evaluation.measure import ExampleScore
    from composer.formats.recipes.methods import AnySettings


def conflict_report(
    held: JobRun, document: Row, passes: Passes | None = None, progress: ProgressCount | None = None
) -> "ReportResult":
    """Makes the `report` on the document's adapters and, if one adapter is to be made, states why they are
    `uncombinable`. `document` has `architecture` (a key), `members` (with name, weight and files), `method` and
    `settings`, and may have `probe`, `policy` and `as_adapter`. Raises what the unit and its passes raise."""
    shared = held.engine.node.share(json.dumps(document, sort_keys=True).encode())
    known: list[tuple[Named, PassResult]] = []
    began_s = monotonic()
    while True:
        content = {"document": shared, "known": held.engine.node.share(json.dumps(known).encode())}
        unit = Unit(name="report", content=content, hints={"spent_s": monotonic() - began_s})
        ((_, result),) = held.engine.map(REPORT, [unit], WITHOUT_MODEL, held.check)
        if passes is None or progress is None or "wanted" not in result:
            return cast(ReportResult, result)
        progress.expect(result["expected"])
        known += passes.run([(who, fit, asked) for who, fit, asked in result["wanted"]])


class _Missing(Exception):
    """Signals passes whose results are not known yet."""

    def __init__(self, wanted: "Sequence[Pass]") -> None:
        super().__init__()
        self.wanted = [named(missing) for missing in wanted]


class _KnownPasses:
    """Known results of passes; implements `Elsewhere` for a probe. Raises _Missing if one is missing."""

    def __init__(self, rows: Sequence[tuple[Sequence[Any], PassResult]]) -> None:
        self._results = {json.dumps(list(wanted)): result for wanted, result in rows}

    def measure(self, wanted: "Pass") -> "Sequence[ExampleScore]":
        return measured_of(self._result(wanted, [wanted]))

    def spread(self, passes: "Sequence[Pass]") -> "Iterator[tuple[Pass, Sequence[ExampleScore]]]":
        missing = [wanted for wanted in passes if self._key(wanted) not in self._results]
        results = [(wanted, self._result(wanted, missing)) for wanted in passes]
        yield from ((wanted, measured_of(result)) for wanted, result in results if "cannot" not in result)

    def _result(self, wanted: "Pass", missing: "Sequence[Pass]") -> PassResult:
        if (result := self._results.get(self._key(wanted))) is None:
            raise _Missing(missing)
        return result

    @staticmethod
    def _key(wanted: "Pass") -> str:
        return json.dumps(list(named(wanted)))


class _Expected:
    """Records how many examples a probe will measure."""

    total = 0

    def expect(self, total: int) -> None:
        self.total = total

    def __call__(self, count: int) -> None:
        """Ignores progress, which the passes count."""


class ProbeContent(TypedDict):
    """The probe of a report: its suites, guards and examples, and the sets of a fit."""

    base: str
    suites: list[Mapping[str, Any] | None]
    guards: list[Mapping[str, Any]]
    k: int
    calibration: list[CalibrationRow] | None
    searched: list[CalibrationRow]


class ReportContent(TypedDict):
    """The shared document that determines a report, without the passes that are known."""

    architecture: str
    members: list[MemberRow]
    method: str
    settings: Mapping[str, Any]
    probe: NotRequired[ProbeContent | None]
    policy: NotRequired[Mapping[str, Any] | None]
    base_names: NotRequired[list[str]]
    as_adapter: NotRequired[bool]


class ReportResult(TypedDict):
    """The report, and the error if its adapters cannot be combined into one."""

    report: ReportDocument
    uncombinable: Row | None


class MissingPasses(TypedDict):
    """The passes to run first, and how many examples the probe measures in all."""

    wanted: list[Named]
    expected: int


def _report(node: Node, unit: Unit, _count: Count) -> ReportResult | MissingPasses:
    from composer.conflicts.examine import examine
    from composer.conflicts.render.text import document as rendered
    from composer.export.combine import refuse_uncombinable

    content: ReportContent = json.loads(node.shared(unit.content["document"]))
    architecture = shared_architecture(node, content["architecture"])
    adapters: list[LoadedAdapter] = []
    for member in content["members"]:
        node.check(0)
        adapters.append(loaded_adapter(node, member, architecture))
    weights = [parse_weight(member["weight"]) for member in content["members"]]
    settings, expected = parse_settings(content["method"], content["settings"]), _Expected()
    evidence: Evidence | None = None
    if probe := content.get("probe"):
        known = _KnownPasses(json.loads(node.shared(unit.content["known"])))
        evidence = replace(_evidence(probe, settings, expected, known), spent_s=unit.hints["spent_s"])
    try:
        report = examine(
            adapters,
            weights,
            settings,
            evidence=evidence,
            policy=read_policy(content.get("policy")),
            base_names=content.get("base_names", ()),
        )
    except _Missing as missing:
        return {"wanted": missing.wanted, "expected": expected.total}
    made: ReportResult = {"report": cast(ReportDocument, rendered(report)), "uncombinable": None}
    if content.get("as_adapter"):
        try:
            refuse_uncombinable(adapters, weights, settings)
        except ComposerError as error:
            made["uncombinable"] = of_composer(error).to_row()
    return made


def _evidence(probe: ProbeContent, settings: "AnySettings", expected: _Expected, known: _KnownPasses) -> "Evidence":
    from composer.conflicts.evidence.probe import usual_most
    from composer.conflicts.examine import Evidence

    return Evidence(
        load=_no_base,
        suites=[Suite.from_json(suite) if suite else None for suite in probe["suites"]],
        guards=[Suite.from_json(guard) for guard in probe["guards"]],
        k=probe["k"],
        most=usual_most(probe["k"]),
        calibration=calibration_of(_no_base, probe["base"], probe["calibration"], settings, len(probe["suites"])),
        searched=calibration_sets(probe["searched"]),
        progress=expected,
        elsewhere=known,
    )


def _no_base() -> NoReturn:
    raise AssertionError("a report loads no base: its passes do")


REPORT = Task(name="conflict report", version=1, run=_report, intact=always_intact)


# The step of a conflict check: the report from the adapters' weights.


def check(held: JobRun) -> None:
    """Computes and stores the report. Hard conflicts do not fail the job: they make the report's verdict `refuse`."""
    with held.resources.read() as session:
        row = checks.find_by_job(session, held.job_id)
        if row is None:
            raise JobLost
        lock = Lock.from_json(row.lock)
        architecture, base_names = bases.architecture(session, lock.base), bases.names(session, lock.base)
        inputs = compositions.inputs_of(session, lock)
        files = [publishing.manifest_files(session, release) for release in inputs]
    members = [
        {
            "name": f"{locked.repository}:{locked.version}",
            "weight": locked.weighted.to_json(),
            "files": to_rows(listed),
        }
        for locked, listed in zip(lock.inputs, files, strict=True)
    ]
    key = share_architecture(held.engine.node, architecture)
    how = {"method": lock.method, "settings": lock.settings, "base_names": base_names}
    made = conflict_report(held, {"architecture": key, "members": members, **how})
    held.check()
    with held.resources.write() as session:
        checks.keep(session, held.job_id, made["report"])


KIND = JobKind(steps={"check": check})
