"""Weights refined by a response surface: the log nats of each member as a quadratic in the weights of the sum.

T members, P points that were measured, each a vector w of weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GRID_STEP = 0.05
LARGEST = 1.3
MOST_MEMBERS = 3
"""Beyond it, the candidates are too few for a surface, and a grid has too many points."""


@dataclass(frozen=True, slots=True)
class Point:
    """Weights, and the nats of each member's suite there; None for a suite that was not measured."""

    weights: tuple[float, ...]
    nats: tuple[float | None, ...]


def unknowns(count: int) -> int:
    """The coefficients of a quadratic in `count` weights."""
    return 1 + count + count * (count + 1) // 2


def proposed(
    points: Sequence[Point], base: Sequence[float], alone: Sequence[float], least_gain: float
) -> tuple[float, ...] | None:
    """The weights at which the worst member's predicted kept share is largest, among those no further from the points
    than the points are from each other (their leverage). None for more than MOST_MEMBERS members, and if the points do
    not determine a surface.

    `base` and `alone` are each member's nats without adapters and by itself.
    """
    count = len(base)
    if count > MOST_MEMBERS:
        return None
    axis = np.arange(GRID_STEP, LARGEST + GRID_STEP / 2, GRID_STEP)
    grid = np.stack(np.meshgrid(*[axis] * count, indexing="ij"), axis=-1).reshape(-1, count)
    kept, allowed = np.full(len(grid), np.inf), np.ones(len(grid), dtype=bool)
    for member in range(count):
        known = [(point.weights, nats) for point in points if (nats := point.nats[member]) is not None]
        if len(known) < unknowns(count):
            return None
        terms = _terms(np.array([weights for weights, _ in known]))
        if np.linalg.matrix_rank(terms) < terms.shape[1]:
            return None
        logs = np.log(np.maximum([nats for _, nats in known], 1e-6))
        coefficients, *_ = np.linalg.lstsq(terms, logs, rcond=None)
        inverse = np.linalg.inv(terms.T @ terms)
        most = _leverage(terms, inverse).max()
        here = _terms(grid)
        allowed &= _leverage(here, inverse) <= most * (1 + 1e-9)
        gain = max(base[member] - alone[member], least_gain)
        kept = np.minimum(kept, (base[member] - np.exp(here @ coefficients)) / gain)
    if not allowed.any():
        return None
    best = grid[int(np.argmax(np.where(allowed, kept, -np.inf)))]
    return tuple(round(float(weight), 4) for weight in best)


def _terms(weights_PT: np.ndarray) -> np.ndarray:
    """1, w_i and w_i w_j for i <= j, for each point."""
    count = weights_PT.shape[1]
    products = [weights_PT[:, i] * weights_PT[:, j] for i in range(count) for j in range(i, count)]
    return np.column_stack([np.ones(len(weights_PT)), weights_PT, *products])


def _leverage(terms: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    return np.einsum("pi,ij,pj->p", terms, inverse, terms)
