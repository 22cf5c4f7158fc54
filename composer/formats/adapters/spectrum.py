"""Measures how much of an adapter's ranks is used: the singular values of every delta, from its factors alone. No
torch.

Delta = s B A has the singular values of s B_half A_half^T, where the halves are square roots of the R x R Gram matrices
of the factors; the O x I product is never formed. Per module: the effective rank exp(H(p)) with p = sigma / sum(sigma)
(Roy and Vetterli 2007, "The effective rank"), the share of the energy |Delta|_F^2 in its leading directions, and the
lowest number of directions that hold 95 and 99 %.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, prod, sqrt
from typing import Any

import numpy as np

from composer.findings import Finding, Severity, zero_deltas
from composer.formats.adapters.factors import MAX_ENERGY, factor_grams, readable
from composer.formats.adapters.facts import Adapter
from composer.formats.adapters.placement.result import PlacedModule, PlacementResult
from composer.formats.checkpoints.numeric import Float64

NEAR_ZERO = 0.01
"""A module whose entries are below this share of the adapter's root mean square adds practically nothing."""
MAX_RANK = 512
MAX_MODULES = 20_000
"""Per-module rows beyond this number are not kept; the summary still counts them."""
# A direction below this share of the largest singular value is rounding, not part of the delta.
_NOISE = 1e-6


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """One delta. `norm` is |Delta|_F with its scale; `entries` is O x I. `energy` has the share of |Delta|_F^2 that is
    left after truncation to rank 1, 2, 4, … below its own."""

    module: str
    rank: int
    entries: int
    norm: float
    effective_rank: float
    energy: dict[int, float]
    rank_95: int
    rank_99: int


@dataclass(frozen=True, slots=True)
class Spectrum:
    """All deltas. `energy` is the share left when every module is truncated to a rank; `rank_95` is the rank at which
    that is 95 %. `effective_rank` is the mean over modules, weighted by energy. `left_out` names modules without a
    spectrum: a rank above 512, an unsupported format, or numbers whose squares are too large to add up."""

    modules: tuple[ModuleSpectrum, ...]
    norm: float
    rank_max: int
    energy: dict[int, float]
    rank_95: int
    rank_99: int
    effective_rank: float
    left_out: tuple[str, ...]

    @property
    def near_zero(self) -> list[str]:
        """Modules whose entries are negligible beside the others'; none if all are zero."""
        entries = sum(module.entries for module in self.modules)
        usual = self.norm / sqrt(entries) if entries else 0.0
        return [module.module for module in self.modules if module.norm < NEAR_ZERO * usual * sqrt(module.entries)]

    def hints(self, known: Sequence[Finding] = ()) -> list[Finding]:
        """Notices about ranks that the next training run could save; not warnings, since no measurement shows what a
        lower rank would cost. And zero_delta for an adapter that adds nothing, unless that is `known`."""
        idle = not self.norm and not any(finding.code == "zero_delta" for finding in known)
        findings = zero_deltas("The adapter", [row.module for row in self.modules], len(self.modules)) if idle else []
        if self.norm and self.rank_95 * 2 <= self.rank_max:
            message = (
                f"Rank {self.rank_max}, but 95 % of the energy is in {self.rank_95} and 99 % in {self.rank_99}: "
                "a lower rank may do."
            )
            findings.append(Finding("rank_unused", Severity.NOTICE, "rank", message, self.rank_95))
        if near := self.near_zero:
            named = ", ".join(near[:5]) + (f" and {len(near) - 5} more" if len(near) > 5 else "")
            message = f"{len(near)} of {len(self.modules)} modules are near zero: {named}. These targets were wasted."
            findings.append(Finding("near_zero_modules", Severity.NOTICE, near[0], message, len(near)))
        return findings

    def summary(self) -> dict[str, Any]:
        """The part that a list of releases shows."""
        return {
            "norm": _short(self.norm),
            "effective_rank": _short(self.effective_rank),
            "energy": _json_keys(self.energy),
            "rank_95": self.rank_95,
            "rank_99": self.rank_99,
            "near_zero": len(self.near_zero),
        }

    def to_json(self) -> dict[str, Any]:
        idle = set(self.near_zero)
        rows = [
            {
                "module": module.module,
                "rank": module.rank,
                "norm": _short(module.norm),
                "effective_rank": _short(module.effective_rank),
                "energy": _json_keys(module.energy),
                "rank_95": module.rank_95,
                "rank_99": module.rank_99,
                "near_zero": module.module in idle,
            }
            for module in self.modules[:MAX_MODULES]
        ]
        return {**self.summary(), "modules": rows, "left_out": list(self.left_out[:MAX_MODULES])}


def spectrum(adapter: Adapter, placed: PlacementResult) -> Spectrum | None:
    """The spectrum of an adapter whose placement and numbers are sound; None if it has no low-rank module. 224 modules
    of a 7B model at rank 16 take 0.3 s on one core; memory is one block of a factor, whatever the adapter. Variants
    that do more than add s B A (DoRA) are measured by that product."""
    rows: list[ModuleSpectrum] = []
    left_out: list[str] = []
    by_direction = np.zeros(MAX_RANK)
    for module, sigma in _sigmas(adapter, placed.low_rank):
        if sigma is None:
            left_out.append(module.module)
            continue
        energy = sigma**2
        by_direction[: len(energy)] += energy
        rows.append(
            ModuleSpectrum(
                module=module.module,
                rank=module.rank,
                entries=prod(module.shape),
                norm=sqrt(float(energy.sum())),
                effective_rank=_effective_rank(sigma),
                energy=_by_rank(energy, module.rank),
                rank_95=_directions(energy, 0.95),
                rank_99=_directions(energy, 0.99),
            )
        )
    if not rows:
        return None
    energy, rank_max = sum(row.norm**2 for row in rows), max(row.rank for row in rows)
    return Spectrum(
        modules=tuple(rows),
        norm=sqrt(energy),
        rank_max=rank_max,
        energy=_by_rank(by_direction, rank_max),
        rank_95=_directions(by_direction, 0.95),
        rank_99=_directions(by_direction, 0.99),
        effective_rank=sum(row.effective_rank * row.norm**2 for row in rows) / energy if energy else 0.0,
        left_out=tuple(left_out),
    )


def _sigmas(adapter: Adapter, modules: Sequence[PlacedModule]) -> Iterator[tuple[PlacedModule, Float64 | None]]:
    """The singular values of each delta, descending; None if they cannot be computed."""
    for module in modules:
        if module.rank > MAX_RANK or not readable(adapter, module):
            yield module, None
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            gram_A, gram_B = factor_grams(adapter, module)
            most = float(np.abs(gram_A).sum()) * float(np.abs(gram_B).sum()) * module.scale**2
        yield module, _sigma(gram_A, gram_B, module.scale) if most <= MAX_ENERGY else None


def _sigma(gram_A: Float64, gram_B: Float64, scale: float) -> Float64:
    values, vectors = np.linalg.eigh(gram_A)
    half = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ gram_B @ half)[::-1], 0)) * abs(scale)
    return np.where(sigma > _NOISE * sigma[0], sigma, 0.0)


def _effective_rank(sigma: Float64) -> float:
    """exp(H(p)), p = sigma / sum(sigma): R for R equal directions, 1 for a single one, 0 for a delta of zeros."""
    total = float(sigma.sum())
    if not total:
        return 0.0
    p = sigma[sigma > 0] / total
    return exp(-float((p * np.log(p)).sum()))


def _directions(energy: Float64, share: float) -> int:
    """The lowest number of leading directions that hold that share of the energy; 0 if there is none."""
    total = float(energy.sum())
    # 1e-12: a sum in another order must not ask for one direction more.
    return int(np.searchsorted(np.cumsum(energy), share * total * (1 - 1e-12)) + 1) if total else 0


def _by_rank(energy: Float64, rank: int) -> dict[int, float]:
    """Empty for a delta of zeros."""
    held, total = np.cumsum(energy), float(energy.sum())
    ranks = (1 << power for power in range((rank - 1).bit_length())) if total else ()
    return {count: float(held[count - 1]) / total for count in ranks}


def _json_keys(energy: dict[int, float]) -> dict[str, float]:
    return {str(rank): round(share, 4) for rank, share in energy.items()}


def _short(value: float) -> float:
    return float(f"{value:.6g}")
