"""/v1/uploads and /v1/blobs: streamed transfers."""

import re
from functools import partial
from typing import Annotated, Any, cast

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import RedirectResponse

from registry.api.http.file_origin import FileOrigin, no_such_address
from registry.api.http.request import ResourcesOf, body_chunks, content_length, receive_body
from registry.api.http.routes import Route
from registry.api.http.rules import Caller
from registry.api.http.threads import BlobResponse, in_store_threads
from registry.database.tables import RevisionFile
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import permit_uploads
from registry.errors import Unavailable
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, parse_digest, parse_name
from registry.storage.blobs import BlobStat, Put
from registry.transfer import uploads
from registry.transfer.resources import Resources
from registry.transfer.uploads import PlannedUpload
from registry.wire.document import MAX_INT64
from registry.wire.transfer import CompletedOut, PartIn, PartOut, PutOut, UploadIn, UploadOut, UploadRow

router = APIRouter(prefix="/v1", tags=["blobs"], route_class=Route)

BYTES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The bytes.", "content": {"application/octet-stream": {}}},
    206: {"description": "The part that Range names.", "content": {"application/octet-stream": {}}},
    307: {"description": "The store's address for the bytes."},
    416: {"description": "Range starts beyond the end."},
}
"""OpenAPI responses of a route that sends a file."""
UNTRUSTED = {
    "Content-Disposition": "attachment",
    "Content-Security-Policy": "sandbox; default-src 'none'; frame-ancestors 'none'",
}
"""Of every answer with bytes that a user sent: a browser saves them, and shows none as a page of this server. `nosniff`
is on every answer of the server."""
UploadId = Annotated[str, Path(max_length=64)]
ByteRange = Annotated[str | None, Header(alias="Range")]
PartNumber = Annotated[int, Path(ge=1, le=10_000)]
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@router.post("/uploads")
@in_store_threads
def plan_upload(body: UploadIn, resources: ResourcesOf, actor: Caller) -> UploadOut:
    """For each file: whether it is present, or where and how to PUT its bytes. Call again to resume after a failure."""
    namespace = parse_name(body.namespace, "namespace")
    permit_uploads(actor, namespace)
    files = [ManifestFile(row.path, row.size_bytes, parse_digest(row.sha256)) for row in body.files]
    return UploadOut(files=[_upload_row(upload) for upload in uploads.plan(resources, actor, namespace, files)])


@router.post("/uploads/{upload_id}/parts/{number}")
@in_store_threads
def plan_part(upload_id: UploadId, number: PartNumber, body: PartIn, resources: ResourcesOf, actor: Caller) -> PutOut:
    """Plan the PUT of one part of a large file. Stores that can do so refuse bytes that do not match `sha256`."""
    return _put_out(uploads.sign_part(resources, actor, upload_id, number, parse_digest(body.sha256)))


@router.post("/uploads/{upload_id}/complete")
@in_store_threads
def complete_upload(upload_id: UploadId, resources: ResourcesOf, actor: Caller) -> CompletedOut:
    """Verify the size and digest of an upload; releases in its namespace may then use the blob."""
    return CompletedOut.of(uploads.complete(resources, actor, upload_id))


@router.put("/blobs/{sha256}", status_code=201, response_class=Response)
async def upload(
    sha256: str,
    request: Request,
    resources: ResourcesOf,
    actor: Caller,
    upload_id: Annotated[str, Query(alias="upload", max_length=64)],
) -> Response:
    """Upload the bytes through the API, for stores without upload addresses."""
    digest, size = parse_digest(sha256), content_length(request)
    receive = partial(uploads.receive_body, resources, actor, upload_id, digest, body_chunks(request), size)
    await receive_body(request, actor, receive)
    return Response(status_code=201)


@router.get("/blobs/{sha256}", response_class=Response, responses=BYTES)
@in_store_threads
def download(
    sha256: str, request: Request, resources: ResourcesOf, actor: Caller, byte_range: ByteRange = None
) -> Response:
    stat = uploads.readable(resources, actor, parse_digest(sha256))
    record_download(resources, actor, f"blobs/{sha256}")
    return blob_response(request, resources, stat, byte_range)


@router.head("/blobs/{sha256}", response_class=Response)
@in_store_threads
def look(sha256: str, resources: ResourcesOf, actor: Caller) -> Response:
    """Show whether there is a blob, and its size."""
    stat = uploads.readable(resources, actor, parse_digest(sha256))
    return Response(headers=blob_headers(stat.sha256, stat.size_bytes))


@router.get("/files/{sha256}", response_class=Response, responses=BYTES)
@in_store_threads
def fetch(  # noqa: PLR0913
    sha256: str,
    request: Request,
    resources: ResourcesOf,
    expires: Annotated[int, Query(ge=0, le=MAX_INT64)],
    signature: Annotated[str, Query(max_length=64)],
    disposition: Annotated[str, Query(max_length=2_000)] = "",
    byte_range: ByteRange = None,
) -> Response:
    """The bytes of a file, on the host name of `ADAPTORY_FILES_URL`, by an address from the registry."""
    digest = parse_digest(sha256)
    origin = origin_of(request)
    if origin is None or not origin.has_signed(digest, expires, disposition, signature):
        raise no_such_address(digest)
    stat = resources.store.stat(digest)
    if stat is None:
        raise no_such_address(digest)
    answer = _bytes(resources, stat, byte_range)
    if disposition:
        answer.headers["Content-Disposition"] = disposition
    return answer


def origin_of(request: Request) -> FileOrigin | None:
    """The origin of users' files, if that is another host name."""
    return cast("FileOrigin | None", request.app.state.file_origin)


def record_download(resources: Resources, actor: Actor, subject: str, path: str | None = None) -> None:
    """Records a download before its answer begins, where the settings ask for it. The subject is the release with the
    path of the file in it, or the blob, whose row only registry admins may read: several namespaces may have it."""
    if resources.settings.audit_reads:
        namespace = None if path is None else subject.partition("/")[0]
        with resources.write() as session:
            audit.record(session, actor, Act.RELEASE_DOWNLOAD, subject, namespace=namespace, path=path)


def file_response(
    request: Request,
    resources: Resources,
    file: RevisionFile,
    named: str,
    byte_range: str | None,
    disposition: str | None = None,
) -> Response:
    """As `blob_response`, for a caller who may read a release containing this file; `named` is its name there. A store
    answers with the `disposition`, if one is given, as Content-Disposition."""
    sha256 = Digest(file.sha256)
    url = _address(request, resources, sha256, disposition)
    stat = resources.recent.stat(resources.store, sha256) if url else resources.store.stat(sha256)
    if stat is None:
        raise Unavailable("blob_lost", f"The store has lost the bytes of {named} ({file.sha256}).", subject=file.sha256)
    uploads.refuse_damaged(stat, file.size_bytes, named)
    return _sent(resources, stat, url, byte_range)


def blob_response(request: Request, resources: Resources, stat: BlobStat, byte_range: str | None) -> Response:
    """The bytes, a range of them, or a redirect if the store, or another host name, has download addresses."""
    return _sent(resources, stat, _address(request, resources, stat.sha256, None), byte_range)


def _address(request: Request, resources: Resources, sha256: Digest, disposition: str | None) -> str | None:
    expires_s, origin = resources.settings.download_expires_s, origin_of(request)
    url = resources.store.url(sha256, expires_s, disposition)
    return url or (origin.address(sha256, expires_s, disposition) if origin else None)


def _sent(resources: Resources, stat: BlobStat, url: str | None, byte_range: str | None) -> Response:
    """A redirect to the store's address, which makes the answer an attachment too, or the bytes."""
    return RedirectResponse(url, 307, UNTRUSTED) if url else _bytes(resources, stat, byte_range)


def _bytes(resources: Resources, stat: BlobStat, byte_range: str | None) -> Response:
    span = _span(byte_range, stat.size_bytes)
    if span is None:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{stat.size_bytes}", **UNTRUSTED})
    start, length = span
    headers = blob_headers(stat.sha256, length)
    if byte_range and length < stat.size_bytes:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{stat.size_bytes}"
    reader = resources.store.open(stat.sha256, start, length)
    status = 206 if "Content-Range" in headers else 200
    return BlobResponse(reader, status, headers)


def _upload_row(announced: PlannedUpload) -> UploadRow:
    file, upload_id = announced.file, announced.upload_id
    put = _put_out(announced.put) if announced.put is not None else None
    if announced.through_the_api:
        put = PutOut(
            url=f"/v1/blobs/{file.sha256}?upload={upload_id}", headers={"Content-Length": str(file.size_bytes)}
        )
    parts = [PartOut.of(part) for part in announced.parts]
    return UploadRow(
        path=file.path, sha256=file.sha256, present=upload_id is None, upload=upload_id, put=put, parts=parts
    )


def _put_out(put: Put) -> PutOut:
    return PutOut(url=put.url, headers=dict(put.headers))


def blob_headers(sha256: Digest, length: int) -> dict[str, str]:
    """The headers of a blob, or of `length` bytes of it."""
    return {
        "ETag": f'"{sha256}"',
        "Content-Length": str(length),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, immutable",
        **UNTRUSTED,
    }


def _span(byte_range: str | None, size: int) -> tuple[int, int] | None:
    """(start, length) of a Range; everything for one not understood (RFC 9110 section 14.2); None for a 416."""
    match = _RANGE.fullmatch(byte_range.strip()) if byte_range else None
    if match is None or match.groups() == ("", ""):
        return 0, size
    first, last = match.groups()
    if not first:
        length = min(int(last), size)
        return (size - length, length) if length else None
    start = int(first)
    end = min(int(last), size - 1) if last else size - 1
    return (start, end - start + 1) if start <= end else None
