"""Laws of the methods, each against a dense float64 sum: identity, zero weight, scale, order, stacking."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer.deltas.delta import Layout, LowRank
from composer.formats.recipes.methods import parse_settings
from composer.methods.join import stack_factors
from composer.methods.pipeline import Selections, SlotDelta, WeightSlot, combine_slot

weights = st.floats(-4, 4, width=32)


@st.composite
def low_ranks(draw: st.DrawFn, count: int) -> list[LowRank]:
    outputs, inputs, layout = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.sampled_from(Layout))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return [
        LowRank(
            module="m",
            weight="m.weight",
            layout=layout,
            A=torch.randn(rank, inputs, generator=generator),
            B=torch.randn(outputs, rank, generator=generator),
            scale=draw(st.floats(0.1, 4)),
        )
        for rank in [draw(st.integers(1, 4)) for _ in range(count)]
    ]


def dense(delta: LowRank) -> torch.Tensor:
    product = delta.scale * (delta.B_OR.double() @ delta.A_RI.double())
    return product if delta.layout is Layout.LINEAR else product.T


def stored(delta: LowRank) -> torch.Tensor:
    left, right = delta.stored_factors()
    return left.double() @ right.double()


def added(method: str, parts: list[tuple[LowRank, float]], **settings: object) -> list[LowRank]:
    slot = WeightSlot(
        [SlotDelta(i, delta, weight, f"{i}") for i, (delta, weight) in enumerate(parts)], sum(w for _, w in parts)
    )
    deltas, _ = combine_slot(slot, parse_settings(method, settings), Selections())
    return [delta for delta in deltas if isinstance(delta, LowRank)]


def combined(method: str, parts: list[tuple[LowRank, float]], **settings: object) -> torch.Tensor:
    return torch.stack([stored(delta) for delta in added(method, parts, **settings)]).sum(0)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["stack", "linear"])
class TestEverySum:
    @given(low_ranks(1))
    def test_one_adapter_of_weight_one_is_itself(self, method: str, deltas: list[LowRank]) -> None:
        assert close(combined(method, [(deltas[0], 1.0)]), dense(deltas[0]))
        assert stored(deltas[0]).shape == deltas[0].stored_shape

    @given(low_ranks(3), st.tuples(weights, weights, weights))
    def test_the_result_is_the_weighted_sum(
        self, method: str, deltas: list[LowRank], given_weights: tuple[float, ...]
    ) -> None:
        expected = sum(weight * dense(delta) for delta, weight in zip(deltas, given_weights, strict=True))
        assert isinstance(expected, torch.Tensor)
        assert close(combined(method, list(zip(deltas, given_weights, strict=True))), expected)

    @given(low_ranks(2), weights)
    def test_a_weight_of_zero_is_absence(self, method: str, deltas: list[LowRank], weight: float) -> None:
        assert close(combined(method, [(deltas[0], weight), (deltas[1], 0.0)]), combined(method, [(deltas[0], weight)]))

    @given(low_ranks(3), st.permutations([0, 1, 2]))
    def test_order_does_not_matter(self, method: str, deltas: list[LowRank], order: list[int]) -> None:
        parts = [(delta, float(index + 1)) for index, delta in enumerate(deltas)]
        assert close(combined(method, parts), combined(method, [parts[index] for index in order]))

    @given(low_ranks(2), weights, st.floats(-3, 3, width=32))
    def test_lambda_scales_the_result(self, method: str, deltas: list[LowRank], weight: float, factor: float) -> None:
        parts = [(deltas[0], weight), (deltas[1], 1.0)]
        assert close(combined(method, parts, **{"lambda": factor}), factor * combined(method, parts))

    @given(low_ranks(3))
    def test_combining_in_two_steps_is_combining_at_once(self, method: str, deltas: list[LowRank]) -> None:
        (first,) = stack_factors(added(method, [(deltas[0], 2.0), (deltas[1], -1.0)]), [1.0, 1.0])
        assert isinstance(first, LowRank)
        at_once = combined(method, [(deltas[0], 2.0), (deltas[1], -1.0), (deltas[2], 0.5)])
        assert close(combined(method, [(first, 1.0), (deltas[2], 0.5)]), at_once)


@given(low_ranks(2), st.floats(0.5, 4), st.floats(0.5, 4), st.floats(0.5, 3))
def test_a_mean_does_not_change_when_all_weights_grow(
    deltas: list[LowRank], one: float, two: float, factor: float
) -> None:
    mean = combined("linear", [(deltas[0], one), (deltas[1], two)], normalize=True)
    assert close(combined("linear", [(deltas[0], one * factor), (deltas[1], two * factor)], normalize=True), mean)
