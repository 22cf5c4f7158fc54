"""Measure how often a limit on answers refuses what is safe, and accepts what is not.

    python examples/answer_limits.py

Resamples what study.py measured (verdicts.jsonl, both members of 78 pairs under two methods). A pair is safe if both
members keep the share of answers and lose at most the nats of the default limits on 200 resampled examples. The
verdict, of as many other resampled examples as a suite has, is that of the counted share (the rule before) and
that of the product: the interval of the share, on 16 examples at first and on more while it is undecided.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

from composer.conflicts.evidence.interval import share_interval
from composer.conflicts.evidence.outcome import LEAST_ANSWERED, Effect, Limits, Outcome, effect_of
from composer.conflicts.evidence.probe import Effort, grown
from composer.evaluation.measure import ExampleScore
from composer.findings import Verdict
from composer.formats.recipes.recipe import CONFIRM

Row = Mapping[str, Any]
FRESH = 200
SIZES = (16, 24, 48, 96, 200)
LIMITS = Limits()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=10, help="resampled suites of each pair")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "verdicts.jsonl")
    chosen = parser.parse_args()
    rows = [json.loads(line) for line in chosen.results.read_text().splitlines()]
    alone = {row["member"]: row for row in rows if "member" in row}
    pairs = [(row, method) for row in rows if "combined" in row for method in row["combined"]]
    print("| unseen examples | rule | safe: refused | unsafe: ok | undecided, within the limit | undecided, below it |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        counts = Counter[tuple[str, bool, str]]()
        for row, method in pairs:
            draw = random.Random(f"{row['a']} {row['b']} {method} {size}")  # noqa: S311 - reproducible, not a secret
            for _ in range(chosen.draws):
                safe = keeps_limits(resampled(draw, row, method, alone, FRESH)(FRESH))
                sampled = resampled(draw, row, method, alone, size)
                outcome = grown(sampled, Effort(CONFIRM, size, LIMITS), size)
                counts["interval", safe, verdict(outcome)] += 1
                counts["counted share", safe, by_counted_share(sampled(min(CONFIRM, size)))] += 1
        for rule in ("counted share", "interval"):
            cells = [share(counts, rule, safe=True, said="warn")]
            cells += [share(counts, rule, safe=False, said=said) for said in ("ok", "within", "below")]
            print(f"| {size} | {rule} | {' | '.join(cells)} |")
    print(drawn_again(18, 20, 24, CONFIRM))


def resampled(draw: random.Random, row: Row, method: str, alone: Mapping[str, Row], size: int) -> Any:
    """A function that returns the outcome on the first k of `size` resampled examples."""
    names = (row["a"], row["b"])
    order = {name: draw.choices(range(len(alone[name]["base"]["nats"])), k=size) for name in names}

    def outcome(k: int) -> Outcome:
        return Outcome(k, tuple(effect(name, order[name][:k]) for name in names), ())

    def effect(name: str, rows: Sequence[int]) -> Effect:
        runs = (alone[name]["base"], alone[name]["alone"], row["combined"][method][name])
        base, own, together = ([measured(run, index) for index in rows] for run in runs)
        return effect_of((name, name), base, own, together, len(names))

    return outcome


def measured(run: Row, index: int) -> ExampleScore:
    return ExampleScore(run["nats"][index], run["tokens"][index], run["exact"][index] == "1")


def keeps_limits(outcome: Outcome) -> bool:
    """Whether every measured value is within its limit."""
    return all(
        effect.loss <= effect.limit(LIMITS)
        and (effect.has_few_answers or effect.still_answered >= LIMITS.answers * effect.answered)
        for effect in outcome.effects
    )


def verdict(outcome: Outcome) -> str:
    judged = outcome.verdict(LIMITS)
    return str(judged) if judged is not Verdict.UNDECIDED else "within" if keeps_limits(outcome) else "below"


def by_counted_share(outcome: Outcome) -> str:
    """The rule before: from LEAST_ANSWERED answers on, the counted share; with fewer, undecided unless surely less."""
    said = [str(effect.of_loss(LIMITS)) for effect in outcome.effects]
    for effect in outcome.effects:
        left = effect.answers_left
        if left is not None and effect.answered >= LEAST_ANSWERED:
            said.append("warn" if left < LIMITS.answers else "ok")
        elif left is not None:
            said.append("warn" if effect.answers_interval.high < LIMITS.answers else "undecided")
    worst = Verdict.worst(Verdict(verdict) for verdict in said)
    return str(worst) if worst is not Verdict.UNDECIDED else "within" if keeps_limits(outcome) else "below"


def share(counts: Mapping[tuple[str, bool, str], int], rule: str, *, safe: bool, said: str) -> str:
    total = sum(count for (of, kept, _), count in counts.items() if (of, kept) == (rule, safe))
    return f"{counts.get((rule, safe, said), 0) / total:.1%}"


def drawn_again(kept: int, answered: int, examples: int, drawn: int) -> str:
    """How often a member with `kept` of `answered` exact matches in a suite is refused on `drawn` of its examples."""
    ways, before, after = comb(examples, drawn), 0.0, 0.0
    lost, silent = answered - kept, examples - answered
    for gone in range(min(lost, drawn) + 1):
        for others in range(min(silent, drawn - gone) + 1):
            chance = comb(lost, gone) * comb(silent, others) * comb(kept, drawn - gone - others) / ways
            seen, left = drawn - others, drawn - others - gone
            before += chance * (seen >= LEAST_ANSWERED and left < LIMITS.answers * seen)
            after += chance * (share_interval(left, seen).high < LIMITS.answers)
    start = f"\n{kept} of {answered} exact matches in {examples} examples, on {drawn} of them"
    return f"{start}: refused in {before:.0%} by the counted share, in {after:.0%} by the interval"


if __name__ == "__main__":
    main()
