"""An unreadable recipe is one clear error, for any content."""

import json
from dataclasses import replace

import pytest

from composer.errors import InvalidFile
from composer.formats.recipes.lock import Lock, LockedInput
from composer.formats.recipes.recipe import load_recipe, parse_recipe
from composer.formats.recipes.rounding import Mode, Rounding

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
)
UNREADABLE = {
    "deep nesting": "inputs: " + "[" * 5000,
    "a date that does not exist": "inputs: [{adapter: 2020-99-99}]\nmethod: stack",
    "a number of 5000 digits": "inputs: [{adapter: a/b, weight: " + "9" * 5000 + "}]\nmethod: stack",
    "a weight no float can hold": "inputs: [{adapter: a/b, weight: 1" + "0" * 400 + "}]\nmethod: stack",
    "a setting no float can hold": "inputs: [a/b]\nmethod: stack\nsettings: {lambda: 1" + "0" * 400 + "}",
    "a weight that float32 cannot square": "inputs: [{adapter: a/b, weight: 1.0e+100}]\nmethod: stack",
    "a lambda that float32 cannot hold": "inputs: [a/b]\nmethod: stack\nsettings: {lambda: 1.0e+308}",
    "settings that are a list": "inputs: [a/b]\nmethod: stack\nsettings: []",
    "a weight that is text": "inputs: [{adapter: a/b, weight: a lot}]\nmethod: stack",
    "aliases without end": BOMB,
    "aliases as a setting": f"inputs: [a/b]\nmethod: stack\nsettings:\n  {BOMB.replace(chr(10), chr(10) + '  ')}",
    "a list that holds itself": "inputs: &a [*a]\nmethod: stack",
    "half a surrogate pair": 'inputs: [a/b]\nmethod: stack\nnotes: "\\ud800"',
    "half a surrogate pair in a key": 'inputs: [a/b]\nmethod: stack\n"\\ud800": 1',
    "a hexadecimal key of 5000 digits": "0x" + "f" * 5000 + ": 1",
    "prompts for a method that is fitted on nothing": "inputs: [{adapter: a/b, prompts: [hi]}]\nmethod: stack",
    "a prompt that says nothing": 'inputs: [{adapter: a/b, prompts: [hi, " "]}]\nmethod: regmean',
    "a rounding that there is not": "inputs: [a/b]\nmethod: stack\nrounding: up",
    "a rounding that is a list": "inputs: [a/b]\nmethod: stack\nrounding: [stochastic]",
    "a rounding with another key": "inputs: [a/b]\nmethod: stack\nrounding: {mode: stochastic, seeds: 1}",
    "a seed that is not a number": "inputs: [a/b]\nmethod: stack\nrounding: {mode: stochastic, seed: yes}",
    "a seed of what is not left to chance": "inputs: [a/b]\nmethod: stack\nrounding: {mode: nearest, seed: 1}",
    "a seed of 65 bits": f"inputs: [a/b]\nmethod: stack\nrounding: {{mode: stochastic, seed: {2**64}}}",
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_no_recipe_can_say_is_refused_in_a_short_message_that_can_be_stored(case: str) -> None:
    with pytest.raises(InvalidFile) as caught:
        load_recipe(UNREADABLE[case])
    assert caught.value.code == "bad_recipe"
    assert len(str(caught.value).encode()) < 500


def test_a_number_that_yaml_takes_for_a_text_is_a_number() -> None:
    """YAML 1.1 requires a dot in `1e-3`."""
    (row,) = load_recipe("inputs: [{adapter: a/b, weight: 1e-3}]\nmethod: stack").inputs
    assert row.weight == 1e-3


def test_a_recipe_with_numbers_and_settings_is_read() -> None:
    recipe = parse_recipe({"inputs": [{"adapter": "a/b", "weight": 2}], "method": "linear", "settings": {"lambda": 1}})
    assert (recipe.inputs[0].weight, recipe.settings) == (2.0, {"lambda": 1})


@pytest.mark.parametrize(("written", "why"), [("", "it is missing"), ("method: tie", "unknown method 'tie'")])
def test_a_recipe_without_a_method_or_with_an_unknown_one_is_refused_with_the_known_ones(
    written: str, why: str
) -> None:
    with pytest.raises(InvalidFile, match=why) as caught:
        load_recipe(f"inputs: [a/b]\n{written}")
    assert len(caught.value.message) < 100
    assert "stack, linear" in caught.value.next_step
    assert "pico_stack" not in caught.value.next_step


CHANCE = Rounding(Mode.STOCHASTIC, 2**64 - 1)


@pytest.mark.parametrize(
    ("written", "rounding"),
    [
        ({}, Rounding()),
        ({"rounding": None}, Rounding()),
        ({"rounding": "nearest"}, Rounding()),
        ({"rounding": {"mode": "nearest"}}, Rounding()),
        ({"rounding": "stochastic"}, Rounding(Mode.STOCHASTIC)),
        ({"rounding": {"mode": "stochastic", "seed": CHANCE.seed}}, CHANCE),
    ],
)
def test_a_recipe_says_how_to_round_and_to_the_nearest_where_it_says_nothing(
    written: dict[str, object], rounding: Rounding
) -> None:
    recipe = parse_recipe({"inputs": ["a/b"], "method": "stack", **written})
    assert recipe.rounding == rounding
    again = parse_recipe(recipe.to_json())
    assert again.to_json() == recipe.to_json()
    assert ("rounding" in recipe.to_json()) == (rounding.mode is Mode.STOCHASTIC)


def lock(rounding: Rounding) -> Lock:
    return Lock(
        base="b" * 64,
        method="linear",
        settings={"normalize": False},
        dtype="bfloat16",
        inputs=(source("c" * 40, 0.5, {"adapter_config.json": "d" * 64}),),
        rounding=rounding,
    )


def source(commit: str, weight: float, files: dict[str, str]) -> LockedInput:
    return LockedInput(repository="acme/sql", version="1.0.0", commit=commit, weight=weight, files=files)


def test_a_lock_that_rounds_to_the_nearest_has_the_digest_it_had_before_it_could_say_so() -> None:
    digest = "20735b8fa911fb149d4a7a3a20607ab727bea8cf8f3ea17a2a8625fd8199ccd7"
    assert lock(Rounding()).digest == lock(Rounding(seed=5)).digest == digest
    assert lock(Rounding()).to_json().keys() == {"base", "method", "settings", "dtype", "inputs", "digest"}
    seeds = {lock(Rounding(Mode.STOCHASTIC, seed)).digest for seed in (0, 1)}
    assert len(seeds | {digest}) == 3


@pytest.mark.parametrize("rounding", [Rounding(), CHANCE])
def test_a_lock_reads_back_as_it_was_written(rounding: Rounding) -> None:
    assert Lock.from_json(json.loads(json.dumps(lock(rounding).to_json()))) == lock(rounding)


def test_a_method_of_the_first_version_leaves_the_digest_of_a_lock_as_it_was() -> None:
    old = Lock(base="b", method="ctm_mean", settings={}, dtype=None, inputs=(source("c", 1.0, {"a": "0"}),))
    assert "method_version" not in old.to_json()
    assert Lock.from_json(old.to_json()) == old
    new = replace(old, method_version=2)
    assert new.to_json()["method_version"] == 2
    assert Lock.from_json(new.to_json()) == new
    assert new.digest != old.digest
