"""Conflict reports on real PEFT adapters of a tiny model, and their messages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from composer.conflicts.evidence.probe import Probed, probe
from composer.conflicts.findings import of_pair
from composer.conflicts.render import text
from composer.conflicts.report import ConflictReport, conflicts
from composer.deltas.delta import LowRank, RowwiseDelta
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.errors import Mismatch, NotSupported
from composer.evaluation.model import load_model
from composer.findings import Severity, Verdict
from composer.formats.recipes.methods import effective_weights, parse_settings
from composer.formats.recipes.policy import DROPPED, parse_policy
from composer.formats.recipes.suite import Example, Suite
from composer.formats.recipes.weights import Weight, parse_rule
from composer.methods.combine import combine_deltas
from tests.composer.adapted import save_adapted
from tests.composer.small_model import Load, dense, scaled
from tests.composer.tiny import MakeModel
from tests.device import DEVICE


def codes(report: ConflictReport) -> dict[str, Severity]:
    return {finding.code: finding.severity for finding in report.findings}


def stacked(adapter: LoadedAdapter, modules: list[str]) -> torch.Tensor:
    by_module = {delta.module: dense(delta) for delta in adapter.deltas}
    return torch.cat([by_module[module].flatten() for module in modules if module in by_module])


def test_a_pairs_numbers_are_those_of_the_dense_deltas(red: LoadedAdapter, green: LoadedAdapter) -> None:
    (pair,) = conflicts([red, green], [1.0, 0.5]).pairs
    shared = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    everything = [f"model.layers.{layer}.self_attn.{p}_proj" for layer in (0, 1) for p in "qvo"]
    A, B = stacked(red, everything), stacked(green, everything)
    inner = (stacked(red, shared) @ stacked(green, shared)).item()
    energies = (A @ A).item(), 0.25 * (B @ B).item()
    assert list(pair.modules) == shared
    assert pair.numbers.cosine == pytest.approx(inner / (A.norm() * B.norm()).item())
    assert pair.numbers.interference == pytest.approx(1 + inner / sum(energies))
    assert pair.numbers.dominance == pytest.approx(max(energies) / sum(energies))


def test_without_a_probe_the_verdict_is_unmeasured_and_no_risk_is_known(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    report = conflicts([red, green], [1.0, 1.0])
    assert report.verdict is report.pairs[0].verdict is Verdict.UNMEASURED
    assert report.pairs[0].evidence == "weights"
    assert report.pairs[0].risk is None
    assert codes(report) == {"weak_evidence": Severity.NOTICE}
    assert report.pairs[0].interval is None
    assert "risk unknown" in text.headlines(report)[1]


def test_the_same_adapter_twice_is_a_warning_since_the_sum_overshoots(red: LoadedAdapter) -> None:
    report = conflicts([red, scaled(red, 1.1, "again")], [1.0, 1.0])
    assert report.verdict is Verdict.WARN
    assert report.pairs[0].numbers.cosine == pytest.approx(1.0)
    assert report.together.interference == pytest.approx(1 + 2.2 / 2.21)
    assert codes(report)["near_duplicate"] is Severity.WARNING
    (same,) = [finding for finding in report.findings if finding.code == "near_duplicate"]
    assert "point the same way (cosine 1.00)" in same.message
    assert "one task trained twice" in same.message


@pytest.mark.parametrize(
    ("cosine", "said"),
    [
        (0.001, "are barely related (cosine 0.00)"),
        (0.09, "are barely related (cosine 0.09)"),
        (0.3, "point partly the same way (cosine 0.30)"),
        (0.7, "point mostly the same way (cosine 0.70)"),
        (1.0, "point the same way (cosine 1.00)"),
    ],
)
def test_a_lowered_threshold_makes_nobody_alike(
    red: LoadedAdapter, green: LoadedAdapter, cosine: float, said: str
) -> None:
    """The policy may request the finding at any cosine; its text must still be true."""
    numbers = replace(conflicts([red, green], [1.0, 1.0]).pairs[0].numbers, dominance=0.5, interference=1 + cosine)
    (report,) = of_pair(("red", "green"), numbers, None, parse_policy("thresholds: {near_duplicate: -1, dominance: 2}"))
    assert said in report.message
    assert f"{1 + cosine:.2f} times the energy" in report.message
    assert ("one task trained twice" in report.message) is (cosine >= 0.5)


def test_advice_to_keep_one_of_two_is_for_those_that_do_the_same(red: LoadedAdapter, green: LoadedAdapter) -> None:
    low = parse_policy("thresholds: {near_duplicate: -1}")
    reports = [conflicts([red, other], [1.0, 1.0], policy=low) for other in (green, scaled(red, 1.1, "again"))]
    assert ["keep one" in " ".join(text.advice(report)) for report in reports] == [False, True]


def test_an_adapter_that_adds_nothing_is_named(red: LoadedAdapter, green: LoadedAdapter) -> None:
    report = conflicts([red, scaled(green, 0.0, "idle")], [1.0, 1.0])
    (zero,) = [finding for finding in report.findings if finding.code == "zero_delta"]
    assert (zero.subject, zero.severity, zero.measure) == ("idle", Severity.WARNING, 4.0)
    assert report.pairs[0].modules == {}
    json.dumps(report.to_json(), allow_nan=False)


def test_an_adapter_that_brings_most_of_the_energy_is_noticed_and_not_failed(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    report = conflicts([red, scaled(green, 30.0, "loud")], [1.0, 1.0])
    assert report.verdict is Verdict.UNMEASURED
    assert codes(report)["dominance"] is Severity.NOTICE
    assert report.members[1].share == pytest.approx(report.pairs[0].numbers.dominance)
    assert "dominance" not in codes(conflicts([red, scaled(green, 30.0, "loud")], [30.0, 1.0]))


def test_a_nan_is_an_error_naming_the_module(red: LoadedAdapter, green: LoadedAdapter) -> None:
    first = green.deltas[0]
    assert isinstance(first, LowRank)
    broken = replace(green, deltas=(replace(first, B=first.B_OR * float("nan")), *green.deltas[1:]))
    report = conflicts([red, broken], [1.0, 1.0])
    assert report.verdict is Verdict.REFUSE
    assert [finding.subject for finding in report.findings if finding.code == "not_finite"] == [first.module]
    json.dumps(report.to_json(), allow_nan=False)


def test_numbers_too_large_to_compare_are_refused_with_the_module(red: LoadedAdapter) -> None:
    first, *others = (delta for delta in red.deltas if isinstance(delta, LowRank))
    huge = replace(first, A=first.A_RI.double() * 1e100, B=first.B_OR.double() * 1e100)
    with pytest.raises(NotSupported, match="cannot be decomposed") as caught:
        conflicts([replace(red, deltas=(huge, *others)), replace(red, name="other")], [1.0, 1.0])
    assert (caught.value.code, caught.value.subject) == ("not_decomposable", first.module)


def test_two_whole_copies_of_one_tensor_refuse_and_are_remarked_first(load: Load) -> None:
    saved = [load(name, seed, modules_to_save=["lm_head"]) for name, seed in (("one", 3), ("two", 4))]
    report = conflicts(saved, [1.0, 1.0])
    assert report.verdict is Verdict.REFUSE
    first = text.remarks(report.findings)[0]
    assert first.startswith("error: ")
    assert "lm_head" in first


def test_the_whole_set_and_every_pair_are_reported_for_three(
    load: Load, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    report = conflicts([red, green, load("blue", 5)], [1.0, 1.0, 0.5])
    assert [(pair.a, pair.b) for pair in report.pairs] == [("red", "green"), ("red", "blue"), ("green", "blue")]
    assert sum(member.share for member in report.members) == pytest.approx(1.0)


def test_a_report_has_the_contracts_shape(red: LoadedAdapter, green: LoadedAdapter) -> None:
    document = json.loads(json.dumps(conflicts([red, green], [1.0, 1.0]).to_json(), allow_nan=False))
    assert {"verdict", "pairs", "findings"} <= document.keys()
    assert document["schema"] == 3
    module_numbers = {"cosine", "input_overlap", "output_overlap", "dominance", "interference"}
    assert {"a", "b", "risk", "evidence", "modules"} | module_numbers <= document["pairs"][0].keys()
    assert {"module"} | module_numbers <= document["pairs"][0]["modules"][0].keys()
    assert document["findings"][0].keys() == {"code", "severity", "subject", "message", "measure"}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0]])
def test_weights_that_do_not_match_the_adapters_are_refused(
    red: LoadedAdapter, green: LoadedAdapter, weights: list[float]
) -> None:
    with pytest.raises(Mismatch, match="one weight each"):
        conflicts([red, green], weights)


def test_no_adapter_or_two_of_one_name_are_refused(red: LoadedAdapter) -> None:
    for adapters in ([], [red, red]):
        with pytest.raises(Mismatch, match="adapters with different names"):
            conflicts(adapters, [1.0] * len(adapters))


def test_one_adapter_alone_is_checked_for_what_it_cannot_be_merged_with(red: LoadedAdapter) -> None:
    report = conflicts([red], [1.0])
    assert (report.pairs, report.verdict) == ((), Verdict.UNMEASURED)


@pytest.mark.parametrize("code", ["input_overlap", "output_overlap", "low_retention"])
def test_a_number_without_evidence_warns_only_where_a_policy_gives_a_threshold(
    red: LoadedAdapter, green: LoadedAdapter, code: str
) -> None:
    loud = 2.0 if code == "low_retention" else -1.0
    policy = parse_policy(json.dumps({"thresholds": {code: loud}}))
    assert codes(conflicts([red, green], [1.0, 1.0], policy=policy))[code] is Severity.WARNING
    assert code not in codes(conflicts([red, green], [1.0, 1.0]))


@pytest.mark.parametrize("code", sorted(DROPPED))
def test_a_policy_may_name_a_dropped_code_and_a_notice_says_that_it_does_nothing(
    red: LoadedAdapter, green: LoadedAdapter, code: str
) -> None:
    policy = parse_policy(json.dumps({code: "error", "thresholds": {code: -1}}))
    report = conflicts([red, green], [1.0, 1.0], policy=policy)
    assert report.verdict is Verdict.UNMEASURED
    (notice,) = [finding for finding in report.findings if finding.code == "dropped_code"]
    assert (notice.severity, notice.subject) == (Severity.NOTICE, code)
    assert f"The policy names {code}" in notice.message
    assert "dropped_code" not in codes(conflicts([red, green], [1.0, 1.0]))


def test_a_loud_adapter_gets_advice_of_the_weight_that_makes_both_equally_loud(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    loud = scaled(green, 30.0, "loud")
    (advice,) = [line for line in conflicts([red, loud], [1.0, 1.0]).pairs[0].explanation.advice if "louder" in line]
    factor = float(advice.split(": ")[1].split(" times")[0])
    assert "number 2" in advice
    assert conflicts([red, loud], [1.0, factor]).pairs[0].numbers.dominance == pytest.approx(0.5, abs=0.02)


def test_an_adapter_of_weight_zero_drowns_in_nothing(red: LoadedAdapter, green: LoadedAdapter) -> None:
    report = conflicts([red, green], [1.0, 0.0])
    assert "dominance" not in codes(report)
    assert not any("equally loud" in line for line in report.pairs[0].explanation.advice)


def test_weights_by_module_count_in_every_weighted_number(red: LoadedAdapter, green: LoadedAdapter) -> None:
    silent = Weight(1.0, (parse_rule("q_proj=0"),))
    report = conflicts([red, green], [1.0, silent])
    assert report.pairs[0].modules["model.layers.0.self_attn.q_proj"].dominance == 1.0
    assert report.pairs[0].numbers.interference == pytest.approx(1.0), "where both are, one has the weight 0"
    assert report.members[0].retention == pytest.approx(1.0)
    assert report.members[1].retention is not None
    assert 0 < report.members[1].retention < 1


def test_layers_are_sums_over_their_modules(red: LoadedAdapter, green: LoadedAdapter) -> None:
    (pair,) = conflicts([red, green], [1.0, 1.0]).pairs
    assert list(pair.layers) == [("model.layers", 0), ("model.layers", 1)]
    own = [layer.retention_b for layer in pair.layers.values()]
    assert min(own) < pair.numbers.retention_b < max(own), "a quotient of sums"


@pytest.mark.parametrize("method", ["ties", "core_tsv", "svd", "linear"])
def test_retention_is_of_what_the_method_makes(red: LoadedAdapter, green: LoadedAdapter, method: str) -> None:
    report = conflicts([red, green], [1.0, 0.5], parse_settings(method))
    combined = combine_deltas([red, green], [1.0, 0.5], method).deltas
    everything = sorted({delta.module for adapter in (red, green) for delta in adapter.deltas})
    M = torch.cat([sum(dense(d) for d in combined if d.module == module).flatten() for module in everything])
    for member, adapter in zip(report.members, (red, green), strict=True):
        own = {delta.module: dense(delta) for delta in adapter.deltas}
        shapes = {delta.module: dense(delta).shape for delta in combined}
        D = torch.cat([own.get(module, torch.zeros(shapes[module])).flatten() for module in everything])
        assert member.retention == pytest.approx(((M @ D) / (D @ D)).item(), rel=1e-4)


@pytest.mark.parametrize("method", ["stack", "ties", "svd"])
def test_two_that_train_one_token_are_a_finding_whatever_the_method(
    tmp_path: Path, make_model: MakeModel, method: str
) -> None:
    base = make_model()
    loaded = [
        load_deltas(save_adapted(base, LoraConfig(trainable_token_indices=rows), tmp_path / name), None)
        for name, rows in (("one", [1, 5]), ("two", [5, 9]))
    ]
    report = conflicts(loaded, [1.0, 1.0], parse_settings(method))
    assert [finding.code for finding in report.findings if finding.severity is Severity.ERROR] == ["token_conflict"]
    assert report.verdict is Verdict.REFUSE


def test_a_mean_tells_the_weights_that_it_comes_to(red: LoadedAdapter, green: LoadedAdapter) -> None:
    report = conflicts([red, green], [1.0, 3.0], parse_settings("mean"))
    assert [member.to_json()["weight"] for member in report.members] == [0.25, 0.75]
    ruled = Weight(1.0, (parse_rule("q_proj=0"),))
    member = conflicts([red, green], [1.0, ruled], parse_settings("mean")).members[0].to_json()
    assert member["weight"] == {"value": 1.0, "rules": [], "among": [1.0, ruled.to_json()]}
    assert effective_weights([1.0, 1.0], parse_settings("mean"))[0].times(2.0).of("m") == 1.0


def test_deltas_without_factors_are_left_out_and_named(red: LoadedAdapter, green: LoadedAdapter) -> None:
    other = RowwiseDelta(
        module="model.layers.0.mlp.up_proj",
        weight="model.layers.0.mlp.up_proj.weight",
        stored_shape=(48, 32),
        rows=lambda W, _: W,
    )
    report = conflicts([red, replace(green, deltas=(*green.deltas, other))], [1.0, 1.0])
    (finding,) = [finding for finding in report.findings if finding.code == "not_factors"]
    assert (finding.subject, finding.measure) == ("green", 1.0)
    assert report.pairs[0].numbers == conflicts([red, green], [1.0, 1.0]).pairs[0].numbers
    alone = conflicts([red, replace(green, deltas=(other,))], [1.0, 1.0]).members[1]
    assert (alone.retention, alone.share) == (None, 0.0), "nothing is known of it, and no number says there is"


def test_the_rows_of_a_report_are_bounded_and_the_modules_that_matter_stay(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    report = conflicts([red, green], [1.0, 1.0])
    (pair,) = report.pairs
    rows = pair.to_json(report.limits, most=1)["modules"]
    assert isinstance(rows, list)
    assert [row["module"] for row in rows] == [next(iter(pair.explanation.shares))]


def test_a_real_probe_goes_into_the_report_of_its_own_adapters(
    base: Path, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    suites = [
        Suite(name=name, kind="target", chat=True, examples=(Example("hi", name), Example("you", name)))
        for name in ("red", "green")
    ]
    members = [
        Probed(adapter.name, adapter.deltas, 1.0, suite) for adapter, suite in zip((red, green), suites, strict=True)
    ]
    loaded = load_model(base, device=DEVICE)
    report = conflicts([red, green], [1.0, 1.0], evidence=probe(lambda: loaded, members, effort=2))
    assert report.pairs[0].evidence == "probe"
    assert "weak_evidence" not in codes(report)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["pairs"][0]["probe"]["effects"][0]["member"] == "red"
    assert document["whole"]["probe"] == document["pairs"][0]["probe"]
