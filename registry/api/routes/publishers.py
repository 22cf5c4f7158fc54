"""Trusted publishers of a repository, which need not exist yet."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response

from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import Admin, CallersOf
from registry.database.tables import TrustedPublisher
from registry.domain.access import publishers
from registry.domain.access.publishers import NewPublisher
from registry.formats.references import RepositoryName, parse_name
from registry.transfer.resources import Resources
from registry.transfer.token_exchange import parse_publisher
from registry.wire.access import PublisherIn, PublisherOut
from registry.wire.document import Page

router = APIRouter(prefix="/v1", tags=["access"], route_class=Route)

PUBLISHERS = "/publishers/{namespace}/{name}"


async def named_in_path(namespace: str, name: str) -> RepositoryName:
    return RepositoryName(parse_name(namespace, "namespace"), parse_name(name, "repository name"))


Named = Annotated[RepositoryName, Depends(named_in_path)]


@router.get(PUBLISHERS)
def list_publishers(named: Named, resources: ResourcesOf, actor: Admin) -> Page[PublisherOut]:
    with resources.read() as session:
        items = [_publisher_view(resources, row) for row in publishers.list_of(session, named)]
    return Page[PublisherOut](items=items, next=None)


@router.post(PUBLISHERS, status_code=201, responses={200: {"model": PublisherOut}})
def add_publisher(
    named: Named, body: PublisherIn, resources: ResourcesOf, actor: Admin, response: Response
) -> PublisherOut:
    """Let jobs of a project publish in the repository. 200 if the same rule exists already."""
    given = NewPublisher(body.issuer, body.project, body.project_id, body.ref, body.environment, body.workflow)
    new = parse_publisher(resources.settings, given)
    with resources.write() as session:
        row, added = publishers.add(session, actor, named, new)
        view = _publisher_view(resources, row)
    response.status_code = 201 if added else 200
    return view


@router.delete(PUBLISHERS + "/{publisher_id}")
def remove_publisher(
    named: Named,
    publisher_id: Annotated[str, Path(max_length=64)],
    resources: ResourcesOf,
    actor: Admin,
    callers: CallersOf,
) -> PublisherOut:
    """Remove a trusted publisher. The tokens that its jobs hold end too."""
    with resources.write() as session:
        view = _publisher_view(resources, publishers.remove(session, actor, named, publisher_id))
    callers.forget()
    return view


def _publisher_view(resources: Resources, row: TrustedPublisher) -> PublisherOut:
    exchanges = bool(resources.settings.oidc_audience)
    return PublisherOut.of(row, repository=f"{row.namespace}/{row.repository}", exchanges=exchanges)
