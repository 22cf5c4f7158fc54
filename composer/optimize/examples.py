"""Which examples of a suite a search may see, and which it is confirmed on. No example has two roles."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from composer.formats.recipes.calibration_sets import CalibrationSet
from composer.formats.recipes.suite import Example, Suite


@dataclass(frozen=True)
class Split:
    """The first `searched` examples of the suite's fixed random order are for the search, the next `confirmed` for the
    confirmation, the others for gates."""

    suite: Suite
    searched: int
    confirmed: int

    @cached_property
    def _order(self) -> tuple[Example, ...]:
        """All examples in the order of `sample`, which gives all of them in the file's order."""
        some = self.suite.sample(len(self.suite.examples) - 1)
        return (*some, *(one for one in self.suite.examples if one not in some))

    @property
    def search(self) -> tuple[Example, ...]:
        return self._order[: self.searched]

    @property
    def confirm(self) -> tuple[Example, ...]:
        return self._order[self.searched : self.searched + self.confirmed]

    def halves(self) -> tuple[Suite, Suite]:
        """Two suites of the search examples: a method fitted on one is scored on the other."""
        half = self.searched // 2
        return self._with(self.search[:half]), self._with(self.search[half:])

    def _with(self, examples: Sequence[Example]) -> Suite:
        return Suite(**{**self.suite.content, "examples": tuple(examples)})  # pyright: ignore[reportArgumentType]

    def to_json(self) -> dict[str, object]:
        """The digests of the search examples, in the form of a lock's calibration sets."""
        return CalibrationSet(self.suite, self.searched).to_json()


def splits(suites: Sequence[Suite], search: int, confirm: int) -> dict[str, Split]:
    """A split of each suite by digest: as many search examples in each, at most half of the smallest one."""
    searched = max(1, min(search, *(len(suite.examples) // 2 for suite in suites)))
    return {suite.digest: Split(suite, searched, confirm) for suite in suites}
