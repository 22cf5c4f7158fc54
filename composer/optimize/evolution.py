"""Weights of many members by an evolution strategy: CMA-ES (Hansen, arXiv 1604.00772), from the package `cmaes`.

A response surface needs more points with more members, an evolution strategy only the order of each generation.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from composer.errors import NotSupported

LEAST, LARGEST = 0.05, 1.3
SPREAD = 0.2
"""The standard deviation of the first generation's weights. Those of a mean of seven are 0.14, of a sum 1."""

Weights = tuple[float, ...]


def require_cmaes() -> None:
    """Raises NotSupported if the package is not installed."""
    if importlib.util.find_spec("cmaes") is None:
        message = "Weights by an evolution strategy need the package cmaes, which is not installed."
        step = "Install adaptory with its extra `optimize`, or leave `evolve` out."
        raise NotSupported("evolution_missing", message, subject="evolve", next_step=step)


class Evolution:
    """Proposes generations of weights around `start`, each between LEAST and LARGEST: none is left out. The same `seed`
    and the same order of each generation give the same weights."""

    def __init__(self, start: Weights, seed: int) -> None:
        import cmaes

        bounds: Any = np.array([(LEAST, LARGEST)] * len(start))
        mean = np.clip(start, LEAST, LARGEST)
        # The package draws from 32-bit seeds.
        self._strategy = cmaes.CMA(mean=mean, sigma=SPREAD, bounds=bounds, seed=seed % 2**32)
        self._asked: list[np.ndarray] = []

    @property
    def population(self) -> int:
        """The size of a generation: 4 + 3 ln n for n weights."""
        return self._strategy.population_size

    def ask(self) -> list[Weights]:
        """The next generation."""
        self._asked = [self._strategy.ask() for _ in range(self.population)]
        return [tuple(round(float(weight), 4) for weight in weights) for weights in self._asked]

    def tell(self, best_first: Sequence[int]) -> None:
        """Says which of the generation were the best: indices into it."""
        ranks = np.argsort(best_first)
        self._strategy.tell([(weights, float(rank)) for weights, rank in zip(self._asked, ranks, strict=True)])
