"""The steps of a composition: check -> combine -> evaluate -> gate -> merge -> publish.

If the recipe has no adapter, nothing is combined and the merged model is evaluated.

Each step can be repeated after a crash: finished results are in the work directory or the database.
"""

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from composer.formats.checkpoints.checkpoint import Architecture, Checkpoint, local_directory, open_checkpoint
from composer.formats.checkpoints.hashing import hash_file, verify_checkpoint
from composer.formats.recipes.calibration_sets import CalibrationSet, used_in
from composer.formats.recipes.methods import AnySettings, Regmean, parse_settings
from composer.formats.recipes.policy import read_policy
from composer.formats.recipes.recipe import Lock, Recipe, parse_recipe
from composer.formats.recipes.suite import Suite as SuiteContent
from composer.formats.recipes.weights import Weight
from registry.database.tables import Base, Release
from registry.domain.access.audit import Actor
from registry.domain.catalog import bases, suites
from registry.domain.catalog.releases import Input
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.domain.channels import gates
from registry.domain.compositions import compositions
from registry.domain.jobs.queue import Amount
from registry.error_codes import refuse_errors
from registry.errors import NotFound, Refused
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, parse_reference
from registry.transfer import publishing, uploads
from registry.transfer.publishing import Push
from registry.worker.judging import Examination, Member, judge, with_inputs
from registry.worker.runner import JobKind, JobRun
from registry.worker.signed import publish_signed
from registry.worker.workspace import work_of

if TYPE_CHECKING:
    from composer.conflicts.examine import Evidence
    from composer.evaluation.calibration import Calibration
    from composer.evaluation.model import LoadedModel

_NAMELESS = ("commit", "weight", "rules")
"""The fields of an input that do not name it, which everyone may see."""


@dataclass(frozen=True, slots=True)
class Output:
    """An output to publish; `target` is REPO:VERSION."""

    target: str
    kind: Kind
    directory: Path


@dataclass(frozen=True, slots=True)
class CompositionRun:
    """A composition as its steps need it. Each step reads it again, so that any step can be the first."""

    composition_id: int
    recipe: Recipe
    lock: Lock
    architecture: Architecture
    locations: list[str]
    input_ids: list[int]
    files: list[list[ManifestFile]]
    member_suites: list[str | None]
    directory: Path

    @property
    def settings(self) -> AnySettings:
        return parse_settings(self.lock.method, self.lock.settings)

    @property
    def adapter_directory(self) -> Path:
        return self.directory / "adapter"

    @property
    def model_directory(self) -> Path:
        return self.directory / "model"

    @property
    def note(self) -> dict[str, Any]:
        """The lineage that goes into every output's adaptory.json.

        It names inputs by commit, not by release: readers of an output need not be allowed to read its inputs or other
        outputs. It omits the lock's digest, from which names could be guessed.
        """
        recipe, lock = self.recipe.to_json(), self.lock.to_json()
        inputs = [{name: row[name] for name in _NAMELESS if name in row} for row in lock["inputs"]]
        return {
            "recipe": {name: value for name, value in recipe.items() if name not in ("inputs", "adapter", "model")},
            "lock": {name: value for name, value in lock.items() if name != "digest"} | {"inputs": inputs},
        }

    @property
    def outputs(self) -> list[Output]:
        """The adapter and the model to publish, as far as the recipe names them."""
        made = (
            (self.recipe.adapter, Kind.ADAPTER, self.adapter_directory),
            (self.recipe.model, Kind.MODEL, self.model_directory),
        )
        return [Output(target, kind, directory) for target, kind, directory in made if target]

    @property
    def evaluated(self) -> list[str]:
        """The recipe's suites, those that the lock's gates use, and with `gates: []` those of the inputs."""
        own = [] if self.has_gates else [suite for suite in self.member_suites if suite]
        return list(dict.fromkeys([*compositions.evaluated(self.recipe, self.lock), *own]))

    @property
    def has_gates(self) -> bool:
        return self.recipe.gates is None or bool(self.recipe.gates)

    @property
    def rules(self) -> dict[str, bool]:
        """The gates, and whether each is required. If the recipe has none (`[]`), the comparison with the inputs only
        warns."""
        required = dict.fromkeys((*(self.recipe.gates or ()), *self.lock.gates), True)
        if self.has_gates:
            return required
        return dict.fromkeys(compositions.gates_against_inputs(self.member_suites), False)

    def calibration_sets(self, held: JobRun) -> list[CalibrationSet]:
        """The examples that each input is fitted on, as the lock says."""
        sets: list[CalibrationSet] = []
        for source, row in zip(self.recipe.inputs, self.lock.calibration, strict=False):
            if "suite_digest" in row:
                (content,) = _suites(held, [row["suite_digest"]])
                sets.append(CalibrationSet(content, len(row["examples"])))
            else:
                sets.append(CalibrationSet(prompts=source.prompts))
        return sets

    def members(self, held: JobRun) -> list[tuple[Path, Weight]]:
        """Each input's directory, with its files verified, and its weight with its rules."""
        members: list[tuple[Path, Weight]] = []
        for locked, files in zip(self.lock.inputs, self.files, strict=True):
            held.check()
            directory = self.directory / "inputs" / locked.commit  # this directory name ends up in adaptory.json
            directory.mkdir(parents=True, exist_ok=True)
            publishing.materialise(held.resources, files, directory)
            members.append((directory, locked.weighted))
        return members

    def base_checkpoint(self, held: JobRun) -> Checkpoint:
        """The base's checkpoint on this host. Verifies its weights: the files at a location may have changed."""
        directory = local_directory(self.locations)
        if directory is None:
            raise NotFound(
                "base_not_here",
                f"This worker cannot find the base at any location ({', '.join(self.locations) or 'it has none'}).",
                subject=self.lock.base,
                next_step="Add one on that host: `adaptory base add DIR`.",
            )
        checkpoint = open_checkpoint(directory)
        verify_checkpoint(checkpoint, self.lock.base, held.check)
        return checkpoint


def check(held: JobRun) -> None:
    """Runs the structural checks and the conflict report. Refuses hard conflicts, a verdict worse than the policy
    requires, and a combination that no adapter file can represent."""
    from composer.conflicts.examine import examine
    from composer.conflicts.render.text import document, summary
    from composer.deltas.variants.load import load_deltas
    from composer.export.combine import refuse_uncombinable

    work = _work(held)
    members = work.members(held)
    loaded = [
        replace(load_deltas(directory, work.architecture), name=f"{locked.repository}:{locked.version}")
        for (directory, _), locked in zip(members, work.lock.inputs, strict=True)
    ]
    policy = read_policy(work.recipe.policy)
    report = examine(
        loaded,
        [weight for _, weight in members],
        work.settings,
        evidence=_evidence(held, work),
        policy=policy,
    )
    _store(held, work, conflicts=document(report))
    refuse_errors(report.findings, "recipe", "Change the recipe.")
    if not policy.accepts(report.verdict):
        message = f"The verdict of the conflict check is {report.verdict}, and {policy.require} is required."
        raise Refused("verdict", message, subject="recipe", next_step=summary(report).fix or "Change the recipe.")
    if work.recipe.adapter:
        refuse_uncombinable(loaded, [weight for _, weight in members], work.settings)


def combine(held: JobRun) -> None:
    """Makes the candidate if the recipe names an adapter: one PEFT adapter, combined as the recipe says."""
    from composer.evaluation.model import load_model
    from composer.export.combine import combine as combine_adapters

    work = _work(held)
    if not work.recipe.adapter or work.adapter_directory.is_dir():
        return
    combine_adapters(
        work.members(held),
        work.adapter_directory,
        work.architecture,
        work.lock.method,
        work.lock.settings,
        note=work.note,
        calibration=_calibration(held, work, cache(lambda: load_model(work.base_checkpoint(held).path))),
    )


def evaluate(held: JobRun) -> None:
    """Evaluates the candidate on the recipe's suites: the adapter on the base in memory, or the merged model when the
    recipe publishes no adapter."""
    from composer.deltas.variants.load import load_deltas
    from composer.evaluation.model import load_model

    work = _work(held)
    if not work.evaluated:
        _store(held, work, candidate_scores=[])
        return
    if work.recipe.adapter:
        combine(held)  # an earlier host may have done it, on its own disk
        model = load_model(work.base_checkpoint(held).path)
        deltas = load_deltas(work.adapter_directory, work.architecture).deltas
    else:
        merge(held)
        model, deltas = load_model(work.model_directory), ()
    contents = _suites(held, work.evaluated)
    done = _Share(held, "examples")
    used = used_in(work.calibration_sets(held), contents)
    examination, compared = Examination(suites=contents, used=used, progress=done), _compared(held, work)
    done.expect(examination.examples(compared))
    scores = [score for suite in contents for score in examination.scores(model, suite, deltas)]
    base = (lambda: model) if work.recipe.adapter else cache(lambda: load_model(work.base_checkpoint(held).path))
    _store(held, work, candidate_scores=with_inputs(scores, examination, compared, base))


def _compared(held: JobRun, work: CompositionRun) -> list[Member]:
    """The inputs, with their recorded scores."""
    from composer.deltas.variants.load import load_deltas

    with held.resources.read() as session:
        releases_used = compositions.inputs_of(session, work.lock)
        recorded = [
            {(score.suite.digest, score.metric): gates.measured(score) for score in suites.scores_of(session, release)}
            for release in releases_used
        ]
    return [
        Member(
            repository=locked.repository,
            version=locked.version,
            suite=suite,
            recorded=scores,
            deltas=lambda directory=directory: load_deltas(directory, work.architecture).deltas,
        )
        for locked, suite, scores, (directory, _) in zip(
            work.lock.inputs, work.member_suites, recorded, work.members(held), strict=True
        )
    ]


def gate(held: JobRun) -> None:
    """Evaluates the recipe's gates and those of the lock, before anything is published."""
    work = _work(held)
    with held.resources.read() as session:
        composition, _ = compositions.find(session, work.composition_id)
        base = gates.scores(session, session.get_one(Base, work.lock.base))
        scores = composition.candidate_scores or []
        current = {suites.find(session, name).digest for name in work.evaluated}
    replaced = sorted({row["suite"] for row in scores if row["suite_digest"] not in current})
    report = judge(work.rules, [row for row in scores if row["suite_digest"] in current], base)
    _store(held, work, gates=report)
    required = [result for result in report if result["required"]]
    failed = [result for result in required if not result["passed"]]
    if failed:
        raise Refused(
            "gate_failed",
            f"The candidate fails {len(failed)} of {len(required)} gates.",
            subject=f"composition/{work.composition_id}",
            next_step=f"Compose again: {', '.join(replaced)} changed while the candidate was measured."
            if replaced
            else "Change weights, method, inputs or the gate, or serve the adapters separately.",
            findings=report,
        )


def merge(held: JobRun) -> None:
    """Writes the merged checkpoint, streamed shard by shard and verified."""
    from composer.merge.plan import plan_merge
    from composer.merge.run import run_merge

    work = _work(held)
    if not work.recipe.model or work.model_directory.is_dir():
        return
    base, how = work.base_checkpoint(held), (work.lock.method, work.lock.settings)
    if work.settings.pipeline.fitted:  # reuse the fitted factors: another fit would differ in the last bits
        combine(held)
        plan = plan_merge(base, [(work.adapter_directory, 1.0)], dtype=work.lock.dtype, rounding=work.lock.rounding)
    else:
        plan = plan_merge(base, work.members(held), *how, work.lock.dtype, work.lock.rounding)
    done = _Share(held, "bytes", plan.size_bytes)
    report = run_merge(plan, work.model_directory, progress=done, note=work.note)
    _store(held, work, merge={key: value for key, value in report.to_json().items() if key != "out_dir"})


def publish(held: JobRun) -> None:
    """Stores the files of all outputs, then publishes all releases, lineage and scores in one transaction.

    Uses the creator's current roles. Raises NotAllowed, and publishes nothing, if a required one was revoked.
    """
    with held.resources.read() as session:
        actor = _creator(held, session)
    combine(held)
    merge(held)
    work = _work(held)
    prepared = [publishing.prepare(held.resources, _upload(held, actor, work, output))[0] for output in work.outputs]
    held.check()
    with held.resources.write() as session:
        actor = _creator(held, session)  # a role may have been revoked meanwhile
        made: list[Release] = []
        for new in prepared:
            if made and work.settings.pipeline.fitted:  # the model is made from the fitted adapter
                new = replace(new, inputs=[Input(made[0].id, 1.0)])
            made.append(publish_signed(held.resources.settings, session, actor, new))
        composition, _ = compositions.find(session, work.composition_id)
        composition.results = compositions.result_rows(made)
        measured = [_measurement(score) for score in composition.candidate_scores or []]
        for release in made:
            if release.repository.kind == Kind.ADAPTER:
                suites.record(session, actor, release, measured)


def clean(held: JobRun) -> None:
    """Deletes inputs, candidate and merged checkpoint; what was published is in the store."""
    with held.resources.read() as session:
        composition = compositions.find_by_job(session, held.job_id)
    shutil.rmtree(work_of(held.resources, composition.id), ignore_errors=True)


KINDS = {
    "composition": JobKind(
        steps={
            "check": check,
            "combine": combine,
            "evaluate": evaluate,
            "gate": gate,
            "merge": merge,
            "publish": publish,
        },
        clean=clean,
    )
}


class _Share:
    """Counts bytes or examples done, from several threads, and writes the job's progress from one at a time."""

    def __init__(self, held: JobRun, unit: str, total: int = 0) -> None:
        self._held, self._unit, self._total, self._done = held, unit, total, 0
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._tell()

    def expect(self, total: int) -> None:
        """Sets the total, at the start or when it grows."""
        with self._lock:
            self._total = total
            self._tell()

    def _tell(self) -> None:
        self._held.progress(Amount(self._done, self._total, self._unit))


def _work(held: JobRun) -> CompositionRun:
    with held.resources.read() as session:
        composition = compositions.find_by_job(session, held.job_id)
        recipe, lock = parse_recipe(composition.recipe), Lock.from_json(composition.lock)
        inputs = compositions.inputs_of(session, lock)
        return CompositionRun(
            composition_id=composition.id,
            recipe=recipe,
            lock=lock,
            architecture=bases.architecture(session, lock.base),
            locations=bases.locations(session, session.get_one(Base, lock.base))[lock.base],
            input_ids=[release.id for release in inputs],
            files=[publishing.manifest_files(session, release) for release in inputs],
            member_suites=compositions.member_suites(session, recipe, inputs),
            directory=work_of(held.resources, composition.id),
        )


def _creator(held: JobRun, session: Session) -> Actor:
    return compositions.creator(session, compositions.find_by_job(session, held.job_id), held.resources.clock())


def _evidence(held: JobRun, work: CompositionRun) -> "Evidence":
    """A probe in memory, if every member has a suite and the recipe asks for a probe; otherwise weaker evidence, as the
    report says. The suites' prompts are always compared."""
    from composer.conflicts.evidence.probe import usual_most
    from composer.conflicts.examine import Evidence
    from composer.evaluation.model import load_model

    named = _suites(held, [suite for suite in work.member_suites if suite])
    suites = {suite.name: suite for suite in named}
    load = cache(lambda: load_model(work.base_checkpoint(held).path))
    return Evidence(
        load=load,
        suites=[suites[name] if name else None for name in work.member_suites],
        guards=[suite for suite in _suites(held, work.recipe.evaluate) if suite.kind == "guard"],
        k=work.recipe.probe,
        most=usual_most(work.recipe.probe),
        calibration=_calibration(held, work, load),
        progress=_Share(held, "examples"),
    )


def _calibration(held: JobRun, work: CompositionRun, load: "Callable[[], LoadedModel]") -> "Calibration | None":
    """The calibration of a fitted method; loads the base on first use."""
    settings = work.settings
    if not isinstance(settings, Regmean):
        return None
    from composer.evaluation.calibration import Calibration

    return Calibration(load, work.calibration_sets(held), settings)


def _suites(held: JobRun, names: Sequence[str]) -> list[SuiteContent]:
    with held.resources.read() as session:
        return [SuiteContent.from_json(suites.find(session, name).content) for name in names]


def _store(held: JobRun, work: CompositionRun, **columns: Any) -> None:
    with held.resources.write() as session:
        composition, _ = compositions.find(session, work.composition_id)
        for name, value in columns.items():
            setattr(composition, name, value)


def _upload(held: JobRun, actor: Actor, work: CompositionRun, output: Output) -> Push:
    reference, directory = parse_reference(output.target), output.directory
    files: list[ManifestFile] = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        file = ManifestFile(
            path.relative_to(directory).as_posix(), path.stat().st_size, Digest(hash_file(path, held.check))
        )
        uploads.store_file(held.resources, actor, reference.repository.namespace, file.sha256, path, move=False)
        files.append(file)
        held.check()
    return Push(
        repository=reference.repository,
        kind=output.kind,
        version=reference.version,
        bump=None,
        base=work.lock.base,
        files=files,
        notes=work.recipe.notes,
        inputs=[Input(row_id, locked.weight) for row_id, locked in zip(work.input_ids, work.lock.inputs, strict=True)],
        composition_id=work.composition_id,
    )


def _measurement(score: dict[str, Any]) -> Measurement:
    return Measurement(
        suite_digest=score["suite_digest"],
        metric=score["metric"],
        value=score["value"],
        stderr=score["stderr"],
        n=score["n"],
        higher_is_better=score["higher_is_better"],
    )
