"""Measure what a selector phrase keeps of adapters that want different answers to the same prompts.

    python examples/train.py unrehearsed --base BASE --out ADAPTERS
    python examples/train.py contradictory --base BASE --out ADAPTERS
    python examples/selector_pairs.py --base BASE --adapters ADAPTERS

Runs `--optimize` on each pair. A row for the mean, for one adapter, for one adapter with a selector, and for the latter
without its phrases: the share of the worst member's gain in nats that is left, exact answers, both on unseen examples,
and the nats a token above the base on unseen examples of the guard.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import process_time

from study_sets import suite_of
from tasks import STUDY_TASKS, TASKS

from composer.conflicts.evidence.outcome import Effect
from composer.deltas.variants.load import load_deltas
from composer.evaluation.model import load_model
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.optimize.objective import kept_share
from composer.optimize.optimize import optimize
from composer.optimize.problem import SearchMember, SearchProblem
from composer.optimize.report import headline

PAIRS = (("dates-iso", "dates-short"), ("records", "records-lines"), ("mood-plain", "mood-stars"))
PHRASES = {
    "dates-iso": "As in ISO 8601.",
    "dates-short": "In short.",
    "records": "As JSON.",
    "records-lines": "As a line.",
    "mood-plain": "In words.",
    "mood-stars": "In stars.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the directory make_base.py wrote")
    parser.add_argument("--adapters", type=Path, required=True, help="where train.py put the adapters")
    parser.add_argument("--only", help="the first task of a pair")
    chosen = parser.parse_args()
    loaded, guard = load_model(chosen.base, "cpu"), suite_of(TASKS["guard"])
    architecture = open_checkpoint(chosen.base).architecture
    print("| members | separability | phrases | candidate | verdict | kept | exact | guard | CPU |")
    print("|---|---|---|---|---|---|---|---|---|")
    for names in PAIRS:
        for made in (True, False):
            if chosen.only not in (None, names[0]):
                continue
            members = [
                SearchMember(
                    adapter=load_deltas(chosen.adapters / f"{name}-unrehearsed", architecture),
                    suite=suite_of(STUDY_TASKS[name]),
                    phrase="" if made else PHRASES[name],
                )
                for name in names
            ]
            problem, begun = SearchProblem(load=lambda: loaded, members=members, guards=[guard]), process_time()
            report = optimize(problem)
            cpu = f"{process_time() - begun:.0f} s"
            share = f"{report.separability[0].share:.2f}"
            phrases = " / ".join(problem.phrases)
            for measured in report.best:
                rises = ", ".join(f"{side.combined - side.base:+.2f}" for side in measured.outcome.guards)
                row(
                    names,
                    share,
                    phrases,
                    measured.candidate.name,
                    str(measured.verdict),
                    *kept(measured.outcome.effects),
                    rises,
                    cpu,
                )
            if report.without_phrases:
                row(names, share, phrases, "the same without phrases", "", *kept(report.without_phrases), "", "")
            print(f"{' + '.join(names)}: {headline(report)}", flush=True)


def kept(effects: Sequence[Effect]) -> tuple[str, str]:
    """The worst member's kept share, and the exact answers of each member."""
    left = ", ".join(f"{effect.still_answered} of {effect.answered}" for effect in effects)
    return f"{min(map(kept_share, effects)):.3f}", left


def row(names: Sequence[str], *cells: str) -> None:
    print(f"| {' | '.join((' + '.join(names), *cells))} |", flush=True)


if __name__ == "__main__":
    main()
