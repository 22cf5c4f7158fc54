"""An interrupted evaluation resumes at the example where it stopped."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from composer.evaluation import model
from composer.evaluation.evaluate import Result, evaluate, examine, scores
from composer.evaluation.journal import ResultJournal, examine_rest
from composer.evaluation.model import LoadedModel
from composer.formats.recipes.suite import Example, Suite

SUITE = Suite(
    name="letters",
    kind="target",
    chat=True,
    examples=tuple(Example(f"say {letter}", f"{letter} 12") for letter in "abcdefgh" * 2),
)


class Stopped(Exception):
    pass


def test_a_stopped_evaluation_measures_only_the_rest_and_ends_with_the_same_scores(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "BATCH_TOKENS", {"cpu": 100})  # several batches on any device
    path, batches = tmp_path / "results" / "one.jsonl", list[int]()

    def stop(count: int) -> None:
        batches.append(count)
        if len(batches) == 2:
            raise Stopped

    def run(progress: object) -> list[Result]:
        journal = ResultJournal(path, "base+adapter letters")
        return examine_rest(lambda: (loaded, ()), SUITE, SUITE.examples, journal, (), progress)  # pyright: ignore[reportArgumentType]

    with pytest.raises(Stopped):
        run(stop)
    with path.open("a") as file:
        file.write('[["say h", "h 12", [], 1.0')  # killed in the middle of a line
    rest = list[int]()
    results = run(rest.append)
    assert sum(batches) + sum(rest) == len(set(SUITE.examples)), "an example that comes twice is measured once"
    again = list[int]()
    assert run(again.append) == results
    assert again == []
    for one, other in zip(scores(SUITE, results), evaluate(loaded, SUITE), strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-5)


def test_results_of_another_model_or_content_are_not_used(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    examine_rest(lambda: (loaded, ()), SUITE, SUITE.examples, ResultJournal(path, "base+adapter"))
    assert ResultJournal(path, "base+adapter").missing(SUITE.examples) == []
    assert len(ResultJournal(path, "base+other").missing(SUITE.examples)) == 8
    assert len(ResultJournal(path, "base+adapter").missing(SUITE.examples)) == 8, "the file was begun anew"


def test_results_come_with_their_examples_as_batches_end(loaded: LoadedModel) -> None:
    seen: dict[int, Result] = {}

    def keep(results: Mapping[int, Result]) -> None:
        assert not seen.keys() & results.keys()
        seen.update(results)

    results = examine(loaded, SUITE, keep=keep)
    assert [seen[index] for index in range(len(results))] == results
