"""The step of an evaluation. Units measure. The scores of each release and suite are committed once they are complete,
so after a crash the job resumes with the next pair."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.orm import Session

from composer.errors import ComposerError, NotSupported
from composer.formats.recipes.elsewhere import HarnessTask, SuiteContent, parse_content
from composer.formats.recipes.phrases import phrased
from composer.formats.recipes.suite import Example, Suite
from composer.formats.sets.router import routed
from registry.database.tables import Base, Release
from registry.database.tables.work import StoredResult, StoredScore
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role, holds
from registry.domain.catalog import bases, suites
from registry.domain.catalog.attestations import About
from registry.domain.catalog.releases import full_name
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.domain.jobs import evaluations
from registry.domain.jobs.evaluations import WantedScore
from registry.errors import NotAllowed, RegistryError
from registry.errors.codes import RETRYABLE
from registry.errors.translation import of_composer, of_row
from registry.formats.attestations import EVIDENCE
from registry.transfer import promotions, publishing, results
from registry.transfer.results import ExampleResults
from registry.worker.attesting import attested, attested_scores
from registry.worker.composition import ProgressCount
from registry.worker.evaluation_units import Examined, examine, run_harness, token_evidence
from registry.worker.node_models import base_hints
from registry.worker.runner import JobKind, JobRun, shown_row
from registry.worker.sets import set_of

if TYPE_CHECKING:
    from composer.evaluation.evaluate import Result

Row = dict[str, Any]


def measure(held: JobRun) -> None:
    """Measures and records what is missing, base by base, so that each base is loaded once.

    A failed measurement does not stop the others; its error is raised at the end.
    """
    with held.resources.read() as session:
        row = evaluations.find(session, held.job_id)
        done = {WantedScore.of(result) for result in row.results}
        left = [wanted for wanted in (WantedScore(**stated) for stated in row.wanted) if wanted not in done]
        digests = {wanted.suite for wanted in left}
        contents = {digest: parse_content(suites.find(session, digest).content) for digest in digests}
    count = ProgressCount(held, "examples", sum(contents[wanted.suite].count for wanted in left))
    missing: list[RegistryError] = []
    for digest in dict.fromkeys(wanted.base for wanted in left):
        for release in dict.fromkeys(wanted.release for wanted in left if wanted.base == digest):
            for wanted in (wanted for wanted in left if (wanted.base, wanted.release) == (digest, release)):
                error = _evaluate(held, wanted, contents[wanted.suite], count)
                missing += [error] if error else []
    if missing:
        raise missing[0]
    _refuse_failed(held)


def _evaluate(held: JobRun, wanted: WantedScore, suite: SuiteContent, progress: ProgressCount) -> RegistryError | None:
    """Records the scores, or the reason why they cannot be measured. Returns the error if this host lacks the base,
    since that is not the suite's fault."""
    try:
        scores, by_example = _measured(held, wanted, suite, progress)
    except (ComposerError, RegistryError) as caught:
        error = of_composer(caught) if isinstance(caught, ComposerError) else caught
        if error.code == "base_not_here":
            return error
        if error.code in RETRYABLE:
            raise
        failure = shown_row(held, error)
        why = f"{failure['detail']} {failure['next']}".strip()
        with held.resources.write() as session:
            failed: StoredResult = {**wanted.row(), "scores": [], "error": why, "failure": failure}
            evaluations.add_result(session, held.job_id, failed)
        return None
    results_sha256, examples = _stored(held, wanted, scores, by_example), _evidence(held, wanted, suite)
    with held.resources.write() as session:
        made: StoredResult = {**wanted.row(), "scores": scores, "error": None, "results_sha256": results_sha256}
        evaluations.add_result(session, held.job_id, made)
        _record(held, session, wanted, [Measurement.of(score, results_sha256) for score in scores], examples)
    promotions.settle_on_base(held.resources, wanted.base)
    return None


def _evidence(held: JobRun, wanted: WantedScore, suite: SuiteContent) -> list[Row]:
    """The evidence for the check of servers, of an adapter on its own base; empty if the suite does not allow it."""
    if wanted.release is None or not isinstance(suite, Suite) or not suite.evidence:
        return []
    with held.resources.read() as session:
        release = session.get_one(Release, wanted.release)
        if release.base_digest != wanted.base or Kind(release.repository.kind) is not Kind.ADAPTER:
            return []
    return token_evidence(held, _examined(held, wanted), suite)


def _record(
    held: JobRun, session: Session, wanted: WantedScore, measurements: list[Measurement], examples: list[Row]
) -> None:
    """Records the scores of a base, or of a release on its own base with its evidence, with the requester's current
    roles. Raises NotAllowed if a required role was revoked."""
    actor = evaluations.requester(session, held.job_id, held.resources.clock())
    suite = suites.find(session, wanted.suite)
    if wanted.release is None:  # a worker's measurement of a base counts as its owner's
        owner = replace(actor, grants={EVERYWHERE: Role.ADMIN.value})
        base = session.get_one(Base, wanted.base)
        made = attested_scores(session, held.resources.settings, actor, About(base, suite), measurements)
        suites.record(session, owner, base, measurements, made)
        return
    release = session.get_one(Release, wanted.release)
    if release.base_digest == wanted.base:  # otherwise it belongs to an upgrade, whose scores are only reported
        _refuse_without_role(actor, release.repository.namespace)
        made = attested_scores(session, held.resources.settings, actor, About(release, suite), measurements)
        suites.record(session, actor, release, measurements, made)
        if examples:
            stated = (EVIDENCE, {"examples": examples})
            attested(session, held.resources.settings, actor, About(release, suite), stated)


def _refuse_failed(held: JobRun) -> None:
    """Raises the error of the first release and suite that could not be measured."""
    with held.resources.read() as session:
        row = evaluations.find(session, held.job_id)
        failed = [(result, result["failure"]) for result in row.results if "failure" in result]
        if not failed:
            return
        (first, failure), count = failed[0], len(row.wanted)
        release = None if first["release"] is None else session.get_one(Release, first["release"])
        subject = session.get_one(Base, first["base"]).name if release is None else full_name(release)
        suite = suites.find(session, first["suite"]).name
    error = of_row(failure)
    error.detail = f"{subject} on {suite}: {error.detail}"
    if count > 1:
        error.detail += f" {len(failed)} of {count} could not be measured; the scores of the others are recorded."
    raise error


KIND = JobKind(steps={"measure": measure})


def _measured(
    held: JobRun, wanted: WantedScore, suite: SuiteContent, progress: ProgressCount
) -> tuple[list[StoredScore], ExampleResults]:
    """Returns the scores and the per-example results, if there are any."""
    from composer.evaluation.evaluate import scores

    examined = _examined(held, wanted)
    serves = set_of(held, wanted.release)
    if isinstance(suite, HarnessTask):
        if serves:
            message = f"{suite.name} runs on one model, and a set has several adapters."
            raise NotSupported("set_on_harness", message, subject=suite.name)
        made = run_harness(held, examined, suite, progress)
        return cast("list[StoredScore]", made["scores"]), ExampleResults(made["examples"], made["metric"])
    asked = phrased(_phrase(held, wanted, suite), suite.examples)
    if serves:
        router, members = serves

        def measured(name: str, some: Sequence[Example]) -> "list[Result]":
            return examine(held, replace(examined, files=members.get(name, ())), suite, some, progress)

        examples = routed(router, asked, measured)
    else:
        examples = examine(held, examined, suite, asked, progress)
    rows = [score.to_json() for score in scores(suite, examples)]
    return cast("list[StoredScore]", rows), ExampleResults([example.to_json() for example in examples])


def _phrase(held: JobRun, wanted: WantedScore, suite: Suite) -> str:
    """The phrase that selects the suite's task, as the release states it; empty without one."""
    if wanted.release is None:
        return ""
    with held.resources.read() as session:
        return session.get_one(Release, wanted.release).provenance.get("phrases", {}).get(suite.name, "")


def _examined(held: JobRun, wanted: WantedScore) -> Examined:
    with held.resources.read() as session:
        base = session.get_one(Base, wanted.base)
        hints = base_hints(bases.locations(session, base)[wanted.base], base.size_bytes)
        release = None if wanted.release is None else session.get_one(Release, wanted.release)
        model = release is not None and Kind(release.repository.kind) is Kind.MODEL
        files = [] if release is None else publishing.manifest_files(session, release)
    return Examined(base=wanted.base, hints=hints, files=files, model=model)


def _stored(held: JobRun, wanted: WantedScore, scores: list[StoredScore], by_example: ExampleResults) -> str | None:
    """Stores the per-example results and returns their digest; None if there are none or the scores are only
    reported."""
    if not by_example.examples:
        return None
    namespace = EVERYWHERE
    with held.resources.read() as session:
        actor = evaluations.requester(session, held.job_id, held.resources.clock())
        if wanted.release is not None:
            release = session.get_one(Release, wanted.release)
            namespace = release.repository.namespace
            if release.base_digest != wanted.base:
                return None  # part of an upgrade, whose scores are only reported
    measured = results.store(
        held.resources,
        actor,
        namespace,
        [Measurement.of(score) for score in scores],
        {wanted.suite: by_example},
    )
    return measured[0].results_sha256


def _refuse_without_role(actor: Actor, namespace: str) -> None:
    if not holds(actor, Role.PUBLISHER, namespace):
        raise NotAllowed(
            "role_lost",
            f"{actor.name} requested this evaluation with a token that no longer has the role {Role.PUBLISHER} in "
            f"{namespace}.",
            subject=namespace,
            next_step="Request it again with a token that has the role.",
        )
