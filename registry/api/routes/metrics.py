"""Metrics for Prometheus, for everyone with a role: they tell nothing of a namespace or a repository."""

from typing import cast

from fastapi import APIRouter, Request, Response

from registry.api.http.metrics import Metrics
from registry.api.http.routes import Route
from registry.api.http.rules import Member

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
router = APIRouter(tags=["operations"], route_class=Route)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request, actor: Member) -> Response:
    """Requests by route, and the queue of jobs, in the text format of Prometheus; of a worker, its jobs and steps."""
    return Response(cast(Metrics, request.app.state.metrics).rendered(), media_type=CONTENT_TYPE)
