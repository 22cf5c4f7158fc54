"""A user checks how two adapters would affect each other, on all kinds of evidence."""

import json
from pathlib import Path

import pytest
import yaml

from tests.composer.conflicts.test_page import Tree
from tests.scenarios.world import Cli, World

PAIR = ("acme/sql:1.0.0", "acme/terraform:1.0.0")


def test_evidence_grows_from_weights_over_activations_to_a_probe(team: Cli, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sql 1\n\nterraform 2\n")
    weights = team.json("conflicts", *PAIR)
    activations = team.json("conflicts", *PAIR, "--prompts", prompts)
    fallen_back = team.json("conflicts", *PAIR, "--prompts", prompts, "--probe", "2")
    for suite, ref in zip(("sql-exact", "terraform-exact"), PAIR, strict=True):
        team.ok("eval", ref, "--suite", suite)
    probed = team.json("conflicts", *PAIR, "--probe", "2", "--probe-max", "4", "--guard", "guard-exact")
    evidence = [report["pairs"][0]["evidence"] for report in (weights, activations, fallen_back, probed)]
    assert evidence == ["weights", "activations", "activations", "probe"]
    assert activations["activations"]["prompts"] == 2
    assert probed["pairs"][0]["probe"]["k"] in (2, 4)
    assert probed["pairs"][0]["risk_low"] <= probed["pairs"][0]["risk"] <= probed["pairs"][0]["risk_high"]
    assert [guard["suite"] for guard in probed["pairs"][0]["probe"]["guards"]] == ["guard-exact"]
    assert probed["whole"]["lost_share"] is not None, "the base is at hand where it was probed"
    explained = team.ok("conflicts", *PAIR, "--probe", "2", "--probe-max", "0", "--explain").out
    assert "nats per token, measured" in explained
    assert "Adapters" in explained
    assert "held together with frequency 0." in explained, "what the intervals are worth is printed beside them"
    shown = team.ok("conflicts", *PAIR, "--probe", "2", "--probe-max", "0").out
    first, *lines = shown.splitlines()
    assert first.startswith(f"Verdict: {probed['verdict']}, measured on 2 examples a suite in ")
    assert 4 <= len(lines) <= 6
    assert lines[-1].startswith(("fix: ", "  "))
    assert max(map(len, shown.splitlines())) <= 80


def test_a_probe_without_suites_says_what_else_there_is(team: Cli) -> None:
    refused = team("conflicts", *PAIR, "--probe", "2")
    assert refused.code == 2
    assert "--prompts" in refused.err


def test_method_settings_and_rules_are_those_of_the_combination(team: Cli) -> None:
    plain = team.json("conflicts", *PAIR)
    ruled = team.json("conflicts", *PAIR, "--weights", "1,0.5", "--rule", "2:q_proj=0")
    assert ruled["adapters"][1]["weight"] == {"value": 0.5, "rules": [{"modules": "q_proj", "weight": 0.0}]}
    assert ruled["whole"]["interference"] == pytest.approx(1.0), "they met in q_proj only"
    assert plain["whole"]["interference"] != pytest.approx(1.0, abs=1e-6)
    ties = team.json("conflicts", *PAIR, "--method", "ties", "--set", "density=0.1")
    assert ties["adapters"][0]["retention"] != pytest.approx(plain["adapters"][0]["retention"], abs=1e-3)
    for wrong, code in (
        (("--rule", "3:q_proj=0"), "3:q_proj=0"), (("--method", "tie"), "tie"), (("--set", "colour=1"), "colour"),
        (("--weights", "1,inf"), "1,inf"),
    ):  # fmt: skip
        refused = team("conflicts", *PAIR, *wrong)
        assert refused.code in (2, 6), refused
        assert code in refused.err


def test_nothing_unmeasured_is_called_ok_and_a_script_can_require_ok(team: Cli, tmp_path: Path) -> None:
    unmeasured = team("conflicts", *PAIR)
    assert (unmeasured.code, unmeasured.out.splitlines()[0]) == (0, "Verdict: unmeasured")
    assert "fix: Measure it: --probe 8 (probe: 8 in a recipe), with a suite for each." in unmeasured.out
    assert team.json("conflicts", *PAIR)["verdict"] == "unmeasured"
    required = team("conflicts", *PAIR, "--require", "ok")
    assert (required.code, "the verdict is unmeasured, and ok is required" in required.err) == (1, True)
    assert team("conflicts", *PAIR, "--require", "unmeasured").code == 0
    wrong = team("conflicts", *PAIR, "--require", "fine")
    assert (wrong.code, "Unknown verdict 'fine' in --require" in wrong.err) == (2, True)
    recipe = tmp_path / "recipe.yaml"
    inputs = [{"adapter": ref} for ref in PAIR]
    recipe.write_text(yaml.safe_dump({"inputs": inputs, "method": "stack", "adapter": "acme/both:1.0.0", "probe": 0}))
    planned = team("compose", recipe, "--plan")
    assert (planned.code, "conflicts: unmeasured" in planned.out) == (0, True)
    refused = team("compose", recipe, "--plan", "--require", "ok")
    assert (refused.code, "is unmeasured, and ok is required" in refused.err) == (1, True)
    ended = team("compose", recipe, "--follow", "--require", "ok")
    assert (ended.code, "next: Measure it: --probe 8" in ended.err) == (1, True)
    assert team("show", "acme/both:1.0.0").code == 3, "nothing was published"


def test_eight_examples_that_nothing_harms_are_ok(world: World, tmp_path: Path) -> None:
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home")})
    suites = [suite_file(tmp_path, name, [(f"{name} {number}", "yes") for number in range(9)]) for name in "ab"]
    policy = tmp_path / "policy.yaml"
    policy.write_text("thresholds: {probe_loss: 1000, probe_answers: 0}\n")
    pair = (world.adapters["sql"], world.adapters["terraform"])
    asked = ("conflicts", *pair, "--base", world.base, "--suite", suites[0], "--suite", suites[1], "--policy", policy)
    assert cli.ok(*asked, "--probe", "8", "--require", "ok").out.startswith("Verdict: ok, measured on 8 examples")
    few = cli(*asked, "--probe", "7", "--require", "ok")
    assert (few.code, few.out.splitlines()[0][:48]) == (1, "Verdict: undecided, measured on 7 examples a sui")


def suite_file(directory: Path, name: str, rows: list[tuple[str, str]]) -> Path:
    path = directory / f"{name}.yaml"
    examples = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    path.write_text(yaml.safe_dump({"name": name, "kind": "target", "chat": True, "examples": examples}))
    return path


@pytest.mark.on("PostgreSQL")
def test_members_that_want_other_answers_to_the_same_prompts_are_named_first(team: Cli, tmp_path: Path) -> None:
    for suite, ref, answer in (("up", PAIR[0], "A"), ("low", PAIR[1], "a")):
        team.ok("suite", "add", suite_file(tmp_path, suite, [(f"case {number}", answer) for number in range(6)]))
        team.ok("eval", ref, "--suite", suite)
    shown = team.ok("conflicts", *PAIR).out
    assert "share 6 prompts and require different answers to 6 of them: no single model" in " ".join(shown.split())
    assert shown.splitlines()[0] == "Verdict: warn"
    assert "fix: Serve them separately and name" in shown
    recipe = tmp_path / "recipe.yaml"
    inputs = [{"adapter": ref, "suite": suite} for ref, suite in zip(PAIR, ("up", "low"), strict=True)]
    recipe.write_text(yaml.safe_dump({"inputs": inputs, "method": "stack", "adapter": "acme/both:1.0.0", "probe": 0}))
    planned = team.json("compose", recipe, "--plan")["conflicts"]
    assert (planned["verdict"], planned["findings"][0]["code"]) == ("warn", "same_prompts")


def test_a_policy_decides_the_verdict_and_the_exit_code(team: Cli, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("input_overlap: error\nthresholds: {input_overlap: -1}\n")
    refused = team("conflicts", *PAIR, "--policy", policy, "--json")
    assert (refused.code, refused.json["verdict"]) == (1, "refuse")
    assert {"input_overlap", "weak_evidence"} == {finding["code"] for finding in refused.json["findings"]}
    policy.write_text("weak_evidence: ignore\n")
    assert team.json("conflicts", *PAIR, "--policy", policy)["findings"] == []
    policy.write_text("vocabulary_mismatch: ignore\n")
    hard = team("conflicts", *PAIR, "--policy", policy)
    assert hard.code == 6
    assert "vocabulary_mismatch" in hard.err
    assert team("conflicts", *PAIR, "--policy", tmp_path / "nowhere.yaml").code == 6


def test_the_page_is_one_file_with_the_same_verdict(team: Cli, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    ran = team.ok("conflicts", *PAIR, "--html", page, "--json")
    assert str(page) in ran.err
    tree = Tree(page.read_text(encoding="utf-8")).root
    assert f"Verdict: {ran.json['verdict']}" in tree.full_text()
    assert "acme/sql:1.0.0" in tree.full_text()
    assert team("conflicts", *PAIR, "--html", tmp_path / "no" / "report.html").code == 2


def test_a_page_is_not_written_through_a_link(world: World, tmp_path: Path) -> None:
    kept, link = tmp_path / "config.json", tmp_path / "report.html"
    kept.write_text("{}")
    link.symlink_to(kept)
    pair = (world.adapters["sql"], world.adapters["support"])
    ran = Cli({"ADAPTORY_HOME": "/dev/null"})("conflicts", *pair, "--html", link)
    assert (ran.code, f"{link} cannot be written: it is a link" in ran.err) == (2, True), ran.err
    assert (kept.read_text(), sorted(tmp_path.iterdir())) == ("{}", [kept, link])


def test_directories_are_compared_beside_a_base_without_any_registry_entry(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    pair = (world.adapters["sql"], world.adapters["terraform"])
    assert on_disk.json("conflicts", *pair)["whole"]["lost_share"] is None
    beside = on_disk.json("conflicts", *pair, "--base", world.base)
    assert beside["whole"]["lost_share"] is not None
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    assert on_disk("conflicts", *pair, "--prompts", prompts).code == 2, "a measurement needs the base's weights"
    assert on_disk.json("conflicts", *pair, "--base", world.base, "--prompts", prompts)["activations"]["prompts"] == 1


def test_directories_are_compared_without_a_registry_that_could_be_opened(world: World, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no directory")
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home")})
    pair = (world.adapters["sql"], world.adapters["terraform"])
    assert cli.json("conflicts", *pair, "--base", world.base)["pairs"]
    assert cli("conflicts", world.adapters["sql"], "acme/terraform").code == 7


def test_a_probe_of_directories_takes_suites_from_files_and_needs_no_registry(world: World, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no directory")
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home")})
    asked = ("conflicts", world.adapters["sql"], world.adapters["terraform"], "--base", world.base, "--probe", "2")
    suites = [tmp_path / f"{name}.yaml" for name in ("one", "two", "general")]
    for path in suites:
        examples = [{"prompt": f"{path.stem} {number}", "completion": "yes"} for number in range(4)]
        path.write_text(yaml.safe_dump({"name": path.stem, "kind": "target", "chat": True, "examples": examples}))
    given = ("--suite", suites[0], "--suite", suites[1], "--guard", suites[2], "--probe-max", "2")
    probe = cli.json(*asked, *given, "--weights", "1,0.5")["pairs"][0]["probe"]
    assert [effect["suite"] for effect in probe["effects"]] == ["one", "two"]
    assert [guard["suite"] for guard in probe["guards"]] == ["general"]
    assert probe["effects"][0]["alone_weighted"] is None
    assert probe["effects"][1]["alone_weighted"] > 0
    missing = cli(*asked, "--suite", suites[0], "--suite", tmp_path / "three.yaml")
    assert missing.code == 6
    assert "three.yaml cannot be read: No such file" in missing.err


def test_rules_of_a_recipe_reach_the_lock_the_report_and_the_result(team: Cli, tmp_path: Path) -> None:
    rules = [{"modules": "q_proj", "weight": 0.0}]
    recipe = tmp_path / "recipe.yaml"
    inputs = [{"adapter": PAIR[0]}, {"adapter": PAIR[1], "weight": 0.5, "rules": rules}]
    recipe.write_text(yaml.safe_dump({"inputs": inputs, "method": "stack", "adapter": "acme/both:1.0.0", "probe": 0}))
    done = team.json("compose", recipe, "--follow")
    assert done["state"] == "done"
    assert done["lock"]["inputs"][1]["rules"] == rules
    assert done["conflicts"]["adapters"][1]["weight"]["rules"] == rules
    assert done["conflicts"]["whole"]["interference"] == pytest.approx(1.0)
    team.ok("pull", "acme/both:1.0.0", "-o", tmp_path / "both")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["r"] == 4, "in q_proj the second one is not there: its rank is the first one's"


def test_a_policy_in_a_recipe_can_end_a_composition_and_a_bad_one_is_refused_at_once(team: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {
        "inputs": [{"adapter": ref} for ref in PAIR],
        "method": "stack",
        "adapter": "acme/both:1.0.0",
        "probe": 0,
    }
    recipe.write_text(
        yaml.safe_dump(content | {"policy": {"input_overlap": "error", "thresholds": {"input_overlap": -1}}})
    )
    ended = team("compose", recipe, "--follow")
    assert ended.code == 1
    assert "share input directions beyond chance" in ended.err
    assert team("show", "acme/both:1.0.0").code == 3, "nothing was published"
    recipe.write_text(yaml.safe_dump(content | {"policy": {"input_overlap": "fatal"}}))
    refused = team("compose", recipe)
    assert refused.code == 6
    assert "policy" in refused.err
    assert "'fatal'" in refused.err
    recipe.write_text(yaml.safe_dump(content | {"policy": {"crowding": "error", "thresholds": {"crowding": 0.01}}}))
    planned = team.json("compose", recipe, "--plan")["conflicts"]
    assert planned["verdict"] == "unmeasured", "the report no longer has that number"
    assert "dropped_code" in [finding["code"] for finding in planned["findings"]]
