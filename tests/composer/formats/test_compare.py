"""Changes between two adapters, against the dense float64 deltas that they represent."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer.formats.adapters.compare import AdapterComparison, EnergyChange, compare
from composer.formats.adapters.inspection import Inspection
from tests.composer.handmade import Factors, dense, random_factors, write_adapter

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def compared(old: Inspection, new: Inspection) -> AdapterComparison:
    return compare(old.adapter, new.adapter, old.placed, new.placed)


def change_of(comparison: AdapterComparison, module: str) -> EnergyChange:
    change = next(row.change for row in comparison.modules if row.module == module)
    assert change is not None
    return change


def assert_equals_dense(change: EnergyChange, old: npt.NDArray[np.float64], new: npt.NDArray[np.float64]) -> None:
    """The definitions, spelled out on the dense matrices."""
    document = change.to_json()
    assert document["norm_old"] == pytest.approx(np.linalg.norm(old), rel=1e-10)
    assert document["norm_new"] == pytest.approx(np.linalg.norm(new), rel=1e-10)
    assert document["norm_difference"] == pytest.approx(np.linalg.norm(new - old), rel=1e-10)
    assert change.cosine == pytest.approx((old * new).sum() / np.linalg.norm(old) / np.linalg.norm(new), abs=1e-10)
    along = (old * new).sum() / (old**2).sum()
    beside = ((new - along * old) ** 2).sum()
    assert change.lost == pytest.approx(max(1 - along, 0) ** 2 * (old**2).sum(), rel=1e-9)
    assert change.gained == pytest.approx(max(along - 1, 0) ** 2 * (old**2).sum() + beside, rel=1e-9)
    assert change.gained + change.lost == pytest.approx(((new - old) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("ranks", [(3, 3), (2, 7), (16, 1), (20, 30)])
def test_norms_cosine_and_energies_equal_the_dense_ones(tmp_path: Path, ranks: tuple[int, int]) -> None:
    one, other = random_factors(1, rank=ranks[0]), random_factors(2, rank=ranks[1])
    old, new = write_adapter(tmp_path / "old", {Q0: one}), write_adapter(tmp_path / "new", {Q0: other}, lora_alpha=3)
    comparison = compared(old, new)
    assert_equals_dense(change_of(comparison, Q0), dense(old, Q0, one), dense(new, Q0, other))
    assert [(row.status, row.rank_old, row.rank_new) for row in comparison.modules] == [("changed", *ranks)]


@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-6])
def test_a_small_change_of_large_factors_keeps_its_digits(tmp_path: Path, step: float) -> None:
    """|new|^2 + |old|^2 - 2 <old, new> would leave nothing of a change of one millionth."""
    one, noise = random_factors(1), random_factors(2)
    other = (one[0] + step * noise[0], one[1] + step * noise[1])
    old, new = write_adapter(tmp_path / "old", {Q0: one}), write_adapter(tmp_path / "new", {Q0: other})
    change = change_of(compared(old, new), Q0)
    exact = np.linalg.norm(dense(new, Q0, other) - dense(old, Q0, one))
    assert change.to_json()["norm_difference"] == pytest.approx(exact, rel=1e-8)


@given(st.floats(-3, 3), st.floats(0, 2))
def test_what_is_gained_and_lost_is_the_energy_of_the_change(along: float, beside: float) -> None:
    """For D' = along D + beside E with |D| = 2, |E| = 1 and E orthogonal to D."""
    from composer.formats.adapters.compare import _split  # pyright: ignore[reportPrivateUsage]

    old, new, inner = 4.0, 4 * along**2 + beside**2, 4 * along
    change = _split(old, new, inner, 4 * (along - 1) ** 2 + beside**2)
    assert change.lost == pytest.approx(4 * max(1 - along, 0) ** 2, abs=1e-9)
    assert change.gained == pytest.approx(4 * max(along - 1, 0) ** 2 + beside**2, abs=1e-9)


def test_the_same_product_through_other_factors_is_the_same(tmp_path: Path) -> None:
    A, B = random_factors(1, rank=4)
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((4, 4)))[0]
    old, new = (
        write_adapter(tmp_path / "old", {Q0: (A, B)}),
        write_adapter(tmp_path / "new", {Q0: (turn @ A, B @ turn.T)}),
    )
    (row,) = compared(old, new).modules
    assert row.status == "same"
    assert row.change is not None
    assert (row.change.difference, row.change.gained, row.change.lost) == (0, 0, 0)


def test_another_scale_is_gained_or_lost_and_nothing_is_beside_it(tmp_path: Path) -> None:
    one = random_factors(1, rank=4)
    old, new = (write_adapter(tmp_path / name, {Q0: one}, lora_alpha=alpha) for name, alpha in (("a", 4), ("b", 6)))
    energy = float((dense(old, Q0, one) ** 2).sum())
    up, down = change_of(compared(old, new), Q0), change_of(compared(new, old), Q0)
    assert (up.gained, up.lost) == (pytest.approx(0.25 * energy), 0)
    assert (down.gained, down.lost) == (pytest.approx(0, abs=1e-9), pytest.approx(0.25 * energy))
    assert up.cosine == pytest.approx(1)


def test_a_module_of_one_adapter_only_is_gained_or_lost_whole(tmp_path: Path) -> None:
    one, other = random_factors(1), random_factors(2)
    old, new = write_adapter(tmp_path / "old", {Q0: one}), write_adapter(tmp_path / "new", {Q1: other})
    comparison = compared(old, new)
    rows = {row.module: row for row in comparison.modules}
    assert (rows[Q0].status, rows[Q1].status) == ("removed", "added")
    lost, gained = (dense(old, Q0, one) ** 2).sum(), (dense(new, Q1, other) ** 2).sum()
    assert change_of(comparison, Q0).lost == pytest.approx(lost)
    assert change_of(comparison, Q1).gained == pytest.approx(gained)
    assert (comparison.overall.lost, comparison.overall.gained) == (pytest.approx(lost), pytest.approx(gained))
    assert comparison.overall.cosine == 0


def test_the_whole_is_the_sum_of_energies_not_the_mean_of_quotients(tmp_path: Path) -> None:
    before, after = ({Q0: random_factors(n), Q1: random_factors(n + 1)} for n in (1, 3))
    old, new = write_adapter(tmp_path / "old", before), write_adapter(tmp_path / "new", after)
    stacked = [
        np.concatenate([dense(seen, module, factors[module]).ravel() for module in (Q0, Q1)])
        for seen, factors in ((old, before), (new, after))
    ]
    overall = compared(old, new).overall
    assert overall.cosine == pytest.approx(
        stacked[0] @ stacked[1] / np.linalg.norm(stacked[0]) / np.linalg.norm(stacked[1])
    )
    assert overall.difference == pytest.approx(((stacked[1] - stacked[0]) ** 2).sum())


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.bfloat16)])
def test_replaced_tensors_are_compared_as_they_are(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    one = random_factors(1)
    heads = [np.random.default_rng(seed).standard_normal((50, 20)) for seed in (1, 2)]
    old, new = (
        write_adapter(tmp_path / str(n), {Q0: one}, dtype=dtype, full={"lm_head.weight": head})
        for n, (dtype, head) in enumerate(zip(dtypes, heads, strict=True))
    )
    stored = [torch.from_numpy(head).to(dtype).double().numpy() for head, dtype in zip(heads, dtypes, strict=True)]
    comparison = compared(old, new)
    row = next(row for row in comparison.modules if row.kind == "replacement")
    assert (row.module, row.rank_old) == ("lm_head.weight", None)
    assert_equals_dense(change_of(comparison, "lm_head.weight"), *stored)
    assert comparison.overall.new == pytest.approx(change_of(comparison, Q0).new), "replacements are not deltas"


def test_a_replaced_tensor_of_one_adapter_only_has_the_norm_of_its_weights(tmp_path: Path) -> None:
    one, head = random_factors(1), np.ones((5, 4))
    old = write_adapter(tmp_path / "old", {Q0: one})
    new = write_adapter(tmp_path / "new", {Q0: one}, full={"lm_head.weight": head})
    (row,) = [row for row in compared(old, new).modules if row.kind == "replacement"]
    assert (row.status, row.to_json()["norm_new"], row.to_json()["energy_gained"]) == ("added", np.sqrt(20), 20)


def test_other_shapes_and_unreadable_numbers_are_said_to_be_so(tmp_path: Path) -> None:
    wide: Factors = random_factors(1, outputs=30)
    huge = tuple(1e200 * part for part in random_factors(3))
    old = write_adapter(tmp_path / "old", {Q0: random_factors(1), Q1: random_factors(2)})
    new = write_adapter(tmp_path / "new", {Q0: wide, Q1: (huge[0], huge[1])})
    comparison = compared(old, new)
    assert [(row.module, row.status, row.change) for row in comparison.modules] == [(Q0, "reshaped", None)]
    assert comparison.left_out == (Q1,)
    json.dumps(comparison.to_json(), allow_nan=False)


def test_modules_whose_energies_have_no_finite_sum_are_left_out(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)]
    modules = {name: (np.full((2, 4), 2.8e76), np.full((4, 2), 2.8e76)) for name in names}
    old = write_adapter(tmp_path / "old", {**modules, "lm_head": random_factors(1, rank=2)}, lora_alpha=2)
    new = write_adapter(tmp_path / "new", {"lm_head": random_factors(2, rank=2)}, lora_alpha=2)
    comparison = compared(old, new)
    assert ([row.module for row in comparison.modules], len(comparison.left_out)) == (["lm_head"], 12)
    json.dumps(comparison.to_json(), allow_nan=False)
