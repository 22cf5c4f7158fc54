"""/v1/evaluations: by a worker, on request."""

from fastapi import APIRouter

from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.routes import Route
from registry.api.http.rules import Caller
from registry.domain.jobs.queue import Wish
from registry.transfer import evaluations
from registry.wire.work import EvaluationIn, EvaluationOut

router = APIRouter(prefix="/v1/evaluations", tags=["quality"], route_class=Route)


@router.post("", status_code=202)
def request(body: EvaluationIn, resources: ResourcesOf, actor: Caller) -> EvaluationOut:
    """Queue the evaluation of releases and bases on suites as one job, which loads each base once. Needs the role
    publisher in each release's namespace, and each base to be the caller's own, as recording the scores does."""
    wish = Wish(priority=body.priority, memory_bytes=body.memory_bytes)
    document = evaluations.request(
        resources,
        actor,
        body.releases,
        body.bases,
        body.suites,
        wish,
    )
    return EvaluationOut.model_validate(document)


@router.get("/{job_id}")
def show(job_id: RowId, resources: ResourcesOf, actor: Caller) -> EvaluationOut:
    """Show an evaluation, as far as it is done. Only for its requester and registry admins. It is
    cancelled by its job."""
    with resources.read() as session:
        return EvaluationOut.model_validate(evaluations.report(session, actor, job_id))
