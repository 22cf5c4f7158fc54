"""Passes that are run elsewhere, played in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from composer.conflicts.evidence.bench import Pass, PassRunner
from composer.evaluation.measure import ExampleScore


@dataclass
class Other:
    """Another process, which runs passes in another order; it cannot run passes named in `left_out`."""

    run: PassRunner
    left_out: str = "nothing"
    rounds: list[int] = field(default_factory=list[int])
    alone: list[str] = field(default_factory=list[str])

    def measure(self, wanted: Pass) -> Sequence[ExampleScore]:
        self.alone.append(wanted.who)
        return self._results(wanted)

    def spread(self, passes: Sequence[Pass]) -> Iterator[tuple[Pass, Sequence[ExampleScore]]]:
        self.rounds.append(len(passes))
        for run in reversed(passes):
            if self.left_out not in run.who:
                yield run, self._results(run)

    def _results(self, wanted: Pass) -> Sequence[ExampleScore]:
        return self.run(wanted.who, [(suite, example) for _, suite, example in wanted.keys])
