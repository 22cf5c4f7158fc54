"""Measures in memory the effect of a combination on each adapter, on a few examples of their own suites. Of all methods
tried on real adapters (docs/methods/study.md), only this one predicts the damage: Spearman 0.93 [0.70, 0.99] between
four examples per suite and the loss on other examples. Nothing is written to disk.
"""

import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from time import perf_counter
from typing import Protocol

import torch

from composer.conflicts.evidence.bench import Bench, Elsewhere, PassRunner, Probed, Runner, not_run, weighted
from composer.conflicts.evidence.outcome import Limits, Outcome
from composer.deltas.delta import Delta
from composer.deltas.tensors import CPU
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.evaluation.calibration import Calibration
from composer.evaluation.hooks import Deltas
from composer.evaluation.model import LoadedModel
from composer.formats.recipes.methods import AnySettings, Combined
from composer.formats.recipes.suite import Example, Suite
from composer.methods.combine import combine_parsed

_COMBINED = "combined: "
USUAL_K = 8
USUAL_MOST = 32
"""Default numbers of examples per suite to start and end with. With 8, the first verdict can be `ok`."""


def usual_most(k: int) -> int:
    """The default maximum for a probe that starts with `k` examples. Below USUAL_K, the probe is a quick look at
    `k`."""
    return max(k, USUAL_MOST) if k >= USUAL_K else k


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


def by_method(
    adapters: Sequence[LoadedAdapter],
    settings: AnySettings,
    calibration: Calibration | None = None,
    device: torch.device = CPU,
) -> Combine:
    """A function that combines some of the adapters with the method, on the device. For a pair, `protect` protects only
    its members, and a fitted method is fitted on the two members' sets in the `calibration`, which has one set per
    adapter.

    In memory, each side of a tied weight is a separate module, regardless of how a merge treats it. The returned
    function raises what `combine_parsed` raises.
    """
    loaded = {adapter.name: adapter for adapter in adapters}
    positions = {adapter.name: number for number, adapter in enumerate(adapters, start=1)}

    def combine(members: Sequence[Probed]) -> Deltas:
        chosen = [positions[member.name] for member in members]
        own = settings.with_tied("untie")
        if isinstance(own, Combined):
            own = own.with_protected([chosen.index(position) + 1 for position in own.protect if position in chosen])
        weights = [member.weight for member in members]
        observe = calibration.pick([position - 1 for position in chosen]).observe if calibration else None
        return combine_parsed([loaded[member.name] for member in members], weights, own, observe, device).deltas

    return combine


def probe(  # noqa: PLR0913
    load: Callable[[], LoadedModel],
    members: Sequence[Probed],
    guards: Sequence[Suite] = (),
    effort: Effort | int = USUAL_K,
    combine: Combine = weighted_sum,
    used: Container[Example] = (),
    progress: Progress | None = None,
    elsewhere: Elsewhere | None = None,
) -> ProbeResult:
    """Measures every pair and the whole set on examples of each member's suite and of each guard: on the base that
    `load` returns, or elsewhere, by a `pass_runner`.

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
        raise Mismatch("probe_members", message, subject="members")
    started = perf_counter()
    bench = Bench(Runner(load, progress), elsewhere=elsewhere)
    run = _Probe(guards, combine, used, progress, bench)
    chosen = [*combinations(members, 2), members]
    for some in chosen:
        run.expect(some, wanted.k)
    bench.run_ahead(lambda: [run.outcome(bench, some, wanted.k) for some in chosen])
    pairs = tuple(run.grown(pair, wanted) for pair in combinations(members, 2))
    overall = run.grown(members, wanted) if len(members) > 2 else pairs[0]
    return ProbeResult(wanted.k, pairs, overall, perf_counter() - started)


def pass_runner(run: Runner, members: Sequence[Probed], guards: Sequence[Suite], combine: Combine) -> PassRunner:
    """Runs passes of a probe of these members and guards that another process makes."""
    by_name = {member.name: member for member in members}
    suites = {suite.digest: suite for suite in (*(member.suite for member in members), *guards)}

    @lru_cache(maxsize=1)  # examples grow, and a fit takes seconds
    def combined(who: str) -> Deltas:
        return list(combine([by_name[name] for name in json.loads(who.removeprefix(_COMBINED))]))

    rows = [(suite, example) for suite in suites.values() for example in suite.examples]
    return PassRunner(run, members, rows, combined)


@dataclass
class _Probe:
    guards: Sequence[Suite]
    combine: Combine
    used: Container[Example]
    progress: Progress | None
    bench: Bench
    planned: Bench = field(default_factory=lambda: Bench(not_run))
    _made: tuple[tuple[str, ...], list[Delta]] = ((), [])

    def grown(self, chosen: Sequence[Probed], effort: Effort) -> Outcome:
        available = max(len(suite.examples) for suite in (*(member.suite for member in chosen), *self.guards))

        def measured(k: int) -> Outcome:
            self.expect(chosen, k)
            self.bench.run_ahead(lambda: self.outcome(self.bench, chosen, k))
            return self.outcome(self.bench, chosen, k)

        return grown(measured, effort, available)

    def expect(self, chosen: Sequence[Probed], k: int) -> None:
        """Announces the examples that `outcome` will measure, with those that were announced before."""
        self.outcome(self.planned, chosen, k)
        if self.progress is not None:
            self.progress.expect(self.planned.passes)

    def outcome(self, bench: Bench, chosen: Sequence[Probed], k: int) -> Outcome:
        references = bench.references(chosen, self.guards, lambda suite: suite.sample(k, self.used))
        who = f"{_COMBINED}{json.dumps([member.name for member in chosen])}"
        results = bench.run(who, lambda: self._combined(chosen), references.rows, fit=who)
        return references.outcome(k, results, len(chosen))

    def _combined(self, chosen: Sequence[Probed]) -> Deltas:
        """The combined deltas, made once while the examples grow, since a fit takes seconds."""
        names = tuple(member.name for member in chosen)
        if self._made[0] != names:
            self._made = (names, list(self.combine(chosen)))
        return self._made[1]
