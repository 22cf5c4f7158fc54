"""Which examples of a suite a search may see, and which the best are confirmed on.

No example is in both. Gates are judged on all that the search did not see: confirmation only chooses among the best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from composer.errors import Mismatch
from composer.formats.recipes.calibration_sets import CalibrationSet
from composer.formats.recipes.suite import Example, Suite


@dataclass(frozen=True)
class Split:
    """The first examples of the suite's fixed random order are for the search, later ones for the confirmation."""

    suite: Suite
    search: tuple[Example, ...]
    confirm: tuple[Example, ...]

    def part(self, examples: Sequence[Example]) -> Suite:
        """A suite of some of the examples, for a fit."""
        return Suite(**{**self.suite.content, "examples": tuple(examples)})  # pyright: ignore[reportArgumentType]

    def to_json(self) -> dict[str, object]:
        """The digests of the search examples, in the form of a lock's calibration sets."""
        return CalibrationSet(self.suite, len(self.search)).to_json()


def splits(members: Sequence[Suite], guards: Sequence[Suite], search: int, confirm: int) -> dict[str, Split]:
    """A split of each suite by digest. The members' have equally many search examples, at most half of the smallest
    one; a smaller guard has fewer. Raises Mismatch for a member's suite of fewer than two examples."""
    for suite in members:
        if len(suite.examples) < 2:
            message = f"{suite.name} has only {len(suite.examples)} example: a search needs some to see and others."
            raise Mismatch("suite_too_small", message, subject=suite.name, next_step="Add examples to the suite.")
    searched = min(search, *(len(suite.examples) // 2 for suite in members))
    seen = {suite.digest: suite.sample(min(searched, len(suite.examples) // 2)) for suite in (*members, *guards)}
    anywhere = frozenset(one for examples in seen.values() for one in examples)
    return {
        suite.digest: Split(suite, seen[suite.digest], suite.sample(confirm, without=anywhere))
        for suite in (*members, *guards)
    }
