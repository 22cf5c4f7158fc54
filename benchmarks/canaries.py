"""Simulated canaries: how soon a worse release is rolled back, and how often one that keeps the rules is.

python -m benchmarks.canaries [WATCHES]

Each watch lasts half an hour, with a decision every five seconds, as agents report. It computes what the registry
computes, without a registry. Beside its figures stands the most that any test could reach which looks once, after two
minutes, knows the served release's errors, and rolls back 1 % of the canaries that keep the rule.
"""

import random
import sys
from math import comb

from registry.domain.rollouts.canaries import VersionFigures, judge
from registry.formats.watch import Watch

WATCH = Watch.model_validate({"for": "30m", "rules": ["errors <= served + 0.01"]})
EVERY_S, LENGTH_S = 5, 1800


def rolled_back_after_s(seed: int, per_second: float, share: float, served: float, candidate: float) -> float | None:
    """The seconds until the canary is rolled back, None if it never is. `served` and `candidate` are the probabilities
    that a request fails, `share` the candidate's of all requests."""
    chance = random.Random(seed)  # noqa: S311
    own, other = VersionFigures(), VersionFigures()
    for second in range(EVERY_S, LENGTH_S + 1, EVERY_S):
        requests = round(per_second * EVERY_S)
        mine = sum(chance.random() < share for _ in range(requests))
        failed = sum(chance.random() < candidate for _ in range(mine))
        others = sum(chance.random() < served for _ in range(requests - mine))
        own, other = own.plus(VersionFigures(mine, failed)), other.plus(VersionFigures(requests - mine, others))
        if judge(WATCH, own, other)[0].broken:
            return second
    return None


def best_power(requests: int, limit: float, rate: float, alpha: float = 0.01) -> float:
    """The power of the most powerful test that a candidate fails more often than the limit, of level alpha, after that
    many of its requests. It counts failures, and decides by chance at the boundary (Neyman and Pearson 1933)."""

    def chance(failures: int, of: float) -> float:
        return comb(requests, failures) * of**failures * (1 - of) ** (requests - failures)

    level = power = 0.0
    for failures in range(requests, -1, -1):
        size = chance(failures, limit)
        part = 1.0 if level + size <= alpha else (alpha - level) / size
        level, power = level + part * size, power + part * chance(failures, rate)
        if part < 1:
            break
    return power


def main(watches: int) -> None:
    print(f"{watches} watches of {LENGTH_S // 60} minutes each; rule: {WATCH.rules[0]}")
    for per_second, share in ((50.0, 0.1), (10.0, 0.5), (5.0, 0.5), (5.0, 0.2), (5.0, 0.1)):
        for served in (0.0, 0.02):
            many = min(watches, 200)
            ended = (rolled_back_after_s(seed, per_second, share, served, served + 0.1) for seed in range(many))
            times = sorted(seconds or float("inf") for seconds in ended)
            within = sum(seconds <= 120 for seconds in times) / many
            best = best_power(round(per_second * share * 120), served + 0.01, served + 0.1)
            print(
                f"errors {served:.0%} and {served + 0.1:.0%}, {per_second:g} requests a second, {share:.0%} of them to "
                f"the candidate: p50 {times[many // 2]:g} s, p95 {times[many * 95 // 100]:g} s, {within:.0%} in 2 min "
                f"(at best {best:.1%})"
            )
    for served in (0.0, 0.02, 0.2):
        false = sum(rolled_back_after_s(seed, 5.0, 0.1, served, served + 0.01) is not None for seed in range(watches))
        print(f"errors {served:.0%} and {served + 0.01:.0%}, within the rule: {false} of {watches} rolled back")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
