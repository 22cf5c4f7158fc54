"""Jobs, health and metrics."""

from functools import partial
from typing import cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from registry.api.http.events import EVENTS, LastEventId, stream
from registry.api.http.metrics import Metrics
from registry.api.http.pagination import Cursor, Limit, decode_number, page
from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.routes import Route
from registry.api.http.rules import Caller, Contributor, Member
from registry.api.http.threads import in_store_threads
from registry.api.routes.views import job_documents, job_page, job_view
from registry.database.engine import Session
from registry.database.migrate import ensure_schema
from registry.database.tables import Job
from registry.domain.access.audit import Actor
from registry.domain.compositions import compositions
from registry.domain.jobs import queue
from registry.errors import Unavailable
from registry.formats.references import ABSENT
from registry.wire.document import Page
from registry.wire.work import JobOut, PriorityIn

router = APIRouter(tags=["operations"], route_class=Route)

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/v1/jobs")
def list_jobs(resources: ResourcesOf, actor: Contributor, limit: Limit = 50, cursor: Cursor = None) -> Page[JobOut]:
    """List jobs, newest first, in namespaces where the caller is a publisher and whose inputs the caller may read."""
    with resources.read() as session:
        rows = compositions.list_jobs(session, actor, before=decode_number(cursor), limit=limit + 1)
        return page(job_page(session, rows), limit, [row.id for row in rows])


@router.get("/v1/jobs/{job_id}")
def show_job(job_id: RowId, resources: ResourcesOf, actor: Caller) -> JobOut:
    with resources.read() as session:
        return job_view(session, _job(session, actor, job_id))


@router.get("/v1/jobs/{job_id}/events", response_class=StreamingResponse, responses=EVENTS)
async def follow_job(
    job_id: RowId, resources: ResourcesOf, actor: Caller, request: Request, last_event_id: LastEventId = None
) -> Response:
    """Server-sent events: the job on every change until it ends, after the one of `Last-Event-ID`, and a comment after
    25 seconds without changes. 204 if that was the last."""
    look = partial(show_job, job_id, resources)
    return await stream(request, actor, look, job_documents, job_id, last_event_id)


@router.post("/v1/jobs/{job_id}/cancel")
def cancel_job(job_id: RowId, resources: ResourcesOf, actor: Caller) -> JobOut:
    with resources.write() as session:
        job = compositions.cancel_job(session, actor, _job(session, actor, job_id))
        return job_view(session, job)


@router.post("/v1/jobs/{job_id}/priority")
def set_priority(job_id: RowId, body: PriorityIn, resources: ResourcesOf, actor: Caller) -> JobOut:
    """Give an unfinished job another priority. Callers who may cancel it may lower it; `high` needs the role releaser
    in its namespace, or in the registry if it has none.
    """
    with resources.write() as session:
        job = _job(session, actor, job_id)
        compositions.permit_change(session, actor, job)
        return job_view(session, queue.set_priority(session, actor, job.id, body.priority))


def _job(session: Session, actor: Actor, job_id: int) -> Job:
    """The job, if the caller may see it."""
    job = queue.find(session, job_id)
    compositions.permit_job(session, actor, job)
    return job


@router.get("/healthz")
async def alive() -> dict[str, str]:
    """Liveness. Asynchronous: all threads may be waiting for a hanging database, which a restart would not fix."""
    return {"status": "ok"}


@router.get("/readyz")
@in_store_threads
def ready(request: Request, resources: ResourcesOf) -> dict[str, str]:
    """Readiness: 503 while the database or the store is unavailable, this version does not work with the schema,
    or the server is about to stop."""
    if request.app.state.draining:
        raise Unavailable("stopping", "This server is about to stop.")
    ensure_schema(resources.database, create=False, newer=True)
    resources.store.stat(ABSENT)
    return {"status": "ok"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request, actor: Member) -> Response:
    """Requests by route, and the queue of jobs, in the text format of Prometheus; of a worker, its jobs and steps."""
    return Response(cast(Metrics, request.app.state.metrics).rendered(), media_type=METRICS_TYPE)
