"""Measure what the verdicts of `adaptory conflicts` are worth: `python examples/verdict_report.py [JSONL] [--most K]`.

Replays the product's own rule, when to measure more examples and which verdict to give, on what study.py measured. Each
pair is split at random many times: a probe sees one part of each suite, and its verdict is compared with the other
part. A pair is harmed if a member that gives at least ANSWERED answers alone keeps less than KEPT of them.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from composer.conflicts.evidence.outcome import Effect, Limits, Outcome, effect_of, side_effect_of
from composer.conflicts.evidence.probe import USUAL_K, USUAL_MOST, Effort, grown
from composer.evaluation.measure import ExampleScore
from composer.findings import Verdict

Row = Mapping[str, Any]
GUARD = "guard"
KEPT, ANSWERED = 0.75, 4
COVERED = (4, 8, 16, 24)


@dataclass(frozen=True)
class Suite:
    """The same examples under the base, each member alone, and the combination, in the order of one split."""

    base: list[ExampleScore]
    alone: dict[str, list[ExampleScore]]
    combined: list[ExampleScore]

    def effect(self, member: str, part: slice) -> Effect:
        return effect_of((member, member), self.base[part], self.alone[member][part], self.combined[part], 2)


@dataclass(frozen=True)
class Pair:
    """One pair under one method; the suites of both members by their names, and the guard's."""

    names: tuple[str, str]
    suites: Mapping[str, Suite]
    guard: Suite

    def outcome(self, k: int, guarded: bool) -> Outcome:
        effects = tuple(self.suites[name].effect(name, slice(k)) for name in self.names)
        alone = {name: run[:k] for name, run in self.guard.alone.items()}
        guard = side_effect_of(GUARD, self.guard.base[:k], alone, self.guard.combined[:k])
        return Outcome(k, effects, (guard,) if guarded else ())

    def unseen(self, most: int) -> list[Effect]:
        return [self.suites[name].effect(name, slice(most, None)) for name in self.names]

    def harmed(self, most: int) -> bool | None:
        """None if no member answers enough alone to tell."""
        left = [effect.answers_left for effect in self.unseen(most) if effect.answered >= ANSWERED]
        return any(share is not None and share < KEPT for share in left) if left else None

    def keeps_what_is_wanted(self, most: int, limits: Limits) -> bool:
        """Whether both members keep enough on the unseen examples, in answers and in nats."""
        unseen = self.unseen(most)
        left = [effect.answers_left for effect in unseen if effect.answered >= ANSWERED]
        return all(share is None or share >= limits.answers for share in left) and all(
            effect.loss <= limits.loss for effect in unseen
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).parent / "verdicts.jsonl")
    parser.add_argument("--most", type=int, default=USUAL_MOST, help="the most examples that a probe sees")
    parser.add_argument("--splits", type=int, default=20, help="random splits of each suite")
    parser.add_argument("--fresh", nargs="*", default=[], help="only pairs with one of these adapters")
    parser.add_argument("--methods", nargs="*", help="all that were measured by default")
    chosen = parser.parse_args()
    rows = [json.loads(line) for line in chosen.results.read_text().splitlines()]
    alone = {row["member"]: row for row in rows if "member" in row}
    pairs = [row for row in rows if "combined" in row and (not chosen.fresh or {row["a"], row["b"]} & {*chosen.fresh})]
    if not pairs:
        parser.error(f"{chosen.results} has no examples of pairs; study.py writes them.")
    by_method = {
        method: [pair for row in pairs for pair in _splits(row, method, alone, chosen.splits)]
        for method in chosen.methods or pairs[0]["combined"]
        if all(method in row["combined"] for row in pairs)
    }
    by_method["all of these"] = [pair for replayed in by_method.values() for pair in replayed]
    for method, replayed in by_method.items():
        for guarded in (False, True):
            print(f"\n{method}, {len(replayed)} probes{' with a guard' if guarded else ''}")
            for line in _verdicts(replayed, chosen.most, guarded):
                print(f"  {line}")
        held = (f"{_coverage(replayed, k, chosen.most):.2f} on {k}" for k in COVERED if k <= chosen.most)
        print(f"  joint coverage of the intervals: {', '.join(held)} examples")


def _splits(row: Row, method: str, alone: Mapping[str, Row], count: int) -> Iterator[Pair]:
    names = (row["a"], row["b"])
    for seed in range(count):
        draw = random.Random(f"{names} {seed}")  # noqa: S311 - a reproducible split, not a secret
        combined = row["combined"][method]
        suites: dict[str, Suite] = {}
        for name in names:
            order = _shuffled(draw, len(combined[name]["nats"]))
            own = {name: _measured(alone[name]["alone"], order)}
            suites[name] = Suite(_measured(alone[name]["base"], order), own, _measured(combined[name], order))
        order = _shuffled(draw, len(combined[GUARD]["nats"]))
        beside = {name: _measured(alone[name][GUARD], order) for name in names}
        guard = Suite(_measured(alone[GUARD]["base"], order), beside, _measured(combined[GUARD], order))
        yield Pair(names, suites, guard)


def _shuffled(draw: random.Random, count: int) -> list[int]:
    return draw.sample(range(count), count)


def _measured(kept: Row, order: Sequence[int]) -> list[ExampleScore]:
    return [ExampleScore(kept["nats"][i], kept["tokens"][i], kept["exact"][i] == "1") for i in order]


def _verdicts(pairs: Sequence[Pair], most: int, guarded: bool) -> list[str]:
    effort = Effort(USUAL_K, most, Limits())
    said = [(grown(lambda k, pair=pair: pair.outcome(k, guarded), effort, most), pair.harmed(most)) for pair in pairs]
    verdicts = [(outcome.verdict(effort.limits), harmed) for outcome, harmed in said]
    wanted = [pair.keeps_what_is_wanted(most, effort.limits) for pair in pairs]
    by_all = [(verdict, pair.harmed(0)) for pair, (verdict, _) in zip(pairs, verdicts, strict=True)]
    judged = zip(pairs, verdicts, strict=True)
    clean = [verdict for pair, (verdict, _) in judged if pair.keeps_what_is_wanted(0, effort.limits)]
    counts = Counter(str(verdict) for verdict, _ in verdicts)
    mean = sum(outcome.k for outcome, _ in said) / len(said)
    return [
        f"verdicts: {', '.join(f'{name} {count / len(said):.0%}' for name, count in counts.most_common())}; "
        f"{mean:.1f} examples a suite on average, at most {most}",
        f"of ok ones harmed: {_share(harmed for verdict, harmed in verdicts if verdict is Verdict.OK)}",
        f"of harmed ones warned: {_share(verdict is Verdict.WARN for verdict, harmed in verdicts if harmed)}",
        f"of unharmed ones ok: {_share(verdict is Verdict.OK for verdict, harmed in verdicts if harmed is False)}",
        "of those that keep 90 % and lose at most 0.1 nats ok: "
        f"{_share(verdict is Verdict.OK for (verdict, _), kept in zip(verdicts, wanted, strict=True) if kept)}",
        "judged by all examples, the probe's among them: "
        f"of ok ones harmed {_share(harmed for verdict, harmed in by_all if verdict is Verdict.OK)}; "
        f"of harmed ones warned {_share(verdict is Verdict.WARN for verdict, harmed in by_all if harmed)}; "
        f"of clean ones ok {_share(verdict is Verdict.OK for verdict in clean)}",
    ]


def _share(answers: Iterator[bool | None]) -> str:
    known = [answer for answer in answers if answer is not None]
    return f"{sum(known) / len(known):.1%} of {len(known)}" if known else "none to judge"


def _coverage(pairs: Sequence[Pair], k: int, most: int) -> float:
    """How often both members' intervals on k examples contain their loss on other examples. Those are few too, so the
    interval is widened by the ratio between the error of a difference of two means and that of one mean."""
    held = 0
    for pair in pairs:
        both = list(zip(pair.outcome(k, guarded=False).effects, pair.unseen(max(k, most)), strict=True))
        wider = [sqrt(1 + k / unseen.examples) for _, unseen in both]
        held += all(_holds(seen, unseen.loss, times) for (seen, unseen), times in zip(both, wider, strict=True))
    return held / len(pairs)


def _holds(effect: Effect, loss: float, times: float) -> bool:
    below, above = effect.loss - effect.loss_interval.low, effect.loss_interval.high - effect.loss
    return -times * below <= loss - effect.loss <= times * above


if __name__ == "__main__":
    main()
