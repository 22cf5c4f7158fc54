"""A set's router as a Python program without dependencies, for gateways and scripts of one's own."""

from composer.formats.sets.adapter_set import AdapterSet
from composer.formats.sets.router import BASE, LONGEST, MAX_CHARS, SHORTEST

_PROGRAM = '''\
"""Chooses the adapter of a set for a prompt: choose("...") in Python, or `python {file} PROMPT`. Needs Python alone.

The class with the most similar prompts is chosen: the nearest centroid of TF-IDF over groups of characters.
"""

import math
import sys
from collections import Counter

BASE = {base!r}
"""The name of the base, for prompts that no adapter is for: set it to the name on your server."""
MEMBERS = {members!r}
"""The name of each class's adapter."""
WEIGHTS = {weights!r}
"""By class, the weight of each group of characters."""


def groups(prompt):
    text = " ".join(prompt[:{chars}].lower().split())
    for length in range({shortest}, {longest} + 1):
        for start in range(len(text) - length + 1):
            yield text[start : start + length]


def similarities(prompt):
    counted = Counter(groups(prompt))
    return {{
        name: math.fsum(count * weights[group] for group, count in counted.items() if group in weights)
        for name, weights in WEIGHTS.items()
    }}


def choose(prompt):
    """The name of the adapter that should answer the prompt, or of the base."""
    similar = similarities(prompt)
    best = max(similar, key=similar.__getitem__)
    return MEMBERS.get(best, BASE) if similar[best] > 0 else BASE


if __name__ == "__main__":
    print(choose(" ".join(sys.argv[1:]) or sys.stdin.read()))
'''


def to_python(made: AdapterSet, file: str = "router.py") -> str:
    """The program. It names members as `adaptory mirror` does, such as acme/sql@1.2.0."""
    members = {name: f"{member.repository}@{member.version}" for name, member in made.members.items()}
    weights = {name: dict(row) for name, row in made.routes.weights.items()}
    numbers = {"chars": MAX_CHARS, "shortest": SHORTEST, "longest": LONGEST}
    return _PROGRAM.format(file=file, base=BASE, members=members, weights=weights, **numbers)
