"""One result of a check, and the policy that turns a list of them into a verdict."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    NOTICE = "notice"
    WARNING = "warning"
    ERROR = "error"


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Finding:
    """`code` is stable; `subject` names the module, tensor, file or pair; `measure` is the number behind it, if any."""

    code: str
    severity: Severity
    subject: str
    message: str
    measure: float | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "code": self.code,
            "severity": self.severity.value,
            "subject": self.subject,
            "measure": self.measure,
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class Policy:
    """Which severity each finding code has in the end. A code not named keeps the severity its check gave it."""

    overrides: Mapping[str, Severity] = field(default_factory=dict[str, Severity])

    def verdict(self, findings: Iterable[Finding]) -> Verdict:
        severities = {self.overrides.get(finding.code, finding.severity) for finding in findings}
        if Severity.ERROR in severities:
            return Verdict.REFUSE
        return Verdict.WARN if Severity.WARNING in severities else Verdict.OK
