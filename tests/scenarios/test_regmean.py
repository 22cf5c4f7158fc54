"""RegMean as users meet it: local directories, and a recipe that is judged by examples that nothing was fitted on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests import services
from tests.scenarios.conftest import Templates, first_releases
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.world import Cli, World

NAMES = ("sql", "support")


def suites(world: World) -> list[object]:
    return [word for name in NAMES for word in ("--suite", world.suites[name])]


def adapters(world: World) -> list[object]:
    return [word for name in NAMES for word in ("--adapter", world.adapters[name])]


def test_combine_and_merge_fit_on_suites_or_prompts(on_disk: Cli, world: World, tmp_path: Path) -> None:
    fitting = [*adapters(world), "--base", world.base, "--method", "regmean"]
    both = on_disk.json("combine", *fitting, *suites(world), "-o", tmp_path / "both")
    assert both["fit"]["fitted"] > 0
    assert max(both["fit"]["errors"]) < max(both["fit"]["errors_of_sum"])
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world.base), str(tmp_path / "both"))

    on_disk.ok("merge", *fitting, *suites(world), "-o", tmp_path / "merged")
    by_hand = ["merge", "--base", world.base, "--adapter", tmp_path / "merged-adapter", "-o", tmp_path / "again"]
    on_disk.ok(*by_hand)
    for file in (tmp_path / "merged").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()

    (tmp_path / "prompts").write_text("sql 1\nsql 2\n")
    prompts = [word for _ in NAMES for word in ("--prompts", tmp_path / "prompts")]
    assert on_disk.json("combine", *fitting, *prompts, "-o", tmp_path / "asked")["fit"]["fitted"] > 0


@pytest.mark.parametrize("command", ["combine", "merge"])
def test_suites_that_want_other_answers_to_the_same_prompts_are_named(
    on_disk: Cli, world: World, tmp_path: Path, command: str
) -> None:
    suite = yaml.safe_load(world.suites["sql"].read_text())
    other = {**suite, "name": "other", "examples": [{**example, "completion": " no"} for example in suite["examples"]]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    both = [word for file in (world.suites["sql"], tmp_path / "other.yaml") for word in ("--suite", file)]
    fitting = (*adapters(world), "--base", world.base, "--method", "regmean", *both)
    assert "no single model serves both" in on_disk.ok(command, *fitting, "-o", tmp_path / "out").err


@pytest.mark.parametrize(
    ("options", "word", "code"),
    [
        (["--method", "regmean"], "--suite", 2),
        (["--method", "stack", "--suite", "SUITE"], "not fitted", 2),
        (["--method", "regmean", "--suite", "SUITE"], "1 suites or prompt files", 2),
        (["--method", "regmean", "--suite", "SUITE", "--suite", "SUITE", "--set", "examples=6"], "none to evaluate", 1),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_any_work(
    on_disk: Cli, world: World, tmp_path: Path, options: list[str], word: str, code: int
) -> None:
    given = [str(world.suites["sql"]) if option == "SUITE" else option for option in options]
    refused = on_disk("merge", *adapters(world), "--base", world.base, *given, "-o", tmp_path / "out")
    assert (refused.code, word in refused.err) == (code, True), refused.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-adapter").exists()


def test_a_merge_does_not_take_another_commands_fit_for_its_own(on_disk: Cli, world: World, tmp_path: Path) -> None:
    fitting = [*adapters(world), "--base", world.base, "--method", "regmean", *suites(world)]
    on_disk.ok("combine", *fitting, "--set", "ridge=0.5", "-o", tmp_path / "out-adapter")
    refused = on_disk("merge", *fitting, "-o", tmp_path / "out")
    assert (refused.code, "is of another settings" in refused.err) == (4, True), refused.err
    on_disk.ok("merge", *fitting, "--set", "ridge=0.5", "-o", tmp_path / "out")


def test_a_fit_made_on_another_base_is_not_merged_into_this_one(on_disk: Cli, world: World, tmp_path: Path) -> None:
    """The output of an interrupted or removed merge leaves its fitted adapter behind."""
    other = tmp_path / "other"
    shutil.copytree(world.base, other)
    shard = next(other.glob("*.safetensors"))
    tensors = load_file(shard)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
    fitting = [*adapters(world), "--method", "regmean", *suites(world), "-o", tmp_path / "out"]
    on_disk.ok("merge", "--base", world.base, *fitting)
    shutil.rmtree(tmp_path / "out")
    refused = on_disk("merge", "--base", other, *fitting)
    assert (refused.code, "is of another base" in refused.err, (tmp_path / "out").exists()) == (4, True, False)
    on_disk.ok("merge", "--base", world.base, *fitting)
    note = json.loads((tmp_path / "out-adapter" / "adaptory.json").read_text())
    assert (len(note["calibration_base"]), note["method_version"]) == (64, note["method_version"])


def test_a_fit_of_an_older_version_of_the_method_is_not_reused(on_disk: Cli, world: World, tmp_path: Path) -> None:
    fitting = [*adapters(world), "--base", world.base, "--method", "regmean", *suites(world), "-o", tmp_path / "out"]
    on_disk.ok("merge", *fitting)
    shutil.rmtree(tmp_path / "out")
    path = tmp_path / "out-adapter" / "adaptory.json"
    note = json.loads(path.read_text())
    path.write_text(json.dumps(note | {"method_version": note["method_version"] - 1}))
    refused = on_disk("merge", *fitting)
    assert (refused.code, "another version of the method" in refused.err) == (4, True), refused.err


def recipe(directory: Path, **changes: Any) -> Path:
    path = directory / "recipe.yaml"
    inputs = [{"adapter": f"acme/{name}", "suite": f"{name}-exact"} for name in NAMES]
    document = {
        "inputs": inputs,
        "method": "regmean",
        "settings": {"examples": 2},
        "adapter": "acme/both:1.0.0",
        "model": "acme/both-merged:1.0.0",
        "probe": 0,
    }
    path.write_text(yaml.safe_dump({**document, **changes}))
    return path


@pytest.fixture(params=services.PAIRINGS)
def team(request: pytest.FixtureRequest, templates: Templates, tmp_path: Path) -> Cli:
    return templates.embedded(request.param, tmp_path, *first_releases(*NAMES))


@pytest.mark.on("PostgreSQL")
def test_a_recipe_is_fitted_judged_on_other_examples_and_locked_by_digest(
    team: Cli, world: World, tmp_path: Path
) -> None:
    gates = [f"{name}-exact.nll within 1000 of inputs" for name in NAMES]
    done = team.json("compose", recipe(tmp_path, evaluate=["sql-exact", "support-exact"], gates=gates))
    assert done["state"] == "done"
    assert [len(examples["examples"]) for examples in done["lock"]["calibration"]] == [2, 2]
    for row in done["candidate_scores"]:
        own = [source for source in row["inputs"] if f"{source['repository']}-exact" == f"acme/{row['suite']}"]
        assert row["n"] == 4, "two of six examples were used to fit"
        assert [(row["n"], row["recorded"]) for row in own] == [(4, False)], (
            "measured on the same four, in the same job"
        )
    assert all(gate["passed"] and gate["required"] for gate in done["gates"])
    lineage = {name: team.json("show", f"acme/{name}")["inputs"] for name in ("both", "both-merged")}
    assert [row["repository"] for row in lineage["both"]] == ["acme/sql", "acme/support"]
    assert [row["repository"] for row in lineage["both-merged"]] == ["acme/both"], "the model is made from the adapter"
    assert team.json("verify", "acme/both-merged", "--rebuild")["rebuild"]["verdict"] == "same"


@pytest.mark.long
def test_a_recipe_names_no_gate_against_its_inputs_and_gets_them(team: Cli, tmp_path: Path) -> None:
    expected = [
        rule
        for name in NAMES
        for rule in (f"{name}-exact.accuracy keeps 0.9 of inputs", f"{name}-exact.nll within 0.1 of inputs")
    ]
    assert team.json("compose", recipe(tmp_path), "--plan")["lock"]["gates"] == expected
    assert "gates" not in team.json("compose", recipe(tmp_path, gates=[]), "--plan")["lock"]
    harmed = [{"adapter": f"acme/{name}", "suite": f"{name}-exact", "weight": 30} for name in NAMES]
    refused = team("compose", recipe(tmp_path, inputs=harmed, method="stack", settings={}))
    assert refused.code == 1
    assert "FAIL  sql-exact.nll within 0.1 of inputs" in refused.out
    assert team("show", "acme/both").code == 3, "nothing was published"


def test_without_gates_the_comparison_with_the_inputs_warns(team: Cli, tmp_path: Path) -> None:
    harmed = [{"adapter": f"acme/{name}", "suite": f"{name}-exact", "weight": 30} for name in NAMES]
    warned = team.json("compose", recipe(tmp_path, inputs=harmed, method="stack", settings={}, gates=[]))
    assert warned["state"] == "done"
    assert {gate["rule"].partition(".")[0] for gate in warned["gates"]} == {f"{name}-exact" for name in NAMES}
    assert {gate["required"] for gate in warned["gates"]} == {False}
    assert not all(gate["passed"] for gate in warned["gates"])


@pytest.mark.long
def test_inputs_are_measured_on_a_suite_that_is_no_inputs_own(team: Cli, tmp_path: Path) -> None:
    gates = ["terraform-exact.nll within 1000 of inputs"]
    changes = {"method": "stack", "settings": {}, "evaluate": ["sql-exact", "terraform-exact"], "gates": gates}
    done = team.json("compose", recipe(tmp_path, **changes))
    assert [gate["passed"] for gate in done["gates"]] == [True]
    compared = {(row["suite"], source["repository"]) for row in done["candidate_scores"] for source in row["inputs"]}
    assert compared == {
        ("terraform-exact", "acme/sql"), ("terraform-exact", "acme/support"), ("sql-exact", "acme/sql"),
    }  # fmt: skip


def test_a_fitted_recipe_needs_examples_and_an_adapter_to_publish(team: Cli, tmp_path: Path) -> None:
    unknown = team("compose", recipe(tmp_path, inputs=["acme/sql", "acme/support"]), "--plan")
    assert (unknown.code, "has no score on a target suite" in unknown.err) == (2, True)
    small = team("compose", recipe(tmp_path, settings={"examples": 6}), "--plan")
    assert (small.code, "leaves none to evaluate on" in small.err) == (1, True)
    alone = team("compose", recipe(tmp_path, adapter=None))
    assert (alone.code, "publishes only a model" in alone.err) == (2, True)


@pytest.mark.long
def test_a_promotion_is_gated_by_what_went_into_the_release(team: Cli, tmp_path: Path) -> None:
    gates = ["sql-exact.nll within 1000 of inputs"]
    team.ok("compose", recipe(tmp_path, evaluate=["sql-exact"], gates=gates))
    team.ok("eval", "acme/sql", "--suite", "sql-exact")
    team.ok("gate", "acme/both@prod", "--rule", "sql-exact.nll within 1000 of inputs")
    team.ok("promote", "acme/both:1.0.0", "--to", "prod")
    team.ok("gate", "acme/sql@prod", "--rule", "sql-exact.nll within 1000 of inputs")
    refused = team("promote", "acme/sql:1.0.0", "--to", "prod")
    assert (refused.code, "no inputs to compare with" in refused.err + refused.out) == (1, True)


def test_a_tamed_adapter_is_fitted_to_change_nothing_on_half_of_the_guard(team: Cli, tmp_path: Path) -> None:
    """Two gates judge it: its own task, and what it costs on the examples of the guard that it was not fitted on."""
    team.ok("suite", "add", write_suite(tmp_path, "general", kind="guard", chat=False))
    loose = ("--set", "examples=2", "--set", "ridge=1e-6", "--set", "guard=1e-6")
    asked = ("tame", "acme/sql", "--as", "acme/sql-tame:1.0.0", "--suite", "sql-exact")
    done = team.json(*asked, "--guard", "general", *loose)
    own, guard = done["lock"]["calibration"]
    assert (own["suite"], len(own["examples"]), guard["suite"], len(guard["examples"])) == (
        "sql-exact", 2, "general", 4,
    )  # fmt: skip
    assert {row["suite"]: row["n"] for row in done["candidate_scores"]} == {"sql-exact": 4, "general": 4}
    assert "general.nll within 0.15 of base" in {gate["rule"] for gate in done["gates"]}
    for name, why in (("sql-exact", "it is a target suite"), ("guard-exact", "it has 6 examples")):
        refused = team(*asked, "--guard", name)
        assert (refused.code, f"{name} cannot guard the fit: {why}." in refused.err) == (1, True)
    assert [row["repository"] for row in team.json("show", "acme/sql-tame")["inputs"]] == ["acme/sql"]


def test_a_recipe_states_how_many_examples_of_the_guard_it_is_fitted_on(team: Cli, tmp_path: Path) -> None:
    team.ok("suite", "add", write_suite(tmp_path, "general", kind="guard"))
    fitted = {"evaluate": ["general"], "gates": [], "model": None}
    for stated, count in (({}, 4), ({"guard_examples": 2}, 2), ({"guard_examples": 8}, 4)):
        lock = team.json("compose", recipe(tmp_path, **fitted, **stated), "--plan")["lock"]
        assert [len(row["examples"]) for row in lock["calibration"]] == [2, 2, count]
    refused = team("compose", recipe(tmp_path, **fitted, guard_examples=2, method="linear", settings={}), "--plan")
    assert "guard_examples: linear is not fitted on anything" in refused.err


def test_a_release_with_scores_on_two_tasks_is_tamed_only_for_one_that_is_named(team: Cli, tmp_path: Path) -> None:
    team.ok("suite", "add", write_suite(tmp_path, "general", kind="guard", chat=False))
    team.ok("eval", "acme/sql", "--suite", "sql-exact", "--suite", "support-exact")
    refused = team("tame", "acme/sql", "--as", "acme/sql-tame:1.0.0", "--guard", "general")
    assert (refused.code, "has scores on sql-exact, support-exact" in " ".join(refused.err.split())) == (2, True)
    assert "with --suite" in refused.err
