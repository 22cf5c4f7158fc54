"""The step of an evaluation. A measured example is kept on this host, the scores of a release and suite in the database
as soon as they are complete, so that a job goes on after a crash with the next one."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from composer.errors import ComposerError
from composer.formats.recipes.elsewhere import HarnessTask, SuiteContent, parse_content
from composer.formats.recipes.suite import Suite
from registry.database.tables import Base, Release
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role, holds
from registry.domain.catalog import bases, suites
from registry.domain.catalog.releases import full_name
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.domain.jobs import evaluations
from registry.domain.jobs.evaluations import Wanted
from registry.errors import NotAllowed, RegistryError
from registry.errors.codes import RETRYABLE
from registry.errors.translation import of_composer, of_row
from registry.transfer import promotions, publishing, results
from registry.transfer.results import Results
from registry.worker.composition import ProgressCount, verified_base
from registry.worker.evaluation_units import Examined, examine_on_nodes
from registry.worker.harness import Harness
from registry.worker.node_models import OneModel, base_hints
from registry.worker.runner import JobKind, JobRun, shown_row
from registry.worker.workspace import evaluation_work_of

if TYPE_CHECKING:
    from composer.deltas.delta import Delta
    from composer.evaluation.evaluate import Result as ExampleResult
    from composer.evaluation.model import LoadedModel

Row = dict[str, Any]
_Subject = Callable[[], "tuple[LoadedModel, Sequence[Delta]]"]


def measure(held: JobRun) -> None:
    """Measures what is not measured yet, base by base: each is loaded once. Records each score as it is measured.

    What cannot be measured does not keep the others from being measured: raises its error at the end.
    """
    rows, done = _rows(held)
    left = [one for one in rows if one not in done]
    with held.resources.read() as session:
        digests = {one.suite for one in left}
        contents = {digest: parse_content(suites.find(session, digest).content) for digest in digests}
    harness = Harness(held.resources.settings.harness_path)
    count = ProgressCount(held, "examples", sum(contents[one.suite].count for one in left))
    missing: list[RegistryError] = []
    models = OneModel()
    for digest in dict.fromkeys(one.base for one in left):
        for release in dict.fromkeys(one.release for one in left if one.base == digest):
            subject = cache(partial(_subject, held, release, digest, models))
            for one in (one for one in left if (one.base, one.release) == (digest, release)):
                error = _evaluate(held, one, contents[one.suite], subject, harness, count)
                missing += [error] if error else []
    if missing:
        raise missing[0]
    _refuse_failed(held)


def _evaluate(
    held: JobRun,
    wanted: Wanted,
    suite: SuiteContent,
    subject: _Subject,
    harness: Harness,
    progress: Callable[[int], None],
) -> RegistryError | None:
    """Measures and records, or keeps why that is not possible. Returns the error of a base that is not here, which is
    not about this suite."""
    try:
        scores, results_sha256 = _measured(held, wanted, suite, subject, harness, progress)
    except (ComposerError, RegistryError) as caught:
        error = of_composer(caught) if isinstance(caught, ComposerError) else caught
        if error.code == "base_not_here":
            return error
        if error.code in RETRYABLE or (isinstance(caught, RegistryError) and error.code != "taken_down"):
            raise
        failure = shown_row(held, error)
        row: Row = {"scores": [], "error": f"{failure['detail']} {failure['next']}".strip(), "failure": failure}
        with held.resources.write() as session:
            evaluations.add_result(session, held.job_id, {**asdict(wanted), **row})
        return None
    with held.resources.write() as session:
        row = {"scores": scores, "error": None, "results_sha256": results_sha256}
        evaluations.add_result(session, held.job_id, {**asdict(wanted), **row})
        _record(held, session, wanted, [Measurement.of(score, results_sha256) for score in scores])
    promotions.settle_on_base(held.resources, wanted.base)
    return None


def _record(held: JobRun, session: Session, wanted: Wanted, measurements: list[Measurement]) -> None:
    """Records scores of a release on its own base, or of a base, with the requester's current roles. Raises NotAllowed
    if a required one was revoked."""
    actor = evaluations.requester(session, held.job_id, held.resources.clock())
    if wanted.release is None:  # a worker's measurement of a base counts as its owner's
        owner = replace(actor, grants={EVERYWHERE: Role.ADMIN.value})
        suites.record(session, owner, session.get_one(Base, wanted.base), measurements)
        return
    release = session.get_one(Release, wanted.release)
    if release.base_digest == wanted.base:  # else it is of an upgrade, whose scores are only reported
        _refuse_without_role(actor, release.repository.namespace)
        suites.record(session, actor, release, measurements)


def _refuse_failed(held: JobRun) -> None:
    """Raises the error of the first release and suite that could not be measured."""
    with held.resources.read() as session:
        row = evaluations.find(session, held.job_id)
        failed = [one for one in row.results if one.get("failure")]
        if not failed:
            return
        first, count = failed[0], len(row.wanted)
        release = None if first["release"] is None else session.get_one(Release, first["release"])
        subject = session.get_one(Base, first["base"]).name if release is None else full_name(release)
        suite = suites.find(session, first["suite"]).name
    error = of_row(first["failure"])
    error.detail = f"{subject} on {suite}: {error.detail}"
    if count > 1:
        error.detail += f" {len(failed)} of {count} could not be measured; the scores of the others are recorded."
    raise error


def clean(held: JobRun) -> None:
    """Deletes the releases' files."""
    shutil.rmtree(evaluation_work_of(held.resources, held.job_id), ignore_errors=True)


KIND = JobKind(steps={"measure": measure}, clean=clean)


def _rows(held: JobRun) -> tuple[list[Wanted], set[Wanted]]:
    """All that is wanted, and what of it is measured."""
    with held.resources.read() as session:
        row = evaluations.find(session, held.job_id)
        done = {Wanted.of(one) for one in row.results}
        return [Wanted(**one) for one in row.wanted], done


def _measured(
    held: JobRun,
    wanted: Wanted,
    suite: SuiteContent,
    subject: _Subject,
    harness: Harness,
    progress: Callable[[int], None],
) -> tuple[list[Row], str | None]:
    """The scores, and the digest of the stored results of each example, if there are any and the scores will be
    recorded."""
    from composer.evaluation.evaluate import scores
    from composer.evaluation.journal import ResultJournal, examine_rest

    def journal(digest: str) -> tuple[Path, str]:
        name = f"{wanted.release or 'base'}-{wanted.base[:16]}-{digest[:16]}.jsonl"
        path = evaluation_work_of(held.resources, held.job_id) / name
        return path, f"{wanted.release} {wanted.base} {digest}"

    if isinstance(suite, HarnessTask):
        rows, outcome = harness.measure(suite, subject, journal, progress)
        return rows, _stored(held, wanted, rows, Results(outcome.examples, outcome.metric))
    if held.engine.spreads:
        examples = _on_nodes(held, wanted, suite, progress)
    else:
        measured = ResultJournal(*journal(suite.digest))
        progress(len(suite.examples) - len(measured.missing(suite.examples)))
        scorers = held.resources.settings.enabled_scorers
        examples = examine_rest(subject, suite, suite.examples, measured, scorers, progress)
    rows = [score.to_json() for score in scores(suite, examples)]
    return rows, _stored(held, wanted, rows, Results([one.to_json() for one in examples]))


def _on_nodes(held: JobRun, wanted: Wanted, suite: Suite, progress: Callable[[int], None]) -> "list[ExampleResult]":
    """The results of all the suite's examples, measured on the nodes of the engine."""
    with held.resources.read() as session:
        base = session.get_one(Base, wanted.base)
        hints = base_hints(bases.locations(session, base)[wanted.base], base.size_bytes)
        release = None if wanted.release is None else session.get_one(Release, wanted.release)
        model = release is not None and Kind(release.repository.kind) is Kind.MODEL
        files = [] if release is None else publishing.manifest_files(session, release)
    examined = Examined(base=wanted.base, hints=hints, files=files, model=model)
    return examine_on_nodes(held, examined, suite, suite.examples, progress)


def _stored(held: JobRun, wanted: Wanted, scores: list[Row], by_example: Results) -> str | None:
    if not by_example.examples:
        return None
    namespace = EVERYWHERE
    with held.resources.read() as session:
        actor = evaluations.requester(session, held.job_id, held.resources.clock())
        if wanted.release is not None:
            release = session.get_one(Release, wanted.release)
            namespace = release.repository.namespace
            if release.base_digest != wanted.base:
                return None  # of an upgrade, whose scores are only reported
    measured = results.store(
        held.resources,
        actor,
        namespace,
        [Measurement.of(score) for score in scores],
        {wanted.suite: by_example},
    )
    return measured[0].results_sha256


def _subject(held: JobRun, release: int | None, digest: str, models: OneModel) -> "tuple[LoadedModel, Sequence[Delta]]":
    """The model, and the deltas to add to it. Raises ComposerError if the release does not fit this base."""
    from composer.deltas.variants.load import load_deltas

    base = partial(models.get, digest, partial(_base, held, digest))
    if release is None:
        return base(), ()
    with held.resources.read() as session:
        row = session.get_one(Release, release)
        kind, files = Kind(row.repository.kind), publishing.manifest_files(session, row)
        architecture = bases.architecture(session, digest)
    directory = evaluation_work_of(held.resources, held.job_id) / str(release)
    publishing.materialise(held.resources.store, files, directory)
    if kind is Kind.MODEL:
        return models.get(release, partial(_load, directory)), ()
    return base(), load_deltas(directory, architecture).deltas


def _base(held: JobRun, digest: str) -> "LoadedModel":
    with held.resources.read() as session:
        base = session.get_one(Base, digest)
        urls, size_bytes = bases.locations(session, base)[digest], base.size_bytes
    return _load(verified_base(held, digest, urls, size_bytes).path)


def _load(directory: Path) -> "LoadedModel":
    from composer.evaluation.model import load_model

    return load_model(directory)


def _refuse_without_role(actor: Actor, namespace: str) -> None:
    if not holds(actor, Role.PUBLISHER, namespace):
        raise NotAllowed(
            "role_lost",
            f"{actor.name} requested this evaluation with a token that no longer has the role {Role.PUBLISHER} in "
            f"{namespace}.",
            subject=namespace,
            next_step="Request it again with a token that has the role.",
        )
