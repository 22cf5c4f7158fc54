"""Tasks, generation and scorers of suites, which are in the digest exactly if they are not the defaults."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import InvalidFile
from composer.formats.recipes.suite import Suite

PLAIN: dict[str, Any] = {"name": "s", "kind": "target", "chat": True, "examples": [{"prompt": "p", "completion": "c"}]}
CHOICES: dict[str, Any] = {"examples": [{"prompt": "p", "completion": "c", "choices": ["c", "d"]}]}
DEFAULTS: dict[str, Any] = {"max_new_tokens": 64, "stop": [], "temperature": 0, "top_p": 1, "seed": 0}


def read(**fields: Any) -> Suite:
    return Suite.from_json(PLAIN | fields)


def test_a_version_is_a_label_and_not_in_the_digest() -> None:
    assert read(version="1.0.0").digest == read(version="2.0.0-rc.1").digest == read().digest
    assert read(version="1.0.0").to_json()["version"] == "1.0.0"
    assert "version" not in read().to_json()


@pytest.mark.parametrize(
    ("stated", "short"),
    [
        ({"task": "teacher_forced"}, {}),
        ({"task": "generation", "generation": DEFAULTS, "scorer": "match"}, {"task": "generation"}),
        (
            {"task": "generation", "scorer": {"name": "match", "settings": {"case": False, "punctuation": True}}},
            {"task": "generation"},
        ),
        ({"task": "generation", "scorer": {"name": "json"}}, {"task": "generation", "scorer": "json"}),
        (
            {"task": "multiple_choice", "scorer": {"name": "likelihood", "settings": {"per": "choice"}}, **CHOICES},
            {"task": "multiple_choice", **CHOICES},
        ),
    ],
)
def test_a_field_at_its_default_is_not_in_the_digest(stated: dict[str, Any], short: dict[str, Any]) -> None:
    assert read(**stated).digest == read(**short).digest
    assert read(**stated).content == read(**short).content


GENERATION = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.integers(1, 4096),
        "stop": st.lists(st.sampled_from([";", "\n\n", "END"]), max_size=2),
        "temperature": st.sampled_from([0, 0.5, 1]),
        "top_p": st.sampled_from([0.9, 1]),
        "seed": st.integers(0, 9),
    },
)


@given(GENERATION, GENERATION)
def test_two_ways_of_generating_have_one_digest_exactly_if_they_are_the_same(one: Any, other: Any) -> None:
    first, second = (read(task="generation", generation=own) for own in (one, other))
    assert (first.digest == second.digest) == (DEFAULTS | one == DEFAULTS | other)
    assert Suite.from_json(first.to_json()) == first
    assert Suite.from_json(first.to_json()).digest == first.digest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": "1.0"}, "version: '1.0' is not a semantic version"),
        ({"task": "chat"}, "task: 'chat' is not one of teacher_forced, generation, multiple_choice"),
        ({"scorer": "json"}, "scorer: only generated answers and choices have a scorer"),
        ({"generation": {}}, "generation: it is set, and the task is not"),
        ({"task": "generation", "generation": {"max_tokens": 3}}, "generation: unknown field 'max_tokens'"),
        ({"task": "generation", "generation": {"temperature": -1}}, "generation.temperature: -1 is not at least 0"),
        ({"task": "generation", "scorer": "likelihood"}, "scorer: likelihood does not score generation"),
        ({"task": "generation", "scorer": "os.system"}, "scorer.name: 'os.system' is not a name of lower-case"),
        (
            {"task": "generation", "scorer": {"name": "match", "settings": {"kase": True}}},
            "scorer.settings: unknown field 'kase'",
        ),
        ({"task": "multiple_choice"}, "example 1: choices: a multiple-choice example has at least two choices"),
        ({"task": "multiple_choice", "scorer": "mine", **CHOICES}, "scorer: mine does not score multiple_choice"),
        (CHOICES, "example 1: choices: only multiple_choice has choices"),
        (
            {"task": "multiple_choice", "examples": [{"prompt": "p", "completion": "x", "choices": ["c", "d"]}]},
            "example 1: choices: the completion is not among the choices",
        ),
    ],
)
def test_a_task_that_does_not_fit_is_refused_with_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidFile) as caught:
        read(**fields)
    assert message in str(caught.value)
    assert caught.value.next_step
