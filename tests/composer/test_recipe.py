"""A recipe that cannot be read is one clear error, whatever a stranger wrote into it."""

import pytest

from composer.errors import InvalidFile
from composer.recipe import load_recipe, parse_recipe

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
)
UNREADABLE = {
    "deep nesting": "inputs: " + "[" * 5000,
    "a date that does not exist": "inputs: [{adapter: 2020-99-99}]\nmethod: stack",
    "a number of 5000 digits": "inputs: [{adapter: a/b, weight: " + "9" * 5000 + "}]\nmethod: stack",
    "a weight no float can hold": "inputs: [{adapter: a/b, weight: 1" + "0" * 400 + "}]\nmethod: stack",
    "a setting no float can hold": "inputs: [a/b]\nmethod: stack\nsettings: {lambda: 1" + "0" * 400 + "}",
    "a weight that is text": "inputs: [{adapter: a/b, weight: '1'}]\nmethod: stack",
    "aliases without end": BOMB,
    "aliases as a setting": f"inputs: [a/b]\nmethod: stack\nsettings:\n  {BOMB.replace(chr(10), chr(10) + '  ')}",
    "a list that holds itself": "inputs: &a [*a]\nmethod: stack",
    "half a surrogate pair": 'inputs: [a/b]\nmethod: stack\nnotes: "\\ud800"',
    "half a surrogate pair in a key": 'inputs: [a/b]\nmethod: stack\n"\\ud800": 1',
    "a hexadecimal key of 5000 digits": "0x" + "f" * 5000 + ": 1",
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_no_recipe_can_say_is_refused_in_a_short_message_that_can_be_stored(case: str) -> None:
    with pytest.raises(InvalidFile) as caught:
        load_recipe(UNREADABLE[case])
    assert caught.value.code == "bad_recipe"
    assert len(str(caught.value).encode()) < 500


def test_a_recipe_with_numbers_and_settings_is_read() -> None:
    recipe = parse_recipe({"inputs": [{"adapter": "a/b", "weight": 2}], "method": "linear", "settings": {"lambda": 1}})
    assert (recipe.inputs[0].weight, recipe.settings) == (2.0, {"lambda": 1})
