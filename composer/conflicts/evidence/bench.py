"""The measuring loop of probes and searches: an example is run once for each set of deltas, and compared by outcome."""

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from composer.conflicts.evidence.outcome import Outcome, effect_of, side_effect_of
from composer.deltas.delta import Delta, names_of
from composer.evaluation.hooks import Deltas
from composer.evaluation.measure import Encoded, ExampleScore, encode, measure
from composer.evaluation.model import LoadedModel
from composer.formats.recipes.suite import Example, Suite, example_digest
from composer.formats.recipes.weights import Weight, parse_weight
from composer.methods.join import times

Asked = tuple[Suite, Example]
Key = tuple[str, str, str]
"""Which deltas, the suite's digest, the example's digest."""
Results = Mapping[str, Sequence[ExampleScore]]
"""By the suite's digest, in the order of the examples."""
BASE, ALONE, WEIGHTED = "base", "alone: ", "weighted: "
"""The names of reference passes: the base, and members by their names."""
MOST_EXAMPLES = 32
"""Of a pass, so that the processes that share a round end it together. The same everywhere, because the last bits of a
result depend on the other examples of its pass."""


@dataclass(frozen=True)
class Probed:
    """An adapter to combine: its deltas, its weight, and the target suite that defines its task."""

    name: str
    deltas: Deltas
    weight: Weight | float
    suite: Suite

    @property
    def is_weighted(self) -> bool:
        return parse_weight(self.weight) != Weight()


def weighted(deltas: Deltas, weight: Weight | float) -> list[Delta]:
    """The deltas times the weight of their modules; a fully saved tensor is unchanged."""
    own = parse_weight(weight)
    return [times(delta, own.of(*names_of(delta))) for delta in deltas]


@dataclass(frozen=True)
class Pass:
    """A pass over some examples under one set of deltas, named by `who`. `fit` names what its deltas are fitted on, and
    is empty if they are not. A process keeps a fit; another would take seconds to make it again."""

    who: str
    deltas: Callable[[], Deltas]
    asked: Sequence[Asked]
    fit: str = ""

    @property
    def keys(self) -> list[Key]:
        """The keys of the results, in the order of the examples."""
        return [(self.who, suite.digest, example_digest(example)) for suite, example in self.asked]

    @property
    def parts(self) -> list["Pass"]:
        """The pass in parts that may run in different processes: one part if its deltas are fitted."""
        count = len(self.asked)
        most = count if self.fit else MOST_EXAMPLES
        return [replace(self, asked=self.asked[start : start + most]) for start in range(0, count, most or 1)]


Measure = Callable[[Pass], Sequence[ExampleScore]]
"""A pass -> the results of its examples, in order."""


class Elsewhere(Protocol):
    """Runs passes in other processes, with the same results."""

    def measure(self, wanted: Pass) -> Sequence[ExampleScore]:
        """The results of one pass. Raises the error of deltas that cannot be made."""
        ...

    def spread(self, passes: Sequence[Pass]) -> Iterable[tuple[Pass, Sequence[ExampleScore]]]:
        """Runs passes side by side, and yields each with its results as it ends. One that cannot be run is left
        out."""
        ...


class Runner:
    """Measures on a base, which `load` returns, the same one every time. `progress` gets the number of examples just
    measured. Raises what `encode`, `deltas_applied` and `deltas` raise."""

    def __init__(self, load: Callable[[], LoadedModel], progress: Callable[[int], None] | None = None) -> None:
        self._load, self._progress = load, progress
        self._encoded: dict[tuple[str, Example], Encoded] = {}

    def __call__(self, wanted: Pass) -> list[ExampleScore]:
        loaded = self._load()
        for suite, example in wanted.asked:
            if (suite.digest, example) not in self._encoded:
                self._encoded[suite.digest, example] = encode(loaded, example, suite.chat, suite.ends)
        encoded = [self._encoded[suite.digest, example] for suite, example in wanted.asked]
        return measure(loaded, encoded, wanted.deltas(), progress=self._progress)


def not_run(wanted: Pass) -> list[ExampleScore]:
    """Replaces a Runner to count the passes: runs nothing and returns the same result for every example."""
    return [ExampleScore(1.0, 1, exact=False) for _ in wanted.asked]


class Record:
    """The results so far."""

    def __init__(self) -> None:
        self.known: dict[Key, ExampleScore] = {}

    def add(self, measured: Iterable[tuple[Key, ExampleScore]]) -> None:
        self.known |= dict(measured)


class Bench:
    """Measures results that are not in the record yet: with `measure` in this process, or elsewhere. `passes` counts
    the requested results, each once, whether run now or recorded before, so that a budget ends a resumed search at the
    same point as any other; `run_now` counts those of them that were run now."""

    def __init__(self, measure: Measure, record: Record | None = None, elsewhere: Elsewhere | None = None) -> None:
        self._measure = elsewhere.measure if elsewhere is not None else measure
        self._elsewhere, self._record = elsewhere, record or Record()
        self._asked: set[Key] = set()
        self._planned: list[Pass] | None = None
        self._assumed: dict[Key, ExampleScore] = {}
        self._run = set[Key]()

    @property
    def passes(self) -> int:
        return len(self._asked)

    @property
    def run_now(self) -> int:
        return len(self._asked & self._run)

    def run(self, who: str, deltas: Callable[[], Deltas], asked: Sequence[Asked], fit: str = "") -> Results:
        """The results for the examples. The missing ones are run in a pass of `who`'s deltas, or in its parts."""
        keys = Pass(who, deltas, asked).keys
        every = dict(zip(keys, asked, strict=True))
        known = ChainMap(self._record.known, self._assumed)
        missing = Pass(who, deltas, [example for key, example in every.items() if key not in known], fit)
        if self._planned is not None:
            self._planned += missing.parts
            self._assumed |= dict(zip(missing.keys, not_run(missing), strict=True))
        else:
            self._asked.update(keys)
            for part in missing.parts:
                self._add(part, self._measure(part))
        results: dict[str, list[ExampleScore]] = {suite.digest: [] for suite, _ in asked}
        for key in keys:
            results[key[1]].append(known[key])
        return results

    def run_ahead(self, ask: Callable[[], object]) -> None:
        """Runs the missing passes that `ask` requests in parallel, if passes are run elsewhere, the longest first.
        `ask` is called once, and gets meaningless results. Within another `ask` it only adds to its passes."""
        if self._elsewhere is None:
            return
        if self._planned is not None:
            ask()
            return
        self._planned = planned = list[Pass]()
        try:
            ask()
        finally:
            self._planned, self._assumed = None, {}
        if not planned:
            return
        planned.sort(key=lambda part: (not part.fit, -len(part.asked)))
        for planned_pass, results in self._elsewhere.spread(planned):
            self._add(planned_pass, results)

    def _add(self, measured: Pass, results: Sequence[ExampleScore]) -> None:
        self._run.update(measured.keys)
        self._record.add(zip(measured.keys, results, strict=True))

    def references(
        self, members: Sequence[Probed], guards: Sequence[Suite], examples: Callable[[Suite], Sequence[Example]]
    ) -> "References":
        """Runs the base, each member alone and, if it has a weight, at that weight. `examples` are a suite's."""
        by_suite = {suite.digest: suite for suite in (*(member.suite for member in members), *guards)}
        asked = {digest: [(suite, example) for example in examples(suite)] for digest, suite in by_suite.items()}
        of_guards = [row for guard in guards for row in asked[guard.digest]]

        def own(name: str, deltas: Callable[[], Deltas], member: Probed, others: Sequence[Asked] = ()) -> Results:
            return self.run(name, deltas, [*asked[member.suite.digest], *others])

        rows = [row for rows in asked.values() for row in rows]
        return References(
            members=members,
            guards=guards,
            asked=asked,
            base=self.run(BASE, lambda: (), rows),
            alone={
                member.name: own(f"{ALONE}{member.name}", lambda member=member: member.deltas, member, of_guards)
                for member in members
            },
            at_weight={
                member.name: own(
                    f"{WEIGHTED}{member.name}", lambda member=member: weighted(member.deltas, member.weight), member
                )
                for member in members
                if member.is_weighted
            },
        )


@dataclass(frozen=True, kw_only=True)
class References:
    """The references of a combination of the members: results on the same examples without it. `asked` has the examples
    by their suite's digest."""

    members: Sequence[Probed]
    guards: Sequence[Suite]
    asked: Mapping[str, Sequence[Asked]]
    base: Results
    alone: Mapping[str, Results]
    at_weight: Mapping[str, Results]

    @property
    def rows(self) -> list[Asked]:
        return [row for rows in self.asked.values() for row in rows]

    def outcome(self, k: int, combined: Results, member_claims: int, guard_claims: int = 1) -> Outcome:
        """The outcome of the combination. The intervals of that number of claims hold simultaneously."""
        effects = tuple(
            effect_of(
                (member.name, member.suite.name),
                self.base[member.suite.digest],
                self.alone[member.name][member.suite.digest],
                combined[member.suite.digest],
                member_claims,
                self.at_weight[member.name][member.suite.digest] if member.name in self.at_weight else None,
            )
            for member in self.members
        )
        side_effects = tuple(
            side_effect_of(
                guard.name,
                self.base[guard.digest],
                {name: run[guard.digest] for name, run in self.alone.items()},
                combined[guard.digest],
                guard_claims,
            )
            for guard in self.guards
        )
        return Outcome(k, effects, side_effects)


# Runs passes that another process names, with the same batches, so that every bit is the same.


class PassRunner:
    """Runs passes by their `who` and the digests of suites and examples, which are of `asked`. `combined` makes the
    deltas of a `who` that names a combination of the members."""

    def __init__(
        self, run: Runner, members: Sequence[Probed], asked: Iterable[Asked], combined: Callable[[str], Deltas]
    ) -> None:
        self._run, self._combined = run, combined
        self._members = {member.name: member for member in members}
        self._asked = {(suite.digest, example_digest(example)): (suite, example) for suite, example in asked}

    def __call__(self, who: str, asked: Sequence[tuple[str, str]]) -> list[ExampleScore]:
        """The results of the examples, in order. Raises what `Runner` and `combined` raise, and KeyError for an example
        that this runner does not have."""
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
