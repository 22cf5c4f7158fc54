"""Statistics from factors against the dense float64 matrices that they represent."""

from dataclasses import fields, replace

import pytest
import torch

from composer.deltas.delta import Layout, LowRank
from composer.deltas.lowrank import Grams, PairSums, relations


def delta(seed: int, outputs: int = 24, inputs: int = 17, rank: int = 3, layout: Layout = Layout.LINEAR) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    A_RI = torch.randn(rank, inputs, generator=generator)
    B_OR = torch.randn(outputs, rank, generator=generator)
    return LowRank(
        module="layers.0.proj", weight="layers.0.proj.weight", layout=layout, A=A_RI, B=B_OR, scale=0.7 + seed
    )


def dense(one: LowRank) -> torch.Tensor:
    return one.scale * one.B_OR.double() @ one.A_RI.double()


def column_projection(matrix: torch.Tensor) -> torch.Tensor:
    U, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    U = U[:, sigma > 1e-8 * sigma[0]]
    return U @ U.T


@pytest.mark.parametrize("layout", Layout)
def test_inner_products_norms_and_cosines_equal_the_dense_ones_in_every_layout(layout: Layout) -> None:
    a, b = delta(1, layout=layout), delta(2, rank=5, layout=layout)
    sums, A, B = relations([a, b]), dense(a), dense(b)
    assert sums.inner[0, 1].item() == pytest.approx((A * B).sum().item(), rel=1e-10)
    assert sums.norm(1) == pytest.approx(torch.linalg.matrix_norm(B).item(), rel=1e-10)
    assert sums.cosine(0, 1) == pytest.approx(torch.cosine_similarity(A.flatten(), B.flatten(), dim=0).item())


@pytest.mark.parametrize("layout", Layout)
def test_outputs_are_the_modules_outputs_however_the_weight_is_stored(layout: Layout) -> None:
    a, b = delta(1, layout=layout), delta(2, rank=5, layout=layout)
    sums, A, B = relations([a, b]), dense(a), dense(b)
    energy = (A**2).sum()
    outputs = ((column_projection(B) @ A) ** 2).sum() / energy
    inputs = ((A @ column_projection(B.T)) ** 2).sum() / energy
    assert sums.output_overlap(0, 1) == pytest.approx(outputs.item(), rel=1e-9)
    assert sums.input_overlap(0, 1) == pytest.approx(inputs.item(), rel=1e-9)
    assert sums.output_excess(0, 1) == pytest.approx(((outputs - 5 / 24) / (1 - 5 / 24)).item(), abs=1e-9)
    assert sums.input_excess(0, 1) == pytest.approx(((inputs - 5 / 17) / (1 - 5 / 17)).item(), abs=1e-9)


def test_interference_and_shares_equal_their_dense_definitions() -> None:
    parts, weights = [delta(1), delta(2), delta(3)], [1.0, -0.5, 2.0]
    weighted = [w * dense(part) for w, part in zip(weights, parts, strict=True)]
    energies = torch.stack([(delta**2).sum() for delta in weighted])
    sums = relations(parts, weights)
    assert sums.interference() == pytest.approx(((sum(weighted) ** 2).sum() / energies.sum()).item())
    assert sums.shares() == pytest.approx((energies / energies.sum()).tolist())


def test_spectra_equal_the_dense_singular_values() -> None:
    parts = [delta(1), delta(2, rank=5)]
    for part, (spectrum, _) in zip(parts, Grams.of(parts).output_spectra, strict=True):
        torch.testing.assert_close(spectrum, torch.linalg.svdvals(dense(part))[: part.rank], rtol=1e-9, atol=0)


def test_random_spans_overlap_by_chance_and_their_excess_is_near_zero() -> None:
    sums = relations([delta(seed, outputs=2048, inputs=2048, rank=16) for seed in (1, 2)])
    assert sums.output_overlap(0, 1) == pytest.approx(16 / 2048, rel=0.25)
    assert abs(sums.output_excess(0, 1)) < 0.002


def test_full_rank_deltas_overlap_by_necessity_so_their_excess_is_zero() -> None:
    sums = relations([delta(1, outputs=4, rank=4), delta(2, outputs=4, rank=4)])
    assert sums.output_overlap(0, 1) == pytest.approx(1.0)
    assert sums.output_excess(0, 1) == 0.0


def test_an_absent_or_zero_delta_has_no_energy_and_nothing_becomes_nan() -> None:
    zero = LowRank(
        module="m", weight="m.weight", layout=Layout.LINEAR, A=torch.randn(3, 17), B=torch.zeros(24, 3), scale=1.0
    )
    for other in (None, zero):
        sums = relations([delta(1), other])
        assert (sums.norm(1), sums.cosine(0, 1), sums.output_overlap(0, 1), sums.input_excess(1, 0)) == (0, 0, 0, 0)
        assert sums.shares() == [1.0, 0.0]
    assert relations([None, None]).interference() == 0.0


def test_the_whole_model_is_the_quotient_of_sums_not_the_mean_of_quotients() -> None:
    first, second = [delta(1), delta(2)], [delta(3), delta(4)]
    total = relations(first) + relations(second)
    stacked = [torch.cat([dense(left), dense(two)]).flatten() for left, two in zip(first, second, strict=True)]
    assert total.cosine(0, 1) == pytest.approx(torch.cosine_similarity(*stacked, dim=0).item())
    mean = (relations(first).cosine(0, 1) + relations(second).cosine(0, 1)) / 2
    assert total.cosine(0, 1) != pytest.approx(mean, rel=1e-3)


def test_picking_two_of_three_equals_comparing_those_two() -> None:
    parts = [delta(1), delta(2), delta(3)]
    picked, alone = relations(parts).pick(2, 0), relations([parts[2], parts[0]])
    for field in fields(PairSums):
        assert getattr(picked, field.name) == pytest.approx(getattr(alone, field.name), rel=1e-9), field.name


def test_sums_start_from_zero() -> None:
    sums = relations([delta(1), delta(2)])
    assert (PairSums.zero(2) + sums).inner == pytest.approx(sums.inner)


def test_retention_is_the_weight_that_explains_most_of_the_sum_by_one_delta() -> None:
    parts, weights = [delta(1), delta(2), delta(3)], [1.0, -0.5, 2.0]
    merged = sum(w * dense(one) for w, one in zip(weights, parts, strict=True))
    sums = relations(parts, weights)
    for index, part in enumerate(parts):
        own = dense(part)
        assert sums.retention(index) == pytest.approx(((merged * own).sum() / (own * own).sum()).item(), rel=1e-9)


def test_factors_in_half_precision_are_taken_to_double() -> None:
    a, b = delta(1), delta(2)
    half = replace(a, A=a.A_RI.bfloat16(), B=a.B_OR.bfloat16())
    full = replace(half, A=half.A_RI.float(), B=half.B_OR.float())
    assert relations([half, b]).inner == pytest.approx(relations([full, b]).inner, rel=1e-12)
