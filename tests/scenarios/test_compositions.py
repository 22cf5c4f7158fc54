"""From a recipe to a combined adapter and a merged checkpoint, compared with PEFT and plain arithmetic."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from composer.evaluation.evaluate import evaluate
from composer.evaluation.model import load_model
from composer.formats.recipes.suite import parse_suite
from tests import services
from tests.composer.small_model import save_adapter, save_llama
from tests.scenarios.traces import Traces, api_of, traces
from tests.scenarios.world import Cli, World

WEIGHTS = {"sql": 0.5, "terraform": -0.25, "support": 1.5}
TOUCHED = ("q_proj", "v_proj", "o_proj")
STEPS = ["check", "combine", "evaluate", "gate", "merge", "publish"]


@pytest.fixture
def team(stocked: Cli, world: World) -> Cli:
    return release_all(stocked, world)


def release_all(cli: Cli, world: World) -> Cli:
    for name in WEIGHTS:
        cli.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny", "--channel", "prod")
    return cli


def write_recipe(directory: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "base": "tiny",
        "inputs": [
            {"adapter": "acme/sql@prod", "weight": WEIGHTS["sql"], "suite": "sql-exact"},
            {"adapter": "acme/terraform:^1.0", "weight": WEIGHTS["terraform"], "suite": "terraform-exact"},
            {"adapter": "acme/support", "weight": WEIGHTS["support"], "suite": "support-exact"},
        ],
        "method": "linear",
        "adapter": "acme/assistant:1.0.0",
        "model": "acme/assistant-merged:1.0.0",
        "probe": 1,
        "gates": [],
        "notes": "all three",
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def settled(cli: Cli) -> Traces:
    """Traces after the worker has cleaned up, which it does after it has recorded that the job is finished."""
    deadline = time.monotonic() + 10
    while (seen := traces(cli)).work and time.monotonic() < deadline:
        time.sleep(0.05)
    return seen


def test_a_recipe_is_planned_composed_and_composed_again(team: Cli, world: World, tmp_path: Path) -> None:
    team.ok("eval", "tiny", "--suite", "guard-exact")
    recipe = write_recipe(
        tmp_path,
        evaluate=["sql-exact", "guard-exact"],
        gates=["guard-exact.nll within 1000 of base", "sql-exact.nll within 1000 of inputs"],
    )
    before = traces(team)
    plan = team.json("compose", recipe, "--plan")
    assert (plan["plan"], plan["state"], [step["name"] for step in plan["steps"]]) == (True, "done", ["check"])
    assert plan["results"] == []
    assert settled(team) == before, "a plan leaves no blob, no release and no file"
    check_lock(team, plan["lock"])
    check_conflicts(plan["conflicts"])

    done = team.json("compose", recipe, "--follow")
    assert done["state"] == "done"
    assert [(step["name"], step["state"]) for step in done["steps"]] == [(name, "done") for name in STEPS]
    assert done["lock"] == plan["lock"]
    assert [(row["repository"], row["version"]) for row in done["results"]] == [
        ("acme/assistant", "1.0.0"), ("acme/assistant-merged", "1.0.0"),
    ]  # fmt: skip
    assert done["result"] == done["results"][0]
    assert [gate["passed"] for gate in done["gates"]] == [True, True]
    measured_now = {
        (source["repository"], source["recorded"]) for row in done["candidate_scores"] for source in row["inputs"]
    }
    assert measured_now == {("acme/sql", False), ("acme/terraform", False), ("acme/support", False)}
    assert {(score["suite"], score["metric"]) for score in done["candidate_scores"]} == {
        ("sql-exact", "nll"), ("sql-exact", "accuracy"), ("guard-exact", "nll"), ("guard-exact", "accuracy"),
    }  # fmt: skip
    check_lineage(team, done)
    check_attested(team, tmp_path)
    with api_of(team) as api:
        path = "/v1/adapters/acme/assistant/releases/1.0.0/scores/sql-exact/results"
        assert len(api.get(path)["examples"]) == 6, "to compare the next release with it, example by example"

    team.ok("pull", "acme/assistant:1.0.0", "-o", tmp_path / "adapter")
    team.ok("pull", "acme/assistant-merged", "-o", tmp_path / "model")
    check_kept(done, [tmp_path / "adapter", tmp_path / "model"])
    check_proof(done, tmp_path / "model")
    assert "keeps 100 % of the sum" in team.ok("compose", recipe).out
    expected = weighted_sum(world, WEIGHTS)
    check_adapter(tmp_path / "adapter", world.base, expected)
    check_model(tmp_path / "model", world.base, expected)

    after = settled(team)
    assert after.work == frozenset()
    again = team.json("compose", recipe, "--follow")
    assert (again["state"], again["results"]) == ("done", done["results"])
    assert settled(team) == after, "the same recipe again makes nothing new"
    move = team.json("promote", "acme/assistant-merged:1.0.0", "--to", "prod")
    assert (move["to_version"], team.json("show", "acme/assistant-merged@prod")["kind"]) == ("1.0.0", "model")


def check_proof(done: dict[str, Any], model: Path) -> None:
    proof = done["merge"]["proof"]
    assert (proof["state"], proof["prompts"]) == ("proved", 16)
    assert proof["equal"] == proof["within"] == proof["positions"] > 16
    assert json.loads((model / "adaptory.json").read_text())["proof"] == proof
    assert proof["words"] in (model / "README.md").read_text()


def check_attested(cli: Cli, directory: Path) -> None:
    """A worker attests the scores and the lineage, which `origin: worker` requires of a release."""
    verified = cli.json("verify", "acme/assistant:1.0.0")["attestations"]
    assert [row["kind"] for row in verified] == ["composition", "scores", "scores"]
    assert verified[0]["predicate"]["weights"] == list(WEIGHTS.values())
    (of_model,) = cli.json("verify", "acme/assistant-merged:1.0.0")["attestations"]
    assert of_model["predicate"]["proof"]["state"] == "proved"
    assert all(score["measured_by"] for score in cli.json("show", "acme/assistant:1.0.0")["scores"])
    (directory / "origin.yaml").write_text("{version: 1, origin: worker}")
    for repository in ("sql", "assistant"):
        cli.ok("policy", "set", f"acme/{repository}@composed", directory / "origin.yaml")
    pushed = cli("promote", "acme/sql:1.0.0", "--to", "composed", "--new-channel")
    assert (pushed.code, "no worker attests that it composed it" in pushed.err) == (1, True)
    cli.ok("promote", "acme/assistant:1.0.0", "--to", "composed", "--new-channel")


def check_kept(done: dict[str, Any], directories: list[Path]) -> None:
    """What is left of each input is one figure in the report, the notes and the cards, which the releases show."""
    report = done["conflicts"]
    assert report["whole"]["kept_words"].startswith("keeps 100 % of the sum; acme/sql:1.0.0 ")
    for directory in directories:
        note = json.loads((directory / "adaptory.json").read_text())["retention"]
        kept = [member["retention"] for member in note["adapters"]]
        assert kept == pytest.approx([member["retention"] for member in report["adapters"]], rel=1e-3)
        assert f"It {note['words']}." in (directory / "README.md").read_text()


def check_lock(cli: Cli, lock: dict[str, Any]) -> None:
    """Every input by commit and by the digest of each file, however the recipe named it."""
    assert [locked["weight"] for locked in lock["inputs"]] == list(WEIGHTS.values())
    for locked, name in zip(lock["inputs"], WEIGHTS, strict=True):
        release = cli.json("show", f"acme/{name}:1.0.0")
        assert (locked["repository"], locked["version"]) == (f"acme/{name}", "1.0.0")
        assert locked["commit"] == release["commit"]
        assert locked["files"] == {file["path"]: file["sha256"] for file in release["files"]}
    assert lock["base"] == cli.json("base", "show", "tiny")["digest"]


def check_conflicts(report: dict[str, Any]) -> None:
    names = [f"acme/{name}:1.0.0" for name in WEIGHTS]
    assert report["verdict"] in ("undecided", "warn"), "its suites have six examples, and eight are needed for an ok"
    assert [(pair["a"], pair["b"]) for pair in report["pairs"]] == [
        (names[0], names[1]), (names[0], names[2]), (names[1], names[2]),
    ]  # fmt: skip
    assert {pair["evidence"] for pair in report["pairs"]} == {"probe"}


def check_lineage(cli: Cli, done: dict[str, Any]) -> None:
    inputs = [(f"acme/{name}", "1.0.0", weight) for name, weight in WEIGHTS.items()]
    for row in done["results"]:
        release = cli.json("show", f"{row['repository']}:{row['version']}")
        assert [(i["repository"], i["version"], i["weight"]) for i in release["inputs"]] == inputs
        assert (release["commit"], release["notes"]) == (row["commit"], "all three")
    measured = {(s["suite"], s["metric"]): s["value"] for s in cli.json("show", "acme/assistant:1.0.0")["scores"]}
    assert measured == {(s["suite"], s["metric"]): s["value"] for s in done["candidate_scores"]}
    assert cli.json("show", "acme/assistant:1.0.0")["adapter"]["rank_max"] == 8


def weighted_sum(world: World, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """W + sum of weight * (W merged with one adapter by PEFT - W), in float64, without any of our code."""
    base = {n: t.double() for n, t in LlamaForCausalLM.from_pretrained(world.base).state_dict().items()}
    total = {name: tensor.clone() for name, tensor in base.items()}
    for name, weight in weights.items():
        model = LlamaForCausalLM.from_pretrained(world.base)
        merged: Any = PeftModel.from_pretrained(model, str(world.adapters[name])).merge_and_unload()
        for key, tensor in merged.state_dict().items():
            total[key] += weight * (tensor.double() - base[key])
    return total


def logits(model: Any, base: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(base)("select a from b where c = 1", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=tokens["input_ids"]).logits


def expected_logits(base: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(base)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return logits(model, base)


def check_adapter(directory: Path, base: Path, expected: dict[str, torch.Tensor]) -> None:
    """PEFT itself loads it, and its delta is that of the recipe."""
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(directory))
    wanted = expected_logits(base, expected)
    assert (wanted - logits(LlamaForCausalLM.from_pretrained(base), base)).abs().max() > 0.1, (
        "the adapters do something"
    )
    torch.testing.assert_close(logits(adapted, base), wanted, rtol=1e-5, atol=1e-5)


def check_model(directory: Path, base: Path, expected: dict[str, torch.Tensor]) -> None:
    """Transformers loads it; weights and logits are the base's with the adapters; untouched shards are copies."""
    merged = LlamaForCausalLM.from_pretrained(directory)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(merged, base), expected_logits(base, expected), rtol=1e-5, atol=1e-5)
    copied = rewritten = 0
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            touched = any(part in name for name in file.keys() for part in TOUCHED)  # noqa: SIM118
        same = shard.read_bytes() == (directory / shard.name).read_bytes()
        assert same != touched, shard.name
        copied, rewritten = copied + (not touched), rewritten + touched
    assert copied
    assert rewritten
    untouched = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(ours) == set(untouched)
    for name, tensor in untouched.items():
        assert torch.equal(ours[name], tensor) or any(part in name for part in TOUCHED)


@pytest.mark.long
def test_a_composition_that_is_refused_publishes_nothing(team: Cli, world: World, tmp_path: Path) -> None:
    """By a gate, by a missing score, and by a conflict that no weight resolves."""
    for seed, name in enumerate(("one", "two")):
        model = LlamaForCausalLM.from_pretrained(world.base)
        save_adapter(
            model, tmp_path / name, seed, r=2, lora_alpha=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
        )
        team.ok("push", tmp_path / name, f"acme/{name}:1.0.0", "--base", "tiny")
    before = settled(team)

    recipe = write_recipe(tmp_path, evaluate=["sql-exact"], gates=["sql-exact.nll <= 0.0001"])
    refused = team("compose", recipe, "--follow")
    assert refused.code == 1
    assert "gate" in refused.err
    assert "sql-exact.nll" in refused.out
    assert settled(team) == before

    unmeasured = write_recipe(tmp_path, evaluate=["sql-exact"], gates=["sql-exact.nll within 9 of base"])
    jobs = team.json("jobs")
    for plan in ("--plan", "--follow"):
        refused = team("compose", unmeasured, plan)
        assert (refused.code, "the base tiny has no nll on the current sql-exact" in refused.err) == (1, True)
        assert "next: Run `adaptory eval tiny --suite sql-exact`" in refused.err
    assert team.json("jobs") == jobs, "what can be known at once is refused before any work"

    for plan in (("--plan",), ("--follow",)):
        conflict = write_recipe(tmp_path, inputs=["acme/one:1.0.0", "acme/two:1.0.0"], probe=0)
        refused = team("compose", conflict, *plan)
        assert refused.code == 1
        assert "lm_head" in refused.err
    assert settled(team) == before
    states = [job["state"] for job in team.json("jobs")["items"]]
    assert states == ["refused"] * 3


@pytest.mark.long
def test_a_tied_weight_is_untied_unless_the_recipe_decides_otherwise(embedded: Cli, tmp_path: Path) -> None:
    cli, base = embedded, save_llama(tmp_path / "base", seed=4, tied=True)
    cli.ok("base", "add", base, "--name", "tied")
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "embed_tokens"]}
    save_adapter(LlamaForCausalLM.from_pretrained(base), tmp_path / "embedding", 1, **settings)
    cli.ok("push", tmp_path / "embedding", "acme/embedding:1.0.0", "--base", "tied")
    recipe = {"inputs": ["acme/embedding:1.0.0"], "method": "stack", "model": "acme/merged:1.0.0", "probe": 0}
    path = tmp_path / "recipe.yaml"

    path.write_text(yaml.safe_dump(recipe | {"settings": {"tied": "refuse"}}))
    refused = cli("compose", path)
    assert refused.code == 1
    assert "embed_tokens" in refused.err
    assert "next: Choose with --set tied=untie or --set tied=shared" in refused.err
    assert traces(cli).releases == ("acme/embedding:1.0.0",)
    assert traces(cli).work == frozenset()

    path.write_text(yaml.safe_dump(recipe | {"settings": {"tied": "shared"}}))
    assert cli.json("compose", path)["state"] == "done"
    cli.ok("pull", "acme/merged:1.0.0", "-o", tmp_path / "merged")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    theirs: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(tmp_path / "embedding")).eval()

    path.write_text(yaml.safe_dump(recipe | {"model": "acme/untied:1.0.0"}))
    cli.ok("compose", path)
    cli.ok("pull", "acme/untied:1.0.0", "-o", tmp_path / "untied")
    untied, ids = LlamaForCausalLM.from_pretrained(tmp_path / "untied").eval(), torch.arange(8)[None]
    assert not untied.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(untied(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)

    theirs_merged = theirs.merge_and_unload()
    for name, tensor in theirs_merged.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_a_model_alone_needs_no_factors_and_is_measured_as_it_is_published(
    small_team: Cli, world: World, tmp_path: Path
) -> None:
    small_team.ok("eval", "tiny", "--suite", "guard-exact")
    alone: dict[str, Any] = {
        "method": "ties", "adapter": None, "probe": 0, "dtype": "bfloat16", "evaluate": ["guard-exact", "sql-exact"],
    }  # fmt: skip
    before = traces(small_team)
    failing = write_recipe(tmp_path, gates=["guard-exact.nll <= 0", "guard-exact.nll within 1000 of inputs"], **alone)
    assert small_team("compose", failing, "--follow").code == 1
    assert settled(small_team) == before, "a gate holds back a model that is written already"

    passing = write_recipe(tmp_path, gates=["guard-exact.nll within 1000 of inputs"], **alone)
    done = small_team.json("compose", passing, "--follow")
    assert [(row["repository"], row["version"]) for row in done["results"]] == [("acme/assistant-merged", "1.0.0")]
    small_team.ok("eval", "acme/sql", "acme/assistant-merged", "--suite", "sql-exact", "--queue")
    small_team.ok("pull", "acme/assistant-merged", "-o", tmp_path / "model")
    model = load_model(tmp_path / "model")
    suites = [parse_suite(world.suites[name]) for name in ("guard", "sql")]
    measured = [score.to_json() for suite in suites for score in evaluate(model, suite)]
    assert [{k: v for k, v in row.items() if k != "inputs"} for row in done["candidate_scores"]] == measured
    assert small_team.json("verify", "acme/assistant-merged", "--rebuild")["rebuild"]["verdict"] == "same"


@pytest.mark.long
def test_a_composition_without_scores_says_that_nothing_is_known(small_team: Cli, tmp_path: Path) -> None:
    unmeasured = [{"adapter": "acme/sql@prod"}, {"adapter": "acme/support"}]
    shown = small_team.ok("compose", write_recipe(tmp_path, probe=0, inputs=unmeasured)).out
    assert "scores: none, so what the result keeps" in shown


@pytest.mark.long
def test_an_input_that_no_suite_judges_is_named(small_team: Cli, tmp_path: Path) -> None:
    one_judged = [{"adapter": "acme/sql@prod", "suite": "sql-exact"}, {"adapter": "acme/support"}]
    alone = write_recipe(tmp_path, probe=0, inputs=one_judged, evaluate=[], gates=[])
    shown = small_team.ok("compose", alone).out
    assert "not compared on a suite of their own: acme/support:1.0.0." in shown


@pytest.mark.parametrize("stocked", [services.PAIRINGS[0]], indirect=True)
def test_a_composition_that_nobody_waits_for_says_where_its_progress_is_shown(team: Cli, tmp_path: Path) -> None:
    assert "`adaptory jobs 1` shows its progress" in team.ok("compose", write_recipe(tmp_path)).out


def test_inputs_for_another_base_twice_or_yanked_are_refused_at_once(small_team: Cli, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=9)
    small_team.ok("base", "add", other, "--name", "other")
    model = LlamaForCausalLM.from_pretrained(other)
    save_adapter(model, tmp_path / "stranger", 1, r=2, lora_alpha=2, target_modules=["q_proj"])
    small_team.ok("push", tmp_path / "stranger", "acme/stranger:1.0.0", "--base", "other")
    refused = small_team("compose", write_recipe(tmp_path, inputs=["acme/sql", "acme/stranger"], base=None))
    assert (refused.code, "acme/stranger:1.0.0" in refused.err) == (4, True)
    twice = small_team("compose", write_recipe(tmp_path, inputs=["acme/sql", "acme/support", "acme/sql@prod"]))
    assert (twice.code, "acme/sql:1.0.0 is named 2 times among the recipe's inputs" in twice.err) == (2, True)
    small_team.ok("yank", "acme/sql:1.0.0", "--reason", "leaks")
    refused = small_team("compose", write_recipe(tmp_path, inputs=["acme/sql:1.0.0"]))
    assert (refused.code, "leaks" in refused.err) == (1, True)
    assert small_team.json("jobs")["items"] == []


def refuse_both(cli: Cli, recipe: Path, code: int, *words: str) -> None:
    """The plan and the composition itself, before any work."""
    jobs = cli.json("jobs")
    for plan in ((), ("--plan",)):
        refused = cli("compose", recipe, *plan)
        assert refused.code == code, refused.err
        assert [word for word in words if word not in refused.err] == []
    assert cli.json("jobs") == jobs


def test_a_version_that_holds_something_else_is_refused_at_once(small_team: Cli, world: World, tmp_path: Path) -> None:
    one = write_recipe(tmp_path, model=None, probe=0, inputs=["acme/sql"])
    small_team.ok("push", world.adapters["support"], "acme/assistant:1.0.0", "--base", "tiny")
    refuse_both(small_team, one, 4, "acme/assistant:1.0.0", "version")

    one = write_recipe(tmp_path, adapter="acme/assistant:2.0.0", model=None, probe=0, inputs=["acme/sql"])
    assert small_team.json("compose", one)["state"] == "done"
    assert small_team.json("compose", one)["state"] == "done", "the same recipe is the same release"
    other = write_recipe(tmp_path, adapter="acme/assistant:2.0.0", model=None, probe=0, inputs=["acme/sql"], notes="x")
    refuse_both(small_team, other, 4, "acme/assistant:2.0.0", "recipe")
    other = write_recipe(tmp_path, adapter="acme/assistant:2.0.0", model=None, probe=0, inputs=["acme/support"])
    refuse_both(small_team, other, 4, "acme/assistant:2.0.0")


@pytest.mark.long
def test_an_output_for_another_base_needs_a_major_number_at_once(small_team: Cli, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=9)
    small_team.ok("base", "add", other, "--name", "other")
    model = LlamaForCausalLM.from_pretrained(other)
    save_adapter(model, tmp_path / "stranger", 1, r=2, lora_alpha=2, target_modules=["q_proj"])
    small_team.ok("push", tmp_path / "stranger", "acme/stranger:1.0.0", "--base", "other")
    changes: dict[str, Any] = {"inputs": ["acme/stranger"], "base": None, "model": None, "probe": 0}
    for version, right in (("1.1.0", "2.0.0"), ("0.9.0", None)):  # below 1.0.0, so users of ^1.0.0 do not get it
        recipe = write_recipe(tmp_path, adapter=f"acme/sql:{version}", **changes)
        if right is None:
            assert small_team.json("compose", recipe, "--plan")["state"] == "done"
        else:
            refuse_both(small_team, recipe, 1, f"Publish it as {right}", "Its base is")
    assert small_team.json("compose", write_recipe(tmp_path, adapter="acme/sql:2.0.0", **changes))["state"] == "done"


def test_a_namespace_that_takes_only_signed_releases_refuses_a_composition_at_once(
    small_team: Cli, tmp_path: Path
) -> None:
    key = tmp_path / "key.pub.pem"
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    small_team.ok("namespace", "set", "strict", "--require-signature", "--signing-key", key)
    for output in ({"adapter": "strict/both:1.0.0", "model": None}, {"model": "strict/merged:1.0.0"}):
        recipe = write_recipe(tmp_path, probe=0, **output)
        refuse_both(small_team, recipe, 1, "strict accepts only releases", "--sign KEY.pem")
    assert small_team.json("compose", write_recipe(tmp_path, model=None, probe=0))["state"] == "done"


@pytest.mark.long
def test_what_cannot_end_as_an_adapter_is_refused_by_the_plan_too(small_team: Cli, tmp_path: Path) -> None:
    idle: dict[str, Any] = {"adapter": "acme/sql@prod", "rules": [{"modules": "nothing.*", "weight": 0.5}]}
    other = "acme/support"
    for changes, code, way_out in (
        ({"method": "stack", "inputs": [idle, other]}, "matches no module", "inspect"),
        ({"method": "dare_ties", "inputs": ["acme/sql", other]}, "no factors", "settings: {rank: 32}"),
    ):
        recipe = write_recipe(tmp_path, **changes, probe=0)
        for plan in ("--plan", "--follow"):
            refused = small_team("compose", recipe, plan)
            assert refused.code == 1
            assert code in refused.err
            assert way_out in refused.err
        job = small_team.json("jobs")["items"][0]
        assert [step["state"] for step in job.get("steps", [])][:1] != ["done"]


@pytest.mark.long
def test_a_merged_model_that_answers_otherwise_than_its_base_with_the_adapters_is_not_published(
    small_team: Cli, tmp_path: Path
) -> None:
    other = save_llama(tmp_path / "other", seed=9)
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " " * (64 << 20))  # too large to be copied beside a merged model
    small_team.ok("base", "add", other, "--name", "other")
    save_adapter(LlamaForCausalLM.from_pretrained(other), tmp_path / "own", 1, r=2, target_modules=["q_proj"])
    small_team.ok("push", tmp_path / "own", "acme/own:1.0.0", "--base", "other")
    inputs = [{"adapter": "acme/own", "suite": "sql-exact"}]
    recipe = write_recipe(tmp_path, inputs=inputs, method="stack", base=None, probe=0)
    refused = small_team("compose", recipe, "--follow")
    assert (refused.code, "does not answer as the base with the adapter: transformers" in refused.err) == (1, True)
    assert small_team("show", "acme/assistant-merged:1.0.0").code != 0
    assert small_team("show", "acme/assistant:1.0.0").code != 0, "the adapter of the same recipe neither"
