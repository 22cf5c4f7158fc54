"""The members of a search as a set: a router fitted on the search examples, and what users would get of it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from composer.conflicts.evidence.bench import ALONE, BASE, Asked, Bench, Probed, References, Results
from composer.formats.recipes.suite import Suite
from composer.formats.sets.router import Router, fit
from composer.optimize.problem import SearchProblem


@dataclass(frozen=True, slots=True)
class Routed:
    """The number of `count` unseen prompts of a member's suite, or of a guard, that the router assigns to it."""

    name: str
    right: int
    count: int


class SetRouting:
    """The classes of the router are the names of passes: BASE, and members alone."""

    def __init__(self, problem: SearchProblem, members: Sequence[Probed]) -> None:
        self._problem = problem
        self._deltas = {f"{ALONE}{member.name}": member.deltas for member in members}

    def results(self, bench: Bench, references: References) -> Results:
        """The results of each example under what the router chooses for its prompt."""
        chosen = defaultdict[str, list[Asked]](list)
        for suite, example in references.rows:
            chosen[self._router.choose(example.prompt)].append((suite, example))
        measured = {
            (who, digest): iter(results)
            for who, rows in chosen.items()
            for digest, results in bench.run(who, lambda who=who: self._deltas.get(who, ()), rows).items()
        }
        return {
            digest: [next(measured[self._router.choose(example.prompt), digest]) for _, example in rows]
            for digest, rows in references.asked.items()
        }

    @property
    def routed(self) -> tuple[Routed, ...]:
        """The number of unseen prompts that the router assigns right, by member and by guard."""
        return tuple(
            Routed(name, sum(self._router.choose(example.prompt) == who for example in unseen), len(unseen))
            for who, name, suite in self._classes
            for unseen in [self._problem.splits[suite.digest].confirm[: self._problem.effort.confirm]]
        )

    @property
    def _classes(self) -> list[tuple[str, str, Suite]]:
        """The class of each suite, with the name of the member or of the guard."""
        of_members = [(f"{ALONE}{member.name}", member.name, member.suite) for member in self._problem.members]
        return of_members + [(BASE, guard.name, guard) for guard in self._problem.other_guards]

    @cached_property
    def _router(self) -> Router:
        prompts = defaultdict[str, list[str]](list)
        for who, _, suite in self._classes:
            prompts[who] += [example.prompt for example in self._problem.splits[suite.digest].search]
        return fit(prompts)
