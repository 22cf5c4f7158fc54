"""The combinations that are tried, simplest first: at equal results the simpler one wins. The choice of candidates
follows measurements on real adapters (docs/how-to/find-a-combination.md).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from composer.formats.recipes.lock import ChoiceDocument
from composer.formats.recipes.methods import AnySettings, parse_settings
from composer.formats.recipes.weights import Weight

SUM_FACTORS = (1.0, 0.7, 0.5)
MEMBER_FACTORS = (0.7, 0.5)
FITS = ((0.01, 1), (0.1, 2), (0.01, 2))
"""(ridge, steps) of RegMean."""
PLAIN_FIT = "regmean, ridge 0.01, 2 steps"
"""The candidate that a search confirms before it races any."""
SELECTOR = "selector"
"""The family of the candidate with phrases."""

SET = "set"
"""The family of the candidate that combines nothing."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with its settings, and a factor for the weight of each member. `family` groups alike ones. With
    `phrases`, one for each member, it is fitted and measured with them before the members' prompts. In the family SET
    method, settings and factors mean nothing: a router chooses a member for each prompt."""

    name: str
    family: str
    method: str
    factors: tuple[float, ...]
    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    phrases: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names the candidate in a journal: two with the same key give the same deltas."""
        if self.is_set:
            return SET
        how = [self.method, self.parsed.version, dict(self.settings), self.factors]
        return json.dumps([*how, *([self.phrases] if self.phrases else [])], sort_keys=True, separators=(",", ":"))

    @property
    def parsed(self) -> AnySettings:
        return parse_settings(self.method, self.settings)

    @property
    def is_set(self) -> bool:
        return self.family == SET

    @property
    def is_fitted(self) -> bool:
        return self.parsed.pipeline.fitted

    @property
    def is_weighted_sum(self) -> bool:
        """Whether the combination is Σ w_i Δ_i with the factors as w, possibly cut to a rank."""
        return self.method == "stack" and "protect" not in self.settings

    def with_settings(self, settings: Mapping[str, object]) -> "Candidate":
        """The candidate with further settings, as far as its method has them."""
        known = type(self.parsed).model_fields.keys()
        return replace(self, settings={**{k: v for k, v in settings.items() if k in known}, **self.settings})

    def weights(self, own: Sequence[Weight]) -> list[Weight]:
        """The members' weights times their factors."""
        return [weight.times(factor) for weight, factor in zip(own, self.factors, strict=True)]

    def to_json(self) -> ChoiceDocument:
        document: ChoiceDocument = {
            "name": self.name,
            "family": self.family,
            "method": SET if self.is_set else self.method,
            "settings": dict(self.settings),
            "factors": list(self.factors),
        }
        if self.phrases:
            document["phrases"] = list(self.phrases)
        return document


def as_set(count: int) -> Candidate:
    """The members as a set with a router."""
    return Candidate(name="members with a router", family=SET, method="stack", factors=(1.0,) * count)


def weighted_sum(name: str, family: str, factors: Sequence[float]) -> Candidate:
    return Candidate(name=name, family=family, method="stack", factors=tuple(factors))


def low_rank(count: int) -> list[Candidate]:
    """The candidates that keep low rank, for `count` members: each takes a fraction of a second per example."""
    ones = (1.0,) * count
    mean = weighted_sum("mean", "mean", [1 / count] * count)
    sums = [
        weighted_sum("sum" if factor == 1 else f"sum x {factor:g}", "sum", [factor] * count) for factor in SUM_FACTORS
    ]
    single = [
        weighted_sum(f"sum, {member + 1} x {factor:g}", "one weight", (*ones[:member], factor, *ones[member + 1 :]))
        for member in range(count)
        for factor in MEMBER_FACTORS
    ]
    protecting = [
        Candidate(name=f"protect {member + 1}", family="protect", method="stack", factors=ones,
                  settings={"protect": [member + 1]})
        for member in range(count)
    ]  # fmt: skip
    joins = [Candidate(name=method, family=method, method=method, factors=ones) for method in ("iso", "tsv")]
    return [mean, *sums, *single, *protecting, *joins]


def fitted(count: int, seed: int = 0) -> list[Candidate]:
    """The fitted candidates: one weight for each member, then RegMean in one step, and in two, which takes twice as
    long. `seed` chooses the tokens of long examples."""
    weights = ("least-squares weights", "fitted weights", {"form": "weights", "steps": 1})
    regmean = [
        (
            f"regmean, ridge {ridge:g}, {steps} step{'s' if steps > 1 else ''}",
            "regmean",
            {"ridge": ridge, "steps": steps},
        )
        for ridge, steps in FITS
    ]
    return [
        Candidate(
            name=name,
            family=family,
            method="regmean",
            factors=(1.0,) * count,
            settings={**settings, **({"seed": seed} if seed else {})},
        )
        for name, family, settings in (weights, *regmean)
    ]


def full_space(count: int) -> list[Candidate]:
    """Methods that decide about each entry of the full matrices, cut to a rank so that an adapter holds the result.
    Making one takes seconds, where a sum takes hundredths of a second. With its measurement on eight examples it costs
    two to four times as much as a sum."""
    ones, settings = (1.0,) * count, {"lambda": 0.7}
    return [Candidate(name="ties_svd x 0.7", family="ties", method="ties_svd", factors=ones, settings=settings)]
