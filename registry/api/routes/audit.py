"""The audit log: its rows, exports, and the hash chain that shows tampering."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse

from registry.api.http.pagination import Cursor, Limit, decode_number, page
from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import AdminSomewhere, RegistryAdmin
from registry.api.routes.queries import EventFilters
from registry.api.routes.views import audit_view, sealed_view
from registry.database.engine import Session
from registry.domain.access import audit, audit_chain
from registry.domain.access.audit import EventQuery
from registry.transfer.resources import Resources
from registry.transfer.sealing import seal_all
from registry.wire.document import Page
from registry.wire.work import AuditOut, CheckpointOut

router = APIRouter(prefix="/v1", tags=["operations"], route_class=Route)

_EXPORT_ROWS = 1000
_LINES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/jsonl": {}}}}


def event_query(actor: AdminSomewhere, filters: Annotated[EventFilters, Query()]) -> EventQuery:
    return filters.query(actor)


@router.get("/audit")
def events(
    resources: ResourcesOf,
    wanted: Annotated[EventQuery, Depends(event_query)],
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[AuditOut]:
    """List the audit log, newest first."""
    with resources.read() as session:
        rows = audit.list_newest_first(session, wanted, before=decode_number(cursor), limit=limit + 1)
        return page([audit_view(row) for row in rows], limit, [row.id for row in rows])


@router.get("/audit.jsonl", response_class=StreamingResponse, responses=_LINES)
def export(resources: ResourcesOf, wanted: Annotated[EventQuery, Depends(event_query)]) -> StreamingResponse:
    """Export all matching rows, oldest first, one line of JSON each."""

    def batch(session: Session, after: int) -> tuple[str, int]:
        rows = audit.list_oldest_first(session, wanted, after=after, limit=_EXPORT_ROWS)
        return "".join(f"{audit_view(row).model_dump_json()}\n" for row in rows), rows[-1].id if rows else after

    return _streamed(resources, batch, 0)


@router.get("/audit/chain", response_class=StreamingResponse, responses=_LINES)
def chain_of_rows(
    resources: ResourcesOf, actor: RegistryAdmin, after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0
) -> StreamingResponse:
    """Export the hash chain from the seal after the number `after` on, one line of JSON each."""

    def batch(session: Session, after: int) -> tuple[str, int]:
        rows = audit_chain.sealed_rows(session, after=after, limit=_EXPORT_ROWS)
        lines = "".join(f"{sealed_view(seal, row).model_dump_json()}\n" for seal, row in rows)
        return lines, rows[-1][0].number if rows else after

    return _streamed(resources, batch, after)


@router.post("/audit/checkpoint")
def checkpoint(resources: ResourcesOf, actor: RegistryAdmin) -> CheckpointOut:
    """Seal all rows, and return the digest of the audit log. Kept elsewhere, it shows later what was changed."""
    seal_all(resources)
    with resources.read() as session:
        taken = audit_chain.checkpoint(session, actor.at.isoformat(timespec="seconds"))
    return CheckpointOut(number=taken.number, digest=taken.digest, at=actor.at)


def _streamed(resources: Resources, batch: Callable[[Session, int], tuple[str, int]], after: int) -> StreamingResponse:
    lines = _lines(resources, batch, after)
    first = next(lines, "")  # before the response starts, while an error can still be reported
    return StreamingResponse(chain([first], lines), media_type="application/jsonl")


def _lines(resources: Resources, batch: Callable[[Session, int], tuple[str, int]], after: int) -> Iterator[str]:
    """Reads each batch in its own transaction: an export of millions of rows must not hold one open."""
    while True:
        with resources.read() as session:
            text, after = batch(session, after)
        if not text:
            return
        yield text
