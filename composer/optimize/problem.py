"""The problem of a search: its members, its limits, and the time it may take."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from math import inf

from composer.conflicts.evidence.outcome import Limits
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.evaluation.model import LoadedModel
from composer.formats.recipes.lock import ExamplesDocument
from composer.formats.recipes.phrases import phrase_of, phrased, phrased_suite, reworded
from composer.formats.recipes.policy import THRESHOLDS, Policy
from composer.formats.recipes.recipe import CONFIRM, SEARCH, Optimize
from composer.formats.recipes.suite import (
    CalibrationSet,
    Contradiction,
    Example,
    Suite,
    contradicting_suites,
    first_examples,
)
from composer.formats.recipes.weights import Weight
from composer.formats.sets.router import SEPARABLE, separability_of
from composer.optimize.evolution import require_cmaes

CONFIRM_GROWTH = 8
"""A confirmation that is undecided goes on with up to this many times as many unseen examples, as far as suites
have them."""


# Which examples of a suite a search may see, and which the best are confirmed on.
#
# No example is in both. Gates are judged on all that the search did not see: confirmation only chooses among the best.
@dataclass(frozen=True)
class Split:
    """The first examples of the suite's fixed random order are for the search, later ones for the confirmation, which
    begins with few of them."""

    suite: Suite
    search: tuple[Example, ...]
    confirm: tuple[Example, ...]

    def part(self, examples: Sequence[Example]) -> Suite:
        """A suite of some of the examples, for a fit."""
        return Suite(**{**self.suite.content, "examples": tuple(examples)})  # pyright: ignore[reportArgumentType]

    @cached_property
    def reworded(self) -> Suite | None:
        """The first unseen examples in other words; None for a suite without chat."""
        return reworded(self.suite, self.confirm[:CONFIRM])

    @property
    def searched(self) -> CalibrationSet:
        """The search examples, to fit on."""
        return CalibrationSet.of_member(self.suite, len(self.search))

    def to_json(self) -> ExamplesDocument:
        """The digests of the search examples, as a lock has them."""
        return first_examples(self.suite, len(self.search))


def splits(members: Sequence[Suite], guards: Sequence[Suite], search: int, confirm: int) -> dict[str, Split]:
    """A split of each suite by digest. The members' have equally many search examples, at most half of the smallest
    one; a smaller guard has fewer. Raises Mismatch for a member's suite of fewer than two examples."""
    for suite in members:
        if len(suite.examples) < 2:
            message = f"{suite.name} has only {len(suite.examples)} example: a search needs some to see and others."
            raise Mismatch("suite_too_small", message, subject=suite.name, next_step="Add examples to the suite.")
    searched = min(search, *(len(suite.examples) // 2 for suite in members))
    seen = {suite.digest: suite.sample(min(searched, len(suite.examples) // 2)) for suite in (*members, *guards)}
    anywhere = frozenset(example for examples in seen.values() for example in examples)
    return {
        suite.digest: Split(suite, seen[suite.digest], suite.sample(confirm * CONFIRM_GROWTH, without=anywhere))
        for suite in (*members, *guards)
    }


@dataclass(frozen=True, slots=True)
class Separability:
    """Two members, and the share of their suites' prompts that tell which of the two is meant."""

    a: str
    b: str
    share: float


_OF_THE_RESULT = ("rank", "energy", "tied")


@dataclass(frozen=True, kw_only=True)
class SearchMember:
    """An adapter to combine: its own weight, which is positive, its target suite, and a phrase that may select it. Its
    name is enough where passes are run elsewhere."""

    adapter: LoadedAdapter | str
    suite: Suite
    weight: Weight = field(default_factory=Weight)
    phrase: str = ""

    @property
    def name(self) -> str:
        return self.adapter if isinstance(self.adapter, str) else self.adapter.name

    @property
    def loaded(self) -> LoadedAdapter:
        """The adapter. Raises TypeError for a name."""
        if isinstance(self.adapter, str):
            raise TypeError(f"{self.adapter} is not loaded: its passes are run elsewhere")
        return self.adapter


@dataclass(frozen=True)
class SearchEffort:
    """`search` and `confirm` are examples of each suite; `confirm` grows while it decides nothing. The search
    ends after `passes` measured examples or `seconds`, whichever comes first, and then confirms; the first round is
    always run. `evolve` is the number of weighted sums that an evolution strategy tries, of whole generations. `seed`
    is that of fits and of the strategy. Unless it is `thorough`, nothing is raced where plain RegMean is confirmed at
    once. `accept` is the recipe's acceptance, empty without one."""

    search: int = SEARCH
    confirm: int = CONFIRM
    passes: float = inf
    seconds: float = inf
    seed: int = 0
    evolve: int = 0
    thorough: bool = False
    accept: str = ""

    @classmethod
    def of(cls, asked: Optimize) -> "SearchEffort":
        """The effort that a recipe states."""
        seconds = inf if asked.minutes is None else asked.minutes * 60
        known = (asked.search, asked.confirm, asked.passes or inf, seconds, asked.seed, asked.evolve)
        return cls(*known, thorough=asked.thorough or bool(asked.evolve), accept=asked.accept or "")


@dataclass(frozen=True, kw_only=True)
class SearchProblem:
    """The members to combine, and the limits. `load` returns the base, the same one every time. With `as_adapter`, only
    what one adapter can hold is tried. `settings` are the recipe's: their requirements on the result (rank, energy,
    tied)
    hold for every candidate. With `may_be_set`, a set of the members is chosen where nothing else keeps the limits.
    Members contradict each other if at least the share `same_prompts` of their prompts have
    other answers."""

    load: Callable[[], LoadedModel]
    members: Sequence[SearchMember]
    guards: Sequence[Suite] = ()
    limits: Limits = field(default_factory=Limits)
    effort: SearchEffort = field(default_factory=SearchEffort)
    as_adapter: bool = False
    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    may_be_set: bool = False
    same_prompts: float = THRESHOLDS["same_prompts"] or 0.0

    def under(self, policy: Policy) -> "SearchProblem":
        """The problem with the policy's limits."""
        share = policy.threshold("same_prompts")
        ignored = share is None or policy.ignores("same_prompts")
        return replace(self, limits=Limits.of(policy), same_prompts=inf if ignored or share is None else share)

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The examples by suite digest. Raises Mismatch for a suite that is too small."""
        members = [member.suite for member in self.members]
        return splits(members, self.other_guards, self.effort.search, self.effort.confirm)

    @cached_property
    def other_guards(self) -> list[Suite]:
        """The guards, each once, without those that are a member's suite."""
        own = {member.suite.digest for member in self.members}
        return [guard for digest, guard in {guard.digest: guard for guard in self.guards}.items() if digest not in own]

    @property
    def searched(self) -> int:
        """The search examples of each member's suite."""
        return len(self.splits[self.members[0].suite.digest].search)

    @property
    def name(self) -> str:
        """Names the problem in a journal by everything that a result depends on besides the content of the base and the
        adapters."""
        members = [[member.name, member.weight.to_json(), member.suite.digest] for member in self.members]
        return json.dumps([members, [guard.digest for guard in self.other_guards], self.effort.search])

    @property
    def result_settings(self) -> dict[str, object]:
        """The settings that every candidate gets, where its method has them."""
        return {name: value for name, value in self.settings.items() if name in _OF_THE_RESULT}

    def contradictions(self) -> list[Contradiction]:
        """The pairs of members for which no single model can serve both."""
        suites = {member.name: member.suite for member in self.members}
        return [
            contradiction for contradiction in contradicting_suites(suites) if contradiction.share >= self.same_prompts
        ]

    @cached_property
    def separability(self) -> list["Separability"]:
        """The separability of each two members with different suites by their prompts, the least separable first."""
        pairs = [
            Separability(a.name, b.name, separability_of(a.suite, b.suite))
            for a, b in combinations(self.members, 2)
            if a.suite.digest != b.suite.digest
        ]
        return sorted(pairs, key=lambda pair: pair.share)

    @property
    def wants_phrases(self) -> bool:
        """Whether a combination with phrases is tried: some are given, or prompts do not tell all members apart."""
        given = any(member.phrase for member in self.members)
        return bool(self.phrases) and (given or any(pair.share < SEPARABLE for pair in self.separability))

    @cached_property
    def phrases(self) -> tuple[str, ...]:
        """A phrase for each member, the given one or one made of its suite's name; none if these are not different."""
        suites = [suite.name for suite in (*(member.suite for member in self.members), *self.other_guards)]
        phrases = tuple(member.phrase or phrase_of(member.suite.name) for member in self.members)
        return phrases if len(set(phrases)) == len(phrases) and len(set(suites)) == len(suites) else ()

    def asked(self, phrases: Sequence[str], suite: Suite, example: Example) -> tuple[Suite, Example]:
        """The example of a member's suite, as it is or in other words, as a candidate with these phrases gets it."""
        by_suite = {member.suite.name: phrase for member, phrase in zip(self.members, phrases, strict=bool(phrases))}
        phrase = by_suite.get(suite.name, "")
        if not phrase:
            return suite, example
        if (phrase, suite.digest) not in self._phrased:
            self._phrased[phrase, suite.digest] = phrased_suite(phrase, suite)
        return self._phrased[phrase, suite.digest], phrased(phrase, [example])[0]

    @cached_property
    def _phrased(self) -> dict[tuple[str, str], Suite]:
        return {}

    def check(self) -> None:
        """Raises Mismatch for fewer than two members, a repeated name, and a weight that is not positive, and
        NotSupported if the package that evolves weights is missing."""
        if self.effort.evolve:
            require_cmaes()
        names = [member.name for member in self.members]
        if len(names) < 2 or len(set(names)) < len(names):
            message = f"A search needs at least two members with different names, not {names}."
            raise Mismatch("probe_members", message, subject="members")
        for member in self.members:
            if member.weight.value <= 0:
                message = f"{member.name} has the weight {member.weight.value:g}, so it has no effect to keep."
                raise Mismatch("weights", message, subject=member.name, next_step="Give it a positive weight.")
