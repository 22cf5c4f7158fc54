"""Configurations of mergekit become recipes with the same result; what has no counterpart is named.

The expected weights and settings gave mergekit's own tensors to 3e-7 of the change, on a llama with three adapters.
"""

from typing import Any

import pytest
import yaml

from composer.errors import InvalidFile, NotSupported
from composer.formats.recipes.mergekit import ImportedRecipe, recipe_of_mergekit
from composer.formats.recipes.recipe import parse_recipe

FILTERS = [{"filter": "self_attn", "value": 0.2}, {"filter": "layers.1", "value": 0.9}, {"value": 0.5}]


def model(adapter: str, **parameters: object) -> dict[str, object]:
    name = f"acme/base+{adapter}" if adapter else "acme/base"
    return {"model": name, **({"parameters": parameters} if parameters else {})}


def imported(method: str, *models: dict[str, object], **config: object) -> ImportedRecipe:
    stated = {"merge_method": method, "base_model": "acme/base", "models": list(models), **config}
    return recipe_of_mergekit(yaml.safe_dump({key: value for key, value in stated.items() if value is not None}), "m")


def weights(made: ImportedRecipe) -> dict[str, float]:
    parse_recipe(made.recipe)  # a recipe
    return {source["adapter"]: source["weight"] for source in made.recipe["inputs"]}


@pytest.mark.parametrize(
    ("method", "models", "config", "expected"),
    [
        ("linear", [model("red", weight=1), model("green", weight=0.5)], {}, (2 / 3, 1 / 3)),
        ("linear", [model("", weight=0.5), model("red", weight=1), model("green", weight=0.5)], {}, (0.5, 0.25)),
        ("linear", [model("red", weight=0.3), model("green", weight=0.7)], {"normalize": False}, (0.3, 0.7)),
        ("task_arithmetic", [model("red", weight=0.7), model("green", weight=-0.4)], {}, (0.7, -0.4)),
        ("task_arithmetic", [model(""), model("red"), model("green")], {"weight": 1, "normalize": True}, (0.5, 0.5)),
        ("task_arithmetic", [model("red", weight="1e-1"), model("green")], {"weight": 1}, (0.1, 1.0)),
    ],
)
def test_a_sum_has_the_weights_that_each_adapter_has_in_the_result(
    method: str, models: list[dict[str, object]], config: dict[str, object], expected: tuple[float, float]
) -> None:
    made = imported(method, *models, parameters=config)
    assert made.recipe["method"] == "linear"
    assert weights(made) == pytest.approx(dict(zip(("red", "green"), expected, strict=True)))


@pytest.mark.parametrize(
    ("method", "config", "settings"),
    [
        ("ties", {"density": 0.5}, {"density": 0.5, "vote": "weighted", "divide": "weights"}),
        ("ties", {"normalize": False}, {"density": 1.0, "vote": "weighted", "divide": "none"}),
        ("breadcrumbs", {"density": 0.8, "gamma": 0.05}, {"density": 0.8, "gamma": 0.05}),
        ("breadcrumbs_ties", {}, {"density": 1.0, "gamma": 0.01, "vote": "weighted", "divide": "none"}),
        ("dare_ties", {"density": 0.6, "lambda": 1.2},
         {"density": 0.6, "vote": "weighted", "divide": "none", "lambda": 1.2}),
        ("dare_linear", {"density": 0.6, "int8_mask": True}, {"density": 0.6}),
        ("della", {"density": 0.6, "epsilon": 0.1},
         {"density": 0.6, "epsilon": 0.1, "vote": "weighted", "divide": "weights"}),
        ("della_linear", {"density": 0.6}, {"density": 0.6, "epsilon": 0.15}),
    ],
)  # fmt: skip
def test_parameters_become_the_settings_of_the_same_rule(
    method: str, config: dict[str, object], settings: dict[str, object]
) -> None:
    made = imported(method, model("red", weight=0.7), model("green", weight=1), parameters=config)
    assert (made.recipe["method"], made.recipe["settings"]) == (method, settings)
    assert weights(made) == {"red": 0.7, "green": 1.0}


def test_weights_by_filter_become_rules_of_which_the_first_match_counts() -> None:
    made = imported("task_arithmetic", model("red", weight=FILTERS), model("green", weight=1), dtype="float16")
    assert made.recipe["inputs"][0] == {
        "adapter": "red",
        "weight": 0.5,
        "rules": [{"modules": "*self_attn*", "weight": 0.2}, {"modules": "*layers.1*", "weight": 0.9}],
    }
    assert (made.recipe["base"], made.recipe["dtype"]) == ("acme/base", "float16")


def test_what_changes_nothing_is_left_out_by_name_and_random_methods_say_how_they_differ() -> None:
    made = imported("dare_ties", model("red", weight=1), tokenizer_source="union", chat_template="chatml")
    assert [remark.split(" ")[0] for remark in made.remarks] == [
        "tokenizer_source", "chat_template", "Random", "What", "Add",
    ]  # fmt: skip
    assert len(imported("ties", model("red", weight=1), tokenizer_source="base").remarks) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"slices": []}, "slices"),
        ({"modules": {}}, "modules"),
        ({"merge_method": "slerp"}, "merge_method 'slerp'"),
        ({"mystery": 1}, "mystery"),
        ({"base_model": "acme/base+other"}, "base_model"),
        ({"base_model": "acme/other"}, "adaptory extract"),
        ({"models": [model("", weight=1)]}, "none has an adapter"),
        ({"models": [{"model": "acme/tuned", "parameters": {"weight": 1}}]}, "acme/tuned is not acme/base"),
        ({"models": [model("red", weight=[0, 0.5, 1])]}, "varies from layer to layer"),
        ({"models": [model("red", weight=FILTERS[:1])]}, "no row without a filter"),
        ({"models": [model("red", weight=1, density=0.5), model("green", weight=1, density=0.4)]}, "not 0.4, 0.5"),
        ({"models": [model("red", weight=1, t=0.5)]}, "the parameter t"),
        ({"parameters": {"rescale": True}}, "ties never rescales here"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_what_has_no_counterpart_and_changes_the_result_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    config = {"merge_method": "ties", "base_model": "acme/base", "models": [model("red", weight=1)], **change}
    with pytest.raises(NotSupported) as refused:
        recipe_of_mergekit(yaml.safe_dump(config), "m.yaml")
    assert (refused.value.code, named in refused.value.message) == ("no_counterpart", True), refused.value.message


def test_an_average_that_would_scale_the_base_is_refused() -> None:
    with pytest.raises(NotSupported, match="would scale the base itself"):
        imported("linear", model("red", weight=1), model("green", weight=1), parameters={"normalize": False})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: [", "m.yaml"),
        ("[1]", "m.yaml: it is not a mapping"),
        ("{merge_method: ties}", "models: it is not a list"),
        (
            "{merge_method: ties, models: [{model: a+b, parameters: {weight: 1, density: 2}}]}",
            "density: 2 is not a number above 0, at most 1",
        ),
        (
            "{merge_method: della, models: [{model: a+b, parameters: {weight: 1, density: 0.1}}]}",
            "epsilon: 0.15 is not",
        ),
        ("{merge_method: ties, models: [1]}", "models[0]"),
        ("{merge_method: ties, models: [{model: 7}]}", "models[0].model"),
        ("{merge_method: ties, models: [{model: b+a, parameters: {weight: x}}]}", "weight of b+a"),
        ("{merge_method: ties, models: [{model: b+a}]}", "weight of b+a"),
        (
            "{merge_method: ties, models: [{model: b+a, parameters: {weight: 1}}], parameters: {normalize: 2}}",
            "normalize",
        ),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_place(text: str, named: str) -> None:
    with pytest.raises(InvalidFile) as refused:
        recipe_of_mergekit(text, "m.yaml")
    assert (refused.value.code, named in refused.value.message) == ("bad_mergekit", True), refused.value.message


@pytest.mark.parametrize("lora", ["red@r1", {"path": "red", "revision": "r1"}])
def test_mappings_that_mergekit_writes_are_read_as_its_texts(lora: object) -> None:
    row = {"model": {"model": {"path": "acme/base", "revision": None}, "lora": lora}, "parameters": {"weight": 1}}
    base = {"model": {"path": "acme/base"}}
    made = imported("ties", row, base_model=base, parameters={"normalize": 1})
    assert made.recipe["base"] == "acme/base"
    assert weights(made) == {"red@r1": 1.0}
    assert made.recipe["settings"]["divide"] == "weights"


@pytest.mark.parametrize(
    ("models", "config", "said"),
    [
        ([model("red", weight=10**400)], {}, "weight of acme/base.red"),
        ([model("red", weight=float("nan"))], {}, "weight of acme/base.red"),
        ([model("red", weight=1e308), model("green", weight=1e308)], {}, "weight of acme/base.red"),
        ([model("red", weight=1), model("green", weight=-0.99999999999999)], {"normalize": True}, "add up to 0"),
        ([model("red", weight=1)], {"base_model": 5}, "base_model"),
        ([model("red", weight=1)], {"base_model": {"model": {"path": "acme/other"}}}, "acme/other"),
        ([{**model("red", weight=1), "layer_range": [0, 4]}], {}, "layer_range"),
        ([model("red", weight=[{"filter": "a*[b", "value": 1}, {"value": 2}])], {}, "filter"),
        ([model("red", weight=[{"filter": ["q"], "value": 1}, {"value": 2}])], {}, "filter"),
    ],
)
def test_values_that_no_recipe_could_have_are_refused_by_name(
    models: list[dict[str, object]], config: dict[str, Any], said: str
) -> None:
    parameters = {key: value for key, value in config.items() if key == "normalize"}
    others = {key: value for key, value in config.items() if key != "normalize"}
    with pytest.raises((InvalidFile, NotSupported), match=said):
        imported("task_arithmetic", *models, parameters=parameters, **others)


def test_a_filter_by_a_tensors_full_name_is_a_rule_for_its_module() -> None:
    rows = [{"filter": "q_proj.weight", "value": 0.2}, {"value": 0.5}]
    rules = imported("task_arithmetic", model("red", weight=rows)).recipe["inputs"][0]["rules"]
    assert rules == [{"modules": "*q_proj*", "weight": 0.2}]
