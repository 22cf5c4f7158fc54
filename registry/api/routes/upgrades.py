"""/v1/upgrades: from one base to another."""

from fastapi import APIRouter, Response

from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.routes import Route
from registry.api.http.rules import Caller, Contributor
from registry.transfer import upgrades
from registry.wire.work import UpgradeIn, UpgradeOut

router = APIRouter(prefix="/v1/upgrades", tags=["bases"], route_class=Route)


@router.post("", status_code=202, responses={200: {"model": UpgradeOut}})
def begin(body: UpgradeIn, resources: ResourcesOf, actor: Contributor, response: Response) -> UpgradeOut:
    """List the adapters on one base, and which of them fit another. 202 if a job measures those that fit and that the
    caller may record scores of; their scores on the new base are only in the report."""
    document = upgrades.begin(resources, actor, body.old, body.new, body.suites, evaluate=body.evaluate)
    response.status_code = 200 if document["job"] is None else 202
    return UpgradeOut.model_validate(document)


@router.get("/{job_id}")
def show(job_id: RowId, resources: ResourcesOf, actor: Caller) -> UpgradeOut:
    """Show an upgrade, as far as it is done. Only for the caller who began it and registry admins."""
    with resources.read() as session:
        return UpgradeOut.model_validate(upgrades.report(session, actor, job_id))
