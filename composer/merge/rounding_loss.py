"""Checks written values against sampled rows recomputed in float64, and measures how much of Δ survived rounding.

Checking every value would add a third to a merge's time. So the sample is the rows that verification recomputes anyway:
nine or ten of each tensor, about 20 thousand values of a small one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import sqrt
from typing import Any

import numpy as np
import torch

from composer.deltas.delta import RowwiseDelta
from composer.errors import RefusedOutput
from composer.findings import Finding, Severity
from composer.formats.checkpoints.files import StoredFile
from composer.formats.checkpoints.numeric import Summed
from composer.formats.recipes.rounding import Mode, Rounding
from composer.merge.chunks import TensorWork
from composer.merge.io.source import Source, picked_rows, source_rows

_SAMPLED_ROWS = 8
_SAMPLED_ELEMENTS = 256  # for a tensor that is only cast or replaced
_FLOAT32_EPS = torch.finfo(torch.float32).eps
_COMPUTED_ULPS = 512  # a delta without factors goes through norms, rotations or transforms in float32
_NOTICE, _WARNING = 0.18, 0.48  # of a delta's entries; in bfloat16, Gaussian, that is RMS(Δ)/RMS(W) = 1e-2 and 3e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingLoss(Summed):
    """Counts and squared norms in float64, over sampled rows or summed over tensors.

    `lost` entries of Δ changed nothing: the output equals the rounded base. `weight` is ‖W‖²,
    `delta` ‖Δ‖², `moved` ‖round(W + Δ) - W‖², `error` ‖round(W + Δ) - W - Δ‖².
    """

    rows: int = 0
    entries: int = 0
    lost: int = 0
    weight: float = 0.0
    delta: float = 0.0
    moved: float = 0.0
    error: float = 0.0

    @property
    def size(self) -> float:
        """RMS(Δ)/RMS(W)."""
        return sqrt(self.delta / self.weight) if self.weight else 0.0

    @property
    def lost_share(self) -> float:
        return self.lost / self.entries if self.entries else 0.0

    def to_json(self) -> dict[str, Any]:
        """`lost_share` of Δ's entries, `energy_kept` ‖round(W + Δ) - W‖²/‖Δ‖², `error` ‖round(W + Δ) - W - Δ‖/‖Δ‖."""
        delta = self.delta or 1.0
        return {
            "sampled_rows": self.rows,
            "relative_size": self.size,
            "lost_share": self.lost_share,
            "energy_kept": self.moved / delta,
            "error": sqrt(self.error / delta),
        }


def total(survivals: Iterable[RoundingLoss]) -> RoundingLoss:
    """The sum over tensors or shards."""
    return reduce(RoundingLoss.__add__, survivals, RoundingLoss())


def find_lost(survivals: dict[str, RoundingLoss], dtypes: dict[str, str], rounding: Rounding) -> list[Finding]:
    """A finding for the tensors whose deltas lose much to the output's dtype, by sampled entries; its subject is the
    one that loses most. None for stochastic rounding, which preserves deltas on average.
    """
    if rounding.mode is Mode.STOCHASTIC:
        return []
    findings: list[Finding] = []
    for dtype in ("BF16", "F16"):
        shares = {name: loss.lost_share for name, loss in survivals.items() if dtypes[name] == dtype and loss.entries}
        losing = sorted((share, name) for name, share in shares.items() if share >= _NOTICE)
        if losing:
            share, worst = losing[-1]
            severity = Severity.WARNING if share >= _WARNING else Severity.NOTICE
            message = (
                f"{len(losing)} of {len(shares)} deltas are so small that {dtype} loses much of them, most in {worst} "
                f"({share:.0%} of its entries). Serve the adapter unmerged, write float32, or round stochastically "
                "(right on average, but noisier)."
            )
            findings.append(Finding(f"{dtype.lower()}_swallow", severity, worst, message, share))
    return findings


@torch.inference_mode()
def confirm(work: TensorWork, source: StoredFile, target: StoredFile, rounding: Rounding) -> RoundingLoss:
    """Verifies a rewritten tensor on sampled rows, recomputed in float64, and returns how much of Δ survived rounding.

    Each written value must lie within half a step of its dtype (a full step for stochastic rounding), plus the rounding
    of R float32 additions (a few hundred for a delta without factors). Raises RefusedOutput naming the tensor
    otherwise.
    """
    name = work.plan.target.name
    chosen = sampled_rows(work)
    if not chosen:
        return RoundingLoss()
    W, delta, slack = _exact_rows(work, source, chosen)
    written = picked_rows(Source(target, work.plan.target, work.columns), chosen)
    exact = W + delta
    if written.is_floating_point():
        limits = torch.finfo(written.dtype)
        slack = slack + exact.abs() * (limits.eps * rounding.steps) * (1 + 1e-6)
        slack = slack + 2 * rounding.steps * limits.smallest_normal * limits.eps
    if not bool(((written.double() - exact).abs() <= slack).all()):
        raise unconfirmed(name, "some rows have unexpected values")
    return survival_of(W, delta, written) if work.changed else RoundingLoss(rows=len(chosen))


def unconfirmed(subject: str, why: str) -> RefusedOutput:
    """The error for output that differs from the plan when it is read back."""
    message = f"{subject} was not written as planned: {why}."
    next_step = "Check the disk and memory, and try again."
    return RefusedOutput("verification", message, subject=subject, next_step=next_step)


def sampled_rows(work: TensorWork) -> list[int]:
    """The rows to check, seeded by the name alone so that the same merge is checked at the same rows. Includes the
    first and the last."""
    if not work.rows:
        return []
    count = _SAMPLED_ROWS if work.columns > 1 else _SAMPLED_ELEMENTS
    picks = np.random.default_rng(list(work.plan.target.name.encode())).integers(0, work.rows, count)
    return sorted({0, work.rows - 1, *picks.tolist()})


def survival_of(W: torch.Tensor, delta: torch.Tensor, written: torch.Tensor) -> RoundingLoss:
    """The rounding loss of some rows, from W and Δ in float64 and the output in its dtype."""
    moved = written.double() - W
    touched = delta != 0
    lost = touched & (written == W.to(written.dtype))

    def energy(values: torch.Tensor) -> float:
        return float(values.square().sum())

    return RoundingLoss(
        rows=W.shape[0], entries=int(touched.sum()), lost=int(lost.sum()), weight=energy(W), delta=energy(delta),
        moved=energy(moved), error=energy(moved - delta),
    )  # fmt: skip


def _exact_rows(
    work: TensorWork, source: StoredFile, rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, Δ, bound of the float32 accumulation error), rows in float64."""
    if work.replacement is not None:
        W = work.replacement[list(rows)].double()
        return W, torch.zeros_like(W), torch.zeros_like(W)
    W = picked_rows(work.source(source), rows).double()
    delta, slack = torch.zeros_like(W), torch.zeros_like(W)

    def inside(begin: int, count: int) -> tuple[list[int], list[int]]:
        held = [i for i, row in enumerate(rows) if begin <= row < begin + count]
        return held, [rows[i] - begin for i in held]

    bound, terms = torch.zeros_like(W), torch.zeros(len(rows), 1, dtype=torch.float64)
    for factors in work.factors:
        held, own = inside(factors.begin, factors.rows)
        for part in factors.parts if held else ():
            left, right = part.stored_rows(own, torch.float64)
            delta[held] += left @ right
            # |left| @ |right| bounds every partial sum; by Cauchy-Schwarz so do the norms, without a second product.
            # (Summed squares take a quarter of the time of torch's norm over rows.)
            norms = left.square().sum(dim=1, keepdim=True).sqrt(), right.square().sum(dim=0, keepdim=True).sqrt()
            bound[held] += norms[0] * norms[1]
        terms[held] += factors.rank + 5
    slack += (W.abs() + bound) * terms * _FLOAT32_EPS
    for computed in work.computed:
        held, own = inside(computed.begin, computed.stored_shape[0])
        if held:
            added = _computed_rows(work, computed, source, own)
            delta[held] += added
            slack[held] += (W[held].abs() + added.abs().amax(dim=1, keepdim=True)) * _COMPUTED_ULPS * _FLOAT32_EPS
    return W, delta, slack


def _computed_rows(work: TensorWork, delta: RowwiseDelta, source: StoredFile, own: Sequence[int]) -> torch.Tensor:
    def base(begin: int, end: int) -> torch.Tensor:
        return source_rows(work.source(source), delta.begin + begin, delta.begin + end).double()

    if delta.all_rows:
        return delta.rows(base(0, delta.stored_shape[0]), 0)[list(own)]
    return torch.cat([delta.rows(base(row, row + 1), row) for row in own])
