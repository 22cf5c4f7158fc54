"""The outcome of a probe: verdict, messages and advice."""

from dataclasses import replace
from math import inf, nan

import pytest

from composer.conflicts.evidence.interval import interval
from composer.conflicts.evidence.outcome import Effect, Limits, Outcome, SideEffect
from composer.conflicts.evidence.probe import ProbeResult
from composer.conflicts.render import text
from composer.conflicts.report import conflicts
from composer.deltas.variants.load import LoadedAdapter
from composer.findings import Severity, Verdict
from composer.formats.recipes.policy import parse_policy
from tests.composer.conflicts.test_conflicts import codes
from tests.composer.small_model import Load


def outcome(loss: float, kept: float, rise: float, stderr: float, k: int = 8) -> ProbeResult:
    """Red had gained 2.5 nats a token and loses `loss`; green loses next to nothing."""
    effects = (
        Effect(
            member="red",
            suite="red-exact",
            base=3.0,
            alone=0.5,
            combined=0.5 + loss,
            loss=loss,
            loss_stderr=stderr,
            loss_interval=interval(loss, stderr, k, 2),
            kept=kept,
            answered=0,
            still_answered=0,
            examples=k,
        ),
        Effect(
            member="green",
            suite="green-exact",
            base=2.0,
            alone=0.4,
            combined=0.41,
            loss=0.01,
            loss_stderr=0.001,
            loss_interval=interval(0.01, 0.001, k, 2),
            kept=0.99,
            answered=0,
            still_answered=0,
            examples=k,
        ),
    )
    alone = {"red": 0.8, "green": 0.9}
    guard = SideEffect(
        suite="general",
        base=0.7,
        alone=alone,
        combined=0.9 + rise,
        rise=rise,
        rise_stderr=stderr,
        rise_interval=interval(rise, stderr, k),
        examples=k,
    )
    measured = Outcome(k, effects, (guard,))
    return ProbeResult(k, (measured,), measured, 1.5)


@pytest.mark.parametrize(
    ("result", "expected", "verdict"),
    [
        (outcome(2.0, 0.2, -1.0, 0.1), {"probe_loss": Severity.WARNING}, Verdict.WARN),
        (outcome(0.08, 0.9, -1.0, 0.005), {"probe_loss": Severity.NOTICE}, Verdict.OK),
        (
            outcome(0.1, 0.9, -1.0, 0.02),
            {"probe_loss": Severity.NOTICE, "probe_open": Severity.NOTICE},
            Verdict.UNDECIDED,
        ),
        (outcome(1.5, 0.4, -4.0, 1.0), {"probe_open": Severity.NOTICE}, Verdict.UNDECIDED),
        (outcome(0.0, 1.0, -1.0, 0.01), {}, Verdict.OK),
        (outcome(0.0, 1.0, -1.0, 0.001, k=7), {"probe_open": Severity.NOTICE}, Verdict.UNDECIDED),
        (outcome(0.0, 1.0, 0.6, 0.03), {"probe_guard": Severity.WARNING}, Verdict.WARN),
        (outcome(0.0, 1.0, 0.04, 0.06), {"probe_open": Severity.NOTICE}, Verdict.UNDECIDED),
    ],
)
def test_a_probe_decides_the_verdict_and_warns_of_damage_that_it_is_sure_of(
    red: LoadedAdapter,
    green: LoadedAdapter,
    result: ProbeResult,
    expected: dict[str, Severity],
    verdict: Verdict,
) -> None:
    report = conflicts([red, green], [1.0, 1.0], evidence=result)
    assert codes(report) == expected
    (pair,) = report.pairs
    assert report.verdict is pair.verdict is verdict
    assert pair.evidence == "probe"
    assert pair.risk == max(effect.loss for effect in result.overall.effects)
    assert pair.risk_stderr == result.overall.worst.loss_stderr
    assert pair.interval == result.overall.risk
    assert pair.interval.low <= pair.risk <= pair.interval.high


@pytest.mark.parametrize(
    "measured", [outcome(nan, nan, -1.0, 0.1), outcome(inf, 0.0, -1.0, nan), outcome(0.0, 1.0, nan, nan)]
)
def test_nats_that_are_not_finite_are_harmful(measured: ProbeResult) -> None:
    assert measured.overall.verdict(Limits()) is Verdict.WARN


def test_a_pair_that_warns_by_a_guard_alone_gets_advice(red: LoadedAdapter, green: LoadedAdapter) -> None:
    report = conflicts([red, green], [1.0, 1.0], evidence=outcome(0.0, 1.0, 0.6, 0.03))
    assert codes(report) == {"probe_guard": Severity.WARNING}
    advised = " ".join(report.pairs[0].explanation.advice)
    assert "--set lambda=0.7" in advised
    assert "protect" not in advised, "no member is harmed"


def test_the_verdict_of_a_set_is_its_worst_pairs(red: LoadedAdapter, green: LoadedAdapter, load: Load) -> None:
    harmless, harmed = outcome(0.0, 1.0, -1.0, 0.001).overall, outcome(2.0, 0.2, -1.0, 0.01).overall
    blue = load("blue", 5)
    with_blue = replace(harmed, effects=(harmed.effects[0], replace(harmed.effects[1], member="blue")))
    third = replace(harmless, effects=(replace(harmless.effects[0], member="blue"), harmless.effects[1]))
    together = replace(harmless, effects=(*harmless.effects, third.effects[0]))
    measured = ProbeResult(8, (harmless, with_blue, third), together, 1.0)
    report = conflicts([red, green, blue], [1.0] * 3, evidence=measured)
    assert [pair.verdict for pair in report.pairs] == [Verdict.OK, Verdict.WARN, Verdict.OK]
    assert report.verdict is Verdict.WARN
    assert text.summary(report).lines[0] == "red + blue (worst of 4 combinations)"
    alone = conflicts([red, green, blue], [1.0] * 3, evidence=replace(measured, pairs=(harmless, third, third)))
    assert alone.verdict is Verdict.OK


def test_a_policy_says_how_much_may_be_lost_and_how_severe_that_is(red: LoadedAdapter, green: LoadedAdapter) -> None:
    result = outcome(loss=0.5, kept=0.8, rise=-1.0, stderr=0.01)
    strict = parse_policy("{probe_loss: error, thresholds: {probe_loss: 0.1}}")
    report = conflicts([red, green], [1.0, 1.0], evidence=result, policy=strict)
    assert (report.verdict, codes(report)["probe_loss"]) == (Verdict.REFUSE, Severity.ERROR)
    ignored = conflicts([red, green], [1.0, 1.0], evidence=result, policy=parse_policy("probe_loss: ignore"))
    assert (ignored.verdict, codes(ignored)) == (Verdict.OK, {})
    of_gain = parse_policy("thresholds: {probe_loss: 0.5 of gain}")
    half = conflicts([red, green], [1.0, 1.0], evidence=result, policy=of_gain)
    assert (half.verdict, codes(half)) == (Verdict.OK, {"probe_loss": Severity.NOTICE})


def test_the_summary_fits_a_screen(red: LoadedAdapter, green: LoadedAdapter) -> None:
    harmed = outcome(1.5, 0.4, 0.6, 0.1).overall
    effects = tuple(replace(effect, answered=8, still_answered=2) for effect in harmed.effects)
    result = ProbeResult(8, (replace(harmed, effects=effects),), replace(harmed, effects=effects), 1.5)
    summary = text.summary(conflicts([red, green], [1.0, 1.0], evidence=result))
    assert summary.headline == "warn, measured on 8 examples a suite in 2 s"
    assert summary.lines == (
        "red + green",
        "red: exact match retained on 2 of 8 (5% to 60%), 90% required",
        "red loses 1.50 nats a token (1.22 to 1.78), 0.10 allowed",
        "guard general rises 0.60 nats a token (0.36 to 0.84), 0.05 allowed",
        "guard general costs 0.80 nats of general ability (base 0.70)",
    )
    assert "protect" in summary.fix or "regmean" in summary.fix
    unmeasured = text.summary(conflicts([red, green], [1.0, 1.0]))
    assert unmeasured.headline == "unmeasured"
    assert unmeasured.fix == "Measure it: --probe 8 (probe: 8 in a recipe), with a suite for each."
    assert all(len(line) < 80 for line in (*summary.lines, *unmeasured.lines))


def test_the_headline_says_who_suffers_and_the_first_table_is_the_measurement(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    report = conflicts([red, green], [1.0, 1.0], evidence=outcome(1.5, 0.4, 0.6, 0.1))
    verdict, headline = text.headlines(report)
    assert verdict == "Verdict: warn."
    assert headline.startswith("red + green: risk +1.50 [+1.22, +1.78] nats per token, measured: red suffers")
    assert headline.endswith("suffers, 40% of its gain is left.")
    first, *others = text.tables(report)
    assert first.title == "Probe"
    assert first.rows[0] == (
        "red + green",
        "red-exact",
        "8",
        "3.00",
        "0.50",
        "2.00",
        "+1.50 [+1.22, +1.78]",
        "40%",
        "-",
    )
    assert first.rows[2] == (
        "red + green",
        "general (guard)",
        "8",
        "0.70",
        "0.90",
        "1.50",
        "+0.60 [+0.36, +0.84]",
        "-",
        "-",
    )
    for table in (first, *others):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_answering_as_well_as_alone_is_said_of_intervals(red: LoadedAdapter, green: LoadedAdapter) -> None:
    sure = conflicts([red, green], [1.0, 1.0], evidence=outcome(0.0, 1.0, -1.0, 0.001))
    assert text.headlines(sure)[1].endswith("both answer their own suites as well as alone.")
    assert text.advice(sure) == []
    open_ = conflicts([red, green], [1.0, 1.0], evidence=outcome(0.0, 1.0, -1.0, 0.1))
    assert text.headlines(open_)[1].endswith("no certain loss on 8 examples.")
    assert text.advice(open_) == [
        "red + green: Undecided: measure more examples (--probe-max 32), if red-exact has them."
    ]


def test_the_coverage_of_the_intervals_is_printed_and_what_they_are_not_corrected_for(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    pair = text.tables(conflicts([red, green], [1.0, 1.0], evidence=outcome(0.0, 1.0, -1.0, 0.001)))[0]
    assert "both members' intervals held together with frequency 0." in pair.note
    assert "not corrected" not in pair.note
    assert text.coverage(4).endswith("They are not corrected for 4 combinations.")


def test_a_damaged_pair_gets_advice_that_names_positions_modules_and_settings(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    report = conflicts([green, red], [1.0, 1.0], evidence=outcome(2.0, 0.2, -1.0, 0.1))
    advice = " ".join(report.pairs[0].explanation.advice)
    assert "--set protect=2" in advice, "red, the one that suffers, is the second one here"
    assert "--set lambda=0.7" in advice
    share = report.pairs[0].explanation.shares
    assert list(share) == [module for module in share if module.endswith("q_proj")], "they meet nowhere else"
    assert sum(share.values()) == pytest.approx(1.0)
    assert list(share.values()) == sorted(share.values(), reverse=True)
