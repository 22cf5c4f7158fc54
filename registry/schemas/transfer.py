"""Uploads on the wire."""

from pydantic import Field

from registry.schemas import Wire
from registry.schemas.catalog import FileRow


class UploadIn(Wire):
    files: list[FileRow] = Field(min_length=1, max_length=10_000)


class UploadRow(Wire):
    """`url` is where to PUT the bytes, None when they are present already."""

    path: str
    sha256: str
    present: bool
    url: str | None


class UploadOut(Wire):
    files: list[UploadRow]
