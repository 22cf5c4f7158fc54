"""Laws for the statistics of any two low-rank deltas."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.deltas.delta import Layout, LowRank
from composer.deltas.lowrank import Grams, relations

OUTPUTS, INPUTS = 20, 14


@st.composite
def deltas(draw: st.DrawFn) -> LowRank:
    rank = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    A_RI = torch.randn(rank, INPUTS, generator=generator)
    B_OR = torch.randn(OUTPUTS, rank, generator=generator)
    if draw(st.booleans()):
        B_OR[:, -1] = B_OR[:, 0]  # a rank-deficient B: the nominal rank is higher than the delta's, when rank > 1
    layout = draw(st.sampled_from(Layout))
    return LowRank(module="m", weight="m.weight", layout=layout, A=A_RI, B=B_OR, scale=draw(st.floats(0.01, 8.0)))


def numbers(a: LowRank, b: LowRank) -> list[float]:
    sums = relations([a, b])
    pairs = ((0, 1), (1, 0))
    return [
        *(sums.cosine(i, j) for i, j in pairs),
        *(sums.output_overlap(i, j) for i, j in pairs),
        *(sums.input_overlap(i, j) for i, j in pairs),
        *(sums.output_excess(i, j) for i, j in pairs),
        *(sums.input_excess(i, j) for i, j in pairs),
    ]


@settings(deadline=None, max_examples=60)
@given(deltas(), deltas(), st.floats(1e-3, 1e3))
def test_angles_and_overlaps_do_not_depend_on_scale(a: LowRank, b: LowRank, factor: float) -> None:
    assert numbers(replace(a, scale=a.scale * factor), b) == pytest.approx(numbers(a, b), abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(deltas(), deltas())
def test_a_pair_reads_the_same_from_both_ends(a: LowRank, b: LowRank) -> None:
    one, other = relations([a, b], [1.0, 2.0]), relations([b, a], [2.0, 1.0])
    assert one.cosine(0, 1) == pytest.approx(other.cosine(0, 1), abs=1e-12)
    assert one.output_overlap(0, 1) == pytest.approx(other.output_overlap(1, 0), abs=1e-9)
    assert one.input_overlap(0, 1) == pytest.approx(other.input_overlap(1, 0), abs=1e-9)
    assert one.interference() == pytest.approx(other.interference())


@settings(deadline=None, max_examples=60)
@given(deltas())
def test_a_delta_agrees_with_itself_and_cancels_its_opposite(a: LowRank) -> None:
    sums = relations([a, a])
    assert sums.cosine(0, 1) == pytest.approx(1.0)
    assert sums.output_overlap(0, 1) == pytest.approx(1.0, abs=1e-6)
    assert sums.input_overlap(0, 1) == pytest.approx(1.0, abs=1e-6)
    assert sums.interference() == pytest.approx(2.0)
    assert relations([a, replace(a, scale=-a.scale)]).interference() == pytest.approx(0.0, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(deltas(), deltas(), st.integers(0, 2**31))
def test_another_gauge_of_the_factors_changes_nothing(a: LowRank, b: LowRank, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(a.rank, a.rank, generator=generator, dtype=torch.float64))[0]
    G = rotation * torch.linspace(0.5, 2.0, a.rank, dtype=torch.float64)
    B_OR = (a.B_OR.double() @ G).float()
    A_RI = (torch.linalg.inv(G) @ a.A_RI.double()).float()
    assert numbers(replace(a, B=B_OR, A=A_RI), b) == pytest.approx(numbers(a, b), abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(deltas(), deltas())
def test_every_share_lies_between_nothing_and_all(a: LowRank, b: LowRank) -> None:
    sums = relations([a, b], [1.0, 0.5])
    assert abs(sums.cosine(0, 1)) <= 1 + 1e-9
    for share in (sums.output_overlap, sums.input_overlap):
        assert -1e-9 <= share(0, 1) <= 1 + 1e-6
    assert sum(sums.shares()) == pytest.approx(1.0)
    assert -1e-9 <= sums.interference() <= 2 + 1e-9


@settings(deadline=None, max_examples=60)
@given(deltas())
def test_a_repeated_column_adds_no_dimension(a: LowRank) -> None:
    dense = a.scale * a.B_OR.double() @ a.A_RI.double()
    ((spectrum, _),) = Grams.of([a]).output_spectra
    exact = torch.linalg.svdvals(dense)
    assert len(spectrum) == int((exact > 1e-5 * exact[0]).sum())
    torch.testing.assert_close(spectrum, exact[: len(spectrum)], rtol=1e-6, atol=0)
