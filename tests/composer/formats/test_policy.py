"""Policies: the findings that count, and their thresholds."""

import ast
from pathlib import Path

import pytest

import composer.conflicts.report
import composer.findings
import composer.methods.structural
from composer.errors import InvalidFile
from composer.findings import HARD, Finding, Severity, Verdict
from composer.formats.recipes.policy import CODES, THRESHOLDS, Policy, parse_policy


def finding(code: str, severity: Severity) -> Finding:
    return Finding(code, severity, "m", "said", 1.0)


def test_a_policy_gives_severities_and_thresholds_and_leaves_the_rest() -> None:
    policy = parse_policy(
        "near_duplicate: error\ndominance: ignore\nthresholds: {near_duplicate: 0.6, low_retention: 1}\n"
    )
    findings = [finding("near_duplicate", Severity.WARNING), finding("dominance", Severity.WARNING)]
    assert policy.judged(findings) == [finding("near_duplicate", Severity.ERROR)]
    assert policy.verdict(findings) is Verdict.REFUSE
    assert policy.verdict(findings[1:]) is Verdict.OK
    assert (policy.threshold("near_duplicate"), policy.threshold("low_retention")) == (0.6, 1.0)
    assert policy.threshold("dominance") == THRESHOLDS["dominance"]


def test_a_policy_reads_how_a_number_is_meant_and_what_verdict_it_requires() -> None:
    policy = parse_policy("require: ok\nthresholds: {probe_loss: 0.5 of gain, probe_answers: 0.8}\n")
    assert (policy.threshold("probe_loss"), policy.threshold("probe_answers")) == (0.5, 0.8)
    assert policy.modes == {"probe_loss"}
    assert [verdict for verdict in Verdict if policy.accepts(verdict)] == [Verdict.OK]
    assert [verdict for verdict in Verdict if not Policy().accepts(verdict)] == [Verdict.REFUSE]


def test_verdicts_have_an_order_and_the_worst_one_counts() -> None:
    assert list(Verdict) == ["ok", "undecided", "unmeasured", "warn", "refuse"]
    assert Verdict.worst([Verdict.UNMEASURED, Verdict.OK, Verdict.UNDECIDED]) is Verdict.UNMEASURED
    assert Policy().verdict([finding("x", Severity.WARNING)], Verdict.UNMEASURED) is Verdict.WARN
    assert Policy().verdict([finding("x", Severity.NOTICE)], Verdict.UNDECIDED) is Verdict.UNDECIDED


def test_an_empty_policy_changes_nothing() -> None:
    assert parse_policy("") == Policy()
    assert Policy().verdict([finding("x", Severity.NOTICE)]) is Verdict.OK
    assert Policy().verdict([finding("x", Severity.WARNING)]) is Verdict.WARN


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[1, 2]", "mapping"),
        ("near_duplicate: [", "not YAML"),
        ("near_duplicate: fatal", "'fatal' is not one of notice, warning, error, ignore"),
        ("near_duplicate: 1", "1 is not one of"),
        ("near_duplicat: error", "'near_duplicat'"),
        ("1: error", "unknown field 1"),
        ("thresholds: 3", "thresholds"),
        ("thresholds: {zero_delta: 3}", "'zero_delta'"),
        ("thresholds: {probe_guard: 0.5 of gain}", "not a finite number"),
        ("thresholds: {probe_loss: 0.5 by interval}", "not a finite number"),
        ("require: good", "'good' is not one of ok, undecided, unmeasured, warn, refuse"),
        ("thresholds: {crowding: much}", "'much' is not a finite number"),
        ("thresholds: {crowding: a lot}", "not a finite number"),
        ("thresholds: {crowding: true}", "not a finite number"),
        ("thresholds: {crowding: .inf}", "not a finite number"),
        ("thresholds: {crowding: .nan}", "not a finite number"),
        ("thresholds: {crowding: 1" + "0" * 4000 + "}", "not a finite number"),
        ("a: " + "[" * 5000, "not YAML"),
        ("# " + "x" * 100_001, "policy: it is longer than"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_key(text: str, named: str) -> None:
    with pytest.raises(InvalidFile, match="policy") as refused:
        parse_policy(text)
    assert named in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("code", sorted(HARD))
def test_a_hard_conflict_stays_an_error(code: str) -> None:
    assert parse_policy(f"{code}: error").overrides == {code: Severity.ERROR}
    for word in ("ignore", "notice", "warning"):
        with pytest.raises(InvalidFile, match=code):
            parse_policy(f"{code}: {word}")


def test_every_code_with_a_number_is_a_code() -> None:
    assert set(THRESHOLDS) <= CODES
    assert HARD <= CODES


def test_every_finding_of_a_conflict_report_has_a_code_that_a_policy_knows() -> None:
    shared = [Path(composer.methods.structural.__file__), Path(composer.findings.__file__)]
    sources = [*shared, *Path(composer.conflicts.__file__).parent.glob("*.py")]
    calls = [call for path in sources for call in ast.walk(ast.parse(path.read_text())) if isinstance(call, ast.Call)]
    made = [call.args[0] for call in calls if getattr(call.func, "id", "") in ("Finding", "_error") and call.args]
    codes = {str(code.value) for code in made if isinstance(code, ast.Constant)}
    assert {"token_conflict", "tied_shared", "near_duplicate", "zero_delta"} <= codes <= CODES
