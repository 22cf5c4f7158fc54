"""Runs passes that another process names, with the same batches, so that every bit is the same."""

from collections.abc import Callable, Iterable, Sequence

from composer.conflicts.evidence.bench import ALONE, BASE, WEIGHTED, Asked, Pass, Probed, Runner, weighted
from composer.deltas.delta import Delta
from composer.evaluation.hooks import Deltas
from composer.evaluation.measure import Measured
from composer.formats.recipes.calibration_sets import example_digest


class PassRunner:
    """Runs passes by their `who` and the digests of suites and examples, which are of `asked`. `combined` makes the
    deltas of a `who` that names a combination of the members."""

    def __init__(
        self, run: Runner, members: Sequence[Probed], asked: Iterable[Asked], combined: Callable[[str], Deltas]
    ) -> None:
        self._run, self._combined = run, combined
        self._members = {one.name: one for one in members}
        self._asked = {(suite.digest, example_digest(example)): (suite, example) for suite, example in asked}

    def __call__(self, who: str, asked: Sequence[tuple[str, str]]) -> list[Measured]:
        """The results of the examples, in order. Raises what `Runner` and `combined` raise, and KeyError for an example
        that is not among those of this runner."""
        return self._run(Pass(who, lambda: self._deltas(who), [self._asked[key] for key in asked]))

    def _deltas(self, who: str) -> Deltas:
        if who == BASE:
            return list[Delta]()
        if who.startswith(ALONE):
            return self._members[who.removeprefix(ALONE)].deltas
        if who.startswith(WEIGHTED):
            member = self._members[who.removeprefix(WEIGHTED)]
            return weighted(member.deltas, member.weight)
        return self._combined(who)
