"""A composition whose method, settings and weights are found by a search, and the search without a registry."""

import json
import re
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from composer.formats.recipes.suite import example_digest, parse_suite
from registry.api.pages.jobs.recipe_form import as_yaml, recipe_used
from tests.registry.api.test_pages import single_user
from tests.scenarios.test_compositions import write_recipe
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.world import Cli, World

LOOSE = {"thresholds": {"probe_loss": 100, "probe_answers": 0, "probe_guard": 100}}
INPUTS = [{"adapter": "acme/sql@prod", "suite": "sql-exact"}, {"adapter": "acme/support", "suite": "support-exact"}]


def recipe_of(directory: Path, **changes: Any) -> Path:
    return write_recipe(
        directory, **{"inputs": INPUTS, "evaluate": ["sql-exact", "guard-exact"], "policy": LOOSE, "probe": 0} | changes
    )


def sha256_of(directory: Path) -> str:
    return sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_searched_composition_is_published_with_its_evidence_and_judged_on_other_examples(
    small_team: Cli, world: World, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, optimize={"search": 2, "confirm": 2})
    done = small_team.json("compose", recipe)
    assert [step["name"] for step in done["steps"]][:2] == ["optimize", "check"]
    lock, evidence = done["lock"], done["lock"]["optimized"]
    choice = evidence["choice"]
    assert (lock["method"], evidence["seed"]) == (choice["method"], 0)
    assert [source["weight"] for source in lock["inputs"]] == pytest.approx(choice["factors"])
    suite = parse_suite(world.suites["sql"])
    seen = next(row["examples"] for row in evidence["searched"] if row["suite"] == "sql-exact")
    assert seen == [example_digest(example) for example in suite.sample(2)]
    (judged,) = {row["n"] for row in done["candidate_scores"] if row["suite"] == "sql-exact"}
    assert judged == len(suite.examples) - 2
    small_team.ok("pull", "acme/assistant:1.0.0", "-o", tmp_path / "assistant")
    note = json.loads((tmp_path / "assistant" / "adaptory.json").read_text())
    assert note["method"] == choice["method"]
    assert "optimized" not in note["note"]["lock"], "readers of an output need not be allowed to read its inputs"
    shown = small_team.ok("compose", recipe).out
    assert f"optimize: {evidence['headline']}" in shown
    assert max(map(len, shown.splitlines())) <= 80
    with resources_of(small_team.environment) as resources, single_user(resources) as http:
        page = unescape(http.get(f"/compositions/{done['id']}").text)
    chosen = page.partition("What the search chose")[2].partition("</section>")[0]
    assert chosen.count('<span class="badge">chosen</span>') == 1
    names = [row["name"] for row in (*evidence["best"], *evidence["tried"])]
    assert [name for name in names if f'<th scope="row">{name}' not in chosen] == []


def test_a_plan_searches_too_publishes_nothing_and_keeps_the_usual_gates_if_it_needs_no_acceptance(
    small_team: Cli, tmp_path: Path
) -> None:
    searched = ("--optimize", "--accept", "worst >= .5")
    plan = small_team.json("compose", recipe_of(tmp_path, gates=None), "--plan", *searched)
    assert [step["name"] for step in plan["steps"]] == ["optimize", "check"]
    assert plan["lock"]["optimized"]["choice"]
    assert plan["results"] == []
    assert "accepted" not in plan["lock"]["optimized"]
    assert "sql-exact.accuracy keeps 0.9 of inputs" in plan["lock"]["gates"]


@pytest.mark.long
def test_if_nothing_fits_the_composition_is_refused_and_the_evidence_stays(small_team: Cli, tmp_path: Path) -> None:
    impossible = {"thresholds": {"probe_loss": -100, "probe_answers": 0}}
    recipe = recipe_of(tmp_path, policy=impossible, optimize={"search": 2, "confirm": 2})
    refused = small_team("compose", recipe)
    assert refused.code == 1
    assert "nothing fits" in refused.err
    assert "add `phrase: TEXT` to every input" in " ".join(refused.err.split())
    evidence = json.loads(small_team("compose", recipe, "--json").out)["lock"]["optimized"]
    assert "ties_svd x 0.7" in {row["name"] for row in evidence["tried"]}
    assert small_team("show", "acme/assistant").code == 3


def test_what_is_accepted_although_it_breaks_a_limit_says_so_in_lock_release_and_gates(
    small_team: Cli, tmp_path: Path
) -> None:
    impossible = {"thresholds": {"probe_loss": -100, "probe_answers": 0}}
    recipe = recipe_of(tmp_path, policy=impossible, gates=None, model=None)
    done = small_team.json("compose", recipe, "--optimize", "--accept", "worst >= 0.001")
    assert done["recipe"]["optimize"]["accept"] == "worst >= 0.001"
    assert done["lock"]["optimized"]["accepted"].startswith("accepted (worst >= 0.001; it is ")
    assert all(rule.endswith("accuracy keeps 0.001 of inputs") for rule in done["lock"]["gates"])
    small_team.ok("pull", "acme/assistant:1.0.0", "-o", tmp_path / "assistant")
    accepted = json.loads((tmp_path / "assistant" / "adaptory.json").read_text())["note"]["accepted"]
    assert f"It was {accepted}." in (tmp_path / "assistant" / "README.md").read_text()
    with resources_of(small_team.environment) as resources, single_user(resources) as http:
        page = unescape(http.get(f"/compositions/{done['id']}").text)
    assert "acme/s" not in accepted, "readers of a release need not be allowed to read its inputs"
    used = page.partition("What the search chose, as a recipe:")[2].partition("<pre")[2].partition("</pre>")[0]
    again = tmp_path / "again.yaml"
    again.write_text(re.sub(r"<[^>]+>", "", used.partition(">")[2]).replace("assistant:1.0.0", "again:1.0.0"))
    repeated = small_team.json("compose", again)
    assert [gate["rule"] for gate in repeated["gates"]] == [gate["rule"] for gate in done["gates"]]
    small_team.ok("pull", "acme/again:1.0.0", "-o", tmp_path / "again")
    assert sha256_of(tmp_path / "again") == sha256_of(tmp_path / "assistant"), "the recipe makes the same adapter"


def test_the_recipe_of_a_choice_that_was_fitted_with_a_guard_makes_the_same_adapter(
    small_team: Cli, tmp_path: Path
) -> None:
    for name, kind in (("one", "target"), ("two", "target"), ("general", "guard")):
        examples = [{"prompt": f"{name} {number}", "completion": f"{number} {name}"} for number in range(16)]
        small_team.ok("suite", "add", write_suite(tmp_path, name, kind=kind, examples=examples))
    inputs = [{**source, "suite": name} for source, name in zip(INPUTS, ("one", "two"), strict=True)]
    stated = {"inputs": inputs, "optimize": {"search": 4, "confirm": 8}, "model": None, "gates": []}
    done = small_team.json("compose", recipe_of(tmp_path, evaluate=["general"], **stated))
    assert [len(row["examples"]) for row in done["lock"]["calibration"]] == [4, 4, 4]
    used = recipe_used(done["recipe"], done["lock"], done["lock"]["optimized"]["choice"])
    assert (used["method"], used["guard_examples"]) == ("regmean", 4)
    again = tmp_path / "again.yaml"
    again.write_text(as_yaml({**used, "adapter": "acme/again:1.0.0"}))
    assert small_team.json("compose", again)["lock"]["calibration"] == done["lock"]["calibration"]
    for name in ("assistant", "again"):
        small_team.ok("pull", f"acme/{name}:1.0.0", "-o", tmp_path / name)
    assert sha256_of(tmp_path / "again") == sha256_of(tmp_path / "assistant")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--accept", "worst >= 0.8"], "--accept has no effect without --optimize"),
        (["--optimize", "--accept", "0.8"], "'0.8' is not an acceptance"),
        (["--optimize", "--accept", "worst >= 2"], "Write worst >= 0.8"),
        (["--optimize", "--accept", "worst >= 0.0000001"], "four decimals"),
        (["--optimize", "--accept", "worst >= nan"], "Write worst >= 0.8"),
    ],
)
def test_an_acceptance_needs_a_search_and_a_share(words: list[str], said: str, small_team: Cli, tmp_path: Path) -> None:
    refused = small_team("compose", recipe_of(tmp_path), *words)
    assert (refused.code, said in refused.err) == (2, True), refused.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": INPUTS[:1]}, "A search needs at least two inputs."),
        ({"adapter": None}, "A search looks for one adapter"),
        ({"inputs": ["acme/sql@prod", "acme/support"]}, "has no score on a target suite"),
        ({"optimize": {"search": 1}}, "optimize.search"),
    ],
)
def test_a_search_that_cannot_work_is_refused_at_once(
    changes: dict[str, Any], message: str, small_team: Cli, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, **{"optimize": {"search": 2, "confirm": 2}} | changes)
    refused = small_team("compose", recipe)
    assert refused.code in (2, 6)
    assert message in refused.err


def test_a_recipe_needs_a_method_only_without_a_search(small_team: Cli, tmp_path: Path) -> None:
    text = recipe_of(tmp_path).read_text().replace("method: linear\n", "")
    without = tmp_path / "without.yaml"
    without.write_text(text)
    assert "method: it is missing" in small_team("compose", without, "--plan").err
    without.write_text(f"{text}optimize: {{search: 2, confirm: 2}}\n")
    assert small_team.json("compose", without, "--plan")["lock"]["optimized"]


def test_directories_are_searched_without_a_registry(world: World, on_disk: Cli, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(json.dumps(LOOSE))
    directories = [world.adapters["sql"], world.adapters["support"]]
    given = [*directories, "--base", world.base, "--suite", world.suites["sql"], "--suite", world.suites["support"]]
    result = on_disk.json("conflicts", *given, "--optimize", "--policy", policy)
    assert result["choice"]
    assert result["members"] == [str(directory) for directory in directories]
    shown = on_disk.ok("conflicts", *given, "--optimize", "--policy", policy).out
    assert f"optimize: {result['headline']}" in shown
    assert f"resumed: {result['passes']} of {result['passes']} examples" in shown, "of the same members and suites"
    assert max(map(len, shown.splitlines())) <= 80
    assert "--probe has no effect" in on_disk("conflicts", *given, "--optimize", "--probe", "8").err
    smaller = ("--optimize", "--policy", policy, "--budget", "search=2", "--budget", "confirm=2", "--budget", "seed=3")
    listed = on_disk.ok("conflicts", *given, *smaller, "--explain").out
    assert "least-squares weights" in listed
    assert "seed 3" in listed
    refused = on_disk("conflicts", *given, "--optimize", "--budget", "hours=1")
    assert (refused.code, "minutes" in refused.err) == (2, True)
    assert "--budget has no effect" in on_disk("conflicts", *given, "--budget", "minutes=1").err
