"""/v1/bases, and /v1/upgrades from one base to another."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from registry.api.http.pagination import Cursor, Limit, decode_cursor, page
from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.routes import Route
from registry.api.http.rules import Caller, Contributor, Member
from registry.api.routes.views import base_page, base_view
from registry.domain.catalog import bases
from registry.domain.catalog.bases import NewBase, TensorRow
from registry.formats.references import parse_digest
from registry.transfer import upgrades
from registry.wire.catalog import BaseIn, BaseOut, DeprecateIn
from registry.wire.document import Page
from registry.wire.work import UpgradeIn, UpgradeOut

router = APIRouter(prefix="/v1/bases", tags=["bases"], route_class=Route)

upgrade_router = APIRouter(prefix="/v1/upgrades", tags=["bases"], route_class=Route)


@router.post("", status_code=201, responses={200: {"model": BaseOut}})
def register(body: BaseIn, resources: ResourcesOf, actor: Contributor, response: Response) -> BaseOut:
    """201 for a new base; 200 for a known one, to which the aliases and locations are added."""
    rows = [TensorRow(row.name, row.dtype, tuple(row.shape), parse_digest(row.sha256)) for row in body.tensors]
    stated = body.model_dump(exclude={"tensors", "weights_digest"})
    new = NewBase(**stated, tensors=rows, weights_digest=parse_digest(body.weights_digest))
    with resources.write() as session:
        base, created = bases.register(session, actor, new)
        response.status_code = 201 if created else 200
        return base_view(session, base)


@router.delete("/aliases/{alias:path}")
def remove_alias(alias: str, resources: ResourcesOf, actor: Contributor) -> BaseOut:
    """Remove an alias and return the base. Only for the base's creator and registry admins."""
    with resources.write() as session:
        return base_view(session, bases.remove_alias(session, actor, alias))


@router.post("/{base:path}/deprecate")
def deprecate(base: str, body: DeprecateIn, resources: ResourcesOf, actor: Contributor) -> BaseOut:
    """Deprecate a base, or undo that with a null reason. Only for the base's creator and registry admins."""
    with resources.write() as session:
        row = bases.find(session, base)
        return base_view(session, bases.deprecate(session, actor, row, body.reason, body.successor))


@router.get("")
def list_bases(resources: ResourcesOf, actor: Member, limit: Limit = 50, cursor: Cursor = None) -> Page[BaseOut]:
    with resources.read() as session:
        rows = bases.list_page(session, after=decode_cursor(cursor), limit=limit + 1)
        return page(base_page(session, rows), limit, [row.name for row in rows])


# The last one: its path matches everything below /v1/bases.
@router.get("/{base:path}")
def show(
    base: str,
    resources: ResourcesOf,
    actor: Member,
    tensors: Annotated[bool, Query(description="Include the tensor table.")] = False,
) -> BaseOut:
    """Show a base by digest, name or alias."""
    with resources.read() as session:
        return base_view(session, bases.find(session, base), tensors=tensors)


@upgrade_router.post("", status_code=202, responses={200: {"model": UpgradeOut}})
def begin_upgrade(body: UpgradeIn, resources: ResourcesOf, actor: Contributor, response: Response) -> UpgradeOut:
    """List the adapters on one base, and which of them fit another. 202 if a job measures those that fit and that the
    caller may record scores of; their scores on the new base are only in the report."""
    document = upgrades.begin(resources, actor, body.old, body.new, body.suites, evaluate=body.evaluate)
    response.status_code = 200 if document["job"] is None else 202
    return UpgradeOut.model_validate(document)


@upgrade_router.get("/{job_id}")
def show_upgrade(job_id: RowId, resources: ResourcesOf, actor: Caller) -> UpgradeOut:
    """Show an upgrade, as far as it is done. Only for the caller who began it and registry admins."""
    with resources.read() as session:
        return UpgradeOut.model_validate(upgrades.report(session, actor, job_id))
