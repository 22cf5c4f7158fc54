"""The steps of a composition: optimize (optional) -> check -> combine -> evaluate -> gate -> merge -> publish.

If the recipe has no adapter, nothing is combined and the merged model is evaluated. A set combines nothing: it is
neither checked for conflicts nor merged.

Each step can be repeated after a crash: finished results are in the work directory or the database.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from sqlalchemy.orm import Session

from composer.conflicts.documents import FindingDocument
from composer.findings import Finding, Severity, Verdict
from composer.formats.recipes.phrases import phrased_suite
from composer.formats.recipes.policy import read_policy
from composer.formats.recipes.suite import Example, Suite, used_in
from composer.formats.sets.router import routed
from registry.database.tables import Base, Namespace, Release
from registry.domain.access import namespaces
from registry.domain.access.audit import Actor
from registry.domain.catalog import bases, commits, releases, signatures, suites
from registry.domain.catalog.attestations import About
from registry.domain.catalog.releases import Input, NewRelease
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.signatures import SignedAs
from registry.domain.catalog.suites import Measurement
from registry.domain.channels.policy import gates
from registry.domain.compositions import checks, compositions
from registry.domain.jobs import evaluations
from registry.environment.settings import Settings
from registry.errors import Refused, Unavailable
from registry.errors.translation import of_row, refuse_errors
from registry.formats.manifest import ManifestFile
from registry.formats.references import parse_reference
from registry.formats.signatures import is_key_of, open_signature, own_fingerprint, read_key, sign
from registry.transfer import publishing, results
from registry.transfer.collect import discard
from registry.transfer.publishing import Push
from registry.wire.work import CandidateScore
from registry.worker import evaluating, report_units
from registry.worker.attesting import attested_composition, attested_scores
from registry.worker.combine_units import calibration_rows, combined_adapter, member_rows
from registry.worker.composition import (
    CompositionRun,
    Output,
    ProgressCount,
    composition_of,
    creator,
    register_files,
    store,
    suites_named,
)
from registry.worker.evaluation_units import Examined, examine
from registry.worker.host import work_of
from registry.worker.judging import Examination, JudgedInput, Subject, judge, with_inputs, with_rewordings
from registry.worker.merging import merged_model, proved_model
from registry.worker.node_files import share_architecture
from registry.worker.node_models import base_hints
from registry.worker.optimizing import optimize
from registry.worker.pass_units import probe_passes
from registry.worker.report_units import ReportResult, conflict_report
from registry.worker.runner import JobKind, JobRun
from registry.worker.sets import made_set, set_files

if TYPE_CHECKING:
    from composer.evaluation.evaluate import Result


def check(held: JobRun) -> None:
    """Runs the structural checks and the conflict report. Refuses hard conflicts, a verdict worse than the policy
    requires, and a combination that no adapter file can represent."""
    work = composition_of(held)
    if work.lock.is_set:
        return
    policy = read_policy(work.recipe.policy)
    made = _reported(held, work)
    report = made["report"]
    store(held, work, conflicts=report)
    refuse_errors([*map(_finding, report["findings"])], "recipe", "Change the recipe.")
    if not policy.accepts(Verdict(report["verdict"])):
        message = f"The verdict of the conflict check is {report['verdict']}, and {policy.require} is required."
        next_step = report.get("summary", {}).get("fix") or "Change the recipe."
        raise Refused("verdict", message, subject="recipe", next_step=next_step)
    if made["uncombinable"] is not None:
        raise of_row(made["uncombinable"])


def _finding(row: FindingDocument) -> Finding:
    return Finding(row["code"], Severity(row["severity"]), row["subject"], row["message"], row.get("measure"))


def _reported(held: JobRun, work: CompositionRun) -> ReportResult:
    """Makes the conflict report. It rests on a probe if every member has a suite and the recipe enables the probe, and
    otherwise on weaker evidence, which it names. The suites' prompts are always compared."""
    named = {suite.name: suite for suite in suites_named(held, [suite for suite in work.member_suites if suite])}
    phrases = work.phrases
    member_suites = [
        phrased_suite(phrases[name], named[name]) if name in phrases else named[name] if name else None
        for name in work.member_suites
    ]
    guards = [suite for suite in suites_named(held, work.recipe.evaluate) if suite.kind == "guard"]
    progress = ProgressCount(held, "examples")
    fitted = work.settings.pipeline.fitted
    with held.resources.read() as session:
        base_names = bases.names(session, work.lock.base)
    probe = {
        "base": work.lock.base,
        "suites": [suite.to_json() if suite else None for suite in member_suites],
        "guards": [guard.to_json() for guard in guards],
        "k": work.recipe.probe,
        "calibration": calibration_rows(work.calibration_sets(held)) if fitted else None,
        "searched": calibration_rows(work.searched(held)),
    }
    document = {
        "architecture": share_architecture(held.engine.node, work.architecture),
        "members": [{**row, "name": name} for row, name in zip(member_rows(work), work.names, strict=True)],
        "method": work.lock.method,
        "settings": work.lock.settings,
        "policy": work.recipe.policy,
        "base_names": base_names,
        "as_adapter": bool(work.recipe.adapter),
        "probe": probe,
    }
    probed = [suite for suite in member_suites if suite is not None]
    if not work.recipe.probe or len(probed) < len(member_suites):
        return conflict_report(held, document)
    return conflict_report(held, document, probe_passes(held, work, probed, guards, progress), progress)


def combine(held: JobRun) -> None:
    """Makes the candidate, one PEFT adapter combined by the recipe's method or a set, if the recipe publishes one."""
    work = composition_of(held)
    if work.measured_output:
        _candidate_files(held, work)


def _candidate_files(held: JobRun, work: CompositionRun) -> list[ManifestFile]:
    return set_files(held, work) if work.lock.is_set else combined_adapter(held, work)


def evaluate(held: JobRun) -> None:
    """Evaluates the candidate on the recipe's suites: the adapter or the members of the set on the base in memory, or
    the merged model when the recipe publishes neither."""
    work = composition_of(held)
    if not work.evaluated:
        store(held, work, candidate_scores=[])
        return
    if work.measured_output:
        candidate = Subject(files=_candidate_files(held, work), is_set=work.lock.is_set)
    else:
        candidate = Subject(files=_merged(held, work), merged=True)
    contents = suites_named(held, work.evaluated)
    done = ProgressCount(held, "examples")
    used = used_in([*work.calibration_sets(held), *work.searched(held)], contents)
    hints = base_hints(work.locations, work.base_bytes)
    chosen = made_set(held, work) if work.lock.is_set else None
    members = dict(zip(chosen.members, work.files, strict=True)) if chosen else {}

    def measured_by_units(subject: Subject, suite: Suite, examples: Sequence[Example]) -> "Sequence[Result]":
        examined = Examined(base=work.lock.base, hints=hints, files=subject.files, model=subject.merged)

        def measured(name: str, some: Sequence[Example]) -> "Sequence[Result]":
            return examine(held, replace(examined, files=members.get(name, ())), suite, some, done)

        if chosen and subject.is_set:
            return routed(chosen.routes, examples, measured)
        return examine(held, examined, suite, examples, done)

    with held.resources.read() as session:
        scored = {score.suite.digest for score in suites.scores_of(session, session.get_one(Base, work.lock.base))}
    examination = Examination(suites=contents, used=used, examine=measured_by_units, base_scored=scored)
    compared = _compared(held, work)
    done.expect(examination.examples(compared))
    measured = {
        suite.digest: examination.measured(candidate, suite, work.phrases.get(suite.name, "")) for suite in contents
    }
    scores = [row for rows, _ in measured.values() for row in rows]
    complete = [suite.digest for suite in contents if examination.count(suite) == len(suite.examples)]
    by_example = {digest: [result.to_json() for result in measured[digest][1]] for digest in complete}
    work.directory.mkdir(parents=True, exist_ok=True)
    work.results_file.write_text(json.dumps({"scores": scores, "results": by_example}), encoding="utf-8")
    rows = with_inputs(scores, examination, compared)
    if not work.lock.optimized:  # a search has measured its choice in other words
        rows = with_rewordings(rows, candidate, examination, compared, work.phrases)
    store(held, work, candidate_scores=rows)


def _compared(held: JobRun, work: CompositionRun) -> list[JudgedInput]:
    """Lists the inputs with their recorded scores."""
    with held.resources.read() as session:
        releases_used = compositions.inputs_of(session, work.lock)
        recorded = [
            {(score.suite.digest, score.metric): gates.measured(score) for score in suites.scores_of(session, release)}
            for release in releases_used
        ]
    return [
        JudgedInput(
            repository=locked.repository,
            version=locked.version,
            suite=suite,
            recorded=scores,
            subject=Subject(files=files),
        )
        for locked, suite, scores, files in zip(work.lock.inputs, work.member_suites, recorded, work.files, strict=True)
    ]


def gate(held: JobRun) -> None:
    """Evaluates the recipe's gates and those of the lock, before anything is published."""
    work = composition_of(held)
    with held.resources.read() as session:
        composition, _ = compositions.find(session, work.composition_id)
        base = gates.scores(session, session.get_one(Base, work.lock.base))
        scores = cast("list[CandidateScore]", composition.candidate_scores or [])
        evaluated = [suites.find(session, name) for name in work.evaluated]
        current = {suite.digest for suite in evaluated}
        guards = {suite.name for suite in evaluated if suite.kind == "guard"}
    replaced = sorted({row["suite"] for row in scores if row["suite_digest"] not in current})
    report = judge(work.rules, [row for row in scores if row["suite_digest"] in current], base, guards)
    documents = [gate.to_json() for gate in report]
    store(held, work, gates=documents)
    required = [gate for gate in report if gate.required]
    failed = [gate for gate in required if gate.fails]
    if failed:
        raise Refused(
            "gate_failed",
            f"The candidate fails {len(failed)} of {len(required)} gates.",
            subject=f"composition/{work.composition_id}",
            next_step=f"Compose again: {', '.join(replaced)} changed while the candidate was measured."
            if replaced
            else "Change weights, method, inputs or the gate, or serve the adapters separately.",
            findings=documents,
        )


def merge(held: JobRun) -> None:
    """Merges the checkpoint into the store shard by shard, verifies it, and compares its answers."""
    work = composition_of(held)
    if work.recipe.model and not work.lock.is_set:
        _merged(held, work)


def _merged(held: JobRun, work: CompositionRun) -> Sequence[ManifestFile]:
    """Returns the files of the merged model, which proves itself on the suites if there are any. The first call merges
    and records the report."""
    model = merged_model(held, work)
    asked = dict.fromkeys([*filter(None, work.member_suites), *work.evaluated])
    if asked:
        model = proved_model(held, work, model, suites_named(held, list(asked)))
    with held.resources.read() as session:
        known = compositions.find(session, work.composition_id)[0].merge
    if not known:  # otherwise an evaluation has merged and recorded it
        store(held, work, merge=model.report)
        judged = read_policy(work.recipe.policy).judged(map(_finding, model.report["findings"]))
        refuse_errors(judged, "recipe", "Change the recipe.")
    return model.files


def publish(held: JobRun) -> None:
    """Stores the files of all outputs, then publishes all releases, lineage and scores in one transaction.

    Uses the creator's current roles. Raises NotAllowed, and publishes nothing, if a required role was revoked.
    """
    with held.resources.read() as session:
        actor = creator(held, session)
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
            attested_composition(session, held.resources.settings, actor, About(release, inputs=inputs), composition)
            if release.repository.kind in (Kind.ADAPTER, Kind.SET):
                for digest in dict.fromkeys(score.suite_digest for score in measured):
                    of_suite = [score for score in measured if score.suite_digest == digest]
                    about = About(release, suites.find(session, digest))
                    proof = attested_scores(session, held.resources.settings, actor, about, of_suite)
                    suites.record(session, actor, release, of_suite, proof)
    held.made.clear()


def clean(held: JobRun) -> None:
    """Deletes the candidate's results, and outputs that were not published."""
    if held.made:
        with suppress(Unavailable):  # an unreachable store must not keep a job from ending; `gc` removes the blobs
            discard(held.resources, held.made)
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
    checks.KIND: report_units.KIND,
    evaluations.KIND: evaluating.KIND,
}


def _upload(held: JobRun, work: CompositionRun, output: Output) -> Push:
    reference = parse_reference(output.target)
    # Earlier steps have made them; these calls reuse the results.
    files = list(_merged(held, work)) if output.kind is Kind.MODEL else _candidate_files(held, work)
    register_files(held, output.target, files)
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
    """The candidate's scores, with their stored per-example results unless another host measured them."""
    with held.resources.read() as session:
        scores = compositions.find(session, work.composition_id)[0].candidate_scores or []
    measured = [Measurement.of(score) for score in scores]
    if not work.measured_output or not work.results_file.is_file():
        return measured
    kept = json.loads(work.results_file.read_text(encoding="utf-8"))
    if [Measurement.of(score) for score in kept["scores"]] != measured:
        return measured
    namespace = parse_reference(work.measured_output).repository.namespace
    rows = {digest: results.ExampleResults(examples) for digest, examples in kept["results"].items()}
    return results.store(held.resources, actor, namespace, measured, rows)


# Publishes a worker's outputs, signed with its key (`ADAPTORY_SIGNING_KEY`).
def publish_signed(
    settings: Settings, session: Session, actor: Actor, new: NewRelease, inputs: Sequence[Release]
) -> Release:
    """Publishes the composition of `inputs`. Signs it with the worker's key if the namespace trusts that key and one of
    its keys signed each input. Raises Refused for unsigned inputs where signatures are required."""
    name, path = new.repository.namespace, settings.signing_key
    namespace = namespaces.find_for_share(session, name) if session.get(Namespace, name) else None
    if path is None or namespace is None or not is_key_of(namespace.signing_keys, own_fingerprint(path)):
        return commits.publish(session, actor, new)[0]
    if namespace.require_signature:  # keys may have been removed since the composition began
        signatures.refuse_unsigned_inputs(session, namespace.name, namespace.signing_keys, inputs)
    elif signatures.unsigned_input(session, namespace.signing_keys, inputs) is not None:
        return commits.publish(session, actor, new)[0]
    bound = releases.signable(str(new.repository), str(new.version), new.base_digest, new.files)
    bundle = sign(read_key(path), bound, {file.path: file.sha256 for file in new.files})
    signed = open_signature(bundle, namespace.signing_keys)
    own = replace(new, signed=signed, signed_by=signed.fingerprint, signed_as=SignedAs.WORKER)
    release, created = commits.publish(session, actor, own)
    if created:
        signatures.keep(session, actor, release, signed.fingerprint, SignedAs.WORKER, bundle)
    return release
