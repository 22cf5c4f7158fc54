"""What a user can be told. One family per exit code; HTTP status, exit code and the client's exception derive from it.

RegistryError
├── Refused      1  a check or a gate said no
├── Usage        2  the command line or the request makes no sense
├── NotFound     3  nothing of that name (or nothing you may see)
├── Conflict     4  it exists already, or somebody was faster
├── NotAllowed   5  the role does not suffice, or nobody said who asks
├── Invalid      6  the input is damaged or does not fit
└── Unavailable  7  a store or a database is away, full or too slow
"""

import errno
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from composer.errors import ComposerError, Mismatch, NotSupported, RefusedOutput
from composer.findings import Finding, Severity
from composer.findings import next_step as advice

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The errnos of a full disk and of a quota that is used up: freeing some space mends them, and nothing else does."""


class RegistryError(Exception):
    """`code` is stable, `subject` names what it is about, `next_step` says what to do, `findings` are the details."""

    exit_code: ClassVar[int]
    status: ClassVar[int]
    title: ClassVar[str]
    retry_after_s: int | None = None
    """When asking again makes sense, in seconds; None where it does not. One error may know better than its family."""

    def __init__(
        self, code: str, detail: str, *, subject: str = "", next_step: str = "", findings: Sequence[dict[str, Any]] = ()
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.subject = subject
        self.next_step = next_step
        self.findings = list(findings)

    def __str__(self) -> str:
        return f"{self.detail} {self.next_step}".strip()


class Refused(RegistryError):
    exit_code, status, title = 1, 422, "Refused by a check"


class Usage(RegistryError):
    exit_code, status, title = 2, 400, "Bad request"


class NotFound(RegistryError):
    exit_code, status, title = 3, 404, "Not found"


class Conflict(RegistryError):
    exit_code, status, title = 4, 409, "Conflict"


class Stale(Conflict):
    """A Conflict whose precondition (`If-Match`) no longer holds."""

    status, title = 412, "Precondition failed"


class NotAllowed(RegistryError):
    exit_code, status, title = 5, 403, "Not allowed"


class Unauthenticated(NotAllowed):
    """A NotAllowed for want of a valid token."""

    status, title = 401, "Who asks?"


class Invalid(RegistryError):
    exit_code, status, title = 6, 422, "Invalid input"


class TooLarge(Invalid):
    """An Invalid that was refused by its size alone, before it was read."""

    status, title = 413, "Too large"


class Unavailable(RegistryError):
    exit_code, status, title = 7, 503, "Unavailable"
    retry_after_s = 5


class TooMany(Unavailable):
    """An Unavailable to this caller alone, who asks for too much at once."""

    status, title = 429, "Too many requests"
    retry_after_s = 1

    def again_in(self, wait_s: float) -> "TooMany":
        """The same, to be asked again in so many seconds."""
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


_BY_CODE: dict[str, type[RegistryError]] = {
    "exists": Conflict,
    "no_parent": Usage,
    "not_finite": Refused,
    "unknown_method": Usage,
    "unknown_setting": Usage,
    "bad_setting": Usage,
    "dtype": Usage,
    "device": Usage,
    "unknown_profile": Usage,
}
"""Codes of the composer whose family is not that of their class."""


def of_composer(error: ComposerError) -> RegistryError:
    """The library's error in the families that exit codes and statuses come from."""
    family: type[RegistryError] = Invalid
    if isinstance(error, Mismatch | NotSupported):
        family = Refused
    elif isinstance(error, RefusedOutput):
        family = Unavailable
    family = _BY_CODE.get(error.code, family)
    return family(error.code, error.message, subject=error.subject, next_step=error.next_step)


def refuse_errors(
    findings: Sequence[Finding],
    subject: str,
    family: type[RegistryError] = Invalid,
    next_step: str = "Correct the adapter, or name its true base with --base.",
) -> None:
    """Raises an error that names the first error's module and carries all findings; returns when none is an error."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if not errors:
        return
    more = f" ({len(errors) - 1} more like this.)" if len(errors) > 1 else ""
    raise family(
        errors[0].code,
        f"{errors[0].message}{more}",
        subject=errors[0].subject or subject,
        next_step=advice(errors[0].code, next_step),
        findings=[finding.to_json() for finding in findings],
    )
