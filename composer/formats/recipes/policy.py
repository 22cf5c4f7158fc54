"""Policies: the severity of findings, and their thresholds. YAML that a team keeps beside its recipes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import ValidationError, create_model

from composer.errors import InvalidFile
from composer.findings import HARD, Finding, Severity, Verdict
from composer.formats.recipes.documents import Document, ParsedBy, RefusedValues, load_yaml, one_of, problem_of
from composer.formats.recipes.weights import real

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
    "input_overlap": None,
    "output_overlap": None,
    "low_retention": None,
}
"""The codes with a threshold, and its default: a finding has at least this value, or less than it for `cancelling` and
`low_retention`; docs/concepts/conflicts.md says what is compared. None: measurements support no threshold, so
only a policy that sets one gets the finding."""

DROPPED = frozenset({"amplified", "crowding", "sign_conflict"})
"""Codes of numbers that reports no longer have. A policy may name them: they do nothing, and a notice says so."""

MODES = {"probe_loss": "of gain", "probe_answers": "by interval"}
"""Words that may follow a threshold: `0.5 of gain` is a share of a member's gain, not nats per token; `0.5 by interval`
leaves nothing open where the interval contains the threshold."""

CODES = frozenset({
    *THRESHOLDS, *HARD, "weak_evidence", "probe_open", "few_answers", "zero_delta", "zero_modules", "not_factors",
    "dropped_code", "little_kept", "bf16_swallow", "f16_swallow", "tied_shared", "tied_untied",
    "contradicting_bases", "same_adapter", "new_embeddings", "missing_modules", "other_paths", "no_prefix",
    "pattern_unused", "raw_keys", "zero_result",
})  # fmt: skip
"""The severity of the findings that a conflict report may have."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The final severity of each finding code, None for no finding, and its threshold.

    A code that is not named keeps the severity of its check and the default of THRESHOLDS. `modes` are the codes whose
    threshold has its word of MODES. `require` is the worst accepted verdict; None accepts all but `refuse`. `strict`
    makes warnings errors.
    """

    overrides: Mapping[str, Severity | None] = field(default_factory=dict[str, Severity | None])
    thresholds: Mapping[str, float] = field(default_factory=dict[str, float])
    modes: frozenset[str] = frozenset()
    require: Verdict | None = None
    strict: bool = False

    def threshold(self, code: str) -> float | None:
        """The threshold of a finding, by default that of THRESHOLDS."""
        return self.thresholds.get(code, THRESHOLDS[code])

    @property
    def dropped(self) -> list[str]:
        """The codes of DROPPED that the policy names."""
        return sorted(DROPPED & {*self.overrides, *self.thresholds})

    def judged(self, findings: Iterable[Finding]) -> list[Finding]:
        """The findings with the severities of this policy, without ignored ones."""
        judged: list[Finding] = []
        for finding in findings:
            severity = self.overrides.get(finding.code, finding.severity)
            if self.strict and severity is Severity.WARNING:
                severity = Severity.ERROR
            if severity is not None:
                judged.append(replace(finding, severity=severity))
        return judged

    def ignores(self, code: str) -> bool:
        """Whether the policy drops findings of this code."""
        return self.overrides.get(code, Severity.NOTICE) is None

    def verdict(self, findings: Iterable[Finding], measured: Verdict = Verdict.OK) -> Verdict:
        """The worse of the measured verdict and that of the findings."""
        severities = {finding.severity for finding in self.judged(findings)}
        if Severity.ERROR in severities:
            return Verdict.REFUSE
        return Verdict.worst([measured, Verdict.WARN if Severity.WARNING in severities else Verdict.OK])

    def accepts(self, verdict: Verdict) -> bool:
        """Whether the verdict is `require` or a better one."""
        worst = self.require or Verdict.WARN
        return Verdict.worst([worst, verdict]) is worst


def parse_policy(text: str, subject: str = "policy") -> Policy:
    """Parses a policy in YAML. Raises InvalidFile if it is not one or too long, and what `read_policy` raises."""
    if len(text) > MAX_POLICY_CHARS:
        raise _bad(subject, f"it is longer than {MAX_POLICY_CHARS} characters")
    document = load_yaml(text, subject, lambda _place, problem: _bad(subject, f"it is not YAML: {problem}"))
    return read_policy(document, subject)


def read_policy(document: object, subject: str = "policy") -> Policy:
    """Parses a policy document; None is an empty one. Raises InvalidFile naming the field."""
    try:
        parsed = PolicyDocument.model_validate({} if document is None else document)
    except ValidationError as error:
        problem = problem_of(error)
        raise _bad(problem.at(subject), problem.why, problem.next_step) from error
    severities = parsed.given()
    require, thresholds = severities.pop("require", None), severities.pop("thresholds", None)
    strict = severities.pop("strict", False)
    numbers: dict[str, _Threshold] = thresholds.given() if thresholds else {}
    return Policy(
        {code: None if severity == IGNORE else Severity(severity) for code, severity in severities.items()},
        {code: threshold.number for code, threshold in numbers.items()},
        frozenset(code for code, threshold in numbers.items() if threshold.has_word),
        None if require is None else Verdict(require),
        strict,
    )


@dataclass(frozen=True, slots=True)
class _Threshold:
    """A threshold, and whether its code's word of MODES follows it."""

    number: float
    has_word: bool


def _threshold(code: str) -> Any:
    word = MODES.get(code)

    def read(value: object) -> _Threshold:
        has_word = word is not None and isinstance(value, str) and value.endswith(f" {word}")
        try:
            return _Threshold(real(str(value).removesuffix(str(word)) if has_word else value), has_word)
        except ValueError as error:
            raise ValueError(f"a finite number, alone or with `{word}`" if word else str(error)) from error

    number, default = {"type": "number"}, THRESHOLDS.get(code)
    schema = {"anyOf": [number, {"type": "string", "pattern": f" {word}$"}]} if word else number
    schema |= {"deprecated": True} if code in DROPPED else {} if default is None else {"default": default}
    return Annotated[_Threshold, ParsedBy(read, schema)]


def _stays_an_error(value: object) -> object:
    if value != Severity.ERROR:
        raise RefusedValues("nothing can be merged with this conflict, so it stays an error")
    return value


_NUMBERS: dict[str, Any] = {code: (_threshold(code), None) for code in (*THRESHOLDS, *sorted(DROPPED))}
_Thresholds = create_model("Thresholds", __base__=Document, **_NUMBERS)
_STAYS = Annotated[str, ParsedBy(_stays_an_error, {"const": "error"})]
_VERDICT = Annotated[str | None, one_of(*Verdict, None)]
_SEVERITY = Annotated[str, one_of(*Severity, IGNORE)]
_FIELDS: dict[str, Any] = {
    "require": (_VERDICT, None),
    "strict": (bool, False),
    "thresholds": (_Thresholds | None, None),
    **{code: (_STAYS if code in HARD else _SEVERITY, None) for code in sorted(CODES | DROPPED)},
}
PolicyDocument = create_model("Policy", __base__=Document, **_FIELDS)
"""A policy document: the severity of findings by code, or `ignore`; `require`, the worst accepted verdict;
`strict`, which makes warnings errors; and `thresholds`, by code, each with its word of MODES if wanted."""


def _bad(where: str, why: str, next_step: str = "") -> InvalidFile:
    return InvalidFile("bad_policy", f"{where}: {why}.", subject=where, next_step=next_step or "Correct the policy.")
