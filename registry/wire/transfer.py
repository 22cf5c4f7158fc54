"""Documents of uploads."""

from typing import Literal

from pydantic import Field

from registry.wire.catalog import FileRow
from registry.wire.document import Wire, WireIn


class UploadIn(WireIn):
    """The files of a future release in `namespace`."""

    namespace: str = Field(max_length=64)
    files: list[FileRow] = Field(min_length=1, max_length=2_000)


class PutOut(Wire):
    """A request that must be sent unchanged: its signature covers `headers`."""

    method: Literal["PUT"] = "PUT"
    url: str
    headers: dict[str, str]


class PartOut(Wire):
    """Parts are contiguous and numbered from 1. A `present` part has been received."""

    number: int
    size_bytes: int
    present: bool


class PartIn(WireIn):
    """The SHA-256 of a part's bytes."""

    sha256: str


class UploadRow(Wire):
    """The step for a file: none if it is `present`; else send it with `put` or in `parts`, then complete `upload`.

    To send a part, POST its SHA-256 to /v1/uploads/{upload}/parts/{number}.

    With neither, all bytes have arrived and only completing remains. A `put` URL that begins with `/` is this
    registry's and needs the caller's token; any other is the store's, which must not see the token.
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
