"""Deltas that cancel, or that add up because of their weights: the combination counts."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from composer.conflicts.render import text
from composer.conflicts.report import conflicts
from composer.deltas.delta import Delta, LowRank
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.findings import Severity, Verdict
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.policy import parse_policy
from tests.composer.conflicts.test_conflicts import codes
from tests.composer.small_model import Load, scaled


def summed_and_turned(adapters: list[LoadedAdapter]) -> list[Delta]:
    """-(the sum of them), by module."""
    by_module: dict[str, list[LowRank]] = defaultdict(list)
    for adapter in adapters:
        for delta in adapter.deltas:
            assert isinstance(delta, LowRank)
            by_module[delta.module].append(delta)
    return [
        replace(
            own[0],
            A=torch.cat([delta.A_RI for delta in own]),
            B=torch.cat([delta.B_OR * -delta.scale for delta in own], dim=1),
            scale=1.0,
        )
        for own in by_module.values()
    ]


@pytest.mark.parametrize(("size", "weights"), [(-1.0, [1.0, 1.0]), (1.0, [1.0, -1.0]), (-1.0, [-0.3, -0.3])])
def test_deltas_that_cancel_are_a_warning(red: LoadedAdapter, size: float, weights: list[float]) -> None:
    report = conflicts([red, scaled(red, size, "again")], weights)
    assert report.verdict is Verdict.WARN
    (finding,) = [finding for finding in report.findings if finding.code == "cancelling"]
    assert (finding.severity, finding.subject) == (Severity.WARNING, "red + again")
    assert finding.measure == pytest.approx(0.0, abs=1e-9)
    assert "0.00 times their separate energy" in finding.message
    assert "They cancel" in " ".join(text.advice(report))
    ignored = parse_policy("{cancelling: ignore, zero_result: ignore, same_adapter: ignore}")
    meant = conflicts([red, scaled(red, size, "again")], weights, policy=ignored)
    assert meant.verdict is Verdict.UNMEASURED


def test_only_what_is_left_of_the_energy_says_that_deltas_cancel(red: LoadedAdapter, green: LoadedAdapter) -> None:
    opposite = scaled(red, -1.0, "opposite")
    assert "cancelling" not in codes(conflicts([red, green], [1.0, -1.0]))
    assert "cancelling" not in codes(conflicts([red, opposite], [1.0, 0.1])), "0.8 of the energy is left"
    strict = parse_policy("thresholds: {cancelling: 0.9}")
    assert "cancelling" in codes(conflicts([red, opposite], [1.0, 0.1], policy=strict))


def test_those_that_cancel_only_together_are_found(red: LoadedAdapter, green: LoadedAdapter, load: Load) -> None:
    """Four adapters whose sum is zero, while every pair keeps at least 0.6 of its energy."""
    four = [red, green, load("blue", 5), load("white", 6)]
    norms = [relative**0.5 for relative in (member.share for member in conflicts(four, [1.0] * 4).members)]
    alone = [scaled(adapter, 1 / norm, adapter.name) for adapter, norm in zip(four, norms, strict=True)]
    minus = replace(scaled(red, 1.0, "minus"), deltas=tuple(summed_and_turned(alone)))
    report = conflicts([*alone, minus], [1.0] * 5)
    (finding,) = [finding for finding in report.findings if finding.code == "cancelling"]
    assert finding.subject == "red + green + blue + white + minus"


def test_opposite_adapters_with_weights_of_different_sign_add_up(red: LoadedAdapter) -> None:
    report = conflicts([red, scaled(red, -1.0, "opposite")], [1.0, -1.0])
    assert report.together.interference == pytest.approx(2.0)
    (finding,) = [finding for finding in report.findings if finding.code == "near_duplicate"]
    assert finding.measure == pytest.approx(1.0)
    assert "one task trained twice" in finding.message
    assert "near_duplicate" not in codes(conflicts([red, scaled(red, 1.0, "again")], [1.0, -1.0]))


def test_a_mean_over_weights_that_cancel_is_refused_in_the_report_as_in_the_combination(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    """0.1 + 0.2 - 0.3 is 5e-17, by which the report once divided."""
    with pytest.raises(Mismatch, match="a mean over them does not exist"):
        conflicts([red, green, scaled(red, 1.0, "again")], [0.1, 0.2, -0.3], parse_settings("mean"))
