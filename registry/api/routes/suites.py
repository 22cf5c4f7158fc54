"""Suites and scores."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response

from composer.formats.recipes.suite import Suite as SuiteContent
from registry.api.http.pagination import Cursor, Limit, decode_number, page
from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import Contributor, Member, Publisher, Reader
from registry.api.routes.repository import RepositoryOf, RepositoryRouter
from registry.api.routes.views import score_view, suite_page, suite_view
from registry.api.schemas.quality import ScoreIn, ScoreOut, ScoresIn, ScoresOut, SuiteOut
from registry.api.schemas.wire import Page
from registry.domain.catalog import bases, releases, suites
from registry.domain.catalog.suites import Measurement
from registry.formats.references import parse_version
from registry.transfer.promotions import settle_on_base

router = APIRouter(prefix="/v1", tags=["quality"], route_class=Route)
repository_routes = RepositoryRouter(tags=["quality"], route_class=Route)


@router.post("/suites", status_code=201, responses={200: {"model": SuiteOut}})
def add_suite(body: dict[str, Any], resources: ResourcesOf, actor: Contributor, response: Response) -> SuiteOut:
    """Add a suite with its examples, as in a suite file. Its author corrects `metrics` by adding it again.

    201 for new content; 200 for known content, which becomes current again if it was an older version.
    """
    content = SuiteContent.from_json(body)
    with resources.write() as session:
        suite, created = suites.add(session, actor, content)
        response.status_code = 201 if created else 200
        [view] = suite_page(session, [suite])
        return view


@router.get("/suites")
def list_suites(resources: ResourcesOf, actor: Member, limit: Limit = 50, cursor: Cursor = None) -> Page[SuiteOut]:
    with resources.read() as session:
        rows = suites.list_page(session, after=decode_number(cursor), limit=limit + 1)
        return page(suite_page(session, rows), limit, [row.id for row in rows])


@router.get("/suites/{suite}")
def show_suite(suite: str, resources: ResourcesOf, actor: Member) -> SuiteOut:
    """Show a suite with its examples, by name (the current content) or digest."""
    with resources.read() as session:
        return suite_view(session, suites.find(session, suite))


@repository_routes.post("/{namespace}/{name}/releases/{version}/scores")
def record_release(
    named: RepositoryOf, version: str, body: ScoresIn, resources: ResourcesOf, actor: Publisher
) -> ScoresOut:
    with resources.write() as session:
        release = releases.find(session, named.name, parse_version(version), named.kind)
        rows, digest = suites.record(session, actor, release, _measurements(body.scores)), release.base_digest
        answer = ScoresOut(scores=[score_view(row) for row in rows])
    settle_on_base(resources, digest)
    return answer


@repository_routes.get("/{namespace}/{name}/releases/{version}/scores")
def release_scores(named: RepositoryOf, version: str, resources: ResourcesOf, actor: Reader) -> ScoresOut:
    with resources.read() as session:
        release = releases.find(session, named.name, parse_version(version), named.kind)
        return ScoresOut(scores=[score_view(row) for row in suites.scores_of(session, release)])


@repository_routes.delete("/{namespace}/{name}/releases/{version}/scores/{suite}/{metric}")
def delete_release_score(
    named: RepositoryOf, version: str, suite: str, metric: str, resources: ResourcesOf, actor: Publisher
) -> ScoreOut:
    """Delete a score and return it. Only for its recorder and admins of the namespace. `suite` is a name or digest."""
    with resources.write() as session:
        release = releases.find(session, named.name, parse_version(version), named.kind)
        return score_view(suites.delete(session, actor, release, suite, metric))


@router.post("/bases/{base:path}/scores")
def record_base(base: str, body: ScoresIn, resources: ResourcesOf, actor: Contributor) -> ScoresOut:
    with resources.write() as session:
        subject = bases.find(session, base)
        rows, digest = suites.record(session, actor, subject, _measurements(body.scores)), subject.digest
        answer = ScoresOut(scores=[score_view(row) for row in rows])
    settle_on_base(resources, digest)
    return answer


@router.get("/bases/{base:path}/scores")
def base_scores(base: str, resources: ResourcesOf, actor: Member) -> ScoresOut:
    with resources.read() as session:
        return ScoresOut(scores=[score_view(row) for row in suites.scores_of(session, bases.find(session, base))])


@router.delete("/bases/{base:path}/scores/{suite}/{metric}")
def delete_base_score(base: str, suite: str, metric: str, resources: ResourcesOf, actor: Contributor) -> ScoreOut:
    """Delete a score and return it. Only for its recorder and registry admins. `suite` is a name or digest."""
    with resources.write() as session:
        return score_view(suites.delete(session, actor, bases.find(session, base), suite, metric))


def _measurements(rows: Sequence[ScoreIn]) -> list[Measurement]:
    return [
        Measurement(
            suite_digest=row.suite_digest,
            metric=row.metric,
            value=row.value,
            stderr=row.stderr,
            n=row.n,
            higher_is_better=row.higher_is_better,
            reported=row.reported,
        )
        for row in rows
    ]
