"""Laws of documents that users write: reading returns what was written, and all else is one of our errors."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from composer.errors import InvalidFile, NotSupported
from composer.formats.recipes.methods import PIPELINES, parse_settings
from composer.formats.recipes.policy import CODES, read_policy
from composer.formats.recipes.recipe import parse_recipe
from composer.formats.recipes.suite import Suite

RECIPE: dict[str, Any] = {
    "base": "b",
    "inputs": ["a/b", {"adapter": "a/c", "weight": 0.7, "suite": "s", "rules": [{"layers": "0-9", "weight": 0}]}],
    "method": "ties",
    "settings": {"density": 0.4, "protect": [1], "tied": "untie"},
    "adapter": "a/d:1.0.0",
    "dtype": "bfloat16",
    "rounding": {"mode": "stochastic", "seed": 7},
    "probe": 8,
    "evaluate": ["s"],
    "gates": ["s.nll within 0.2 of base"],
    "policy": {"near_duplicate": "error", "thresholds": {"probe_loss": "0.5 of gain"}, "require": "ok"},
    "notes": "n",
}
SUITE: dict[str, Any] = {
    "name": "s",
    "kind": "target",
    "description": "d",
    "chat": True,
    "ends": False,
    "examples": [{"prompt": "p", "completion": "c"}],
    "metrics": {"rouge_l": "higher"},
}
ASKED: dict[str, Any] = SUITE | {
    "version": "1.0.0",
    "task": "generation",
    "generation": {"max_new_tokens": 8, "stop": [";"], "temperature": 0.5, "top_p": 0.9, "seed": 1},
    "scorer": {"name": "match", "settings": {"case": True}},
}
CHOSEN: dict[str, Any] = SUITE | {
    "task": "multiple_choice",
    "scorer": {"name": "likelihood", "settings": {"per": "token"}},
    "examples": [{"prompt": "p", "completion": "c", "choices": ["c", "d"]}],
}
READERS: list[tuple[dict[str, Any], Callable[[object], object]]] = [
    (RECIPE, parse_recipe),
    (SUITE, Suite.from_json),
    (ASKED, Suite.from_json),
    (CHOSEN, Suite.from_json),
    (RECIPE["policy"], read_policy),
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.binary(max_size=3), st.text(max_size=5),
    st.sampled_from(["\ud800", 10**400, -0.0, "1", "true", "0.5 of gain", 2**64]),
)  # fmt: skip
NAMES = [*RECIPE, *ASKED, "choices", "adapter", "weight", "layers", "mode", "density"]
KEYS = st.one_of(st.sampled_from(NAMES), SCALARS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield path
    for key, item in items:
        yield from paths(item, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    document = copy.deepcopy(document)
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return document


def refused(read: Callable[[Any], object], document: object) -> InvalidFile | NotSupported | None:
    try:
        read(document)
    except (InvalidFile, NotSupported) as error:
        return error
    return None


@given(st.data())
def test_any_change_of_a_document_is_read_or_refused_by_an_error_of_ours(data: st.DataObject) -> None:
    document, read = data.draw(st.sampled_from(READERS))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths(document))))
        document = changed(document, path, data.draw(VALUES))
    error = refused(read, document)
    if error is not None:
        assert error.code in ("bad_recipe", "suite_field", "suite_example", "bad_policy")
        assert error.next_step
        str(error).encode()  # half a surrogate pair cannot be stored


@given(st.sampled_from(sorted(PIPELINES)), st.dictionaries(KEYS, VALUES, max_size=2))
def test_any_settings_are_read_or_refused_and_what_was_read_is_read_again(
    method: str, settings: dict[str, object]
) -> None:
    error = refused(lambda given: parse_settings(method, given), settings)
    if error is not None:
        assert error.code in ("unknown_setting", "bad_setting")
        return
    parsed = parse_settings(method, settings)
    written = json.loads(json.dumps(parsed.to_json()))
    assert parse_settings(method, written).to_json() == parsed.to_json()


@given(
    st.fixed_dictionaries(
        {
            "inputs": st.lists(
                st.fixed_dictionaries(
                    {"adapter": st.text("ab/", min_size=1)},
                    optional={
                        "weight": st.floats(-1e12, 1e12),
                        "suite": st.none() | st.text("ab"),
                        "rules": st.lists(
                            st.fixed_dictionaries(
                                {
                                    "weight": st.floats(-1e12, 1e12),
                                    "modules": st.from_regex(r"[a-z*]{1,9}", fullmatch=True),
                                }
                            ),
                            max_size=3,
                        ),
                    },
                ),
                min_size=1,
                max_size=4,
            ),
            "method": st.sampled_from(["stack", "linear", "ties"]),
        },
        optional={
            "base": st.none() | st.text("ab"),
            "settings": st.fixed_dictionaries({}, optional={"lambda": st.floats(-9, 9), "rank": st.integers(1, 64)}),
            "probe": st.integers(0, 64),
            "evaluate": st.lists(st.text("ab")),
            "gates": st.none() | st.lists(st.text("ab")),
            "notes": st.text("ab"),
            "policy": st.dictionaries(st.sampled_from(sorted(CODES)), st.just("error")),
            "rounding": st.fixed_dictionaries({"mode": st.just("stochastic"), "seed": st.integers(0, 2**64 - 1)}),
        },
    )
)
def test_a_recipe_says_what_was_written_and_is_read_again_as_it_is(document: dict[str, Any]) -> None:
    recipe = parse_recipe(document)
    content = json.loads(json.dumps(recipe.to_json()))
    assert parse_recipe(content) == recipe
    unchanged = document.keys() - {"inputs"}
    assert {name: content.get(name, {}) for name in unchanged} == {name: document[name] for name in unchanged}


WRONG = {"chat": 1, "ends": "true", "name": 3, "kind": True, "description": b"d", "examples": {"0": {}}, "metrics": []}


def test_no_value_becomes_one_of_another_type() -> None:
    as_text = {name: str(value) for name, value in RECIPE.items() if not isinstance(value, str)}
    as_numbers = {name: 1 for name, value in RECIPE.items() if isinstance(value, str)} | {"probe": True, "gates": (1,)}
    cases = [(RECIPE, parse_recipe, wrong) for wrong in (as_text, as_numbers)] + [(SUITE, Suite.from_json, WRONG)]
    for document, read, wrong in cases:
        for name, value in wrong.items():
            assert refused(read, document | {name: value}), (name, value)
