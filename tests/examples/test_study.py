"""The numbers in docs/methods/study.md equal the measurements: the rows of every pair are kept beside it."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import study_report
import study_sets
from study import OLDER
from train import STUDY

EXAMPLES = Path(study_report.__file__).parent
ROWS = [json.loads(line) for line in (EXAMPLES / "study.jsonl").read_text().splitlines()]
DOCUMENT = (EXAMPLES.parent / "docs" / "methods" / "study.md").read_text()


def test_every_pair_of_the_twelve_adapters_was_measured_once() -> None:
    names = {*OLDER, *STUDY}
    assert sorted((row["a"], row["b"]) for row in ROWS) == sorted(combinations([*OLDER, *STUDY], 2))
    assert len(names) == 12


@pytest.mark.long
def test_the_documents_correlations_are_those_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Their intervals take a minute, so fewer draws are used here."""
    monkeypatch.setattr(study_report, "DRAWS", 5)
    monkeypatch.setattr(study_report, "PLOT", tmp_path / "study.svg")
    monkeypatch.setattr("sys.argv", ["study_report.py"])
    study_report.main()
    made = _without_intervals(capsys.readouterr().out)
    assert made
    assert _without_intervals(DOCUMENT)[: len(made)] == made  # tables of other scripts follow


def _without_intervals(text: str) -> list[str]:
    return [re.sub(r" \[.*?\]", "", line) for line in text.splitlines() if line.startswith("|")]


def test_what_combinations_keep_in_the_results_is_what_the_rows_of_the_sets_give() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "sets.jsonl").read_text().splitlines()]
    results = (EXAMPLES.parent / "benchmarks" / "RESULTS.md").read_text()
    assert "\n".join(study_sets.summary(rows)) in results
