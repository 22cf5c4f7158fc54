"""Measures in memory what combining adapters does to each of them, on a few examples of their own suites.

Of everything tried on real adapters (docs/study.md), only this predicts the damage: Spearman 0.93 [0.70, 0.99] between
four examples per suite and the loss on other examples. Nothing is written to disk.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from time import perf_counter
from typing import Protocol

from composer.conflicts.evidence.outcome import Limits, Outcome, effect_of, side_effect_of
from composer.deltas.delta import Delta, LowRank, RowwiseDelta, names_of
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.evaluation.calibration import Calibration
from composer.evaluation.hooks import Deltas
from composer.evaluation.measure import Encoded, Measured, encode, measure
from composer.evaluation.model import LoadedModel
from composer.formats.recipes.methods import AnySettings, Combined
from composer.formats.recipes.suite import Example, Suite
from composer.formats.recipes.weights import Weight, parse_weight
from composer.methods.combine import combine_parsed
from composer.methods.join import scaled

USUAL_K = 8
USUAL_MOST = 24
"""Default numbers of examples per suite to start and end with. With 8, the first verdict can be `ok`."""


def usual_most(k: int) -> int:
    """The default maximum for a probe that starts with `k` examples. Below USUAL_K, the probe is a quick look at
    `k`."""
    return max(k, USUAL_MOST) if k >= USUAL_K else k


@dataclass(frozen=True)
class Probed:
    """An adapter to combine: its deltas, its weight, and the target suite that defines its task."""

    name: str
    deltas: Deltas
    weight: Weight | float
    suite: Suite


Combine = Callable[[Sequence[Probed]], Deltas]


class Progress(Protocol):
    """Called with the number of examples planned, again whenever it grows, and with the number just measured."""

    def expect(self, total: int) -> None:
        """Sets the total number of examples, at the start or when it grows."""

    def __call__(self, count: int) -> None: ...


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Every pair and the set together (`overall`), measured on at least `k` examples per suite. For two members, the
    pair is the set."""

    k: int
    pairs: tuple[Outcome, ...]
    overall: Outcome
    seconds: float

    def pair(self, a: str, b: str) -> Outcome | None:
        """The outcome of the pair, in either order; None if it was not probed."""
        return next((outcome for outcome in self.pairs if set(outcome.members) == {a, b}), None)

    def to_json(self) -> dict[str, object]:
        pairs = [outcome.to_json() for outcome in self.pairs]
        return {"k": self.k, "pairs": pairs, "whole": self.overall.to_json(), "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class Effort:
    """`k` examples per suite, doubled up to `most` while more examples may decide something about `limits`."""

    k: int = USUAL_K
    most: int = USUAL_K
    limits: Limits = field(default_factory=Limits)


def grown(measured: Callable[[int], Outcome], effort: Effort, available: int) -> Outcome:
    """Measures on a growing number of examples, at most `available`, until more would change nothing."""
    k = effort.k
    outcome = measured(k)
    while outcome.needs_more(effort.limits) and k < min(effort.most, available):
        k = min(2 * k, effort.most)
        outcome = measured(k)
    return outcome


def weighted_sum(members: Sequence[Probed]) -> Deltas:
    """The members' deltas times their weights, side by side, as `stack` combines them."""
    return [delta for member in members for delta in weighted(member.deltas, member.weight)]


def weighted(deltas: Deltas, weight: Weight | float) -> list[Delta]:
    """The deltas times the weight of their modules; a fully saved tensor is unchanged."""
    own = parse_weight(weight)
    return [_times(delta, own.of(*names_of(delta))) for delta in deltas]


def _times(delta: Delta, weight: float) -> Delta:
    if isinstance(delta, LowRank):
        return replace(delta, scale=delta.scale * weight)
    return scaled(delta, weight) if isinstance(delta, RowwiseDelta) else delta


def by_method(
    adapters: Sequence[LoadedAdapter],
    settings: AnySettings,
    calibration: Calibration | None = None,
) -> Combine:
    """A function that combines some of the adapters with the method. For a pair, `protect` protects only its members,
    and a fitted method is fitted on the two members' sets in the `calibration`, which has one set per adapter.

    In memory, each side of a tied weight is a separate module, whatever a merge does with it. The returned function
    raises what `combine_parsed` raises.
    """
    loaded = {adapter.name: adapter for adapter in adapters}
    positions = {adapter.name: number for number, adapter in enumerate(adapters, start=1)}

    def combine(members: Sequence[Probed]) -> Deltas:
        chosen = [positions[member.name] for member in members]
        own = settings.with_tied("untie")
        if isinstance(own, Combined):
            own = own.with_protected([chosen.index(one) + 1 for one in own.protect if one in chosen])
        weights = [member.weight for member in members]
        observe = calibration.pick([position - 1 for position in chosen]).observe if calibration else None
        return combine_parsed([loaded[member.name] for member in members], weights, own, observe).deltas

    return combine


def probe(  # noqa: PLR0913
    loaded: LoadedModel,
    members: Sequence[Probed],
    guards: Sequence[Suite] = (),
    effort: Effort | int = USUAL_K,
    combine: Combine = weighted_sum,
    used: Container[Example] = (),
    progress: Progress | None = None,
) -> ProbeResult:
    """Measures every pair and the whole set on examples of each member's suite and of each guard.

    The examples are `suite.sample(k)` without those that a method was fitted on (`used`). They are always the same, and
    larger samples contain smaller ones, so nothing is measured twice. The base and each member alone are measured once
    for all pairs. m > 2 members and g guards first cost k m (m + 2) + k g (m^2 + m + 4) / 2 examples, and k more for
    each member whose weight is not 1.

    Raises Mismatch for fewer than two members or a repeated name, and what `encode`, `deltas_applied` and `combine`
    raise.
    """
    wanted = Effort(effort, effort) if isinstance(effort, int) else effort
    names = [member.name for member in members]
    if len(names) < 2 or len(set(names)) < len(names) or wanted.k < 1:
        message = f"A probe needs at least two members with different names and k >= 1, not {names} and {wanted.k}."
        raise Mismatch("probe_members", message, subject="members", next_step="Give each member its own name.")
    started = perf_counter()
    bench = _Bench(loaded, combine, used, progress)
    for chosen in (*combinations(members, 2), members):
        bench.expect(chosen, guards, wanted.k)

    def outcome(chosen: Sequence[Probed]) -> Outcome:
        available = max(len(suite.examples) for suite in (*(member.suite for member in chosen), *guards))
        return grown(lambda k: bench.outcome(chosen, guards, k), wanted, available)

    pairs = tuple(outcome(pair) for pair in combinations(members, 2))
    overall = outcome(members) if len(members) > 2 else pairs[0]
    return ProbeResult(wanted.k, pairs, overall, perf_counter() - started)


def _together(chosen: Sequence[Probed]) -> tuple[str, ...]:
    return ("combined", *(member.name for member in chosen))


_Run = dict[str, list[Measured]]  # by suite digest


class _Bench:
    """Runs examples with the base, a member or a combination active, each only once, and keeps the results."""

    def __init__(
        self, loaded: LoadedModel, combine: Combine, used: Container[Example], progress: Progress | None
    ) -> None:
        self._loaded, self._combine, self._used, self._progress = loaded, combine, used, progress
        self._wanted: set[tuple[tuple[str, ...], str, Example]] = set()
        self._latest: tuple[tuple[str, ...], list[Delta]] | None = None
        self._encoded: dict[tuple[str, Example], Encoded] = {}
        self._measured: dict[tuple[tuple[str, ...], str, Example], Measured] = {}

    def expect(self, chosen: Sequence[Probed], guards: Sequence[Suite], k: int) -> None:
        """Announces the examples that `outcome` will measure and that were not announced before."""
        everything = [*(member.suite for member in chosen), *guards]
        runs = [((), everything), (_together(chosen), everything)]
        runs += [((member.name,), [member.suite, *guards]) for member in chosen]
        runs += [(("weighted", one.name), [one.suite]) for one in chosen if parse_weight(one.weight) != Weight()]
        for who, suites in runs:
            self._wanted |= {(who, one.digest, example) for one in suites for example in one.sample(k, self._used)}
        if self._progress is not None:
            self._progress.expect(len(self._wanted))

    def outcome(self, chosen: Sequence[Probed], guards: Sequence[Suite], k: int) -> Outcome:
        self.expect(chosen, guards, k)
        own = [member.suite for member in chosen]
        base = self._run((), lambda: (), [*own, *guards], k)
        alone = {
            member.name: self._run((member.name,), lambda member=member: member.deltas, [member.suite, *guards], k)
            for member in chosen
        }
        as_weighted = {
            member.name: self._run(
                ("weighted", member.name),
                lambda member=member: weighted(member.deltas, member.weight),
                [member.suite],
                k,
            )
            for member in chosen
            if parse_weight(member.weight) != Weight()
        }
        combined = self._run(_together(chosen), lambda: self._combined(chosen), [*own, *guards], k)
        return Outcome(
            k,
            tuple(
                effect_of(
                    (member.name, member.suite.name),
                    base[member.suite.digest],
                    alone[member.name][member.suite.digest],
                    combined[member.suite.digest],
                    len(chosen),
                    as_weighted[member.name][member.suite.digest] if member.name in as_weighted else None,
                )
                for member in chosen
            ),
            tuple(
                side_effect_of(
                    guard.name,
                    base[guard.digest],
                    {name: run[guard.digest] for name, run in alone.items()},
                    combined[guard.digest],
                )
                for guard in guards
            ),
        )

    def _run(self, who: tuple[str, ...], deltas: Callable[[], Deltas], suites: Sequence[Suite], k: int) -> _Run:
        examples = {suite.digest: [(suite, example) for example in suite.sample(k, self._used)] for suite in suites}
        missing = [
            (suite, example)
            for rows in examples.values()
            for suite, example in rows
            if (who, suite.digest, example) not in self._measured
        ]
        if missing:
            encoded = [self._encode(suite, example) for suite, example in missing]
            measured = measure(self._loaded, encoded, deltas(), progress=self._progress)
            for (suite, example), result in zip(missing, measured, strict=True):
                self._measured[who, suite.digest, example] = result
        return {
            digest: [self._measured[who, digest, example] for _, example in rows] for digest, rows in examples.items()
        }

    def _combined(self, chosen: Sequence[Probed]) -> Deltas:
        """The combined deltas, made once while the examples grow, since a fit takes seconds."""
        names = tuple(member.name for member in chosen)
        if self._latest is None or self._latest[0] != names:
            self._latest = (names, list(self._combine(chosen)))
        return self._latest[1]

    def _encode(self, suite: Suite, example: Example) -> Encoded:
        key = (suite.digest, example)
        if key not in self._encoded:
            self._encoded[key] = encode(self._loaded, example, suite.chat, suite.ends)
        return self._encoded[key]
