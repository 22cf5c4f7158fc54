"""The steps of a composition: optimize (if asked) -> check -> combine -> evaluate -> gate -> merge -> publish.

If the recipe has no adapter, nothing is combined and the merged model is evaluated.

Each step can be repeated after a crash: finished results are in the work directory or the database.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from composer.formats.adapters.tokenizers import chosen_tokenizer
from composer.formats.recipes.calibration_sets import used_in
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.policy import read_policy
from registry.database.tables import Base, Release
from registry.domain.access.audit import Actor
from registry.domain.catalog import suites
from registry.domain.catalog.releases import Input
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.domain.channels import gates
from registry.domain.compositions import checks, compositions
from registry.domain.jobs import evaluations
from registry.errors import Refused
from registry.errors.translation import refuse_errors
from registry.formats.manifest import ManifestFile
from registry.formats.references import parse_reference
from registry.transfer import publishing, results
from registry.transfer.publishing import Push
from registry.worker import checking, evaluating, merging
from registry.worker.composition import (
    CompositionRun,
    Output,
    ProgressCount,
    composition_of,
    creator,
    fetch_adapter,
    store,
    suites_named,
)
from registry.worker.examining import candidate_of, examiner, store_output
from registry.worker.fit_units import fitted_adapter
from registry.worker.judging import Examination, Member, Subject, judge, with_inputs
from registry.worker.optimizing import optimize
from registry.worker.pass_units import probe_elsewhere
from registry.worker.runner import JobKind, JobRun
from registry.worker.signed import publish_signed
from registry.worker.workspace import work_of

if TYPE_CHECKING:
    from composer.conflicts.examine import Evidence
    from composer.deltas.variants.load import LoadedAdapter
    from composer.evaluation.calibration import Calibration
    from composer.evaluation.model import LoadedModel


def check(held: JobRun) -> None:
    """Runs the structural checks and the conflict report. Refuses hard conflicts, a verdict worse than the policy
    requires, and a combination that no adapter file can represent."""
    from composer.conflicts.examine import examine
    from composer.conflicts.render.text import document, summary
    from composer.deltas.variants.load import load_deltas
    from composer.export.combine import refuse_uncombinable

    work = composition_of(held)
    members = work.members(held)
    loaded = [
        replace(load_deltas(directory, work.architecture), name=f"{locked.repository}:{locked.version}")
        for (directory, _), locked in zip(members, work.lock.inputs, strict=True)
    ]
    chosen_tokenizer(None, [(one.name, one.path) for one in loaded])  # before any work: two that differ are refused
    policy = read_policy(work.recipe.policy)
    report = examine(
        loaded,
        [weight for _, weight in members],
        work.settings,
        evidence=_evidence(held, work, loaded),
        policy=policy,
    )
    store(held, work, conflicts=document(report))
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

    work = composition_of(held)
    if not work.recipe.adapter or work.adapter_directory.is_dir():
        return
    if held.engine.spreads and work.settings.pipeline.fitted:
        fetch_adapter(held.resources.store, fitted_adapter(held, work), work.adapter_directory)
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
    work = composition_of(held)
    if not work.evaluated:
        store(held, work, candidate_scores=[])
        return
    (combine if work.recipe.adapter else merge)(held)  # an earlier host may have done it, on its own disk
    candidate = candidate_of(held, work)
    contents = suites_named(held, work.evaluated)
    done = ProgressCount(held, "examples")
    used = used_in([*work.calibration_sets(held), *work.searched(held)], contents)
    examination = Examination(suites=contents, used=used, examine=examiner(held, work, done))
    compared = _compared(held, work)
    done.expect(examination.examples(compared))
    measured = {suite.digest: examination.measured(candidate, suite) for suite in contents}
    scores = [row for rows, _ in measured.values() for row in rows]
    complete = [suite.digest for suite in contents if examination.count(suite) == len(suite.examples)]
    by_example = {digest: [one.to_json() for one in measured[digest][1]] for digest in complete}
    work.results_file.write_text(json.dumps({"scores": scores, "results": by_example}), encoding="utf-8")
    store(held, work, candidate_scores=with_inputs(scores, examination, compared))


def _compared(held: JobRun, work: CompositionRun) -> list[Member]:
    """The inputs, with their recorded scores."""
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
            subject=Subject(directory=directory, files=files),
        )
        for locked, suite, scores, (directory, _), files in zip(
            work.lock.inputs, work.member_suites, recorded, work.members(held), work.files, strict=True
        )
    ]


def gate(held: JobRun) -> None:
    """Evaluates the recipe's gates and those of the lock, before anything is published."""
    work = composition_of(held)
    with held.resources.read() as session:
        composition, _ = compositions.find(session, work.composition_id)
        base = gates.scores(session, session.get_one(Base, work.lock.base))
        scores = composition.candidate_scores or []
        evaluated = [suites.find(session, name) for name in work.evaluated]
        current, guards = {one.digest for one in evaluated}, {one.name for one in evaluated if one.kind == "guard"}
    replaced = sorted({row["suite"] for row in scores if row["suite_digest"] not in current})
    report = judge(work.rules, [row for row in scores if row["suite_digest"] in current], base, guards)
    store(held, work, gates=report)
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
    """Writes the merged checkpoint, shard by shard and verified: to this host's disk, or into the store."""
    from composer.merge.plan import plan_merge
    from composer.merge.run import run_merge

    work = composition_of(held)
    if not work.recipe.model or work.model_directory.is_dir():
        return
    if merging.is_streamed(held, work):
        model = merging.stored_model(held, work, _fitted_files(held, work))
        with held.resources.read() as session:
            known = compositions.find(session, work.composition_id)[0].merge
        if not known:  # a later step calls this too, and finds what has been made in no time
            store(held, work, merge=model.report)
        return
    base, how = work.base_checkpoint(held), (work.lock.method, work.lock.settings)
    if work.settings.pipeline.fitted:  # reuse the fitted factors: another fit would differ in the last bits
        combine(held)
        plan = plan_merge(base, [(work.adapter_directory, 1.0)], dtype=work.lock.dtype, rounding=work.lock.rounding)
    else:
        plan = plan_merge(base, work.members(held), *how, work.lock.dtype, work.lock.rounding)
    done = ProgressCount(held, "bytes", plan.size_bytes)
    report = run_merge(plan, work.model_directory, progress=done, note=work.note)
    store(held, work, merge={key: value for key, value in report.to_json().items() if key != "out_dir"})


def _fitted_files(held: JobRun, work: CompositionRun) -> list[ManifestFile]:
    """The files of the adapter that a fitted method made, in the store: the model is made from them."""
    if not work.settings.pipeline.fitted:
        return []
    combine(held)
    return store_output(held, work.outputs[0])


def publish(held: JobRun) -> None:
    """Stores the files of all outputs, then publishes all releases, lineage and scores in one transaction.

    Uses the creator's current roles. Raises NotAllowed, and publishes nothing, if a required one was revoked.
    """
    with held.resources.read() as session:
        actor = creator(held, session)
    combine(held)
    merge(held)
    work = composition_of(held)
    prepared = [publishing.prepare(held.resources, _upload(held, work, output))[0] for output in work.outputs]
    measured = _measured(held, actor, work)
    held.check()
    with held.resources.write() as session:
        actor = creator(held, session)  # a role may have been revoked meanwhile
        inputs = compositions.inputs_of(session, work.lock)
        made: list[Release] = []
        for new in prepared:
            if made and work.settings.pipeline.fitted:  # the model is made from the fitted adapter
                new = replace(new, inputs=[Input(made[0].id, 1.0)])
            made.append(publish_signed(held.resources.settings, session, actor, new, inputs))
        composition, _ = compositions.find(session, work.composition_id)
        composition.results = compositions.result_rows(made)
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
            "optimize": optimize,
            "check": check,
            "combine": combine,
            "evaluate": evaluate,
            "gate": gate,
            "merge": merge,
            "publish": publish,
        },
        clean=clean,
    ),
    checks.KIND: checking.KIND,
    evaluations.KIND: evaluating.KIND,
}


def _evidence(held: JobRun, work: CompositionRun, adapters: "Sequence[LoadedAdapter]") -> "Evidence":
    """A probe in memory, if every member has a suite and the recipe asks for a probe; otherwise weaker evidence, as the
    report says. The suites' prompts are always compared."""
    from composer.conflicts.evidence.probe import usual_most
    from composer.conflicts.examine import Evidence
    from composer.evaluation.model import load_model

    named = suites_named(held, [suite for suite in work.member_suites if suite])
    suites = {suite.name: suite for suite in named}
    load = cache(lambda: load_model(work.base_checkpoint(held).path))
    evidence = Evidence(
        load=load,
        suites=[suites[name] if name else None for name in work.member_suites],
        guards=[suite for suite in suites_named(held, work.recipe.evaluate) if suite.kind == "guard"],
        k=work.recipe.probe,
        most=usual_most(work.recipe.probe),
        calibration=_calibration(held, work, load),
        searched=work.searched(held),
        progress=ProgressCount(held, "examples"),
    )
    return replace(evidence, elsewhere=probe_elsewhere(held, work, adapters, evidence))


def _calibration(held: JobRun, work: CompositionRun, load: "Callable[[], LoadedModel]") -> "Calibration | None":
    """The calibration of a fitted method; loads the base on first use."""
    settings = work.settings
    if not isinstance(settings, Regmean):
        return None
    from composer.evaluation.calibration import Calibration

    return Calibration(load, work.calibration_sets(held), settings, base=work.lock.base)


def _upload(held: JobRun, work: CompositionRun, output: Output) -> Push:
    reference = parse_reference(output.target)
    if output.kind is Kind.MODEL and merging.is_streamed(held, work):
        files = merging.stored_model(held, work, _fitted_files(held, work)).files  # made by the step before
    else:
        files = store_output(held, output)
    return Push(
        repository=reference.repository,
        kind=output.kind,
        version=reference.version,
        bump=None,
        base=work.lock.base,
        files=sorted(files, key=lambda file: file.path),
        notes=work.recipe.notes,
        inputs=[Input(row_id, locked.weight) for row_id, locked in zip(work.input_ids, work.lock.inputs, strict=True)],
        composition_id=work.composition_id,
    )


def _measured(held: JobRun, actor: Actor, work: CompositionRun) -> list[Measurement]:
    """The candidate's scores; with the stored results of each example, unless another host has measured them."""
    with held.resources.read() as session:
        scores = compositions.find(session, work.composition_id)[0].candidate_scores or []
    measured = [Measurement.of(score) for score in scores]
    if not work.recipe.adapter or not work.results_file.is_file():
        return measured
    kept = json.loads(work.results_file.read_text(encoding="utf-8"))
    if [Measurement.of(score) for score in kept["scores"]] != measured:
        return measured
    namespace = parse_reference(work.recipe.adapter).repository.namespace
    rows = {digest: results.Results(examples) for digest, examples in kept["results"].items()}
    return results.store(held.resources, actor, namespace, measured, rows)
