"""Scorers of generated answers."""

import json
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from composer.errors import ComposerError
from composer.evaluation.scorers.json_match import MAX_CHARS
from composer.evaluation.scorers.process import open_scorer
from composer.evaluation.scorers.scorer import PythonScorers, checked_score, scorer_named
from composer.formats.recipes.suite import Example
from composer.formats.recipes.tasks import ScorerChoice
from tests.composer.scorers import install_scorer


def score(answer: str, completion: str, name: str = "match", **settings: object) -> float:
    chosen = ScorerChoice(name=name, settings=settings)
    return checked_score(scorer_named(chosen, ()), name, answer, Example("?", completion))


@pytest.mark.parametrize(
    ("answer", "completion", "settings", "expected"),
    [
        ("  The\nAnswer ", "the answer", {}, 1),
        ("the answer.", "the answer", {}, 0),
        ("the answer.", "the answer", {"punctuation": False}, 1),
        ("The answer", "the answer", {"case": True}, 0),
        ("ﬁne café", "fine cafe\u0301", {}, 1),
        ("", "x", {}, 0),
    ],
)
def test_text_matches_after_normalization(
    answer: str, completion: str, settings: dict[str, object], expected: float
) -> None:
    assert score(answer, completion, **settings) == expected


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        ('{"b": [1, 2.0], "a": null}', '{ "a": null,\n "b": [1.0, 2] }', 1),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 1),
        ("[2, 1]", "[1, 2]", 0),
        ("true", "1", 0),
        ("1e1", "10", 1),
        ('{"a": 1, "a": 1}', '{"a": 1}', 0),
        ("NaN", "1", 0),
        ("1e999999999999999999999", "1", 0),
        ("[" * 50_000, "[]", 0),
        ("[" * 200 + "]" * 200, "[]", 0),
        ("9" * 90_000, "9", 0),
        ("1e900000000", "1", 0),
        (f'"{"x" * MAX_CHARS}"', '"x"', 0),
        ('{"a": 1} and more', '{"a": 1}', 0),
    ],
)
def test_json_matches_by_value_and_whatever_else_comes_is_wrong_at_once(
    answer: str, completion: str, expected: float
) -> None:
    began_s = time.monotonic()
    assert score(answer, completion, "json") == expected
    assert time.monotonic() - began_s < 1


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text() | some.floats(allow_nan=False, allow_infinity=False),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_two_json_texts_match_exactly_if_their_values_are_equal(one: Any, other: Any) -> None:
    written = json.dumps(one, indent=1, sort_keys=True)
    assert score(json.dumps(one), written, "json") == 1
    assert score(json.dumps(other), written, "json") == float(_same(one, other))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return Decimal(json.dumps(one)) == Decimal(json.dumps(other))
    return type(one) is type(other) and one == other


def raises(_answer: str, _example: Example) -> float:
    raise RuntimeError("no database")


def leaves(_answer: str, _example: Example) -> float:
    sys.exit(3)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda: scorer_named(ScorerChoice(name="sql_results"), ()), "scorer_disabled"),
        (lambda: scorer_named(ScorerChoice(name="not_there"), ("not_there",)), "scorer_missing"),
        (lambda: checked_score(raises, "mine", "a", Example("p", "c")), "scorer_failed"),
        (lambda: checked_score(leaves, "mine", "a", Example("p", "c")), "scorer_failed"),
        (lambda: checked_score(lambda *_: 2.0, "mine", "a", Example("p", "c")), "scorer_failed"),
        (lambda: checked_score(lambda *_: float("nan"), "mine", "a", Example("p", "c")), "scorer_failed"),
        (lambda: score("1", "not JSON", "json"), "scorer_failed"),
    ],
)
def test_a_scorer_that_cannot_score_is_an_error_and_never_a_zero(call: Callable[[], object], code: str) -> None:
    with pytest.raises(ComposerError) as caught:
        call()
    assert caught.value.code == code
    assert caught.value.next_step


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    install_scorer(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_installed")
def test_a_python_scorer_runs_in_a_process_that_ends_with_it_and_is_killed_when_it_takes_too_long(
    tmp_path: Path,
) -> None:
    chosen = ScorerChoice(name="obedient", settings={"marker": str(tmp_path / "pid")})

    def asked(*answers: str, limit_s: float = 30) -> list[float | ComposerError]:
        scores: list[float | ComposerError] = []
        with open_scorer(chosen, PythonScorers(("obedient",), limit_s)) as scorer:
            for answer in answers:
                try:
                    example = Example("p", "c", ("c", "d"))
                    scores.append(checked_score(scorer, "obedient", answer, example, lambda _: "example 1 of queries"))
                except ComposerError as error:
                    scores.append(error)
        assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists(), "nothing goes on"
        return scores

    answers = ("c", "prints", "raises", "leaves", "returns None", "d", "dies")
    whys = ("example 1 of queries: RuntimeError: no database", "SystemExit: 3", "TypeError")
    right, wrong, *failed, after, died = asked(*answers)
    assert (right, wrong, after) == (1, 0, 1)
    for error, why in zip([*failed, died], [*whys, "its process ended with -9"], strict=True):
        assert isinstance(error, ComposerError)
        assert (error.code, why in error.message) == ("scorer_failed", True)
    for answer in ("sleeps", "loops"):
        began_s = time.monotonic()
        (late,) = asked(answer, limit_s=0.3)
        assert isinstance(late, ComposerError)
        assert (late.code, time.monotonic() - began_s < 20) == ("scorer_timeout", True)
        assert "example 1 of queries no score within 0.3 s" in late.message
    for settings, code in (({"marker": "x", "other": 1}, "scorer_settings"), ({"marker": ""}, "scorer_failed")):
        wrong = ScorerChoice(name="obedient", settings=settings)
        with pytest.raises(ComposerError) as caught, open_scorer(wrong, PythonScorers(("obedient",))):
            pass
        assert caught.value.code == code
