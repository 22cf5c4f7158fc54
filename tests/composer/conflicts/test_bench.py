"""How the passes of probes and searches are cut, and in which order they are run elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from composer.conflicts.evidence.bench import MOST_EXAMPLES, Asked, Bench, Pass, not_run
from composer.evaluation.measure import ExampleScore
from composer.formats.recipes.suite import Example, Suite

EXAMPLES = [Example(prompt=f"p{number}", completion="c") for number in range(2 * MOST_EXAMPLES + 6)]
SUITE = Suite(name="many", description="", kind="target", chat=False, examples=tuple(EXAMPLES))
ASKED: list[Asked] = [(SUITE, example) for example in EXAMPLES]


@dataclass
class Elsewhere:
    """Other processes: notes the passes of each round, and those that are run alone."""

    rounds: list[list[Pass]] = field(default_factory=list[list[Pass]])
    alone: list[Pass] = field(default_factory=list[Pass])

    def measure(self, wanted: Pass) -> Sequence[ExampleScore]:
        self.alone.append(wanted)
        return not_run(wanted)

    def spread(self, passes: Sequence[Pass]) -> Iterator[tuple[Pass, Sequence[ExampleScore]]]:
        self.rounds.append(list(passes))
        yield from ((wanted, not_run(wanted)) for wanted in passes)


def test_a_long_pass_is_cut_alike_here_and_elsewhere_unless_its_deltas_are_fitted() -> None:
    here, elsewhere = list[Pass](), Elsewhere()

    def measure(wanted: Pass) -> Sequence[ExampleScore]:
        here.append(wanted)
        return not_run(wanted)

    for bench in (Bench(measure), Bench(not_run, elsewhere=elsewhere)):
        bench.run("a sum", lambda: (), ASKED)
        bench.run("a fit", lambda: (), ASKED, fit="all")
        assert bench.passes == bench.run_now == 2 * len(EXAMPLES)
    assert [len(wanted.asked) for wanted in here] == [MOST_EXAMPLES, MOST_EXAMPLES, 6, len(EXAMPLES)]
    assert [wanted.keys for wanted in here] == [wanted.keys for wanted in elsewhere.alone]


def test_a_round_elsewhere_begins_with_what_takes_longest_and_leaves_nothing_to_run_alone() -> None:
    elsewhere = Elsewhere()
    bench = Bench(not_run, elsewhere=elsewhere)

    def ask() -> None:
        bench.run("base", lambda: (), ASKED[:3])
        bench.run_ahead(lambda: bench.run("a sum", lambda: (), ASKED))  # within another: one round
        bench.run("a fit", lambda: (), ASKED[:8], fit="all")

    bench.run_ahead(ask)
    ask()
    (only,) = elsewhere.rounds
    assert [(wanted.who, len(wanted.asked)) for wanted in only] == [
        ("a fit", 8), ("a sum", MOST_EXAMPLES), ("a sum", MOST_EXAMPLES), ("a sum", 6), ("base", 3),
    ]  # fmt: skip
    assert not elsewhere.alone
    bench.run_ahead(lambda: bench.run("never requested", lambda: (), ASKED[:4]))
    assert bench.run_now == bench.passes == 8 + 3, "what is only run ahead is not counted"
