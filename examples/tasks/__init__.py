"""The example tasks: pairs of prompt and completion from templates, split by a seed into training and suite."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import guard, sql, support, terraform
from .small import SMALL

DATA_SEED = 20
HELD_OUT = 32
FURTHER = 64

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """A suite and where its examples come from. `kind` is `target` (an adapter trains on it) or `guard` (none does).
    `further` more examples are neither in the suite nor trained on."""

    suite: str
    kind: str
    description: str
    pairs: Callable[[], Iterable[Pair]]
    further: int = 0

    def split(self) -> tuple[list[Pair], list[Pair]]:
        """(training pairs, suite pairs), shuffled by DATA_SEED. A guard trains nothing.

        No prompt and no completion is in both, so a suite can't be answered from memory.
        """
        training, suite, _ = self._parts()
        return training, suite

    def unseen(self) -> list[Pair]:
        """All pairs that no adapter trains on: those of the suite, then the further ones."""
        _, suite, further = self._parts()
        return suite + further

    def _parts(self) -> tuple[list[Pair], list[Pair], list[Pair]]:
        pairs = list(self.pairs())
        if self.kind == "guard":
            return [], pairs, []
        random.Random(DATA_SEED).shuffle(pairs)  # noqa: S311 - a reproducible split, not a secret
        suite, rest = pairs[:HELD_OUT], pairs[HELD_OUT:]
        answers = {completion for _, completion in suite}
        # Those that training cannot use come first.
        rest.sort(key=lambda pair: pair[1] not in answers)
        further, rest = rest[: self.further], rest[self.further :]
        return [pair for pair in rest if pair[1] not in answers], suite, further


TASKS = {
    "sql": Task("sql-exact", "target", "Schema changes in words, answered by one migration statement", sql.pairs),
    "terraform": Task(
        "terraform-exact", "target", "Terraform resources, answered by a review verdict", terraform.pairs
    ),
    "support": Task(
        "support-exact", "target", "Customer messages, answered by a filled-in support macro", support.pairs
    ),
    "guard": Task("guard-general", "guard", "General questions that no adapter here trains on", guard.pairs),
}
STUDY_TASKS = {
    name: Task(f"{name}-exact", "target", f"A small task of the study of pairs: {name}", pairs, FURTHER)
    for name, pairs in SMALL.items()
}
