"""The upload endpoint for clients with `hf_xet`, which use it for every large file from version 1.20 on.

Their other requests (chunks that others have sent, newer forms of these calls, telemetry) are answered with 404.
"""

from collections.abc import Iterator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from registry.api.http.request import ResourcesOf, body_chunks, receive_body
from registry.api.http.rules import Rule, Where
from registry.api.hub.models import MODEL
from registry.api.hub.wire import HubRoute
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role
from registry.domain.channels import revisions
from registry.formats.references import parse_repository
from registry.transfer import xet
from registry.transfer.resources import Resources
from registry.transfer.xet import XetPush

router = APIRouter(route_class=HubRoute)
Pusher = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.PUBLISHER, changes=True))]


@router.get("/api" + MODEL + "/xet-write-token/{revision:path}")
def begin(
    namespace: str, name: str, revision: str, request: Request, resources: ResourcesOf, actor: Pusher
) -> JSONResponse:
    """A token for one push, and the upload address of that push."""
    repository = parse_repository(f"{namespace}/{name}")
    with resources.snapshot() as session:
        revisions.refuse_no_branch(session, repository, revision)
    permit = xet.begin(resources, actor, repository)
    address = f"{request.base_url}xet/{permit.upload_id}"
    return JSONResponse({"accessToken": permit.token, "exp": permit.expires, "casUrl": address})


def push_of(upload: str, request: Request, resources: ResourcesOf) -> XetPush:
    """The push at an address, for the holder of a token for it."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return xet.authenticate(resources, upload, token if scheme.lower() == "bearer" else "")


def _chunks(request: Request, push: XetPush, resources: Resources) -> Iterator[bytes]:
    """Streams the body, possibly for hours. Raises at its end if the token has expired meanwhile."""
    yield from body_chunks(request)
    push_of(push.upload_id, request, resources)


PushOf = Annotated[XetPush, Depends(push_of)]


@router.post("/xet/{upload}/v1/xorbs/default/{xorb}")
async def receive_xorb(xorb: str, push: PushOf, request: Request, resources: ResourcesOf) -> JSONResponse:
    receive = partial(xet.receive_xorb, resources, push, xorb, _chunks(request, push, resources))
    return JSONResponse({"was_inserted": await receive_body(request, push.actor, receive)})


@router.post("/xet/{upload}/v1/shards")
@router.post("/xet/{upload}/shards")
async def receive_shard(push: PushOf, request: Request, resources: ResourcesOf) -> JSONResponse:
    receive = partial(xet.receive_shard, resources, push, _chunks(request, push, resources))
    await receive_body(request, push.actor, receive)
    return JSONResponse({"result": 1})
