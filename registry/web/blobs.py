"""/v1/uploads and /v1/blobs: bytes in and out, streamed."""

import re
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from registry import uploads
from registry.access import Role, permit
from registry.errors import NotFound
from registry.http.request import ResourcesOf, body_chunks, content_length
from registry.http.rules import Caller
from registry.manifest import ManifestFile
from registry.names import Digest, parse_digest
from registry.resources import Resources
from registry.schemas.transfer import UploadIn, UploadOut, UploadRow
from registry.storage.blobs import Reader

router = APIRouter(prefix="/v1", tags=["blobs"])

_BLOCK_BYTES = 1 << 20
_URL_EXPIRES_S = 3600
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@router.post("/uploads")
def plan_upload(body: UploadIn, resources: ResourcesOf, actor: Caller) -> UploadOut:
    """For each file: present already, or where to PUT its bytes."""
    permit(actor, Role.PUBLISHER)
    files = [ManifestFile(row.path, row.size_bytes, parse_digest(row.sha256)) for row in body.files]
    missing = {file.sha256 for file in uploads.absent(resources, files)}
    return UploadOut(
        files=[
            UploadRow(
                path=f.path,
                sha256=f.sha256,
                present=f.sha256 not in missing,
                url=f"/v1/blobs/{f.sha256}" if f.sha256 in missing else None,
            )
            for f in files
        ]
    )


@router.put("/blobs/{sha256}", status_code=201)
def upload(sha256: str, request: Request, resources: ResourcesOf, actor: Caller) -> Response:
    permit(actor, Role.PUBLISHER)
    uploads.receive(resources, actor, parse_digest(sha256), body_chunks(request), content_length(request))
    return Response(status_code=201)


@router.get("/blobs/{sha256}")
def download(
    sha256: str, resources: ResourcesOf, actor: Caller, byte_range: Annotated[str | None, Header(alias="Range")] = None
) -> Response:
    permit(actor, Role.READER)
    return blob_response(resources, parse_digest(sha256), byte_range)


@router.head("/blobs/{sha256}")
def look(sha256: str, resources: ResourcesOf, actor: Caller) -> Response:
    permit(actor, Role.READER)
    return Response(headers=_headers(parse_digest(sha256), _size(resources, parse_digest(sha256))))


def blob_response(resources: Resources, sha256: Digest, byte_range: str | None) -> Response:
    """The bytes, a part of them, or the way to them where the store has addresses."""
    size = _size(resources, sha256)
    url = resources.store.url(sha256, _URL_EXPIRES_S)
    if url is not None:
        return RedirectResponse(url, status_code=307)
    span = _span(byte_range, size)
    if span is None:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    start, length = span
    headers = _headers(sha256, length)
    if byte_range and length < size:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    reader = resources.store.open(sha256, start, length)
    status = 206 if "Content-Range" in headers else 200
    return StreamingResponse(
        _blocks(reader), status_code=status, headers=headers, media_type="application/octet-stream"
    )


def _size(resources: Resources, sha256: Digest) -> int:
    stat = resources.store.stat(sha256)
    if stat is None:
        raise NotFound(
            "blob_unknown", f"There is no blob {sha256}.", subject=sha256, next_step="PUT its bytes to this path first."
        )
    return stat.size_bytes


def _headers(sha256: Digest, length: int) -> dict[str, str]:
    return {
        "ETag": f'"{sha256}"',
        "Content-Length": str(length),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, immutable",
    }


def _span(byte_range: str | None, size: int) -> tuple[int, int] | None:
    """(start, length) of a Range, the whole for one not understood (RFC 9110 section 14.2), None where 416 is due."""
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


def _blocks(reader: Reader) -> Iterator[bytes]:
    with reader:
        while block := reader.read(_BLOCK_BYTES):
            yield block
