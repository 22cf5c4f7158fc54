"""Errors in the family of their code: those of the composer, of a stored row and of findings."""

from collections.abc import Mapping, Sequence
from typing import Any

from composer.errors import ComposerError
from composer.findings import Finding, Severity
from composer.findings import next_step as advice
from registry.error_codes import PREFIXES, REGISTER
from registry.errors import FAMILIES, NO_SPACE, Refused, RegistryError, Unavailable

_FAMILIES = {code: family for family, codes in REGISTER.items() for code in codes}


def is_registered(code: str) -> bool:
    """Whether the register has the code, or the prefix of a code that ends in a name from a file."""
    return code in _FAMILIES or code.startswith(tuple(PREFIXES))


def family_of(code: str) -> type[RegistryError]:
    """The family of a code. Refused for a finding that is an error only because a policy says so."""
    by_prefix = (family for prefix, family in PREFIXES.items() if code.startswith(prefix))
    return _FAMILIES.get(code) or next(by_prefix, Refused)


def of_composer(error: ComposerError) -> RegistryError:
    """An error of the library in the family of its code."""
    return family_of(error.code)(error.code, error.message, subject=error.subject, next_step=error.next_step)


def of_failed_work(error: RegistryError | ComposerError | OSError) -> RegistryError:
    """An error that ends a worker's work, as the job gets it: of a disk, it says what to look at."""
    if isinstance(error, RegistryError):
        return error
    if isinstance(error, ComposerError):
        return of_composer(error)
    return Unavailable(
        "disk_full" if error.errno in NO_SPACE else "disk_error",
        f"This worker cannot read or write its files: {error.strerror or error}.",
        next_step="Check the worker's disk and its log.",
    )


def of_row(row: Mapping[str, Any]) -> RegistryError:
    """The error that `to_row` kept. A code of a newer server has the family of its exit code."""
    code = row["code"]
    family = (
        family_of(code)
        if is_registered(code)
        else next(family for family in FAMILIES if family.exit_code == row["exit_code"])
    )
    return family(code, row["detail"], subject=row["subject"], next_step=row["next"], findings=row["findings"])


def refuse_errors(
    findings: Sequence[Finding],
    subject: str,
    next_step: str = "Correct the adapter, or name its true base with --base.",
) -> None:
    """Raises an error that names the first error's module and carries all findings; returns if none is an error."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if not errors:
        return
    first = errors[0]
    more = f" ({len(errors) - 1} more like this.)" if len(errors) > 1 else ""
    raise family_of(first.code)(
        first.code,
        f"{first.message}{more}",
        subject=first.subject or subject,
        next_step=advice(first.code, next_step),
        findings=[finding.to_json() for finding in findings],
    )
