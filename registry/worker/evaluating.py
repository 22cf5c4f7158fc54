"""The steps of an evaluation: measure -> record. A measured example is kept on this host, a measured release and suite
in the database, so that a job goes on after a crash with the next one."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import ComposerError
from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.recipes.suite import Suite as SuiteContent
from registry.database.tables import Base, Release
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role, holds
from registry.domain.catalog import bases, suites
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.domain.jobs import evaluations
from registry.domain.jobs.evaluations import Wanted
from registry.errors import NotAllowed
from registry.transfer import promotions, publishing, results
from registry.worker.composition import ProgressCount, suites_named, verified_base
from registry.worker.runner import JobKind, JobRun
from registry.worker.workspace import evaluation_work_of

if TYPE_CHECKING:
    from composer.deltas.delta import Delta
    from composer.evaluation.model import LoadedModel

Row = dict[str, Any]


def measure(held: JobRun) -> None:
    """Measures what is not measured yet, base by base: each is loaded once."""
    rows, done = _rows(held)
    left = [one for one in rows if one not in done]
    contents = {content.digest: content for content in suites_named(held, list({one.suite for one in left}))}
    count = ProgressCount(held, "examples", sum(len(contents[one.suite].examples) for one in left))
    for digest in dict.fromkeys(one.base for one in left):
        base = cache(partial(_base, held, digest))
        of_base = [one for one in left if one.base == digest]
        for release in dict.fromkeys(one.release for one in of_base):
            subject, error = _subject(held, release, digest, base)
            for one in (one for one in of_base if one.release == release):
                scores, kept = ([], None) if error else _measured(held, one, contents[one.suite], subject, count)
                _keep(held, one, scores, error, kept)


def record(held: JobRun) -> None:
    """Records the scores of releases on their own base and of bases, then judges the promotions that wait for them.

    Uses the requester's current roles. Raises NotAllowed, and records nothing, if a required one was revoked.
    """
    with held.resources.write() as session:
        actor = evaluations.requester(session, held.job_id, held.resources.clock())
        rows = evaluations.find(session, held.job_id).results
        for row in rows:
            subject = session.get_one(Base, row["base"])
            if row["release"] is not None:
                release = session.get_one(Release, row["release"])
                if release.base_digest != row["base"]:
                    continue  # of an upgrade, whose scores are only reported
                _refuse_without_role(actor, release.repository.namespace)
                suites.record(session, actor, release, _measurements(row))
            else:  # a worker's measurement of a base counts as its owner's
                suites.record(session, _as_owner(actor), subject, _measurements(row))
    for digest in dict.fromkeys(row["base"] for row in rows):
        promotions.settle_on_base(held.resources, digest)


def clean(held: JobRun) -> None:
    """Deletes the releases' files."""
    shutil.rmtree(evaluation_work_of(held.resources, held.job_id), ignore_errors=True)


KIND = JobKind(steps={"measure": measure, "record": record}, clean=clean)


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
    subject: "tuple[LoadedModel, Sequence[Delta]]",
    progress: Callable[[int], None],
) -> tuple[list[Row], str | None]:
    """The scores, and the digest of the stored results of each example, if the scores will be recorded."""
    from composer.evaluation.evaluate import scores
    from composer.evaluation.journal import ResultJournal, examine_rest

    name = f"{wanted.release or 'base'}-{wanted.base[:16]}-{wanted.suite[:16]}.jsonl"
    path = evaluation_work_of(held.resources, held.job_id) / name
    journal = ResultJournal(path, f"{wanted.release} {wanted.base} {wanted.suite}")
    progress(len(suite.examples) - len(journal.missing(suite.examples)))
    scorers = held.resources.settings.enabled_scorers
    results = examine_rest(lambda: subject, suite, suite.examples, journal, scorers, progress)
    rows = [score.to_json() for score in scores(suite, results)]
    return rows, _stored(held, wanted, rows, [one.to_json() for one in results])


def _stored(held: JobRun, wanted: Wanted, scores: list[Row], examples: list[Row]) -> str | None:
    namespace = EVERYWHERE
    with held.resources.read() as session:
        actor = evaluations.requester(session, held.job_id, held.resources.clock())
        if wanted.release is not None:
            release = session.get_one(Release, wanted.release)
            namespace = release.repository.namespace
            if release.base_digest != wanted.base:
                return None  # of an upgrade, whose scores are only reported
    measured = results.store(
        held.resources, actor, namespace, _measurements({"scores": scores}), {wanted.suite: results.Results(examples)}
    )
    return measured[0].results_sha256


def _keep(held: JobRun, wanted: Wanted, scores: Sequence[Row], error: str | None, results_sha256: str | None) -> None:
    result = {**asdict(wanted), "scores": scores, "error": error, "results_sha256": results_sha256}
    with held.resources.write() as session:
        evaluations.add_result(session, held.job_id, result)


def _subject(
    held: JobRun, release: int | None, digest: str, base: "Callable[[], LoadedModel]"
) -> "tuple[tuple[LoadedModel, Sequence[Delta]], str | None]":
    """The model with the deltas to add to it, and an error if the release cannot be measured on this base. The others
    still are."""
    from composer.deltas.variants.load import load_deltas

    if release is None:
        return (base(), ()), None
    with held.resources.read() as session:
        row = session.get_one(Release, release)
        kind, files = Kind(row.repository.kind), publishing.manifest_files(session, row)
        architecture = bases.architecture(session, digest)
    directory = evaluation_work_of(held.resources, held.job_id) / str(release)
    directory.mkdir(parents=True, exist_ok=True)
    publishing.materialise(held.resources, files, directory)
    if kind is Kind.MODEL:
        return (_load(directory), ()), None
    model = base()
    try:
        return (model, load_deltas(directory, architecture).deltas), None
    except ComposerError as error:
        return (model, ()), f"{error.message} {error.next_step}".strip()


def _base(held: JobRun, digest: str) -> "LoadedModel":
    return _load(_checkpoint(held, digest).path)


def _load(directory: Path) -> "LoadedModel":
    from composer.evaluation.model import load_model

    return load_model(directory)


def _checkpoint(held: JobRun, digest: str) -> Checkpoint:
    with held.resources.read() as session:
        urls = bases.locations(session, session.get_one(Base, digest))[digest]
    return verified_base(held, digest, urls)


def _refuse_without_role(actor: Actor, namespace: str) -> None:
    if not holds(actor, Role.PUBLISHER, namespace):
        raise NotAllowed(
            "role_lost",
            f"{actor.name} requested this evaluation with a token that no longer has the role {Role.PUBLISHER} in "
            f"{namespace}.",
            subject=namespace,
            next_step="Request it again with a token that has the role.",
        )


def _as_owner(actor: Actor) -> Actor:
    return Actor(actor.name, actor.at, {EVERYWHERE: Role.ADMIN.value}, actor.public, actor.token_id, actor.source)


def _measurements(row: Row) -> list[Measurement]:
    return [Measurement.of(score, row.get("results_sha256")) for score in row["scores"]]
