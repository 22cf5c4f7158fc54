"""Evaluations that users queue for a worker: releases and bases on suites, in one job."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from registry.database.tables import Base, Job, Release
from registry.database.tables.work import StoredResult
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, administers, permit, permit_somewhere, refuse_other_owner
from registry.domain.catalog import bases, metrics, repositories, suites
from registry.domain.catalog.releases import full_name
from registry.domain.channels import resolve
from registry.domain.jobs import evaluations
from registry.domain.jobs.evaluations import WantedScore
from registry.domain.jobs.queue import PLAIN, Wish
from registry.errors import NotFound, Usage
from registry.formats.references import parse_reference
from registry.transfer.resources import Resources

MAX_SUBJECTS = 100
MAX_SUITES = 50
MAX_PAIRS = 1_000
"""Maximum number of subjects times suites in one job."""


def request(
    resources: Resources,
    actor: Actor,
    release_names: Sequence[str],
    base_names: Sequence[str],
    on: Sequence[str],
    wish: Wish = PLAIN,
) -> dict[str, object]:
    """Queues the evaluation of releases and bases on suites; each base is loaded once. Returns its report.

    Requires the same rights as recording the scores: the publisher role for each release, and ownership of each base.
    Raises NotFound, NotAllowed, TooMany, Refused for a scorer that is not enabled, and Usage
    for too many or for a suite that workers cannot run.
    """
    references = [parse_reference(name) for name in dict.fromkeys(release_names)]
    _refuse_too_many(len(references) + len(base_names), len(on))
    namespaces = dict.fromkeys(reference.repository.namespace for reference in references)
    for namespace in namespaces:
        permit(actor, Role.PUBLISHER, namespace)
    if base_names:
        permit_somewhere(actor, Role.PUBLISHER)
    with resources.write() as session:
        releases = [resolve.resolve(session, reference) for reference in references]
        named = [_own_base(session, actor, name) for name in base_names]
        named_suites = [suites.find_readable(session, name, actor) for name in on]
        wanted_suites = [
            suite if suite.task == suites.HARNESS else suites.with_examples(suite) for suite in named_suites
        ]
        for suite in wanted_suites:
            metrics.refuse_disabled(suite, resources.settings.enabled_scorers.names)
        subjects = [(subject.id, subject.base_digest) for subject in releases] + [
            (None, subject.digest) for subject in named
        ]
        wanted = [WantedScore(release, base, suite.digest) for release, base in subjects for suite in wanted_suites]
        job = evaluations.create(session, actor, namespaces, wanted, wish=wish)
        subject_names = [full_name(subject) for subject in releases] + [subject.name for subject in named]
        suite_names = [suite.name for suite in wanted_suites]
        evaluations.record_request(session, actor, job, subjects=subject_names, suites=suite_names)
        return _report(session, job)


def report(session: Session, actor: Actor, job_id: int) -> dict[str, object]:
    """The report of an evaluation, as far as it is done. Only for its requester, who must still read what
    it measures, and registry admins."""
    job = session.get(Job, job_id)
    job = None if job is None or job.kind != evaluations.KIND else job
    if job is None or not (evaluations.is_own(session, actor, job) or administers(actor, job.namespace)):
        raise NotFound(
            "evaluation_unknown", f"Evaluation {job_id} does not exist, or is not yours.", subject=str(job_id)
        )
    return _report(session, job)


def _refuse_too_many(subjects: int, on: int) -> None:
    pairs = subjects * on
    if not pairs or subjects > MAX_SUBJECTS or on > MAX_SUITES or pairs > MAX_PAIRS:
        raise Usage(
            "bad_evaluation",
            f"{subjects} subjects on {on} suites: an evaluation has 1 to {MAX_SUBJECTS} subjects on 1 to "
            f"{MAX_SUITES} suites, and at most {MAX_PAIRS:,} pairs.",
        )


def _own_base(session: Session, actor: Actor, name: str) -> Base:
    base = bases.find(session, name)
    refuse_other_owner(actor, f"base {base.name}", base.created_by)
    return base


def _report(session: Session, job: Job) -> dict[str, object]:
    row = evaluations.find(session, job.id)
    done = {WantedScore.of(result): result for result in row.results}
    items = [_item(session, subject, done.get(subject)) for subject in (WantedScore(**wanted) for wanted in row.wanted)]
    return {
        "job": job.id,
        "state": job.state,
        "steps": job.steps,
        "error": job.error,
        "items": items,
    }


def _item(session: Session, wanted: WantedScore, result: StoredResult | None) -> dict[str, object]:
    release = None if wanted.release is None else session.get_one(Release, wanted.release)
    base, suite = session.get_one(Base, wanted.base), suites.find(session, wanted.suite)
    names = ("metric", "value", "stderr", "n", "higher_is_better")
    return {
        "repository": None if release is None else str(repositories.name_of(release.repository)),
        "version": None if release is None else release.version,
        "base": {"digest": base.digest, "name": base.name},
        "suite": suite.name,
        "suite_digest": suite.digest,
        "task": suite.task,
        "scores": None if result is None else [{name: score[name] for name in names} for score in result["scores"]],
        "error": None if result is None else result["error"],
    }
