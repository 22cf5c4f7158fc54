"""Jobs, the event log and health."""

from typing import Annotated

from fastapi import APIRouter, Query

from registry import audit, compositions, jobs
from registry.access import Role, permit
from registry.http.pages import Cursor, Limit, decode_number, page
from registry.http.request import ActorOf, ResourcesOf, RowId
from registry.schemas import Page
from registry.schemas.work import AuditOut, JobOut
from registry.web.views import audit_view, job_view

router = APIRouter(tags=["operations"])


@router.get("/v1/jobs")
def list_jobs(resources: ResourcesOf, actor: ActorOf, limit: Limit = 50, cursor: Cursor = None) -> Page[JobOut]:
    """The newest first."""
    permit(actor, Role.READER)
    with resources.read() as session:
        rows = jobs.list_page(session, before=decode_number(cursor), limit=limit + 1)
        return page([job_view(row) for row in rows], limit, [row.id for row in rows])


@router.get("/v1/jobs/{job_id}")
def show_job(job_id: RowId, resources: ResourcesOf, actor: ActorOf) -> JobOut:
    permit(actor, Role.READER)
    with resources.read() as session:
        return job_view(jobs.find(session, job_id))


@router.post("/v1/jobs/{job_id}/cancel")
def cancel_job(job_id: RowId, resources: ResourcesOf, actor: ActorOf) -> JobOut:
    permit(actor, Role.PUBLISHER)
    with resources.write() as session:
        _, job = compositions.cancel(session, actor, compositions.of_job(session, job_id).id)
        return job_view(job)


@router.get("/v1/audit")
def events(
    resources: ResourcesOf,
    actor: ActorOf,
    limit: Limit = 50,
    cursor: Cursor = None,
    subject: Annotated[str | None, Query(max_length=300)] = None,
) -> Page[AuditOut]:
    """What was done, in the order in which it was done."""
    permit(actor, Role.ADMIN)
    with resources.read() as session:
        rows = audit.events(session, after=decode_number(cursor), limit=limit + 1, subject=subject)
        return page([audit_view(row) for row in rows], limit, [row.id for row in rows])


@router.get("/healthz")
def alive() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
def ready(resources: ResourcesOf) -> dict[str, str]:
    """503 while the database is away."""
    resources.database.ping()
    return {"status": "ok"}
