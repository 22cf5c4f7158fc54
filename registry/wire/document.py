"""The documents of the API as types: what a server returns and a client reads. Field names are the contract.

A document that was read keeps its source object (`Wire.document`), since `--json` and the Python API show it unchanged:
with the fields of a newer server, and with numbers and times as they were written. Keeping unknown fields in the types
instead (`extra="allow"`) would lose the latter, and would let a server return misspelt ones.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from typing import Annotated, Any, Generic, Self, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from registry.errors import Invalid

T = TypeVar("T")

MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1
"""Limits of the integer columns. Larger numbers are refused with the name of the field."""
MAX_FIELDS = 1_000
"""Maximum fields of one object; hyperparameters need the most."""


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is not a time in the years 1 to 9999 in UTC") from None


Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""A time in UTC; without an offset, UTC is assumed."""


class Wire(BaseModel):
    """Refuses unknown fields: a misspelt option would otherwise be dropped silently. Only `read` ignores them."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    @classmethod
    def of(cls, row: object, **others: Any) -> Self:
        """Builds the document of a row or a value: `others`, and its attributes with the names of the other fields."""
        own = {name: getattr(row, name) for name in cls.model_fields.keys() - others.keys()}
        return cls.model_validate(own | others)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Reads a document written by a server of this version or a newer one. Raises ValidationError."""
        answer = cls.model_validate(document, extra="ignore")
        answer._keep(document)
        return answer

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """The object that this was read from. If it was not read itself, like an item of a list, its fields."""
        return self.model_dump(mode="json")

    def _keep(self, document: Mapping[str, Any]) -> None:
        vars(self)["document"] = document
        for name, value in self:
            if isinstance(value, Wire):
                value._keep(document[name])


class WireIn(Wire):
    """A request body. Refuses NUL characters, which PostgreSQL does not accept, and objects with very many fields,
    since each would become a validation error."""

    # FastAPI silences pydantic's warning about a body's alias as it declares the route, which builds the schema.
    model_config = ConfigDict(defer_build=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_odd(cls, given: Any) -> Any:
        left = [given]
        while left:
            one = left.pop()
            if isinstance(one, str) and "\0" in one:
                raise Invalid("bad_value", f"A string contains a NUL character: {one[:40]!r}.")
            if isinstance(one, dict):
                if len(cast("dict[Any, Any]", one)) > MAX_FIELDS:
                    message = f"An object has more than {MAX_FIELDS:,} fields."
                    raise Invalid("bad_value", message, next_step="See /openapi.json for the fields of this request.")
                left += chain.from_iterable(cast("dict[Any, Any]", one).items())
            elif isinstance(one, list):
                left += cast("list[Any]", one)
        return given


class Page(Wire, Generic[T]):
    """A page of a list. `next` is the cursor of the next page, null at the end."""

    items: list[T]
    next: str | None = None


class Problem(Wire):
    """A problem (RFC 9457), with `code` and `family` (docs/reference/errors.md lists both), `subject`, `next` (what to
    do), `help` (the page of the code, relative to the request's address), the findings that caused a refusal, and the
    id of the request in the access log (`X-Request-Id`)."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    family: str
    status: int
    detail: str
    code: str
    subject: str = ""
    next: str = ""
    help: str = ""
    findings: list[dict[str, Any]] = []
    request_id: str | None = None
