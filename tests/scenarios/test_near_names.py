"""Unknown names are answered with known ones: near names, channels, versions, and bases that an adapter fits."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM

from composer.formats.adapters.inspection import inspect
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.small_model import save_adapter, save_gpt2
from tests.scenarios.world import Cli, World


@pytest.fixture
def small_team(stocked_on_disk: Cli, world: World) -> Cli:
    stocked_on_disk.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod")
    return stocked_on_disk


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (["show", "acme/sqll"], "Did you mean acme/sql?"),
        (["show", "acm/sql"], "Did you mean acme/sql?"),
        (["log", "acme/sq"], "Did you mean acme/sql?"),
        (["show", "acme/x"], "next: `adaptory list` shows"),
        (["rollback", "acm/sql@prod"], "Did you mean acme/sql?"),
        (["show", "acme/sql@prd"], "The channels of acme/sql: prod."),
        (["history", "acme/sql@prd"], "The channels of acme/sql: prod."),
        (["show", "acme/sql:1.1.0"], "It has 1.0.0"),
        (["base", "show", "tinny"], "Did you mean tiny?"),
        (["base", "show", "Acme/Tiny-LLama"], "Did you mean Acme/Tiny-Llama"),
        (["eval", "acme/sql", "--suite", "sql-exakt"], "Did you mean sql-exact?"),
        (["eval", "tinny", "--suite", "sql-exact"], "Did you mean tiny?"),
        (["pul", "acme/sql"], "Did you mean 'pull'?"),
        (["suite", "show"], "The commands are add, list, share, guard."),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(small_team: Cli, command: list[str], hint: str) -> None:
    refused = small_team(*command)
    assert refused.code in (2, 3)
    assert hint in refused.err, refused.err


def test_a_gate_on_a_suite_or_metric_that_is_not_there_is_refused(small_team: Cli) -> None:
    for rule, hint in (
        ("sql-exakt.accuracy >= 0.5", "Did you mean sql-exact?"),
        ("sql-exact.acuracy >= 0.5", "Did you mean accuracy?"),
        ("guard-exact.nl within 0.1 of served", "Did you mean nll?"),
    ):
        refused = small_team("gate", "acme/sql@prod", "--rule", rule)
        assert (refused.code, hint in refused.err) == (3, True), refused.err
    assert small_team.json("gate", "acme/sql@prod")["rules"] == []


def test_a_metric_that_a_suite_states_is_named_beside_those_of_every_suite(small_team: Cli, tmp_path: Path) -> None:
    stated = {"name": "summary", "kind": "target", "chat": False, "metrics": {"rouge_l": "higher"}}
    file = tmp_path / "summary.yaml"
    file.write_text(yaml.safe_dump({**stated, "examples": [{"prompt": "Say it.", "completion": " It."}]}))
    small_team.ok("suite", "add", file)
    for metric, hint in (("rouge", "Did you mean rouge_l?"), ("f1", "summary has nll, accuracy, rouge_l")):
        refused = small_team("gate", "acme/sql@prod", "--rule", f"summary.{metric} >= 0.5")
        assert (refused.code, hint in refused.err) == (3, True), refused.err


def test_a_recipe_is_refused_at_once_for_gates_on_suites_and_metrics_that_are_not_there(
    small_team: Cli, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {"inputs": ["acme/sql"], "method": "stack", "adapter": "acme/copy:v1.0.0", "evaluate": ["sql-exact"]}
    for rule, hint in (
        ("sql-exakt.accuracy >= 0.5", "Did you mean sql-exact?"),
        ("sql-exact.acuracy >= 0.5", "Did you mean accuracy?"),
        ("sql-exact.rouge_l >= 0.5", "a composition measures nll and accuracy, not rouge_l"),
    ):
        recipe.write_text(yaml.safe_dump({**content, "gates": [rule]}))
        refused = small_team("compose", recipe)
        assert (refused.code, hint in refused.err) == (3, True), refused.err
    assert small_team.json("jobs")["items"] == []


def test_a_push_against_the_wrong_base_names_those_that_fit(small_team: Cli, world: World, tmp_path: Path) -> None:
    other = save_gpt2(tmp_path / "wide")
    small_team.ok("base", "add", other, "--name", "wide")
    refused = small_team("push", world.adapters["sql"], "acme/sql:1.1.0", "--base", "wide")
    assert refused.code == 6
    assert "does not fit the base wide" in refused.err
    assert "next: It fits tiny: name one with --base." in refused.err
    assert "lora_A" not in refused.err, "its keys are right"


def test_a_base_of_other_shapes_is_not_taken_for_wrong_keys(world: World, tmp_path: Path) -> None:
    """Some of its keys are the base's, and the base has fewer layers."""
    small = LlamaForCausalLM.from_pretrained(world.base).config
    small.num_hidden_layers, small.hidden_size = small.num_hidden_layers + 1, 2 * small.hidden_size
    save_adapter(LlamaForCausalLM(small), tmp_path / "other", 9, r=2, target_modules=["q_proj"])
    seen = inspect(tmp_path / "other", open_checkpoint(world.base).architecture)
    codes = {finding.code for finding in seen.findings}
    assert "shape_mismatch" in codes
    assert "wrong_prefix" not in codes


def test_the_path_that_an_adapter_names_is_matched_with_registered_locations(
    small_team: Cli, world: World, tmp_path: Path
) -> None:
    directory = tmp_path / "trained"
    model = LlamaForCausalLM.from_pretrained(world.base)
    save_adapter(model, directory, 9, r=2, lora_alpha=4, target_modules=["q_proj"])
    config = json.loads((directory / "adapter_config.json").read_text())
    for written, code in ((str(world.base), 0), (f"{world.base.parent}/./{world.base.name}/", 0), ("/no/such", 3)):
        config["base_model_name_or_path"] = written
        (directory / "adapter_config.json").write_text(json.dumps(config))
        pushed = small_team("push", directory, "acme/new", "--bump", "auto")
        assert pushed.code == code, pushed.err
    assert "It fits tiny: name one with --base." in pushed.err
    copy = shutil.copytree(world.base, tmp_path / "copy")
    config["base_model_name_or_path"] = str(copy)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    refused = small_team("push", directory, "acme/new", "--bump", "auto")
    assert (refused.code, f"adaptory base add {copy}" in refused.err) == (3, True), refused.err


def test_a_version_may_have_the_v_of_a_tag(small_team: Cli, world: World, tmp_path: Path) -> None:
    pushed = small_team.json("push", world.adapters["other-sql"], "acme/sql:v1.1.0", "--base", "tiny")
    assert pushed["release"]["version"] == "1.1.0"
    assert small_team.json("show", "acme/sql:v1.1.0")["version"] == "1.1.0"
    small_team.ok("promote", "acme/sql:v1.1.0", "--to", "prod")
    small_team.ok("rollback", "acme/sql@prod", "--to", "v1.0.0")
    small_team.ok("pull", "acme/sql:v1.0.0", "-o", tmp_path / "out")
    for range_ in ("^v1.0", "v1.x", ">=v1.0.0 <v1.1.0", "v1.0.0 - v1.0.9"):
        assert small_team.json("show", f"acme/sql:{range_}")["version"] in ("1.0.0", "1.1.0")
    small_team.ok("yank", "acme/sql:v1.1.0", "--reason", "wrong")
    recipe = tmp_path / "recipe.yaml"
    content = {"inputs": ["acme/sql:v1.0.0"], "method": "stack", "adapter": "acme/copy:v1.0.0", "probe": 0}
    recipe.write_text(yaml.safe_dump(content))
    small_team.ok("compose", recipe)
    assert small_team.json("show", "acme/copy:v1.0.0")["version"] == "1.0.0"
