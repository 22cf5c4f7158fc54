"""Whether prompts alone tell two suites apart.

The classifier is the nearest centroid of TF-IDF vectors of character 3- to 5-grams within words (Salton and Buckley,
1988; Rocchio, 1971). For term t in prompt d of n prompts: (1 + ln tf(t, d)) (1 + ln((1 + n) / (1 + df(t)))), scaled to
length 1, as scikit-learn's TfidfVectorizer("char_wb", (3, 5), sublinear_tf) has it. Each prompt is assigned to the
suite with the nearer centroid of the others, and the share that is assigned to its own suite is the separability.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import log, sqrt

from composer.formats.recipes.suite import Suite

SEPARABLE = 0.9
"""From this share on, prompts tell two suites apart. In the study, pairs of other tasks have 1.00, and pairs that want
different answers to the same prompts 0.47 to 0.72."""
MAX_PROMPTS, MAX_CHARS = 64, 2_000
"""As many prompts of each suite, and characters of each prompt, are compared."""
Vector = Mapping[str, float]


def tfidf(texts: Sequence[str]) -> list[Vector]:
    """The vectors of the texts, of length 1."""
    counts = [Counter(_ngrams(text[:MAX_CHARS])) for text in texts]
    documents = Counter(term for own in counts for term in own)
    weight = {term: 1 + log((1 + len(texts)) / (1 + among)) for term, among in documents.items()}
    return [_unit({term: (1 + log(often)) * weight[term] for term, often in own.items()}) for own in counts]


def separability(a: Suite, b: Suite) -> float:
    """The share of prompts that the classifier assigns to their own suite without having seen them: 1 for prompts of
    different tasks, about 0.5 for alike ones. A prompt that both suites have is in one of them only, in turn."""
    sides = _disjoint(a, b)
    if min(map(len, sides)) < 2:
        return 0.0 if _prompts(a) & _prompts(b) else 1.0
    vectors = tfidf([*sides[0], *sides[1]])
    parts = vectors[: len(sides[0])], vectors[len(sides[0]) :]
    sums = [_sum(part) for part in parts]
    right = 0
    for own, part in enumerate(parts):
        other = sums[1 - own]
        for vector in part:
            rest = {term: value - vector.get(term, 0.0) for term, value in sums[own].items()}
            right += _similarity(vector, rest) > _similarity(vector, other)
    return right / len(vectors)


def _disjoint(a: Suite, b: Suite) -> tuple[list[str], list[str]]:
    sides, shared = (list[str](), list[str]()), _prompts(a) & _prompts(b)
    turn = {prompt: number % 2 for number, prompt in enumerate(sorted(shared))}
    for number, suite in enumerate((a, b)):
        for prompt in dict.fromkeys(example.prompt for example in suite.sample(2 * MAX_PROMPTS)):
            if turn.get(prompt, number) == number and len(sides[number]) < MAX_PROMPTS:
                sides[number].append(prompt)
    return sides


def _prompts(suite: Suite) -> set[str]:
    return {example.prompt for example in suite.examples}


def _ngrams(text: str) -> Iterable[str]:
    for word in text.lower().split():
        padded = f" {word} "
        for size in (3, 4, 5):
            yield from (padded[start : start + size] for start in range(max(1, len(padded) - size + 1)))
            if len(padded) <= size:
                break


def _sum(vectors: Iterable[Vector]) -> dict[str, float]:
    total: dict[str, float] = {}
    for vector in vectors:
        for term, value in vector.items():
            total[term] = total.get(term, 0.0) + value
    return total


def _unit(vector: Vector) -> Vector:
    length = sqrt(sum(value * value for value in vector.values())) or 1.0
    return {term: value / length for term, value in vector.items()}


def _similarity(vector: Vector, centroid: Vector) -> float:
    """The cosine of the angle, times the length of the vector."""
    length = sqrt(sum(value * value for value in centroid.values()))
    return sum(value * centroid.get(term, 0.0) for term, value in vector.items()) / length if length else 0.0
