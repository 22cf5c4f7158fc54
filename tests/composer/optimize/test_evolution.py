"""An evolution strategy over the weights of seven members, whose best weights are known."""

import numpy as np

from composer.optimize.evolution import LARGEST, LEAST, Evolution, Weights

BEST = np.array([0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 0.2])
GENERATIONS = 60


def worst(weights: Weights) -> float:
    """The distance of the worst member from its best weight."""
    return float(np.abs(np.array(weights) - BEST).max())


def run(seed: int, generations: int = GENERATIONS) -> list[Weights]:
    evolution, tried = Evolution((1 / 7,) * 7, seed), list[Weights]()
    for _ in range(generations):
        asked = evolution.ask()
        evolution.tell(sorted(range(len(asked)), key=lambda index: worst(asked[index])))
        tried += asked
    return tried


def test_the_worst_member_of_seven_comes_near_its_best_weight() -> None:
    tried = run(seed=0)
    assert worst(tried[0]) > 0.5
    assert min(map(worst, tried)) < 0.1


def test_no_weight_leaves_its_bounds() -> None:
    tried = np.array(run(seed=1))
    assert tried.min() >= LEAST
    assert tried.max() <= LARGEST


def test_a_seed_gives_the_same_weights_each_time() -> None:
    assert run(seed=3, generations=5) == run(seed=3, generations=5)
    assert run(seed=3, generations=5) != run(seed=4, generations=5)
