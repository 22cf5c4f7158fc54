"""Findings of a probe about answers, about the complete set, and about adapters without factors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, get_peft_model

from composer.conflicts.evidence.interval import interval
from composer.conflicts.evidence.outcome import Effect, Limits, Outcome
from composer.conflicts.evidence.probe import ProbeResult
from composer.conflicts.findings import of_outcome
from composer.conflicts.render.html import page
from composer.conflicts.render.text import document, headlines, tables
from composer.conflicts.report import conflicts
from composer.deltas.delta import RowwiseDelta
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.findings import Verdict
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.policy import Policy, parse_policy
from tests.composer.small_model import Load
from tests.composer.tiny import MakeModel, load_model


def answering(answered: int, still: int) -> Outcome:
    """Red loses far less than half of its gain in nats, but some of its answers."""
    effects = (
        Effect(
            member="red",
            suite="red-exact",
            base=3.0,
            alone=0.1,
            combined=0.4,
            loss=0.3,
            loss_stderr=0.01,
            loss_interval=interval(0.3, 0.01, 16, 2),
            kept=0.9,
            answered=answered,
            still_answered=still,
            examples=16,
        ),
        Effect(
            member="green",
            suite="green-exact",
            base=2.0,
            alone=0.4,
            combined=0.4,
            loss=0.0,
            loss_stderr=0.001,
            loss_interval=interval(0.0, 0.001, 16, 2),
            kept=1.0,
            answered=40,
            still_answered=40,
            examples=40,
        ),
    )
    return Outcome(16, effects, ())


OLD = parse_policy("thresholds: {probe_loss: 0.5 of gain, probe_answers: 0.5 by interval}")


def answers_said(answered: int, still: int, policy: Policy) -> list[str]:
    findings = of_outcome(answering(answered, still), policy)
    assert all(
        f"{still} of the {answered}" in finding.message for finding in findings if finding.code == "probe_answers"
    )
    return [finding.code for finding in findings if finding.code != "probe_loss"]


@pytest.mark.parametrize(
    ("answered", "still", "said"),
    [
        (13, 0, ["probe_answers"]),
        (20, 18, ["probe_open"]),
        (16, 12, ["probe_open"]),
        (16, 11, ["probe_answers"]),
        (16, 16, ["probe_open"]),
        (29, 29, []),
        (60, 59, []),
        (60, 58, ["probe_open"]),
        (7, 7, ["few_answers"]),
        (1, 0, ["few_answers"]),
        (2, 0, ["probe_answers"]),
        (0, 0, []),
    ],
)
def test_the_interval_of_the_share_decides_whether_nine_in_ten_are_left_and_few_answers_leave_it_to_the_loss(
    answered: int, still: int, said: list[str]
) -> None:
    assert answers_said(answered, still, parse_policy("thresholds: {probe_loss: 1}")) == said


@pytest.mark.parametrize(
    ("answered", "still", "said"),
    [
        (13, 0, ["probe_answers"]),
        (5, 0, ["probe_answers"]),
        (4, 0, ["few_answers"]),
        (3, 1, ["few_answers"]),
        (16, 9, []),
        (0, 0, []),
    ],
)
def test_a_policy_may_ask_for_the_interval_of_the_share_and_for_half_of_the_gain(
    answered: int, still: int, said: list[str]
) -> None:
    assert answers_said(answered, still, OLD) == said
    assert Limits.of(OLD) == Limits(loss=0.5, answers=0.5, of_gain=True, by_interval=True)
    assert answering(1, 1).effects[0].limit(Limits.of(OLD)) == pytest.approx(1.45)


@pytest.mark.parametrize(
    ("least", "still", "said"),
    [
        (0.75, 8, ["probe_answers"]),
        (0.75, 9, ["probe_open"]),
        (0.75, 15, ["probe_open"]),
        (0.75, 16, []),
        (0.2, 7, []),
        (0.2, 4, ["probe_open"]),
        (0.2, 0, ["probe_answers"]),
        (0, 0, []),
        (-1, 0, []),
    ],
)
def test_a_policy_says_what_share_of_the_answers_has_to_be_left(least: float, still: int, said: list[str]) -> None:
    assert answers_said(16, still, parse_policy(f"thresholds: {{probe_loss: 1, probe_answers: {least}}}")) == said


def test_the_share_that_is_left_is_printed_with_its_interval() -> None:
    (answers,) = [finding for finding in of_outcome(answering(13, 4), Policy()) if finding.code == "probe_answers"]
    assert "4 of the 13 examples" in answers.message
    assert "(11% to 57% of all)" in answers.message
    share = answering(13, 4).to_json(Limits())["effects"][0]["answers_interval"]  # pyright: ignore[reportIndexIssue]
    assert share == pytest.approx({"low": 0.1127, "high": 0.5726}, abs=1e-4)


def test_what_is_open_is_named_with_its_numbers() -> None:
    (answers,) = [finding for finding in of_outcome(answering(12, 9), Policy()) if finding.code == "probe_open"]
    assert "open after 16 examples whether red retains 90% of its exact match" in answers.message
    assert answers.message.endswith("(9 of 12 so far; at least 29 exact matches are needed to decide).")
    assert (answers.subject, answers.measure) == ("red + green: red", 0.75)
    (few,) = [finding for finding in of_outcome(answering(4, 3), Policy()) if finding.code == "few_answers"]
    assert "red is judged by its loss alone: it answers 4 of 16 examples of red-exact exactly" in few.message
    wide = replace(answering(9, 9).effects[0], loss_interval=interval(0.3, 1.0, 16, 2))
    (loss,) = of_outcome(Outcome(16, (replace(wide, answered=0, still_answered=0),), ()), Policy())
    assert "whether red loses more than 0.10 nats a token on red-exact (between -" in loss.message
    both = of_outcome(Outcome(16, (replace(wide, answered=12, still_answered=9),), ()), Policy())
    assert [finding.measure for finding in both] == [0.3, 0.75]


def test_an_open_question_makes_the_verdict_undecided_whatever_its_finding_is(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    lossless = replace(answering(9, 9).effects[0], loss=0.0, loss_interval=interval(0.0, 0.001, 16, 2))
    outcome = Outcome(16, (lossless, answering(9, 9).effects[1]), ())
    measured = ProbeResult(16, (outcome,), outcome, 1.0)
    report = conflicts([red, green], [1.0, 1.0], evidence=measured)
    assert (report.verdict, report.pairs[0].verdict) == (Verdict.UNDECIDED, Verdict.UNDECIDED)
    assert headlines(report)[0] == "Verdict: undecided."
    assert "undecided" in page(document(report))
    quiet = conflicts([red, green], [1.0, 1.0], evidence=measured, policy=parse_policy("probe_open: ignore"))
    assert (quiet.verdict, quiet.findings) == (Verdict.UNDECIDED, ())
    failing = conflicts([red, green], [1.0, 1.0], evidence=measured, policy=parse_policy("probe_open: error"))
    assert headlines(failing)[0] == "Verdict: refuse."
    unasked = conflicts([red, green], [1.0, 1.0], evidence=measured, policy=parse_policy("probe_answers: ignore"))
    assert unasked.verdict is Verdict.OK, "what a policy ignores raises no question"


def test_what_a_members_own_weight_takes_is_reported_beside_its_loss(red: LoadedAdapter, green: LoadedAdapter) -> None:
    lowered = replace(answering(0, 0).effects[0], alone_weighted=0.3)
    outcome = Outcome(16, (lowered, answering(0, 0).effects[1]), ())
    report = conflicts([red, green], [0.7, 1.0], evidence=ProbeResult(16, (outcome,), outcome, 1.0))
    (loss,) = report.findings
    assert "(0.10 alone, 0.40 combined), of which its own weight causes +0.20;" in loss.message
    assert "of which its own weight causes +0.20" in report.pairs[0].explanation.meaning
    assert "0.10 (0.30 at its weight)" in tables(report)[0].rows[0]


def test_what_was_measured_of_the_whole_set_is_said_before_the_pairs(
    red: LoadedAdapter, green: LoadedAdapter, load: Load
) -> None:
    measured = ProbeResult(16, (answering(16, 16),), answering(13, 0), 1.0)
    report = conflicts([red, green, load("blue", 5)], [1.0] * 3, evidence=measured)
    assert headlines(report)[1].startswith("All together: risk +0.30")
    assert "red: exact match retained on 0 of 13" in headlines(report)[1]
    shown = page(document(report))
    assert shown.index("All together") < shown.index("red + green</th>")
    assert "<td>0 of 13</td>" in shown


def test_the_whole_set_has_advice_of_its_own(red: LoadedAdapter, green: LoadedAdapter, load: Load) -> None:
    harmed = answering(13, 0)
    lossless = replace(harmed.effects[1], member="red")
    fine = Outcome(16, (lossless, harmed.effects[1]), ())
    three, weights = [red, green, load("blue", 5)], [1.0] * 3
    together = conflicts(three, weights, evidence=ProbeResult(16, (fine,), harmed, 1.0))
    assert (together.verdict, together.pairs[0].explanation.advice) == (Verdict.WARN, ())
    assert together.advice[0].startswith("Fit the combination on the members' own examples")
    assert "Shrink the sum: --set lambda=0.7, or --method mean." in together.advice
    a_pair = conflicts(three, weights, evidence=ProbeResult(16, (harmed,), fine, 1.0))
    assert a_pair.advice
    assert all(line.startswith("red + green: ") for line in a_pair.advice)
    both = conflicts([red, green], [1.0, 1.0], evidence=ProbeResult(16, (harmed,), harmed, 1.0))
    assert both.advice == both.pairs[0].explanation.advice
    assert conflicts(three, weights, evidence=ProbeResult(16, (fine,), fine, 1.0)).advice == ()
    unmeasured = conflicts(three, weights)
    assert unmeasured.advice[0].startswith("Measure it")
    assert unmeasured.advice[1].startswith("Without a measurement, take the mean"), "a sum of three"
    assert unmeasured.to_json()["whole"]["advice"] == list(unmeasured.advice)


def test_the_json_of_a_probe_says_what_each_member_and_guard_may_lose(red: LoadedAdapter, green: LoadedAdapter) -> None:
    outcome = answering(13, 4)
    measured = ProbeResult(16, (outcome,), outcome, 1.0)
    report = conflicts(
        [red, green], [1.0, 1.0], evidence=measured, policy=parse_policy("thresholds: {probe_loss: 0.2}")
    )
    first = report.to_json()["whole"]["probe"]["effects"][0]
    assert (first["tolerated"], first["answers_required"], first["verdict"]) == (0.2, 0.9, "warn")
    free = conflicts([red, green], [1.0, 1.0], evidence=measured, policy=parse_policy("probe_loss: ignore"))
    assert free.to_json()["whole"]["probe"]["effects"][0]["tolerated"] is None


def test_adapters_without_factors_have_an_unknown_risk_and_not_none(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model()
    twins: list[LoadedAdapter] = []
    for name in ("a", "b"):
        torch.manual_seed(1)
        config = LoHaConfig(r=2, alpha=4, target_modules=["q_proj"], init_weights=False)
        get_peft_model(load_model(base), config).save_pretrained(tmp_path / name)
        twins.append(load_deltas(tmp_path / name, open_checkpoint(base).architecture))
    report = conflicts(twins, [1.0, 1.0])
    assert report.pairs[0].risk is None
    assert json.loads(json.dumps(report.to_json()))["pairs"][0]["risk"] is None
    assert "risk unknown" in headlines(report)[1]


def test_advice_names_no_method_that_wants_factors_where_an_adapter_has_none(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    measured = ProbeResult(16, (answering(13, 0),), answering(13, 0), 1.0)
    advised = " ".join(conflicts([red, green], [1.0, 1.0], evidence=measured).pairs[0].explanation.advice)
    assert "protect=1" in advised
    assert "knots_ties" in advised
    other = RowwiseDelta(
        module="model.layers.0.mlp.up_proj",
        weight="model.layers.0.mlp.up_proj.weight",
        stored_shape=(48, 32),
        rows=lambda W, _: W,
    )
    computed = replace(green, deltas=(*green.deltas, other))
    advised = " ".join(conflicts([red, computed], [1.0, 1.0], evidence=measured).pairs[0].explanation.advice)
    assert "--method ties" in advised
    assert "protect" not in advised
