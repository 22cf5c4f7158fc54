"""Style sheets and scripts. Their addresses contain their digests, so browsers may cache them for good."""

import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Response

DIRECTORY = Path(__file__).parents[1] / "assets"
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}

router = APIRouter()


@cache
def address(name: str) -> str:
    """The address of an asset with its current content."""
    digest = hashlib.sha256((DIRECTORY / name).read_bytes()).hexdigest()[:16]
    return f"/static/{digest}/{name}"


@cache
def _contents() -> dict[str, tuple[bytes, str]]:
    files = [path for path in DIRECTORY.iterdir() if path.suffix in _TYPES]
    return {address(path.name): (path.read_bytes(), _TYPES[path.suffix]) for path in files}


@router.get("/static/{digest}/{name}", include_in_schema=False)
async def send(digest: str, name: str) -> Response:
    asset = _contents().get(f"/static/{digest}/{name}")
    if asset is None:
        return Response(status_code=404)
    content, media_type = asset
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(content, media_type=media_type, headers=headers)
