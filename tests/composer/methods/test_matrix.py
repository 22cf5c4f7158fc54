"""The k largest magnitudes, found without sorting, beside a stable sort."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.methods.matrix import BLOCK_ROWS, Matrix, largest


def by_sorting(X: torch.Tensor, k: int) -> torch.Tensor:
    kept = X.abs().flatten().argsort(descending=True, stable=True)[:k]
    mask = torch.zeros(X.numel(), dtype=torch.bool)
    mask[kept] = True
    return mask.reshape(X.shape)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 3 * BLOCK_ROWS)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    X = torch.randn(rows, columns, generator=generator) * draw(st.sampled_from([1e-30, 1.0, 1e30]))
    if draw(st.booleans()):  # many equal values, also zeros
        X = (X / X.abs().max() * draw(st.integers(1, 4))).round()
    if draw(st.booleans()):  # rows of very different sizes, which mislead a sample
        X = X * torch.logspace(-12, 0, rows)[:, None]
    return X


@settings(max_examples=200)
@given(matrices(), st.floats(0, 1))
def test_the_largest_are_those_of_a_stable_sort(X: torch.Tensor, share: float) -> None:
    k = int(share * X.numel())
    (selected,) = largest([Matrix.of(X)], k)
    expected = by_sorting(X, k)
    assert torch.equal(selected.mask(X, 0), expected)
    for begin, end in ((0, X.shape[0]), (X.shape[0] // 3, X.shape[0])):
        assert torch.equal(selected.kept(X[begin:end], begin), torch.where(expected, X, 0.0)[begin:end])


@settings(max_examples=100)
@given(matrices(), matrices(), st.floats(0, 1))
def test_the_largest_of_two_matrices_are_those_of_both_in_a_row(
    one: torch.Tensor, other: torch.Tensor, share: float
) -> None:
    both = torch.cat([one.flatten(), other.flatten()])
    k = int(share * both.numel())
    selected = [
        kept.mask(X, 0).flatten()
        for kept, X in zip(largest([*map(Matrix.of, (one, other))], k), (one, other), strict=True)
    ]
    assert torch.equal(torch.cat(selected), by_sorting(both, k))


@given(matrices(), st.integers(0, 200), st.integers(0, 200))
def test_rows_are_the_same_however_many_are_asked_for(X: torch.Tensor, begin: int, count: int) -> None:
    matrix = Matrix(tuple(X.shape), lambda first, last: X[first:last])
    begin = min(begin, X.shape[0] - 1)
    end = min(X.shape[0], begin + 1 + count)
    assert torch.equal(matrix.rows(begin, end), X[begin:end])
