"""Suites and scores, and evaluations by a worker on request."""

from typing import Any

from fastapi import APIRouter, Response

from composer.formats.recipes.elsewhere import parse_content
from registry.api.http.pagination import Cursor, Limit, decode_number, page
from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.routes import Route
from registry.api.http.rules import Caller, Contributor, Member, Publisher, Reader
from registry.api.http.threads import in_store_threads
from registry.api.routes.repository import RepositoryOf, RepositoryRouter
from registry.api.routes.views import score_view, suite_page, suite_view
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, refuse_other_owner
from registry.domain.catalog import bases, suite_registration, suites
from registry.domain.catalog.suites import Measurement
from registry.domain.jobs.queue import Wish
from registry.formats.references import parse_version
from registry.transfer import evaluations
from registry.transfer.promotions import settle_on_base
from registry.transfer.resources import Resources
from registry.wire.document import Page
from registry.wire.quality import (
    ScoreOut,
    ScoresImported,
    ScoresIn,
    ScoresOut,
    SuiteOut,
    SuiteResultsOut,
    SuiteSharedIn,
)
from registry.wire.work import EvaluationIn, EvaluationOut

router = APIRouter(prefix="/v1", tags=["quality"], route_class=Route)
evaluations_router = APIRouter(prefix="/v1/evaluations", tags=["quality"], route_class=Route)
repository_routes = RepositoryRouter(tags=["quality"], route_class=Route)


@router.post("/suites", status_code=201, responses={200: {"model": SuiteOut}})
def add_suite(body: dict[str, Any], resources: ResourcesOf, actor: Contributor, response: Response) -> SuiteOut:
    """Add a suite with its examples, as in a suite file, or a task of a harness, which has none. Its author corrects
    `metrics` by adding it again.

    201 for new content; 200 for known content, which becomes current again if it was an older version.
    """
    content = parse_content(body)
    with resources.write() as session:
        suite, created = suite_registration.add(session, actor, content)
        response.status_code = 201 if created else 200
        [view] = suite_page(session, [suite])
        return view


@router.get("/suites")
def list_suites(resources: ResourcesOf, actor: Member, limit: Limit = 50, cursor: Cursor = None) -> Page[SuiteOut]:
    with resources.read() as session:
        rows = suites.list_page(session, actor, after=decode_number(cursor), limit=limit + 1)
        return page(suite_page(session, rows), limit, [row.id for row in rows])


@router.get("/suites/{suite:path}")
def show_suite(suite: str, resources: ResourcesOf, actor: Member) -> SuiteOut:
    """Show a suite with its examples, by name (the current content) or digest. A suite of a namespace is for those who
    may read there, unless it is shared."""
    with resources.read() as session:
        return suite_view(session, suites.find_readable(session, suite, actor))


@router.put("/suites/{suite:path}/shared")
def share_suite(suite: str, body: SuiteSharedIn, resources: ResourcesOf, actor: Contributor) -> SuiteOut:
    """Let every member of the registry read a namespace's suite, or only those who may read there. Only for its author
    and admins of the namespace."""
    with resources.write() as session:
        [view] = suite_page(session, [suite_registration.share(session, actor, suite, shared=body.shared)])
        return view


@repository_routes.post("/{namespace}/{name}/releases/{version}/scores")
@in_store_threads
def record_release(
    named: RepositoryOf, version: str, body: ScoresIn, resources: ResourcesOf, actor: Publisher
) -> ScoresOut:
    """Record scores and, for comparisons example by example, the results that they are made of."""
    with resources.read() as session:
        named.release(session, version)
    measurements = _measurements(resources, actor, named.name.namespace, body)
    with resources.write() as session:
        release = named.release(session, version)
        rows, digest = suites.record(session, actor, release, measurements), release.base_digest
        answer = ScoresOut(scores=[score_view(row, release.provenance.get("phrases")) for row in rows])
    settle_on_base(resources, digest)
    return answer


@repository_routes.post("/{namespace}/{name}/releases/{version}/scores/import")
@in_store_threads
def import_scores(named: RepositoryOf, version: str, resources: ResourcesOf, actor: Publisher) -> ScoresImported:
    """Record the scores that the release's README.md (`model-index`) and `.eval_results/*.yaml` report, as publishing
    it does. They are `reported`, and never replace measured ones."""
    from registry.transfer import publishing

    ids, doubts = publishing.import_scores(resources, actor, (named.name, parse_version(version), named.kind))
    with resources.read() as session:
        scores = [score_view(row) for row in suites.with_ids(session, ids)]
    return ScoresImported(scores=scores, warnings=[finding.to_json() for finding in doubts])


@repository_routes.get("/{namespace}/{name}/releases/{version}/scores")
def release_scores(named: RepositoryOf, version: str, resources: ResourcesOf, actor: Reader) -> ScoresOut:
    with resources.read() as session:
        release = named.release(session, version)
        phrases = release.provenance.get("phrases")
        return ScoresOut(scores=[score_view(row, phrases) for row in suites.scores_of(session, release)])


@repository_routes.get(
    "/{namespace}/{name}/releases/{version}/scores/{suite:path}/results", response_model=SuiteResultsOut
)
@in_store_threads
def release_results(named: RepositoryOf, version: str, suite: str, resources: ResourcesOf, actor: Reader) -> Response:
    """The result of each example on a suite, in its order. `suite` is a name, `NAME@VERSION` or digest."""
    with resources.read() as session:
        sha256 = suites.results_of(session, named.release(session, version), suite, actor)
    return _document(resources, sha256)


@repository_routes.delete("/{namespace}/{name}/releases/{version}/scores/{suite:path}/{metric}")
def delete_release_score(
    named: RepositoryOf, version: str, suite: str, metric: str, resources: ResourcesOf, actor: Publisher
) -> ScoreOut:
    """Delete a score and return it. Only for its recorder and admins of the namespace. `suite` is a name or digest."""
    with resources.write() as session:
        return score_view(suites.delete(session, actor, named.release(session, version), suite, metric))


@router.post("/bases/{base:path}/scores")
@in_store_threads
def record_base(base: str, body: ScoresIn, resources: ResourcesOf, actor: Contributor) -> ScoresOut:
    """Record scores and, for comparisons example by example, the results that they are made of."""
    with resources.read() as session:
        refuse_other_owner(actor, f"base {base}", bases.find(session, base).created_by)
    measurements = _measurements(resources, actor, EVERYWHERE, body)
    with resources.write() as session:
        subject = bases.find(session, base)
        rows, digest = suites.record(session, actor, subject, measurements), subject.digest
        answer = ScoresOut(scores=[score_view(row) for row in rows])
    settle_on_base(resources, digest)
    return answer


@router.get("/bases/{base:path}/scores/{suite:path}/results", response_model=SuiteResultsOut)
@in_store_threads
def base_results(base: str, suite: str, resources: ResourcesOf, actor: Member) -> Response:
    """The result of each example on a suite, in its order. `suite` is a name, `NAME@VERSION` or digest."""
    with resources.read() as session:
        sha256 = suites.results_of(session, bases.find(session, base), suite, actor)
    return _document(resources, sha256)


@router.get("/bases/{base:path}/scores")
def base_scores(base: str, resources: ResourcesOf, actor: Member) -> ScoresOut:
    with resources.read() as session:
        return ScoresOut(scores=[score_view(row) for row in suites.scores_of(session, bases.find(session, base))])


@router.delete("/bases/{base:path}/scores/{suite:path}/{metric}")
def delete_base_score(base: str, suite: str, metric: str, resources: ResourcesOf, actor: Contributor) -> ScoreOut:
    """Delete a score and return it. Only for its recorder and registry admins. `suite` is a name or digest."""
    with resources.write() as session:
        return score_view(suites.delete(session, actor, bases.find(session, base), suite, metric))


def _document(resources: Resources, sha256: str) -> Response:
    from registry.transfer import results

    return Response(results.load(resources, sha256), media_type="application/json")


def _measurements(resources: Resources, actor: Actor, namespace: str, body: ScoresIn) -> list[Measurement]:
    """The measurements, with their stored results."""
    from registry.transfer import results

    measured = [Measurement(**row.model_dump()) for row in body.scores]
    rows = {
        result.suite_digest: results.ExampleResults(
            [row.model_dump(exclude_defaults=True) for row in result.examples], result.metric
        )
        for result in body.results
    }
    return results.store(resources, actor, namespace, measured, rows) if rows else measured


@evaluations_router.post("", status_code=202)
def request_evaluation(body: EvaluationIn, resources: ResourcesOf, actor: Caller) -> EvaluationOut:
    """Queue the evaluation of releases and bases on suites as one job, which loads each base once. Needs the role
    publisher in each release's namespace, and each base to be the caller's own, as recording the scores does."""
    wish = Wish(priority=body.priority, memory_bytes=body.memory_bytes)
    document = evaluations.request(resources, actor, body.releases, body.bases, body.suites, wish)
    return EvaluationOut.model_validate(document)


@evaluations_router.get("/{job_id}")
def show_evaluation(job_id: RowId, resources: ResourcesOf, actor: Caller) -> EvaluationOut:
    """Show an evaluation, as far as it is done. Only for its requester and registry admins. It is
    cancelled by its job."""
    with resources.read() as session:
        return EvaluationOut.model_validate(evaluations.report(session, actor, job_id))
