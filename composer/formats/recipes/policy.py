"""Which findings matter, and from which number on: YAML that a team keeps beside its recipes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import yaml

from composer.errors import InvalidFile
from composer.findings import HARD, Finding, Severity, Verdict
from composer.formats.recipes.weights import real
from composer.formats.untrusted import printable

MAX_POLICY_CHARS = 100_000

IGNORE = "ignore"

THRESHOLDS: dict[str, float | None] = {
    "near_duplicate": 0.5,
    "cancelling": 0.5,
    "dominance": 10 / 11,
    "same_prompts": 0.1,
    "probe_loss": 0.1,
    "probe_answers": 0.9,
    "probe_guard": 0.05,
    "amplified": 1.0,
    "input_overlap": None,
    "output_overlap": None,
    "crowding": None,
    "sign_conflict": None,
    "low_retention": None,
}
"""The codes that hang on a number, with the number from which on each is found, or for `cancelling` and
`low_retention` below which; docs/composing.md says of what.

None: no measurement backs a number, so there is no such finding unless a policy gives one.
"""

MODES = {"probe_loss": "of gain", "probe_answers": "by interval"}
"""What a policy may write after a number: `0.5 of gain` is a share of what a member had gained, not nats per token;
`0.5 by interval` fails where a binomial test is sure, not by the share that was counted."""

CODES = frozenset({
    *THRESHOLDS, *HARD, "weak_evidence", "probe_open", "zero_delta", "zero_modules", "not_factors",
    "bf16_swallow", "f16_swallow", "tied_shared", "tied_untied",
})  # fmt: skip
"""Of the findings that a conflict report may have."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Which severity each finding code has in the end, None for none at all, and from which number on it is found.

    A code not named keeps the severity its check gave it, and the number in THRESHOLDS. `modes` are the codes whose
    number is followed by its word in MODES. `require` is the worst verdict that is accepted; None accepts all but
    `refuse`.
    """

    overrides: Mapping[str, Severity | None] = field(default_factory=dict[str, Severity | None])
    thresholds: Mapping[str, float] = field(default_factory=dict[str, float])
    modes: frozenset[str] = frozenset()
    require: Verdict | None = None

    def threshold(self, code: str) -> float | None:
        return self.thresholds.get(code, THRESHOLDS[code])

    def judged(self, findings: Iterable[Finding]) -> list[Finding]:
        """The findings with the severities of this policy, without those it ignores."""
        severities = [(finding, self.overrides.get(finding.code, finding.severity)) for finding in findings]
        return [replace(finding, severity=severity) for finding, severity in severities if severity is not None]

    def ignores(self, code: str) -> bool:
        return self.overrides.get(code, Severity.NOTICE) is None

    def verdict(self, findings: Iterable[Finding], measured: Verdict = Verdict.OK) -> Verdict:
        """The worse of what was measured and what the findings come to."""
        severities = {finding.severity for finding in self.judged(findings)}
        if Severity.ERROR in severities:
            return Verdict.REFUSE
        return Verdict.worst([measured, Verdict.WARN if Severity.WARNING in severities else Verdict.OK])

    def accepts(self, verdict: Verdict) -> bool:
        worst = self.require or Verdict.WARN
        return Verdict.worst([worst, verdict]) is worst


def parse_policy(text: str, subject: str = "policy") -> Policy:
    """The policy in a YAML text. Raises InvalidFile where it is none or too long, and what `read_policy` raises."""
    if len(text) > MAX_POLICY_CHARS:
        raise _bad(subject, f"it is longer than {MAX_POLICY_CHARS} characters")
    try:
        document: object = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _bad(subject, f"it is not YAML: {getattr(error, 'problem', None) or error}") from error
    return read_policy(document, subject)


def read_policy(document: object, subject: str = "policy") -> Policy:
    """A code of a finding and `notice`, `warning`, `error` or `ignore`; under `thresholds`, a code and a number, with
    its word of MODES where that is meant; `require`, a verdict.

    Raises InvalidFile naming the key: no mapping, another value, a number for a code that hangs on none, or a hard
    conflict, which stays an error.
    """
    rows = _mapping(document, subject)
    numbers = _mapping(rows.pop("thresholds", None), f"{subject}: thresholds")
    require = rows.pop("require", None)
    if require not in (None, *Verdict):
        raise _bad(f"{subject}: require", f"{printable(require)} is none of {', '.join(Verdict)}")
    modes = {code for code, value in numbers.items() if code in MODES and str(value).endswith(f" {MODES[code]}")}
    plain = {code: str(value).removesuffix(MODES[code]) if code in modes else value for code, value in numbers.items()}
    return Policy(
        {code: _severity(code, value, subject) for code, value in rows.items()},
        {code: _number(code, value, f"{subject}: thresholds") for code, value in plain.items()},
        frozenset(modes),
        None if require is None else Verdict(str(require)),
    )


def _mapping(document: object, subject: str) -> dict[str, object]:
    if not isinstance(document, dict | None):
        raise _bad(subject, "it must be a mapping")
    rows = cast("dict[object, object]", document or {})
    for key in rows:
        if not isinstance(key, str):
            raise _bad(subject, f"{printable(key)} is no code")
    return dict(cast("dict[str, object]", rows))


def _severity(code: str, value: object, subject: str) -> Severity | None:
    if code not in CODES:
        raise _bad(f"{subject}: {printable(code)}", f"the codes are {', '.join(sorted(CODES))}")
    words = [*Severity, IGNORE]
    if value not in words:
        raise _bad(f"{subject}: {printable(code)}", f"{printable(value)} is none of {', '.join(words)}")
    if code in HARD and value != Severity.ERROR:
        raise _bad(f"{subject}: {code}", "nothing can be merged with this conflict, so it stays an error")
    return None if value == IGNORE else Severity(str(value))


def _number(code: str, value: object, subject: str) -> float:
    if code not in THRESHOLDS:
        raise _bad(f"{subject}: {printable(code)}", f"the codes with a number are {', '.join(THRESHOLDS)}")
    try:
        return real(value)  # also `1e-3`, which YAML takes for a text
    except ValueError as error:
        raise _bad(f"{subject}: {code}", f"{printable(value)} is not a finite number") from error


def _bad(where: str, why: str) -> InvalidFile:
    return InvalidFile("bad_policy", f"{where}: {why}.", subject=where, next_step="Correct the policy.")
