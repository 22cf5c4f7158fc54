"""Files at a revision: what the client downloads."""

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from registry.api.http.request import ResourcesOf
from registry.api.http.rules import Reader
from registry.api.http.threads import in_store_threads
from registry.api.hub.models import Named
from registry.api.hub.wire import HubRoute, file_url, is_movable, revision_headers
from registry.api.routes.blobs import ByteRange, blob_headers, file_response, record_download
from registry.database.engine import Session
from registry.database.tables import RevisionFile
from registry.domain.catalog import releases, repositories
from registry.domain.channels import revisions
from registry.domain.channels.revisions import Located
from registry.formats.references import Digest

router = APIRouter(route_class=HubRoute)

FILE = "/{namespace}/{name}/resolve/{revision}/{path:path}"


@router.head(FILE)
def describe_file(
    request: Request, named: Named, revision: str, path: str, resources: ResourcesOf, actor: Reader
) -> Response:
    """The first request of every download. `Location` pins the commit, or a channel could move before the next."""
    with resources.read() as session:
        located = revisions.locate(session, actor, named, revision)
        headers = revision_headers(request, located)
        file = _find(session, located, path)
    headers = blob_headers(Digest(file.sha256), file.size_bytes) | headers | _headers(revision, located, file)
    if is_movable(revision, located):
        headers["Location"] = file_url(request, located, path)
    return Response(headers=headers)


@router.get(FILE)
@in_store_threads
def download_file(  # noqa: PLR0913
    request: Request,
    named: Named,
    revision: str,
    path: str,
    resources: ResourcesOf,
    actor: Reader,
    byte_range: ByteRange = None,
    known: Annotated[str | None, Header(alias="If-None-Match")] = None,
    begun: Annotated[str | None, Header(alias="If-Range")] = None,
) -> Response:
    """The bytes, a range of them, a redirect to the store, or 304 for a client that has them."""
    with resources.read() as session:
        located = revisions.locate(session, actor, named, revision)
        headers = revision_headers(request, located)
        file = _find(session, located, path)
    headers |= _headers(revision, located, file)
    if known is not None and file.sha256 in known:
        return Response(status_code=304, headers=headers | {"ETag": f'"{file.sha256}"'})
    if begun is not None and file.sha256 not in begun:  # the name stands for other bytes now: send all of them
        byte_range = None
    record_download(resources, actor, located.full_name, path)
    response = file_response(request, resources, file, f"{path} of {located.full_name}", byte_range)
    response.headers.update(headers)
    return response


@router.get("/{name}/resolve/{revision}/{path:path}")
@router.head("/{name}/resolve/{revision}/{path:path}")
def find_nameless(name: str, revision: str, path: str) -> Response:
    """Files of models without a namespace, such as gpt2: this registry has none."""
    raise repositories.unknown(name)


def _find(session: Session, located: Located, path: str) -> RevisionFile:
    return releases.find_revision_file(session, located.revision_id, path, located.full_name)


def _headers(revision: str, located: Located, file: RevisionFile) -> dict[str, str]:
    """Digest and size, which a redirect to the store hides, and how long the answer holds."""
    linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size_bytes)}
    return linked | ({"Cache-Control": "private, no-cache"} if is_movable(revision, located) else {})
