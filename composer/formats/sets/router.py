"""Chooses the adapter for a prompt: that of the nearest centroid, by the character n-grams that the prompts share.

With N prompts in all, df(g) of them with the n-gram g, and tf(g, p) occurrences of g in the prompt p:

    idf(g)         = ln((1 + N) / (1 + df(g))) + 1
    vector(p)      = tf(g, p) idf(g), divided by its Euclidean length
    centroid(c)    = the sum of the class's vectors, divided by its length
    similarity     = sum over g of tf(g, p) idf(g) centroid(c)[g]

Source: Rocchio classification, Manning, Raghavan and Schuetze, Introduction to Information Retrieval, section 14.2,
with the smoothed idf that scikit-learn documents. The length of a new prompt's own vector is the same for every class
and left out, so that a class is one table of weights, idf(g) centroid(c)[g].
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from composer.formats.recipes.suite import Example, Suite

BASE = "base"
"""The class of the prompts that no adapter is for."""
SHORTEST, LONGEST = 3, 5
"""The lengths of the n-grams, in characters."""
MAX_CHARS = 2000
"""The first characters of a prompt decide."""
T = TypeVar("T")
_DIGITS = 6
"""Significant digits of a weight."""


@dataclass(frozen=True, slots=True)
class Router:
    """`weights` has the weight of each n-gram, by class. Of equally similar classes the first one is chosen."""

    weights: Mapping[str, Mapping[str, float]]

    def choose(self, prompt: str) -> str:
        """The class of the prompt: BASE if it shares no n-gram with any class."""
        similar = self.similarities(prompt)
        best = max(similar, key=similar.__getitem__)
        return best if similar[best] > 0 else BASE

    def similarities(self, prompt: str) -> dict[str, float]:
        """The similarity of the prompt to each class, not normalized."""
        counted = Counter(ngrams(prompt))
        return {
            name: math.fsum(count * weights[gram] for gram, count in counted.items() if gram in weights)
            for name, weights in self.weights.items()
        }


def routed(router: Router, examples: Sequence[Example], run: Callable[[str, list[Example]], Sequence[T]]) -> list[T]:
    """The results of the examples, in order: `run` gets each class that is chosen with its examples, and returns
    theirs."""
    chosen = defaultdict[str, list[int]](list)
    for index, example in enumerate(examples):
        chosen[router.choose(example.prompt)].append(index)
    results = dict[int, T]()
    for name, indices in chosen.items():
        results.update(zip(indices, run(name, [examples[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(examples))]


def ngrams(prompt: str) -> Iterator[str]:
    """Yields the n-grams of a prompt, in lower case and with single spaces."""
    text = " ".join(prompt[:MAX_CHARS].lower().split())
    for length in range(SHORTEST, LONGEST + 1):
        yield from (text[start : start + length] for start in range(len(text) - length + 1))


def fit(prompts: Mapping[str, Sequence[str]]) -> Router:
    """The router of these prompts by class."""
    counted = {name: [Counter(ngrams(prompt)) for prompt in given] for name, given in prompts.items()}
    every = [grams for rows in counted.values() for grams in rows]
    documents = Counter(gram for grams in every for gram in grams)
    idf = {gram: math.log((1 + len(every)) / (1 + count)) + 1 for gram, count in documents.items()}
    return Router({name: _class_weights(rows, idf) for name, rows in counted.items()})


def _class_weights(rows: Sequence[Mapping[str, int]], idf: Mapping[str, float]) -> dict[str, float]:
    centroid = defaultdict[str, float](float)
    for grams in rows:
        length = math.sqrt(math.fsum((count * idf[gram]) ** 2 for gram, count in grams.items()))
        for gram, count in grams.items():
            centroid[gram] += count * idf[gram] / length
    length = math.sqrt(math.fsum(value * value for value in centroid.values())) or 1.0
    return {gram: float(f"{idf[gram] * value / length:.{_DIGITS}g}") for gram, value in sorted(centroid.items())}


def separability(prompts: Mapping[str, Sequence[str]]) -> float:
    """The share of prompts that a router of all other prompts assigns to their class, averaged over the classes: 1 if
    they can be separated, about 1 / (number of classes) if they cannot."""
    shares: list[float] = []
    for name, given in prompts.items():
        right = sum(
            fit({**prompts, name: [*given[:index], *given[index + 1 :]]}).choose(prompt) == name
            for index, prompt in enumerate(given)
        )
        shares.append(right / len(given))
    return math.fsum(shares) / len(shares)


# Whether prompts alone tell the tasks of two suites apart: measured by a router of all other prompts, for each one.
SEPARABLE = 0.9
"""From this share on, prompts tell two suites apart. In the study, pairs of other tasks have 1.00, and pairs with the
same prompts and other answers 0.28 and 0.44."""
MAX_PROMPTS = 16
"""As many prompts of each suite are compared."""


def separability_of(a: Suite, b: Suite) -> float:
    """The share of prompts that are assigned to their own suite, averaged over both: 1 for different tasks, about 0.5
    or less for the same prompts. A prompt that both suites have is in one of them only, in turn, since a router would
    otherwise have seen it. Fewer than two prompts on a side cannot be measured: 0 if any is shared, else 1."""
    shared = sorted(_prompts(a).keys() & _prompts(b).keys())
    turn = {prompt: number % 2 for number, prompt in enumerate(shared)}
    sides = [
        [prompt for prompt in _prompts(suite, 2 * MAX_PROMPTS) if turn.get(prompt, side) == side][:MAX_PROMPTS]
        for side, suite in enumerate((a, b))
    ]
    if min(map(len, sides)) < 2:
        return 0.0 if shared else 1.0
    return separability({str(side): prompts for side, prompts in enumerate(sides)})


def _prompts(suite: Suite, count: int | None = None) -> dict[str, None]:
    """The suite's different prompts, in its fixed random order if only some are wanted. Very short ones, which have no
    n-gram of every length, are left out."""
    return {example.prompt: None for example in suite.sample(count) if len(example.prompt.strip()) >= LONGEST}
