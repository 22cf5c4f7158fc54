"""Conflict reports on real PEFT adapters of a tiny model, and what is said about them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from composer import report
from composer.conflicts import ConflictReport, conflicts
from composer.delta import LowRank
from composer.errors import Mismatch
from composer.evaluate import load_model
from composer.findings import Severity, Verdict
from composer.probe import Effect, Member, Outcome, ProbeResult, SideEffect, probe
from composer.suite import Example, Suite
from composer.variants import LoadedAdapter, load_deltas
from tests.composer.small_model import save_adapter, save_llama

Load = Callable[..., LoadedAdapter]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def load(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Load:
    architecture = load_model(base, device="cpu").architecture

    def load(name: str, seed: int, **config: object) -> LoadedAdapter:
        directory = tmp_path_factory.mktemp("adapters") / name
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **config}
        save_adapter(AutoModelForCausalLM.from_pretrained(base), directory, seed, **settings)
        return replace(load_deltas(directory, architecture), name=name)

    return load


@pytest.fixture(scope="module")
def red(load: Load) -> LoadedAdapter:
    return load("red", 1)


@pytest.fixture(scope="module")
def green(load: Load) -> LoadedAdapter:
    return load("green", 2, r=2, target_modules=["q_proj", "o_proj"])


def scaled(adapter: LoadedAdapter, factor: float, name: str) -> LoadedAdapter:
    deltas = tuple(replace(d, scale=d.scale * factor) for d in adapter.deltas if isinstance(d, LowRank))
    return replace(adapter, name=name, deltas=deltas)


def codes(found: ConflictReport) -> dict[str, Severity]:
    return {finding.code: finding.severity for finding in found.findings}


def stacked(adapter: LoadedAdapter, modules: list[str]) -> torch.Tensor:
    by_module = {
        d.module: d.scale * d.B_OR.double() @ d.A_RI.double() for d in adapter.deltas if isinstance(d, LowRank)
    }
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
    assert (pair.numbers.norm_a, pair.numbers.norm_b) == pytest.approx((A.norm().item(), B.norm().item()))


def test_without_a_probe_the_risk_is_labelled_weak_evidence(red: LoadedAdapter, green: LoadedAdapter) -> None:
    found = conflicts([red, green], [1.0, 1.0])
    assert found.verdict is Verdict.OK
    assert found.pairs[0].evidence == "weights"
    assert 0 <= found.pairs[0].risk <= 1
    assert codes(found) == {"weak_evidence": Severity.NOTICE}
    assert "weak evidence" in report.headlines(found)[1]


def test_the_same_adapter_twice_is_a_warning_since_the_sum_overshoots(red: LoadedAdapter) -> None:
    found = conflicts([red, scaled(red, 1.1, "again")], [1.0, 1.0])
    assert found.verdict is Verdict.WARN
    assert found.pairs[0].numbers.cosine == pytest.approx(1.0)
    assert found.interference == pytest.approx(1 + 2.2 / 2.21)
    assert codes(found)["near_duplicate"] is Severity.WARNING


def test_an_adapter_that_adds_nothing_is_named(red: LoadedAdapter, green: LoadedAdapter) -> None:
    found = conflicts([red, scaled(green, 0.0, "idle")], [1.0, 1.0])
    (zero,) = [finding for finding in found.findings if finding.code == "zero_delta"]
    assert (zero.subject, zero.severity, zero.measure) == ("idle", Severity.WARNING, 4.0)
    assert found.pairs[0].modules == {}
    json.dumps(found.to_json(), allow_nan=False)


def test_an_adapter_that_brings_most_of_the_energy_is_noticed_and_not_failed(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    found = conflicts([red, scaled(green, 30.0, "loud")], [1.0, 1.0])
    assert found.verdict is Verdict.OK
    assert codes(found)["dominance"] is Severity.NOTICE
    assert found.shares["loud"] == pytest.approx(found.pairs[0].numbers.dominance)
    assert "dominance" not in codes(conflicts([red, scaled(green, 30.0, "loud")], [30.0, 1.0]))


def test_a_nan_is_an_error_naming_the_module(red: LoadedAdapter, green: LoadedAdapter) -> None:
    first = green.deltas[0]
    assert isinstance(first, LowRank)
    broken = replace(green, deltas=(replace(first, B_OR=first.B_OR * float("nan")), *green.deltas[1:]))
    found = conflicts([red, broken], [1.0, 1.0])
    assert found.verdict is Verdict.REFUSE
    assert [finding.subject for finding in found.findings if finding.code == "not_finite"] == [first.module]
    json.dumps(found.to_json(), allow_nan=False)


def test_two_whole_copies_of_one_tensor_refuse_and_are_remarked_first(load: Load) -> None:
    saved = [load(name, seed, modules_to_save=["lm_head"]) for name, seed in (("one", 3), ("two", 4))]
    found = conflicts(saved, [1.0, 1.0])
    assert found.verdict is Verdict.REFUSE
    first = report.remarks(found.findings)[0]
    assert first.startswith("error: ")
    assert "lm_head" in first


def test_the_whole_set_and_every_pair_are_reported_for_three(
    load: Load, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    found = conflicts([red, green, load("blue", 5)], [1.0, 1.0, 0.5])
    assert [(pair.a, pair.b) for pair in found.pairs] == [("red", "green"), ("red", "blue"), ("green", "blue")]
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_a_report_has_the_contracts_shape(red: LoadedAdapter, green: LoadedAdapter) -> None:
    document = json.loads(json.dumps(conflicts([red, green], [1.0, 1.0]).to_json(), allow_nan=False))
    assert {"verdict", "pairs", "findings"} <= document.keys()
    module_numbers = {"cosine", "input_overlap", "output_overlap", "norm_a", "norm_b", "dominance", "interference"}
    assert {"a", "b", "risk", "evidence", "modules"} | module_numbers <= document["pairs"][0].keys()
    assert {"module"} | module_numbers <= document["pairs"][0]["modules"][0].keys()
    assert document["findings"][0].keys() == {"code", "severity", "subject", "message", "measure"}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0]])
def test_weights_that_do_not_match_the_adapters_are_refused(
    red: LoadedAdapter, green: LoadedAdapter, weights: list[float]
) -> None:
    with pytest.raises(Mismatch, match="each with a weight"):
        conflicts([red, green], weights)


def test_no_adapter_or_two_of_one_name_are_refused(red: LoadedAdapter) -> None:
    for adapters in ([], [red, red]):
        with pytest.raises(Mismatch, match="adapters of different names"):
            conflicts(adapters, [1.0] * len(adapters))


def test_one_adapter_alone_is_checked_for_what_it_cannot_be_merged_with(red: LoadedAdapter) -> None:
    found = conflicts([red], [1.0])
    assert (found.pairs, found.verdict) == ((), Verdict.OK)


def outcome(loss: float, kept: float, rise: float, stderr: float) -> ProbeResult:
    effects = (
        Effect("red", "red-exact", 3.0, 0.5, 0.5 + loss, loss, stderr, kept),
        Effect("green", "green-exact", 2.0, 0.4, 0.41, 0.01, stderr, 0.99),
    )
    measured = Outcome(effects, (SideEffect("general", 0.7, {"red": 0.8, "green": 0.9}, 0.9 + rise, rise, stderr),))
    return ProbeResult(4, (measured,), measured, 1.5)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (outcome(loss=1.5, kept=0.4, rise=0.0, stderr=0.1), {"probe_loss": Severity.WARNING}),
        (outcome(loss=0.5, kept=0.8, rise=0.0, stderr=0.1), {"probe_loss": Severity.NOTICE}),
        (outcome(loss=1.5, kept=0.4, rise=0.0, stderr=1.0), {}),
        (outcome(loss=0.0, kept=1.0, rise=0.6, stderr=0.1), {"probe_guard": Severity.WARNING}),
    ],
)
def test_a_probe_decides_the_risk_and_warns_of_damage_beyond_its_error(
    red: LoadedAdapter, green: LoadedAdapter, result: ProbeResult, expected: dict[str, Severity]
) -> None:
    found = conflicts([red, green], [1.0, 1.0], probe=result)
    assert codes(found) == expected
    assert found.pairs[0].evidence == "probe"
    assert found.pairs[0].risk == max(effect.loss for effect in result.whole.effects)
    assert found.pairs[0].risk_stderr == result.whole.effects[0].loss_stderr


def test_the_headline_says_who_suffers_and_the_first_table_is_the_measurement(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    found = conflicts([red, green], [1.0, 1.0], probe=outcome(1.5, 0.4, 0.6, 0.1))
    verdict, headline = report.headlines(found)
    assert verdict == "Verdict: warn."
    assert headline.startswith(
        "red + green: risk +1.50 ± 0.10 nats per token, measured: red is the one that suffers, 40% of its gain is left."
    )
    first, *others = report.tables(found)
    assert first.title == "Probe"
    assert first.rows[0] == ("red + green", "red-exact", "3.00", "0.50", "2.00", "+1.50 ± 0.10", "40%")
    assert first.rows[2] == ("red + green", "general (guard)", "0.70", "0.90", "1.50", "+0.60 ± 0.10", "-")
    for table in (first, *others):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_a_harmless_pair_is_said_to_be_harmless(red: LoadedAdapter, green: LoadedAdapter) -> None:
    found = conflicts([red, green], [1.0, 1.0], probe=outcome(0.0, 1.0, 0.0, 0.1))
    assert report.headlines(found)[1].endswith("both answer their own suites as well as alone.")


def test_a_real_probe_goes_into_the_report_of_its_own_adapters(
    base: Path, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    suites = [Suite(name, "target", "", True, (Example("hi", name), Example("you", name))) for name in ("red", "green")]
    members = [Member(one.name, one.deltas, 1.0, suite) for one, suite in zip((red, green), suites, strict=True)]
    found = conflicts([red, green], [1.0, 1.0], probe=probe(load_model(base, device="cpu"), members, k=2))
    assert found.pairs[0].evidence == "probe"
    assert "weak_evidence" not in codes(found)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["pairs"][0]["probe"]["effects"][0]["member"] == "red"
    assert document["whole"]["probe"] == document["pairs"][0]["probe"]
