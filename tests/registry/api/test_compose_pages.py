"""The form for recipes: its fields become the recipe that REST accepts, and a recipe becomes the form again."""

import re
from collections.abc import Generator
from typing import Any
from urllib.parse import urlencode

import pytest

from composer.formats.recipes.methods import PIPELINES, parse_settings
from composer.formats.recipes.recipe import parse_recipe
from registry.api.pages.jobs.recipe_form import SETTING, RecipeForm, recipe_used
from tests.access.browser import Browser
from tests.access.house import PRIVATE, PUBLIC, House

PAIR = [{"adapter": "acme/sql:1.0.0", "weight": 0.5}, {"adapter": "acme/sql:1.1.0", "weight": 1.0, "suite": "exact"}]
WITH_FIELDS: list[dict[str, Any]] = [
    {"method": "mean"},
    {"method": "ties", "settings": {"density": 0.4, "vote": "count", "lambda": 0.7}, "probe": 0},
    {"method": "stack", "settings": {"protect": [1, 2], "sequential": True}, "gates": []},
    {
        "method": "regmean",
        "settings": {"examples": 8},
        "gates": ["exact.nll within 0.2 of base"],
        "evaluate": ["exact"],
    },
    {"optimize": {"search": 4, "confirm": 8, "minutes": 1.5}, "adapter": "acme/all:1.0.0", "notes": "for the demo"},
    {"method": "mean", "model": "acme/merged:2.0.0", "dtype": "bfloat16", "probe": 16},
]
AS_TEXT: list[dict[str, Any]] = [
    {"method": "mean", "rounding": {"mode": "stochastic", "seed": 7}},
    {"method": "mean", "policy": {"near_duplicate": "error"}},
    {"optimize": {"passes": 100}, "gates": []},
    {"method": "mean", "inputs": [{**PAIR[0], "rules": [{"layers": "0-3", "weight": 0.2}]}]},
    {"method": "regmean", "inputs": [{**PAIR[0], "prompts": ["How are you?"]}]},
]


@pytest.fixture
def publisher(house: House) -> Generator[Browser]:
    with Browser(house) as browser:
        browser.sign_in(house.secrets["publisher"])
        browser.open("/compose")
        yield browser


def settings_of(recipe: Any) -> Any:
    return parse_settings(recipe.method, recipe.settings)


@pytest.mark.parametrize("given", WITH_FIELDS + AS_TEXT, ids=lambda given: " ".join(given))
def test_a_recipe_becomes_the_form_and_the_form_the_recipe(given: dict[str, Any]) -> None:
    recipe = parse_recipe({"inputs": PAIR, **given})
    form = RecipeForm.of_document(recipe.to_json())
    assert bool(form.recipe) == (given in AS_TEXT)
    again = form.parse()
    assert settings_of(again) == settings_of(recipe)
    assert again.model_copy(update={"settings": {}}) == recipe.model_copy(update={"settings": {}})


def test_what_a_search_chose_is_a_recipe_of_the_same_releases_phrases_and_gates() -> None:
    stated = {"adapter": "acme/sql@prod", "weight": 1, "phrase": "given"}
    recipe = {"inputs": [stated, stated], "evaluate": ["general"], "gates": None, "optimize": {}}
    inputs = [{"repository": "acme/sql", "version": f"1.0.{number}", "weight": 0.5} for number in range(2)]
    choice: Any = {"settings": {"steps": 1}}
    gates = ["sql.accuracy keeps 0.8 of inputs"]
    lock: Any = {"inputs": inputs, "method": "regmean", "gates": gates, "optimized": {"choice": choice}}
    used = recipe_used(recipe, lock, choice)
    assert [row["adapter"] for row in used["inputs"]] == ["acme/sql:1.0.0", "acme/sql:1.0.1"]
    assert [row["phrase"] for row in used["inputs"]] == [None, None], "the choice has none, though some were given"
    assert used["gates"] is None
    assert "guard_examples" not in used
    fitted: Any = {**lock, "calibration": [{"examples": ["a"]}] * 2 + [{"examples": ["a", "b"]}]}
    assert recipe_used(recipe, fitted, choice)["guard_examples"] == 2, (
        "as many of the guard as the search fitted its choice on"
    )
    phrased = {**choice, "phrases": ["a", "b"]}
    used = recipe_used(recipe, {**lock, "optimized": {"choice": phrased, "accepted": "accepted"}}, phrased)
    assert [row["phrase"] for row in used["inputs"]] == ["a", "b"]
    assert (used["gates"], used["evaluate"]) == (gates, ["general", "sql"])


@pytest.mark.parametrize("method", [*PIPELINES])
def test_every_method_has_fields_that_take_its_defaults(method: str) -> None:
    form = RecipeForm(method=method, settings={}, texts={}, numbers={})
    fields = form.setting_fields
    assert [field.name for field in fields if field.name == "lambda"], "settings that all methods have"
    for field in fields:
        assert not field.choices or field.default in field.choices, field
    posted = [(SETTING + field.name, field.default) for field in fields]
    filled = RecipeForm.of_fields([("input", "acme/sql"), ("weight", "1"), ("suite", ""), ("method", method), *posted])
    assert settings_of(filled.parse()) == parse_settings(method)


def test_an_address_begins_a_recipe_with_its_options(house: House, publisher: Browser) -> None:
    text = publisher.open(
        "/compose?with=acme/sql:1.0.0*0.5&with=acme/sql:1.1.0&method=ties&set=density=0.4&probe=16"
    ).text
    assert re.search('name="input" value="acme/sql:1.0.0"', text)
    assert re.search('name="weight" value="0.5"', text)
    assert re.search('name="setting.density" value="0.4"', text)
    assert re.search('name="probe" value="16"', text)
    assert not re.search('name="optimize" value="yes" checked', text)
    assert re.search(
        'name="optimize" value="yes" checked', publisher.open("/compose?with=acme/sql:1.0.0&optimize=yes").text
    )
    assert "<option selected>mean</option>" in publisher.open("/compose").text
    number = house.things[PRIVATE].composition_id
    assert "<option selected>svd</option>" in publisher.open(f"/compose?composition={number}&method=svd").text
    assert 'name="setting.lambda" value="0.7"' in publisher.open(f"/compose?composition={number}&set=lambda=0.7").text
    for unknown in (house.things["other"].composition_id, 4_000, "x"):
        assert publisher.open(f"/compose?composition={unknown}").status_code == 404


def fields(**others: str) -> dict[str, Any]:
    rows = {"input": ["acme/sql:1.0.0", ""], "weight": ["0.5", "1"], "suite": ["", ""]}
    return {**rows, "method": "mean", "setting.lambda": "0.5", **others}


def test_a_plan_is_what_rest_plans(house: House, publisher: Browser) -> None:
    answer = publisher.post("/compose", fields(do="plan", evaluate="exact", gates="exact.nll <= 1"))
    assert answer.status_code == 303, answer.text
    made = house.ask("publisher", "GET", f"/v1{answer.headers['location']}").json()
    assert (made["plan"], made["state"]) == (True, "queued")
    assert made["recipe"]["inputs"] == [{"adapter": "acme/sql:1.0.0", "weight": 0.5, "suite": None}]
    assert (made["recipe"]["settings"], made["recipe"]["gates"]) == ({"lambda": 0.5}, ["exact.nll <= 1"])
    page = publisher.open(answer.headers["location"])
    assert "waiting for a worker" in page.text
    cancelled = publisher.post(f"/jobs/{made['job']}/cancel")
    assert cancelled.headers["location"] == f"/jobs/{made['job']}"
    assert "It was cancelled." in publisher.open(answer.headers["location"]).text
    assert publisher.open(f"{answer.headers['location']}/conflicts").status_code == 200


def test_a_form_that_cannot_be_a_recipe_is_shown_again_with_what_is_wrong(publisher: Browser) -> None:
    for wrong, status, said in (
        (fields(do="plan", weight="much"), 422, "&#39;much&#39; is not a finite number"),
        (fields(do="plan", method="none"), 422, "unknown method"),
        (fields(do="compose"), 400, "no adapter, no model and no set"),
        (fields(do="plan", gates="nonsense"), 400, "nonsense"),
        ({"do": "plan", "recipe": "inputs: ["}, 422, "it is not YAML"),
        ({"do": "plan"}, 422, "at least 1 is needed"),
    ):
        page = publisher.post("/compose", wrong)
        assert (page.status_code, said in page.text) == (status, True), page.text
        assert "recipe" in wrong or "input" not in wrong or 'value="acme/sql:1.0.0"' in page.text


def test_a_form_that_only_changes_is_not_composed(house: House, publisher: Browser) -> None:
    before = house.ask("publisher", "GET", "/v1/jobs").json()["items"]
    assert publisher.post("/compose", fields()).text.count('name="input"') == 3
    assert publisher.post("/compose", fields(do="row")).text.count('name="input"') == 7
    assert 'name="input" value="acme/sql:1.0.0"' not in publisher.post("/compose", fields(drop="0")).text
    text = publisher.post("/compose", fields(do="text")).text
    assert re.search(r'<textarea name="recipe"[^>]*>inputs:\n- adapter: acme/sql:1.0.0\n  weight: 0.5', text)
    assert house.ask("publisher", "GET", "/v1/jobs").json()["items"] == before


def test_a_recipe_needs_the_roles_that_rest_asks_for(house: House) -> None:
    for caller in ("reader", "publisher", "stranger"):
        with Browser(house) as browser:
            browser.sign_in(house.secrets[caller])
            for namespace in (PRIVATE, PUBLIC):
                browser.open("/compose")
                recipe = {"inputs": [{"adapter": f"{namespace}/sql:1.0.0"}], "method": "mean"}
                stated = house.ask(caller, "POST", "/v1/compositions", json={"recipe": recipe, "plan": True})
                form = {"input": f"{namespace}/sql:1.0.0", "weight": "1", "suite": "", "method": "mean", "do": "plan"}
                shown = browser.post("/compose", form)
                expected = 303 if stated.status_code == 202 else stated.status_code
                assert shown.status_code == expected or (caller, shown.status_code) == ("reader", 403), shown.text


def test_a_form_of_many_inputs_is_read(publisher: Browser) -> None:
    """Everything that a recipe may have, in one form."""
    rows = {"input": [f"acme/sql:1.0.{number}" for number in range(64)], "weight": ["1"] * 64, "suite": ["exact"] * 64}
    assert len(urlencode(rows, doseq=True)) < 64 << 10
    names = set(re.findall(r'name="([a-z_.]+)"', publisher.open("/compose?method=ties&with=acme/sql:1.0.0").text))
    others: dict[str, str | list[str]] = dict.fromkeys(
        names - {*rows, "form_token", "do", "drop", "recipe", "method", "text"}, ""
    )
    answer = publisher.post("/compose", {**rows, **others, "method": "ties"})
    assert answer.status_code == 200, answer.text
    assert answer.text.count('name="input"') == 64
