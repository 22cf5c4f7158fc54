"""The wire: pydantic only. Field names are the contract of the REST API and of `--json`."""

from itertools import chain
from typing import Any, Generic, TypeVar, cast

from pydantic import BaseModel, ConfigDict, model_validator

from registry.errors import Invalid

T = TypeVar("T")

MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1
"""What the integer columns hold: a larger number is refused at the edge, by the name of its field."""
MAX_FIELDS = 1_000
"""Of one object: hyperparameters are the most that a request may say."""


class Wire(BaseModel):
    """Unknown fields in a request are refused, since a misspelt option would otherwise be dropped silently."""

    model_config = ConfigDict(extra="forbid")


class WireIn(Wire):
    """A request's body, no text of which has a NUL: SQLite would take it, and PostgreSQL does not. Nor has an object
    of it very many fields, of each of which the validation would make an error."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_odd(cls, given: Any) -> Any:
        left = [given]
        while left:
            one = left.pop()
            if isinstance(one, str) and "\0" in one:
                raise Invalid("bad_value", f"A text has a NUL: {one[:40]!r}.", next_step="Leave it out.")
            if isinstance(one, dict):
                if len(cast("dict[Any, Any]", one)) > MAX_FIELDS:
                    message = f"An object has more than {MAX_FIELDS:,} fields."
                    raise Invalid("bad_value", message, next_step="See /openapi.json for those of this request.")
                left += chain.from_iterable(cast("dict[Any, Any]", one).items())
            elif isinstance(one, list):
                left += cast("list[Any]", one)
        return given


class Page(Wire, Generic[T]):
    """`next` is the cursor of the next page, None at the end."""

    items: list[T]
    next: str | None = None


class Problem(BaseModel):
    """RFC 9457 with `code` and `family` (docs/errors.md lists both), `subject`, `next` (what to do), the findings
    behind a refusal, and the id that the access log has of the request (`X-Request-Id`)."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    family: str
    status: int
    detail: str
    code: str
    subject: str = ""
    next: str = ""
    findings: list[dict[str, object]] = []
    request_id: str | None = None
