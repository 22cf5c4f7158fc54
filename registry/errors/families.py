"""Errors that users see. The family decides exit code, HTTP status and the client's exception.

Each family has its codes, with the next step of each; an error states its own if it knows more.

RegistryError
├── Refused      1  a check or a gate refused
├── Usage        2  the command line or the request makes no sense
├── NotFound     3  nothing has that name (or you may not see it)
├── Conflict     4  it exists already, or another request was faster
├── NotAllowed   5  the role does not suffice, or the caller is not authenticated
├── Invalid      6  the input is damaged or does not fit
└── Unavailable  7  a store or a database is unreachable, full or too slow
"""

import errno
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from registry.errors import codes, input_codes

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errnos of a full disk and of an exhausted quota: only freeing space fixes them."""


class RegistryError(Exception):
    """`code` is stable, `subject` names the affected thing, `findings` has the details. `next_step` is by default the
    text of the code."""

    codes: ClassVar[Mapping[str, str]]
    """The family's codes, and the next step of each."""
    exit_code: ClassVar[int]
    status: ClassVar[int]
    title: ClassVar[str]
    family: ClassVar[str]
    """The family's name on the wire."""
    log_lines: Sequence[str] = ()
    """The last lines that the failed process logged, if it was not this one."""
    retry_after_s: int | None = None
    """Seconds after which to retry; None if retrying is pointless. An error may set its own."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        subject: str = "",
        next_step: str | None = None,
        findings: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.subject = subject
        self.next_step = self.codes.get(code, "") if next_step is None else next_step
        self.findings = list(findings)

    def __str__(self) -> str:
        return f"{self.detail} {self.next_step}".strip()

    def to_row(self) -> dict[str, Any]:
        """The error in the form that jobs and promotions store."""
        return {
            "code": self.code,
            "detail": self.detail,
            "subject": self.subject,
            "next": self.next_step,
            "exit_code": self.exit_code,
            "findings": self.findings,
        }


class Refused(RegistryError):
    codes = codes.REFUSED
    exit_code, status, title, family = 1, 422, "Refused by a check", "refused"


class Usage(RegistryError):
    codes = input_codes.USAGE
    exit_code, status, title, family = 2, 400, "Bad request", "usage"


class NotFound(RegistryError):
    codes = codes.NOT_FOUND
    exit_code, status, title, family = 3, 404, "Not found", "not_found"


class Conflict(RegistryError):
    codes = codes.CONFLICT
    exit_code, status, title, family = 4, 409, "Conflict", "conflict"


class Stale(Conflict):
    """A Conflict whose precondition (`If-Match`) no longer holds."""

    codes = codes.STALE
    status, title, family = 412, "Precondition failed", "stale"


class NotAllowed(RegistryError):
    codes = codes.NOT_ALLOWED
    exit_code, status, title, family = 5, 403, "Not allowed", "not_allowed"


class Unauthenticated(NotAllowed):
    """A NotAllowed for a missing or invalid token."""

    codes = codes.UNAUTHENTICATED
    status, title, family = 401, "Unauthenticated", "unauthenticated"


class Invalid(RegistryError):
    codes = input_codes.INVALID
    exit_code, status, title, family = 6, 422, "Invalid input", "invalid"


class TooLarge(Invalid):
    """An Invalid for input refused by its size, before it was read."""

    codes = codes.TOO_LARGE
    status, title, family = 413, "Too large", "too_large"


class Unavailable(RegistryError):
    codes = codes.UNAVAILABLE
    exit_code, status, title, family = 7, 503, "Unavailable", "unavailable"
    retry_after_s = 5


class TooMany(Unavailable):
    """An Unavailable for this caller only, who sends too many requests at once."""

    codes = codes.TOO_MANY
    status, title, family = 429, "Too many requests", "too_many"
    retry_after_s = 1

    def again_in(self, wait_s: float) -> "TooMany":
        """The same error, to be retried after `wait_s` seconds."""
        self.retry_after_s = max(1, math.ceil(wait_s))
        return self


FAMILIES: tuple[type[RegistryError], ...] = (
    Refused,
    Usage,
    NotFound,
    Conflict,
    Stale,
    NotAllowed,
    Unauthenticated,
    Invalid,
    TooLarge,
    Unavailable,
    TooMany,
)
