"""RegMean's laws on small random factors, with a dense least-squares solution as the oracle."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer.deltas.delta import Delta, Layout, LowRank
from composer.deltas.variants.load import LoadedAdapter
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.weights import Weight
from composer.methods.regmean import Fit, Inputs, ModuleFit, ModuleInputs, dual, fit, primal, solve_core, solve_input

INPUTS, OUTPUTS = 7, 5
SEEDS = st.integers(0, 2**32 - 1)
SETTINGS = Regmean(steps=1)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module(seed: int, ranks: Sequence[int] = (2, 3), rows: Sequence[int] = (4, 9)) -> ModuleFit:
    A = [random(seed + 10 * m, rank, INPUTS) for m, rank in enumerate(ranks)]
    B = [random(seed + 10 * m + 1, OUTPUTS, rank) for m, rank in enumerate(ranks)]
    return ModuleFit(A, B, Inputs([random(seed + 10 * m + 2, count, INPUTS) for m, count in enumerate(rows)]))


def product(B: Sequence[torch.Tensor], A: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(B), dim=1) @ torch.cat(list(A))


def least_squares(one: ModuleFit, a: Sequence[float], w0: float, rho: float) -> torch.Tensor:
    """D (O x I) of the objective itself, as one stacked least-squares problem over dense matrices."""
    deltas = [B @ A for A, B in zip(one.A, one.B, strict=True)]
    rows = [X * weight**0.5 for X, weight in zip(one.X, a, strict=True)]
    wanted = [row @ delta.T for row, delta in zip(rows, deltas, strict=True)]
    identity = torch.eye(INPUTS, dtype=torch.float64) * rho**0.5
    prior = w0 * sum(deltas, torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64))
    system, right = torch.cat([*rows, identity]), torch.cat([*wanted, identity @ prior.T])
    return torch.linalg.lstsq(system, right, driver="gelsd").solution.T


@given(SEEDS, st.floats(0.01, 100), st.floats(0.01, 100), st.floats(-1, 2), st.floats(1e-3, 1e3))
def test_primal_dual_and_dense_least_squares_agree(seed: int, first: float, other: float, w0: float, rho: float):
    one, a = module(seed % 10**6), [first, other]
    expected = least_squares(one, a, w0, rho)
    for solved in (primal(one, a, w0, rho), dual(one, a, w0, rho)):
        torch.testing.assert_close(product(one.B, solved), expected, rtol=1e-7, atol=1e-8)


@given(SEEDS, st.floats(0.01, 100), st.floats(0, 100), st.floats(-1, 2), st.floats(1e-3, 1e3))
def test_a_guard_adds_rows_on_which_least_squares_wants_no_change(
    seed: int, first: float, guard: float, w0: float, rho: float
):
    seed %= 10**6
    one = module(seed, rows=(4, 9, 5))  # two members, and the guard's rows
    a = [first, 1.0, guard]
    with_zero = replace(one, A=[*one.A, one.A[0][:0]], B=[*one.B, one.B[0][:, :0]])
    expected = least_squares(with_zero, a, w0, rho)
    for solved in (primal(one, a, w0, rho), dual(one, a, w0, rho)):
        torch.testing.assert_close(product(one.B, solved), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("solve", [solve_input, solve_core])
def test_the_heavier_the_guard_the_less_changes_on_its_inputs(solve: Callable[..., list[torch.Tensor]]):
    one = module(3, ranks=(3, 3), rows=(4, 4, 2))
    changes = [float((one.X[2] @ product(one.B, solve(one, [1.0, 1.0, g], 0.5, 0.01)).T).norm()) for g in (0, 1, 100)]
    assert changes[0] > 2 * changes[1] > 4 * changes[2]


@given(SEEDS, st.booleans())
def test_one_member_stays_itself_on_what_it_saw(seed: int, core: bool):
    one = module(seed % 10**6, ranks=(3,), rows=(20,))
    solved = (solve_core if core else solve_input)(one, [1.0], 1.0, 0.5)
    torch.testing.assert_close(product(one.B, solved), one.B[0] @ one.A[0])


def test_without_a_ridge_each_member_acts_as_alone_on_inputs_that_nobody_else_has():
    apart = module(1, rows=(3, 3))
    first, other = apart.X
    apart = ModuleFit(
        apart.A,
        apart.B,
        Inputs([torch.nn.functional.pad(first[:, :3], (0, 4)), torch.nn.functional.pad(other[:, :4], (3, 0))]),
    )
    D = product(apart.B, solve_input(apart, [1.0, 1.0], 0.5, 1e-12))
    for X, A, B in zip(apart.X, apart.A, apart.B, strict=True):
        torch.testing.assert_close(X @ D.T, X @ (B @ A).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solve", [solve_input, solve_core])
def test_an_endless_ridge_leaves_the_weighted_sum(solve: Callable[..., list[torch.Tensor]]):
    one = module(2)
    D = product(one.B, solve(one, [1.0, 1.0], 0.3, 1e9))
    torch.testing.assert_close(D, 0.3 * product(one.B, one.A), rtol=1e-6, atol=1e-7)


@given(SEEDS)
def test_the_core_form_does_not_depend_on_how_a_delta_is_split_into_factors(seed: int):
    one = module(seed % 10**6)
    G = random(seed % 10**6 + 5, 2, 2) + 3 * torch.eye(2, dtype=torch.float64)
    other = ModuleFit([G @ one.A[0], one.A[1]], [one.B[0] @ torch.linalg.inv(G), one.B[1]], one.inputs)
    for solve in (solve_core, solve_input):
        before, after = (product(m.B, solve(m, [1.0, 2.0], 0.4, 0.1)) for m in (one, other))
        torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-7)


def adapter(seed: int, name: str = "one", rank: int = 2, modules: Sequence[str] = ("a", "b")) -> LoadedAdapter:
    deltas = tuple(
        LowRank(
            module=path,
            weight=f"{path}.weight",
            layout=Layout.LINEAR,
            A=random(seed + index, rank, INPUTS),
            B=random(seed + index + 50, OUTPUTS, rank),
            scale=0.5,
        )
        for index, path in enumerate(modules)
    )
    return LoadedAdapter(
        name=name,
        path=Path(name),
        config=cast(Any, SimpleNamespace()),
        placed=cast(Any, SimpleNamespace()),
        deltas=deltas,
    )


def seeing(*seeds: int, hidden: Sequence[str] = ()) -> Callable[..., Mapping[str, ModuleInputs]]:
    """The same rows for any active deltas, different ones for each member and module."""

    def observe(member: int | None, _active: Sequence[Delta], modules: Sequence[str]) -> dict[str, ModuleInputs]:
        if member is None:
            return {}
        rows = {path: random(seeds[member] + 100 * index, 6, INPUTS) for index, path in enumerate(modules)}
        return {path: ModuleInputs([X], float(X.square().sum())) for path, X in rows.items() if path not in hidden}

    return observe


def summed(fitted: Fit, module_name: str) -> torch.Tensor:
    parts = [
        d for adapter in fitted.adapters for d in adapter.deltas if isinstance(d, LowRank) and d.module == module_name
    ]
    return sum((d.scale * d.B_OR.double() @ d.A_RI.double() for d in parts), torch.zeros(OUTPUTS, INPUTS).double())


def test_twins_become_the_one_that_both_are():
    one, twin = adapter(1), adapter(1, "twin")
    fitted = fit([one, twin], [Weight(), Weight()], SETTINGS, seeing(3, 3))
    alone = summed(Fit([one], fitted.report), "a")
    rows = random(3, 6, INPUTS)
    torch.testing.assert_close(rows @ summed(fitted, "a").T, rows @ alone.T, rtol=1e-5, atol=1e-5)
    assert fitted.report.w0 == pytest.approx(0.5, abs=0.01)


def test_the_order_of_the_members_is_irrelevant():
    one, other = adapter(1), adapter(7, "other", rank=3)
    fitted = fit([one, other], [Weight(), Weight(0.7)], SETTINGS, seeing(3, 4))
    turned = fit([other, one], [Weight(0.7), Weight()], SETTINGS, seeing(4, 3))
    torch.testing.assert_close(summed(fitted, "a"), summed(turned, "a"), rtol=1e-5, atol=1e-6)
    assert fitted.report.errors == pytest.approx(turned.report.errors[::-1])


def test_a_weight_of_zero_is_as_if_the_adapter_were_not_there():
    one, other = adapter(1), adapter(7, "other")
    from composer.methods.combine import without_zero_weights

    idle = without_zero_weights(other, Weight(0.0))
    with_it = fit([one, idle], [Weight(), Weight(0.0)], SETTINGS, seeing(3, 4))
    without = fit([one], [Weight()], SETTINGS, seeing(3))
    torch.testing.assert_close(summed(with_it, "b"), summed(without, "b"))


def test_a_module_whose_inputs_are_not_to_be_had_keeps_the_weighted_sum_and_is_named():
    one, other = adapter(1), adapter(7, "other")
    fitted = fit([one, other], [Weight(), Weight()], SETTINGS, seeing(3, 4, hidden=["b"]))
    plain = summed(Fit([one, other], fitted.report), "b")
    torch.testing.assert_close(summed(fitted, "b"), fitted.report.w0 * plain)
    assert fitted.report.kept_at_sum == ("b",)
    assert fitted.report.fitted == 1


def test_a_member_without_a_delta_in_a_module_asks_it_to_stay_quiet_there():
    one, other = adapter(1), adapter(7, "other", modules=("a",))
    fitted = fit([one, other], [Weight(), Weight()], Regmean(steps=1, ridge=1e-6), seeing(3, 4))
    own, foreign = random(3 + 100, 6, INPUTS), random(4 + 100, 6, INPUTS)
    action, leaked = (X @ summed(fitted, "b").T for X in (own, foreign))
    alone = own @ summed(Fit([one], fitted.report), "b").T
    assert float((action - alone).norm() / alone.norm()) < 0.8
    assert float(leaked.norm() / (foreign @ summed(Fit([one], fitted.report), "b").T).norm()) < 0.8


def test_the_errors_of_the_report_are_those_of_the_objective():
    one, other = adapter(1), adapter(7, "other")
    fitted = fit([one, other], [Weight(), Weight()], SETTINGS, seeing(3, 4))
    for member, (own, seed) in enumerate(((one, 3), (other, 4))):
        lost = own_energy = lost_by_sum = 0.0
        for index, path in enumerate(("a", "b")):
            X = random(seed + 100 * index, 6, INPUTS)
            alone = summed(Fit([own], fitted.report), path)
            base = float(X.square().sum())
            lost += float((X @ (summed(fitted, path) - alone).T).square().sum()) / base
            plain = fitted.report.w0 * summed(Fit([one, other], fitted.report), path)
            lost_by_sum += float((X @ (plain - alone).T).square().sum()) / base
            own_energy += float((X @ alone.T).square().sum()) / base
        assert fitted.report.errors[member] == pytest.approx((lost / own_energy) ** 0.5, rel=1e-4)
        assert fitted.report.errors_of_sum[member] == pytest.approx((lost_by_sum / own_energy) ** 0.5, rel=1e-4)
    assert max(fitted.report.errors) < max(fitted.report.errors_of_sum)


@given(SEEDS, st.integers(1, 3))
def test_fitted_weights_are_those_of_a_dense_least_squares_problem(seed: int, count: int):
    seed %= 10**6
    members = [adapter(seed + 7 * index, f"m{index}") for index in range(count)]
    seeds = [seed + 31 * index for index in range(count)]
    settings = Regmean(steps=1, form="weights", ridge=0.01)
    fitted = fit(members, [Weight()] * count, settings, seeing(*seeds))
    columns, wanted = list[torch.Tensor](), list[torch.Tensor]()
    for member, own_seed in enumerate(seeds):
        own = [alone(members[member], path) for path in ("a", "b")]
        rows = [random(own_seed + 100 * index, 6, INPUTS) for index in range(2)]
        energies = [float(X.square().sum()) for X in rows]
        t = sum(float((X @ D.T).square().sum()) / one for X, D, one in zip(rows, own, energies, strict=True))
        for index, path in enumerate(("a", "b")):
            scale = (energies[index] * t) ** -0.5
            columns.append(
                torch.stack([(rows[index] @ alone(member, path).T).flatten() for member in members], 1) * scale
            )
            wanted.append((rows[index] @ own[index].T).flatten() * scale)
    root = (0.01 * float(torch.cat(columns).square().sum()) / count) ** 0.5
    system = torch.cat([*columns, root * torch.eye(count, dtype=torch.float64)])
    right = torch.cat([*wanted, torch.full((count,), root / count, dtype=torch.float64)])
    expected = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution.flatten()
    assert fitted.report.weights == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-8)
    weighted = sum((w * alone(one, "a") for w, one in zip(expected, members, strict=True)), torch.zeros(()))
    torch.testing.assert_close(summed(fitted, "a"), weighted, rtol=1e-4, atol=1e-5)


def alone(one: LoadedAdapter, module_name: str) -> torch.Tensor:
    [delta] = [d for d in one.deltas if isinstance(d, LowRank) and d.module == module_name]
    return delta.scale * delta.B_OR.double() @ delta.A_RI.double()


def test_a_module_that_cannot_be_fitted_gets_the_fitted_weight_of_its_member():
    one, other = adapter(1), adapter(7, "other")
    settings = Regmean(steps=1, form="weights")
    fitted = fit([one, other], [Weight(), Weight()], settings, seeing(3, 4, hidden=["b"]))
    first, second = fitted.report.weights
    torch.testing.assert_close(summed(fitted, "b"), first * alone(one, "b") + second * alone(other, "b"))
    assert first != pytest.approx(second)
