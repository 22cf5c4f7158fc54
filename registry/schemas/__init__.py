"""The wire: pydantic only. Field names are the contract of the REST API and of `--json`."""

from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")

MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1
"""What the integer columns hold: a larger number is refused at the edge, by the name of its field."""


class Wire(BaseModel):
    """Unknown fields in a request are refused, since a misspelt option would otherwise be dropped silently."""

    model_config = ConfigDict(extra="forbid")


class Page(Wire, Generic[T]):
    """`next` is the cursor of the next page, None at the end."""

    items: list[T]
    next: str | None = None


class Problem(BaseModel):
    """RFC 9457 with `code`, `subject`, `next` (what to do) and the findings behind a refusal."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    subject: str = ""
    next: str = ""
    findings: list[dict[str, object]] = []
