"""The tables of `python -m benchmarks.compositions`, from its results."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from composer.conflicts.evidence.outcome import Effect, Limits, Outcome, SideEffect, effect_of, side_effect_of
from composer.conflicts.evidence.probe import Effort, grown
from composer.evaluation.measure import ExampleScore
from composer.findings import Verdict
from composer.formats.recipes.recipe import CONFIRM
from composer.optimize.candidates import Candidate
from composer.optimize.objective import kept_share
from composer.optimize.report import Confirmed, choose

Document = Mapping[str, Any]
Rows = Sequence[ExampleScore]
LIMITS = Limits()
UNSEEN, FRESH = 24, 200
"""A search judges on the 24 of a suite's 32 examples that it has not seen; whether that was right is judged on 200."""


def tables(sets: Sequence[Document], adapters: Document, draw: random.Random, draws: int) -> Iterator[str]:
    """Markdown: each set by candidate, then each adapter as it is and tamed, then how often verdicts err."""
    yield "| members | candidate | kept | exact | reworded, exact | guard | CPU |"
    yield "|---|---|---|---|---|---|---|"
    for document in sets:
        for name in document["candidates"]:
            yield f"| {' | '.join((' + '.join(document['members']), name, *_cells(document, name)))} |"
    yield "\n| members | what a search answers | its CPU |\n|---|---|---|"
    for document in sets:
        search = document["search"]
        yield f"| {' + '.join(document['members'])} | {search['headline']} | {search['cpu_s']:.0f} s |"
    yield from _adapter_table(adapters)
    yield from _error_table(sets, draw, draws)


def _cells(document: Document, name: str) -> list[str]:
    fresh, wrapped = _outcome(document, name, "fresh"), _outcome(document, name, "reworded")
    [guard] = fresh.guards
    return [
        f"{min(map(kept_share, fresh.effects)):.3f}",
        _answers(fresh.effects),
        _answers(wrapped.effects),
        f"{guard.combined - guard.base:+.2f}",
        f"{document['candidates'][name]['cpu_s']:.0f} s",
    ]


def _answers(effects: Sequence[Effect]) -> str:
    return ", ".join(f"{effect.still_answered} of {effect.answered}" for effect in effects)


def _outcome(document: Document, name: str, words: str, chosen: Mapping[str, Sequence[int]] | None = None) -> Outcome:
    """The outcome of a candidate on fresh or reworded examples: on all, or on those chosen by member."""
    known, combined = document[words], document["candidates"][name][words]
    effects: list[Effect] = []
    for member, suite in known["suites"].items():
        runs = (known["base"][suite], known["alone"][member][suite], combined[suite])
        rows = range(len(runs[0])) if chosen is None else chosen[member]
        base, alone, after = ([ExampleScore(*run[row]) for row in rows] for run in runs)
        effects.append(effect_of((member, member), base, alone, after, len(known["suites"])))
    return Outcome(len(effects[0].suite), tuple(effects), _guards(document, name) if words == "fresh" else ())


def _guards(document: Document, name: str) -> tuple[SideEffect, ...]:
    known, guard = document["fresh"], document["guard"]
    alone = {member: _rows(known["alone"][member][guard]) for member in known["suites"]}
    after = _rows(document["candidates"][name]["fresh"][guard])
    return (side_effect_of("guard", _rows(known["base"][guard]), alone, after),)


def _rows(rows: Sequence[Any]) -> Rows:
    return [ExampleScore(*row) for row in rows]


def _adapter_table(adapters: Document) -> Iterator[str]:
    yield "\n| adapter | guard, as it is | tamed | kept | exact | reworded, exact, as it is | tamed | CPU |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, rows in adapters.items():
        fresh, wrapped, guard = ({of: _rows(rows[words][of]) for of in ("base", "original", "tamed")}
                                 for words in ("fresh", "reworded", "guard"))  # fmt: skip
        effect = effect_of((name, name), fresh["base"], fresh["original"], fresh["tamed"], 1)
        cost = {of: _nats(guard[of]) - _nats(guard["base"]) for of in ("original", "tamed")}
        exact = {of: f"{sum(bool(row.exact) for row in wrapped[of])} of {len(wrapped[of])}" for of in cost}
        cells = [name, f"{cost['original']:+.2f}", f"{cost['tamed']:+.2f}", f"{kept_share(effect):.3f}"]
        cells += [_answers([effect]), exact["original"], exact["tamed"], f"{rows['cpu_s']:.0f} s"]
        yield f"| {' | '.join(cells)} |"


def _nats(rows: Rows) -> float:
    return sum(row.nats for row in rows) / sum(row.tokens for row in rows)


def _error_table(sets: Sequence[Document], draw: random.Random, draws: int) -> Iterator[str]:
    """Resamples the fresh examples: suites of UNSEEN are judged by the product's rule, others of FRESH are the truth.
    The candidates are those that a search confirms, with the set."""
    counts = Counter[tuple[str, bool, str]]()
    for document in sets:
        for _ in range(draws):
            best = [_confirmed(document, name, draw) for name in ("regmean (default)", "mean", "selector", "set")]
            chosen = choose([confirmed for confirmed, _ in best], may_be_set=True)
            for confirmed, safe in best:
                counts["candidate", safe, str(confirmed.verdict)] += 1
                if confirmed.candidate == chosen:
                    counts["choice", safe, str(confirmed.verdict)] += 1
    yield "\n| | | ok | undecided | refused |\n|---|---|---|---|---|"
    for of in ("candidate", "choice"):
        for safe in (True, False):
            row = [counts[of, safe, str(verdict)] for verdict in (Verdict.OK, Verdict.UNDECIDED, Verdict.WARN)]
            cells = [f"{count} ({count / max(1, sum(row)):.1%})" for count in row]
            yield f"| {of} | {'safe' if safe else 'not safe'}, {sum(row)} | {' | '.join(cells)} |"


def _confirmed(document: Document, name: str, draw: random.Random) -> tuple[Confirmed, bool]:
    """A candidate as a search confirms it on resampled examples, and whether it is safe on others."""

    def resampled(size: int) -> dict[str, list[int]]:
        known = document["fresh"]
        return {
            member: draw.choices(range(len(known["base"][suite])), k=size) for member, suite in known["suites"].items()
        }

    rows = resampled(UNSEEN)
    outcome = grown(
        lambda k: _outcome(document, name, "fresh", {member: own[:k] for member, own in rows.items()}),
        Effort(CONFIRM, UNSEEN, LIMITS),
        UNSEEN,
    )
    truth = _outcome(document, name, "fresh", resampled(FRESH))
    candidate = Candidate(
        name=name,
        family="set" if name == "set" else name,
        method="stack",
        factors=(1.0,),
        phrases=("a",) if name == "selector" else (),
    )
    excess = 0.0 if keeps_limits(outcome) else 1.0
    verdict = outcome.verdict(LIMITS)
    return Confirmed(candidate=candidate, outcome=outcome, verdict=verdict, unseen=UNSEEN, excess=excess), keeps_limits(
        truth
    )


def keeps_limits(outcome: Outcome) -> bool:
    """Whether every measured value is within its limit."""
    kept = all(
        effect.loss <= effect.limit(LIMITS)
        and (effect.has_few_answers or effect.still_answered >= LIMITS.answers * effect.answered)
        for effect in outcome.effects
    )
    return kept and all(guard.rise <= LIMITS.guard for guard in outcome.guards)
