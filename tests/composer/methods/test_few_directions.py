"""Adapters with few or common directions: the result of a method is never random, nor zero."""

from dataclasses import replace

import pytest
import torch

from composer.deltas.delta import LowRank
from composer.formats.recipes.methods import parse_settings
from composer.methods.join import elect
from composer.methods.pipeline import Selections, SlotDelta, WeightSlot, combine_slot
from tests.composer.methods.test_methods import as_stored, combined, error, low_ranks


def sharing() -> list[LowRank]:
    """Two adapters with a frozen A, so that both read the same inputs."""
    one, two, _ = low_ranks()
    return [replace(one, A=two.A_RI, B=torch.cat([one.B_OR, one.B_OR[:, :2].flip(0)], dim=1)), two]


@pytest.mark.parametrize("method", ["tsv", "core_tsv", "pico_tsv"])
def test_adapters_that_share_their_inputs_are_joined_within_those_in_any_order(method: str) -> None:
    deltas = sharing()
    result = combined(method, deltas, (1.0, 1.0))
    assert error(combined(method, deltas[::-1], (1.0, 1.0)), result) < 1e-4
    rows = torch.linalg.qr(deltas[0].A_RI.double().T)[0]
    assert error(result @ rows @ rows.T, result) < 1e-5, "nothing is read that neither of them reads"


@pytest.mark.parametrize("method", ["tsv", "core_tsv"])
def test_an_adapter_given_twice_is_itself(method: str) -> None:
    one = low_ranks()[0]
    assert error(combined(method, [one, one], (1.0, 1.0)), as_stored(one)) < 1e-5


@pytest.mark.parametrize("method", ["iso", "core_iso"])
@pytest.mark.parametrize("budget", [{"rank": 3}, {"energy": 0.25}])
def test_a_cut_of_equal_singular_values_keeps_the_directions_that_the_sum_had_most_of(
    method: str, budget: dict[str, object]
) -> None:
    deltas = low_ranks()
    slot = WeightSlot([SlotDelta(i, delta, 1.0, f"{i}") for i, delta in enumerate(deltas)], 3.0)
    (cut,), lost = combine_slot(slot, parse_settings(method, budget), Selections())
    U, sigma, Vh = torch.linalg.svd(sum(map(as_stored, deltas), torch.zeros(deltas[0].stored_shape)))
    count = int((sigma > 1e-6 * sigma[0]).sum())
    kept = 3 if "rank" in budget else -(-count // 4)
    assert error(as_stored(cut), sigma[:count].mean() * U[:, :kept] @ Vh[:kept]) < 1e-4
    assert lost is not None
    assert (lost.rank, lost.full_rank) == (kept, count)
    assert lost.relative == pytest.approx((1 - kept / count) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("method", ["core_ties", "knots_ties", "ctm_ties", "ties", "breadcrumbs", "core_dare_ties"])
def test_something_is_left_of_adapters_of_one_direction(method: str) -> None:
    ones = [replace(delta, A=delta.A_RI[:1], B=delta.B_OR[:, :1]) for delta in low_ranks()[:2]]
    dare = {"density": 0.9} if "dare" in method else {}
    assert float(combined(method, ones, (1.0, 1.0), dare).norm()) > 0


def test_an_even_count_of_signs_has_no_side_of_its_own() -> None:
    X_TMN = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(0))
    turned = elect(-X_TMN, [1.0, 1.0], vote="count")
    assert torch.equal(turned, -elect(X_TMN, [1.0, 1.0], vote="count"))
