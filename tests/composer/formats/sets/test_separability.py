"""Whether prompts tell two suites apart: 1 for different tasks, about chance for the same prompts."""

from hypothesis import given
from hypothesis import strategies as st

from composer.formats.recipes.phrases import MAX_PHRASE_CHARS, phrase_of, phrased_suite, problem_of_phrase
from composer.formats.recipes.suite import NAME, CalibrationSet, Example, Suite
from composer.formats.sets.router import SEPARABLE, separability_of

DATES = [f"Write the date {day} May {year}." for day in range(10, 14) for year in (2019, 2023, 2026)]
REVIEWS = [
    f"The {thing} {text}" for thing in ("lamp", "tent", "chair") for text in ("is fine", "broke", "smells", "works")
]
PROMPTS = st.lists(st.text("abcde ", min_size=5, max_size=12), min_size=1, max_size=6)


def suite_of(name: str, prompts: list[str]) -> Suite:
    examples = [{"prompt": prompt, "completion": name} for prompt in prompts]
    return Suite.from_json({"name": name, "kind": "target", "chat": True, "examples": examples})


def test_prompts_of_other_tasks_are_separable_and_the_same_prompts_are_not() -> None:
    dates, same, reviews = suite_of("a", DATES), suite_of("b", DATES), suite_of("c", REVIEWS)
    assert separability_of(dates, reviews) == 1.0
    assert separability_of(dates, same) < 0.7 < SEPARABLE
    assert separability_of(suite_of("a", ["Yes or no?"]), suite_of("b", ["Yes or no?"])) == 0.0, "too few, and shared"
    assert separability_of(suite_of("a", ["Yes or no?"]), suite_of("b", ["True or false?"])) == 1.0


def test_a_phrase_makes_the_same_prompts_separable() -> None:
    both = [
        phrased_suite(phrase, suite_of(name, DATES)) for name, phrase in (("a", "As in ISO 8601."), ("b", "In short."))
    ]
    assert separability_of(*both) >= SEPARABLE


@given(first=PROMPTS, second=PROMPTS)
def test_separability_of_any_two_suites_is_a_share(first: list[str], second: list[str]) -> None:
    assert 0 <= separability_of(suite_of("a", first), suite_of("b", second)) <= 1


@given(name=st.from_regex(NAME, fullmatch=True))
def test_every_name_of_a_suite_makes_a_phrase(name: str) -> None:
    phrase = phrase_of(name)
    assert problem_of_phrase(phrase) == ""
    assert len(phrase) <= MAX_PHRASE_CHARS


@given(phrase=st.sampled_from(["As SQL:", "In short."]), prompts=PROMPTS)
def test_examples_with_a_phrase_are_those_that_were_fitted_on_and_no_others(phrase: str, prompts: list[str]) -> None:
    suite = suite_of("a", prompts)
    used = CalibrationSet(suite, 2, phrase=phrase)
    with_phrase = phrased_suite(phrase, suite).examples
    assert [example in used for example in with_phrase] == [example in used for example in suite.examples]
    assert Example(f"{phrase} another", "a") not in used
    assert used.to_json() == {**CalibrationSet(suite, 2).to_json(), "phrase": phrase}
