"""Uploads on the wire."""

from typing import Literal

from pydantic import Field

from registry.api.schemas import Wire, WireIn
from registry.api.schemas.catalog import FileRow


class UploadIn(WireIn):
    """Files that a release in `namespace` shall have."""

    namespace: str = Field(max_length=64)
    files: list[FileRow] = Field(min_length=1, max_length=2_000)


class PutOut(Wire):
    """A request to be made as it is; `headers` are part of what was signed."""

    method: Literal["PUT"] = "PUT"
    url: str
    headers: dict[str, str]


class PartOut(Wire):
    """Parts follow one another in the file and count from 1. One that is `present` has arrived."""

    number: int
    size_bytes: int
    present: bool


class PartIn(WireIn):
    """What a part's bytes are."""

    sha256: str


class UploadRow(Wire):
    """What to do for a file: nothing if it is `present`; else send it by `put` or in `parts`, then complete `upload`.

    How to send a part is asked with its sha256 at /v1/uploads/{upload}/parts/{number}.

    With neither, all of it has arrived and only completing is left. The url of a `put` that begins with `/` is one of
    this registry, which wants the caller's token; any other is of its store, which must not see it.
    """

    path: str
    sha256: str
    present: bool
    upload: str | None = None
    put: PutOut | None = None
    parts: list[PartOut] = Field(default=[])


class UploadOut(Wire):
    files: list[UploadRow]


class CompletedOut(Wire):
    sha256: str
    size_bytes: int
