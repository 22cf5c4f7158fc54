"""RegMean on LoRA factors: keeps the trained B and fits A on the modules' inputs.

On the inputs that a module gets from member m's own examples, the combination D should do what m does alone:

    min over D = Σ_i B_i A*_i of  Σ_m a_m |(D - Δ_m) X_m|² + rho |D - w0 Σ_i Δ_i|²

This is RegMean (2212.09849) for the factors of LoRA (IterIS, 2411.15231). In a second step, the inputs are those of the
merged model while the targets stay (RegMean++, 2508.03121). The rank is that of a stack, R = Σ r_i. No matrix of size
I x I or O x I is formed. a_m = 1 / (|W X_m|² t_m) with t_m = Σ over modules |Δ_m X_m|² / |W X_m|² makes the members'
relative errors count equally. rho is relative to the mean eigenvalue of Σ a_m X_m X_m^T. w0 is the mean of the
least-squares weights, which the form `weights` takes as they are instead of a fitted A.

On the inputs X_g of a guard, which every member should leave to the base, D should do nothing: one term more,
a_g |D X_g|², with a_g = g / (|W X_g|² mean_m t_m). It is that of a member without a delta.

Shapes: O outputs and I inputs of a module, r_i rank of member i, R their sum, T members; N_m rows (tokens) of member m,
N their sum with the guard's. Lists of inputs have an entry for each member, and the guard's last if there is one.
Everything is computed in float64.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from math import fsum, sqrt
from statistics import fmean
from typing import TypeVar

import torch

from composer.deltas.delta import Additive, Delta, Layout, LowRank, Replacement, names_of
from composer.deltas.tensors import CPU, torch_threads
from composer.deltas.variants.load import LoadedAdapter
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.weights import Weight
from composer.methods.join import times

_CUT = 1e-12
"""Relative to the largest eigenvalue; below this, the core form's R x R system counts as singular in a direction."""
_ROWS_BYTES = 1 << 30
"""The inputs that are held in memory at once, in float64."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModuleInputs:
    """One module's inputs on one member's examples: rows X (N x I in parts, any dtype), and Σ |W x|² over them."""

    parts: Sequence[torch.Tensor]
    base_energy: float

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat([part.double() for part in self.parts])


Observe = Callable[[int | None, Sequence[Delta], Mapping[str, LowRank]], Mapping[str, ModuleInputs]]
"""(member index, active deltas, a delta per key) -> by key, the inputs of the matrix that the delta adds to, on that
member's examples, or on the guard's for None (an empty mapping without a guard). Matrices whose inputs cannot be
observed (packed projections) are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """The result of a fit. `errors` has √(Σ over modules |(D - Δ_m) X_m|² / |W X_m|² / t_m) for each member m, on the
    inputs of the last step; `errors_of_sum` has the same for the weighted sum w0 Σ Δ_i. `weights` are the members'
    least-squares weights, w0 their mean. `guard` and `guard_of_sum` have √(Σ |D X_g|² / |W X_g|² / mean t_m) on the
    guard's inputs, None without a guard. `fitted` counts modules and expert stacks. Those in `kept_at_sum` keep the
    weighted sum (a stack, in at least one expert): their inputs cannot be observed, no example reached them, or an
    adapter has no factors there."""

    w0: float
    weights: tuple[float, ...]
    errors: tuple[float, ...]
    errors_of_sum: tuple[float, ...]
    fitted: int
    kept_at_sum: tuple[str, ...]
    guard: float | None = None
    guard_of_sum: float | None = None

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Fit:
    """The adapters with fitted factors and all weights folded in, so that their plain sum is the combination."""

    adapters: list[LoadedAdapter]
    report: FitReport


class Inputs:
    """A module's inputs: X_m (N_m x I) for each member and the guard, and products that modules with the same inputs
    (q, k, v) share."""

    def __init__(self, X: Sequence[torch.Tensor]) -> None:
        self.X = list(X)

    @property
    def columns(self) -> int:
        return self.X[0].shape[1]

    @property
    def rows(self) -> int:
        return sum(map(len, self.X))

    @cached_property
    def energies(self) -> list[float]:
        return [float(X.square().sum()) for X in self.X]

    @cached_property
    def moments(self) -> list[torch.Tensor]:
        """S_m = X_m^T X_m, I x I."""
        return [X.T @ X for X in self.X]

    @cached_property
    def products(self) -> torch.Tensor:
        """<x, y> for all pairs of rows, N x N."""
        X_NI = torch.cat(self.X)
        return X_NI @ X_NI.T


@dataclass(frozen=True, slots=True)
class ModuleFit:
    """One module's factors and inputs. `A` (r_i x I) and `B` (O x r_i) have an entry per member, of rank 0 if it has no
    delta. Scales and weights are folded into B."""

    A: list[torch.Tensor]
    B: list[torch.Tensor]
    inputs: Inputs

    @property
    def X(self) -> list[torch.Tensor]:  # noqa: N802 - the formula's
        return self.inputs.X

    @property
    def blocks(self) -> list[slice]:
        """Each member's rows of the stacked A."""
        ends = list(accumulate(len(A) for A in self.A))
        return [slice(end - len(A), end) for end, A in zip(ends, self.A, strict=True)]

    def rho(self, a: Sequence[float], ridge: float) -> float:
        """The ridge relative to the mean eigenvalue of the members' Σ a_m S_m."""
        own = zip(a[: len(self.A)], self.inputs.energies, strict=False)
        return ridge * sum(a_m * energy for a_m, energy in own) / self.inputs.columns

    def inner(self, member: int) -> torch.Tensor:
        """Σ <Δ_i x, Δ_j x> over the rows x of a member or of the guard: T x T."""
        H_RN = torch.cat(self.A) @ self.X[member].T
        products_RR = self._products * (H_RN @ H_RN.T)
        return torch.stack([torch.stack([products_RR[i, j].sum() for j in self.blocks]) for i in self.blocks])

    def error(self, fitted: Sequence[torch.Tensor], member: int) -> float:
        """|(Σ B_i A*_i - Δ_m) X_m|², where the guard has no Δ_m."""
        H_RN = torch.cat(list(fitted)) @ self.X[member].T
        if member < len(self.A):
            H_RN[self.blocks[member]] -= self.A[member] @ self.X[member].T
        return max(0.0, float((self._products * (H_RN @ H_RN.T)).sum()))

    @property
    def _products(self) -> torch.Tensor:
        """B^T B, R x R."""
        B_OR = torch.cat(self.B, dim=1)
        return B_OR.T @ B_OR


def fit(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[Weight],
    settings: Regmean,
    observe: Observe,
    device: torch.device = CPU,
) -> Fit:
    """Fits the factors of the adapters' linear modules on the device; every other delta gets the weight w0, and the
    report names it.

    The settings are `ridge` (rho), `steps` (1 or 2), `guard` (g) and `form`: `input` fits A over the whole input side,
    `core` only recombines the rows of A (an R x R matrix), `weights` fits one weight for each adapter, which its other
    deltas get too. Raises what `observe` raises.
    """
    members = [index for index, adapter in enumerate(adapters) if len(adapter.deltas)]
    own = [[times(delta, weights[index].of(*names_of(delta))) for delta in adapters[index].deltas] for index in members]
    pairs = _factored(own)
    some = {key: next(iter(own.values())) for key, own in pairs.items()}

    def guarded(active: Sequence[Delta]) -> _Guard:
        return _Guard(settings.guard, observe(None, active, some) if settings.guard else {})

    problem = _Problem.of(
        pairs, [observe(index, active, some) for index, active in zip(members, own, strict=True)], guarded([]), device
    )
    fitted_T = problem.weights(settings.ridge)
    w0 = fmean(fitted_T)
    w_T = fitted_T if settings.form == "weights" else [w0] * len(members)
    solved, errors = problem.solved(_solver(settings, w_T))
    for _ in range(1, settings.steps):
        merged = [delta for deltas in _with_factors(own, solved, w_T) for delta in deltas]
        problem = _Problem.of(pairs, [observe(index, merged, some) for index in members], guarded(merged), device)
        if settings.form == "weights":
            w_T = fitted_T = problem.weights(settings.ridge)
        solved, errors = problem.solved(_solver(settings, w_T))
    fitted = dict(zip(members, _with_factors(own, solved, w_T), strict=True))
    additive = [delta for deltas in own for delta in deltas if not isinstance(delta, Replacement)]
    count, errors_of_sum = len(members), list(problem.errors_of_sum(w0))
    report = FitReport(
        w0=w0,
        weights=tuple(fitted_T),
        errors=tuple(errors[:count]),
        errors_of_sum=tuple(errors_of_sum[:count]),
        guard=errors[count] if errors[count:] else None,
        guard_of_sum=errors_of_sum[count] if errors_of_sum[count:] else None,
        fitted=len(
            {
                _stack_or_module(delta)
                for by_member in pairs.values()
                for delta in by_member.values()
                if _key(delta) in solved
            }
        ),
        kept_at_sum=tuple(sorted({_stack_or_module(delta) for delta in additive if _key(delta) not in solved})),
    )
    return Fit(
        [replace(adapter, deltas=tuple(fitted.get(index, ()))) for index, adapter in enumerate(adapters)], report
    )


def solve_input(module: ModuleFit, a: Sequence[float], w0: float, ridge: float) -> list[torch.Tensor]:
    """A* of each member over the whole input side, by the smaller of two equivalent systems: the primal of size I x I,

    A*_i = A_i (a_i S_i + rho w0) (Σ_j a_j S_j + rho)^-1,  S = X^T X,

    or its dual of size N x N, if there are fewer rows than inputs.
    """
    inputs, rho = module.inputs, module.rho(a, ridge)
    if rho <= 0:
        return [w0 * A for A in module.A]
    return (primal if inputs.columns < inputs.rows else dual)(module, a, w0, rho)


def primal(module: ModuleFit, a: Sequence[float], w0: float, rho: float) -> list[torch.Tensor]:
    weighted = [a_m * S_II for a_m, S_II in zip(a, module.inputs.moments, strict=True)]
    factor = _factor(torch.stack(weighted).sum(0), rho)
    return [
        torch.cholesky_solve((A @ S_II + rho * w0 * A).T, factor).T for A, S_II in zip(module.A, weighted, strict=False)
    ]


def dual(module: ModuleFit, a: Sequence[float], w0: float, rho: float) -> list[torch.Tensor]:
    """A*_i = w0 A_i + A_i Y^T (E_i - w0) (Y Y^T + rho)^-1 Y,  Y = [√a_m X_m] (N x I),  E_i is 1 on i's rows, else 0."""
    some = module.X[0]
    owner_N = torch.tensor([member for member, X in enumerate(module.X) for _ in range(len(X))], device=some.device)
    root_N = some.new_tensor(a).sqrt()[owner_N]
    factor = _factor(module.inputs.products * torch.outer(root_N, root_N), rho)
    Y_NI = torch.cat(module.X) * root_N[:, None]
    fitted: list[torch.Tensor] = []
    for member, A_RI in enumerate(module.A):
        wanted_RN = (A_RI @ Y_NI.T) * ((owner_N == member).double() - w0)
        fitted.append(w0 * A_RI + torch.cholesky_solve(wanted_RN.T, factor).T @ Y_NI)
    return fitted


def _factor(system: torch.Tensor, rho: float) -> torch.Tensor:
    """The Cholesky factor of system + rho."""
    return torch.linalg.cholesky(system + rho * torch.eye(len(system), dtype=system.dtype, device=system.device))


def solve_core(module: ModuleFit, a: Sequence[float], w0: float, ridge: float) -> list[torch.Tensor]:
    """A* = M A: recombines the rows of A by one R x R matrix:

    M = (Σ a_m E_m K_m + rho w0 G) (Σ a_m K_m + rho G)^-1,  K_m = A X_m^T X_m A^T,  G = A A^T,  E_m keeps m's rows.

    B^T B cancels, so the result does not depend on how a delta is split into its factors.
    """
    A_RI = torch.cat(module.A)
    G_RR = A_RI @ A_RI.T
    system_RR, wanted_RR = torch.zeros_like(G_RR), torch.zeros_like(G_RR)
    for X_NI, a_m, block in zip(module.X, a, [*module.blocks, slice(0)], strict=False):  # of the guard, none is kept
        H_RN = A_RI @ X_NI.T
        K_RR = a_m * (H_RN @ H_RN.T)
        system_RR += K_RR
        wanted_RR[block] += K_RR[block]
    rho = module.rho(a, ridge)
    if rho <= 0:
        return [w0 * A for A in module.A]
    system_RR, wanted_RR = system_RR + rho * G_RR, wanted_RR + rho * w0 * G_RR
    M_RR = wanted_RR @ torch.linalg.pinv(system_RR, rtol=_CUT, hermitian=True)
    return [M_RR[block] @ A_RI for block in module.blocks]


Solve = Callable[[ModuleFit, Sequence[float]], list[torch.Tensor]]
"""(a module, a of each member and of the guard) -> A* of each member."""


def _solver(settings: Regmean, w_T: Sequence[float]) -> Solve:
    """The way in which the settings solve a module. Unless they choose the weights alone, those are equal."""
    if settings.form == "weights":
        return lambda module, _a: [w * A for w, A in zip(w_T, module.A, strict=True)]
    solve = solve_core if settings.form == "core" else solve_input
    return lambda module, a: solve(module, a, w_T[0] if w_T else 0.0, settings.ridge)


@dataclass(frozen=True, slots=True)
class _Guard:
    """The guard's weight g and its inputs by key, which are empty without a guard."""

    weight: float
    seen: Mapping[str, ModuleInputs]


@dataclass(frozen=True, slots=True)
class _Problem:
    """One step's fit: for each matrix that can be fitted, the pairs by member and the inputs. Each is computed on
    `device`; results are on the CPU.

    `seen` has an entry for each of the `count` members, and one for the guard if there is one. `inner` has
    Σ over modules G_m / |W X_m|² (T x T) for each; a member's diagonal gives t_m.
    """

    pairs: Mapping[str, Mapping[int, LowRank]]
    seen: Sequence[Mapping[str, ModuleInputs]]
    count: int
    guard: float
    inner: list[torch.Tensor]
    device: torch.device

    @classmethod
    def of(
        cls,
        pairs: Mapping[str, Mapping[int, LowRank]],
        own: Sequence[Mapping[str, ModuleInputs]],
        guard: _Guard,
        device: torch.device,
    ) -> "_Problem":
        count, seen = len(own), [*own, *([guard.seen] if guard.seen else [])]
        pairs = {name: own for name, own in pairs.items() if any(name in observed for observed in seen)}
        # An expert that gets no token of a member's examples has no rows there.
        columns = {name: next(iter(own.values())).A_RI.shape[1] for name, own in pairs.items()}
        none = {name: ModuleInputs([torch.zeros(0, count)], 0.0) for name, count in columns.items()}
        inner = [torch.zeros(count, count, dtype=torch.float64) for _ in seen]
        seen = [{**none, **observed} for observed in seen]
        problem = cls(pairs, seen, count, guard.weight, inner, device)
        each = range(len(seen))
        for name, grams in problem.each(lambda _name, module: [module.inner(member).cpu() for member in each]):
            for member, observed in enumerate(seen):
                if observed[name].base_energy > 0:
                    inner[member] += grams[member] / observed[name].base_energy
        return problem

    def each(self, compute: Callable[[str, ModuleFit], T]) -> Iterator[tuple[str, T]]:
        """`compute` of each module, in order. Modules with the same inputs (q, k and v) follow each other and share
        products; others are computed side by side, on a thread each."""

        def computed(names: Sequence[str]) -> list[tuple[str, T]]:
            inputs = Inputs([observed[names[0]].rows.to(self.device) for observed in self.seen])
            return [(name, compute(name, self._module(name, inputs))) for name in names]

        def inputs_of(name: str) -> list[int]:
            return [id(part) for observed in self.seen for part in observed[name].parts]

        groups = [list(names) for _, names in groupby(self.pairs, inputs_of)]
        with torch_threads(1), ThreadPoolExecutor(self._side_by_side(), "regmean") as pool:
            for group in pool.map(computed, groups):
                yield from group

    def _side_by_side(self) -> int:
        """The number of modules that may be computed at once: one for each core, if their rows fit in _ROWS_BYTES; on
        an accelerator, one."""
        if self.device.type != "cpu":
            return 1
        sizes = [
            8 * sum(part.numel() for observed in self.seen for part in observed[name].parts) for name in self.pairs
        ]
        return max(1, min(os.cpu_count() or 1, _ROWS_BYTES // max(sizes, default=1)))

    def _module(self, name: str, inputs: Inputs) -> ModuleFit:
        """The module's factors in float64."""
        pairs = {member: pair.to(self.device) for member, pair in self.pairs[name].items()}
        some = next(iter(pairs.values()))
        A, B = [some.A_RI[:0].double()] * self.count, [some.B_OR[:, :0].double()] * self.count
        for member, pair in pairs.items():
            A[member], B[member] = pair.A_RI.double(), pair.B_OR.double() * pair.scale
        return ModuleFit(A, B, inputs)

    def alpha(self, name: str) -> list[float]:
        """a_m = 1 / (|W X_m|² t_m), and that of the guard; 0 if the base does nothing."""
        energies = [observed[name].base_energy for observed in self.seen]
        shares = [*self._t(), *([self._mean_t() / self.guard] if len(self.seen) > self.count else [])]
        return [1 / (value * t) if value > 0 else 0.0 for value, t in zip(energies, shares, strict=True)]

    def weights(self, ridge: float) -> list[float]:
        """The weights w that minimize Σ_m a_m |Σ_i w_i Δ_i X_m - Δ_m X_m|² over all modules together,

        (Σ_m G_m / t_m + g G_g / mean t + r) w = Σ_m G_m[:, m] / t_m + r / T  (2605.29101), with r relative to the mean
        eigenvalue of the members' part. 1 / T each if there were no inputs.
        """
        count = self.count
        grams = [gram / t for gram, t in zip(self.inner[:count], self._t(), strict=True)]
        own_TT = torch.stack(grams).sum(0)
        system_TT = own_TT + sum(self.inner[count:], torch.zeros_like(own_TT)) * self.guard / self._mean_t()
        wanted_T = torch.stack([gram[:, member] for member, gram in enumerate(grams)]).sum(0)
        r = ridge * float(own_TT.trace()) / count
        if r <= 0:
            return [1 / count] * count
        identity = torch.eye(count, dtype=torch.float64)
        return torch.linalg.solve(system_TT + r * identity, wanted_T + r / count).tolist()

    def solved(self, solve: Solve) -> tuple[dict[str, list[torch.Tensor]], list[float]]:
        """Each module's fitted A by member, in float32, and the relative errors on the inputs of each member and of
        the guard."""

        def fitted(name: str, module: ModuleFit) -> tuple[list[torch.Tensor], list[float]]:
            alpha = self.alpha(name)
            factors = solve(module, alpha)
            errors = [share * module.error(factors, member) for member, share in enumerate(alpha)]
            return [A.float().cpu() for A in factors], errors

        solved = dict(self.each(fitted))
        squares = [fsum(errors[member] for _, errors in solved.values()) for member in range(len(self.seen))]
        squares[self.count :] = [square / self.guard for square in squares[self.count :]]
        return {name: factors for name, (factors, _) in solved.items()}, list(map(sqrt, squares))

    def errors_of_sum(self, w0: float) -> Iterator[float]:
        """The relative errors under w0 Σ Δ_i: |Σ_i c_i Δ_i X_m|² with c_i = w0, but c_m = w0 - 1."""
        for member, (inner_TT, t) in enumerate(zip(self.inner, [*self._t(), self._mean_t()], strict=False)):
            c_T = torch.full((self.count,), w0, dtype=torch.float64)
            c_T[member : member + 1] -= 1
            yield sqrt(max(0.0, float(c_T @ inner_TT @ c_T)) / t)

    def _t(self) -> list[float]:
        """t_m; 1 for a member that does nothing."""
        return [float(gram[member, member]) or 1.0 for member, gram in enumerate(self.inner[: self.count])]

    def _mean_t(self) -> float:
        return fmean(self._t()) if self.count else 1.0


def _factored(own: Sequence[Sequence[Delta]]) -> dict[str, dict[int, LowRank]]:
    """Key of a matrix -> the members' pairs, if each member that changes it has exactly one pair of a linear module."""
    touched: dict[str, list[tuple[int, Delta]]] = defaultdict(list)
    for member, deltas in enumerate(own):
        for delta in deltas:
            touched[_key(delta)].append((member, delta))
    matrices: dict[str, dict[int, LowRank]] = {}
    for key, parts in touched.items():
        pairs = {member: delta for member, delta in parts if isinstance(delta, LowRank) and _is_linear(delta)}
        if len(pairs) == len(parts):
            matrices[key] = pairs
    return matrices


def _key(delta: Delta) -> str:
    """The key of the matrix that a delta adds to: a module's, or one expert's part of a stack."""
    if isinstance(delta, Replacement) or delta.stacked is None:
        return delta.module
    return f"{delta.stacked.parameter}/{delta.stacked.expert}/{delta.stacked.first}"


def _stack_or_module(delta: Additive) -> str:
    return delta.stacked.parameter if delta.stacked else delta.module


def _is_linear(delta: LowRank) -> bool:
    if not (delta.stacked or delta.weight.endswith(".weight")):  # packed attention
        return False
    return delta.layout is not Layout.EMBEDDING and not (delta.kernel or delta.nested or delta.tied)


def _with_factors(
    own: Sequence[Sequence[Delta]], solved: Mapping[str, list[torch.Tensor]], w_T: Sequence[float]
) -> list[list[Delta]]:
    """Each member's deltas with the fitted A; those that were not fitted, times the member's weight."""
    return [
        [
            replace(delta, A=solved[_key(delta)][member])
            if isinstance(delta, LowRank) and _key(delta) in solved
            else times(delta, w_T[member])
            for delta in deltas
        ]
        for member, deltas in enumerate(own)
    ]
