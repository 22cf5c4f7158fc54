"""A composition whose tasks are selected by phrases: recipe, lock, scores, card, page and an evaluation afterwards."""

import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from composer.formats.checkpoints.card import card_provenance
from tests.registry.api.test_pages import single_user
from tests.scenarios.test_compositions import write_recipe
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.world import Cli, World

PHRASES = {"sql-exact": "As SQL:", "support-exact": "For a “customer”."}
INPUTS = [
    {"adapter": "acme/sql@prod", "suite": "sql-exact", "phrase": PHRASES["sql-exact"]},
    {"adapter": "acme/support", "suite": "support-exact", "phrase": PHRASES["support-exact"]},
]


def recipe_of(directory: Path, **changes: Any) -> Path:
    fitted = {
        "inputs": INPUTS,
        "method": "regmean",
        "settings": {"examples": 2},
        "evaluate": ["guard-exact"],
        "gates": None,
    }
    return write_recipe(directory, **fitted | changes)


def test_phrases_of_a_recipe_reach_the_lock_the_scores_the_card_and_every_later_evaluation(
    small_team: Cli, world: World, tmp_path: Path
) -> None:
    loose = {"gates": ["guard-exact.nll within 100 of base", "sql-exact.nll within 100 of inputs"]}
    done = small_team.json("compose", recipe_of(tmp_path, evaluate=["guard-exact", *PHRASES], **loose))
    assert {row["suite"]: row.get("phrase") for row in done["lock"]["calibration"]} == {**PHRASES, "guard-exact": None}
    assert {row["suite"]: row.get("phrase") for row in done["candidate_scores"]} == {**PHRASES, "guard-exact": None}
    assert done["conflicts"]["findings"] == [] or "same_prompts" not in json.dumps(done["conflicts"]["findings"])
    for name in ("assistant", "assistant-merged"):
        directory = tmp_path / name
        small_team.ok("pull", f"acme/{name}:1.0.0", "-o", directory)
        card = (directory / "README.md").read_bytes()
        assert card_provenance(card) == ({"phrases": PHRASES}, [])
        assert "| support-exact | `For a “customer”.` |" in card.decode()
        assert json.loads((directory / "adaptory.json").read_text())
        assert small_team.json("show", f"acme/{name}:1.0.0")["provenance"]["phrases"] == PHRASES
    release = small_team.json("show", "acme/assistant:1.0.0")
    recorded = {(row["suite"], row["metric"]): row for row in release["scores"]}
    assert recorded["sql-exact", "nll"]["phrase"] == "As SQL:"
    assert recorded["guard-exact", "nll"]["phrase"] is None
    assert "with its phrase “As SQL:”" in small_team.ok("show", "acme/assistant:1.0.0").out


def test_every_evaluation_of_a_release_with_phrases_uses_them(small_team: Cli, tmp_path: Path) -> None:
    loose = {"gates": [], "evaluate": [], "model": None, "probe": 0}
    small_team.ok("compose", recipe_of(tmp_path, **loose))
    here = small_team.json("eval", "acme/assistant:1.0.0", "--suite", "sql-exact")["scores"]
    assert {row["phrase"] for row in here} == {"As SQL:"}
    queued = small_team.json("eval", "acme/assistant:1.0.0", "--suite", "sql-exact", "--queue")
    assert queued["items"][0]["scores"][0]["value"] == pytest.approx(here[0]["value"], abs=1e-4)
    plain = small_team.json("eval", "acme/sql:1.0.0", "--suite", "sql-exact")["scores"]
    assert {row.get("phrase") for row in plain} == {None}


def test_a_release_with_phrases_is_not_fitted_again_without_them(small_team: Cli, tmp_path: Path) -> None:
    small_team.ok("compose", recipe_of(tmp_path, gates=[], evaluate=[], model=None, probe=0))
    guard = write_suite(tmp_path, "general", kind="guard")
    small_team.ok("suite", "add", guard)
    asked = ("tame", "acme/assistant", "--as", "acme/calm:1.0.0", "--guard", "general", "--suite", "sql-exact")
    refused = small_team(*asked)
    said = " ".join(refused.err.split())
    assert (refused.code, "acme/assistant answers sql-exact after the phrase “As SQL:”" in said) == (2, True), said
    assert "Tame or combine the adapters that it was made of" in said
    assert small_team("show", "acme/calm").code == 3


def test_the_page_of_a_release_shows_its_phrases_where_it_is_used(small_team: Cli, tmp_path: Path) -> None:
    small_team.ok("compose", recipe_of(tmp_path, gates=[], model=None, probe=0))
    with resources_of(small_team.environment) as resources, single_user(resources) as http:
        page = unescape(http.get("/acme/assistant/1.0.0").text)
    assert "Begin every prompt with the phrase of its task" in page
    assert "For a “customer”." in page
    assert 'prompt = "As SQL: " + prompt' in page
    assert 'model="acme/assistant@CHANNEL:sql-exact"' in page
    assert "with its phrase “As SQL:”" in page


@pytest.mark.parametrize(
    ("phrases", "changes", "message"),
    [
        (("SQL:", None), {}, "inputs[1].phrase: it is missing, and another input has one"),
        (("SQL:", "SQL:"), {}, "inputs[1].phrase: inputs[0] has the same"),
        ((" ", "b"), {}, "inputs[0].phrase: it is empty"),
        (("two\nlines", "b"), {}, "inputs[0].phrase: it is not one line without spaces around it"),
        (("a" * 101, "b"), {}, "inputs[0].phrase: it has more than 100 characters"),
        (("SQL:", "b"), {"method": "linear", "settings": {}}, "inputs[0].phrase: linear is not fitted on anything"),
    ],
)
def test_a_phrase_that_selects_nothing_is_refused(
    phrases: tuple[str, str | None], changes: dict[str, Any], message: str, small_team: Cli, tmp_path: Path
) -> None:
    inputs = [
        {**source, "phrase": phrase} if phrase else {name: source[name] for name in ("adapter", "suite")}
        for source, phrase in zip(INPUTS, phrases, strict=True)
    ]
    refused = small_team("compose", recipe_of(tmp_path, inputs=inputs, **changes), "--plan")
    assert refused.code == 6
    assert message in refused.err


def test_two_inputs_with_one_suite_have_no_phrases(small_team: Cli, tmp_path: Path) -> None:
    inputs = [{**source, "suite": "sql-exact"} for source in INPUTS]
    refused = small_team("compose", recipe_of(tmp_path, inputs=inputs), "--plan")
    assert "another input has the same suite, sql-exact" in refused.err
    assert "Name another suite for one of the inputs" in refused.err
