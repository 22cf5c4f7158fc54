"""A guard suite of a base's own answers: made by one command, and used by fits, gates and evaluations."""

from pathlib import Path

import yaml

from composer.formats.recipes.instructions import INSTRUCTIONS
from composer.formats.recipes.suite import parse_suite
from tests.scenarios.test_regmean import adapters, suites
from tests.scenarios.world import Cli, World


def test_a_base_answers_instructions_which_then_guard_fits_and_measure_releases(
    stocked: Cli, world: World, tmp_path: Path
) -> None:
    file = tmp_path / "guard.yaml"
    made = stocked.json("suite", "guard", "tiny", "-o", file, "--examples", 12, "--tokens", 6)
    suite = parse_suite(file)
    assert (suite.kind, suite.chat, suite.digest) == ("guard", True, made["digest"])
    assert [example.prompt for example in suite.examples] == [
        prompt for prompt in INSTRUCTIONS[:12] if prompt not in made["unanswered"]
    ]
    assert suite.ends is (made["cut"] == 0)

    stocked.ok("suite", "add", file)
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    (on_base,) = [
        row for row in stocked.json("eval", "tiny", "--suite", suite.name)["scores"] if row["metric"] == "accuracy"
    ]
    assert on_base["value"] > 0.9  # its own answers; the text of one in twelve reads back as other tokens
    fitting = ("combine", *adapters(world), *suites(world), "--base", world.base, "--method", "regmean")
    changed = [
        stocked.json(*fitting, "--guard", file, "--set", f"guard={weight}", "-o", tmp_path / f"both-{weight}")["fit"]
        for weight in (1, 100)
    ]
    assert changed[1]["guard"] < changed[0]["guard"] / 2  # less is changed on these instructions


def test_a_directory_and_own_instructions_do_without_a_registry(on_disk: Cli, world: World, tmp_path: Path) -> None:
    prompts = [f"say {number}" for number in range(9)]
    (tmp_path / "own.txt").write_text("\n".join([*prompts, prompts[0]]))
    file = tmp_path / "own-guard.yaml"
    ran = on_disk.ok("suite", "guard", world.base, "-o", file, "--name", "own", "--prompts", tmp_path / "own.txt")
    assert [example["prompt"] for example in yaml.safe_load(file.read_text())["examples"]] == prompts
    assert f"adaptory suite add {file}" in ran.out.replace("\n", " ")
    again = on_disk("suite", "guard", world.base, "-o", file)
    assert (again.code, "exists" in again.err) == (4, True)


def test_too_few_and_too_many_instructions_are_refused_by_name(on_disk: Cli, world: World, tmp_path: Path) -> None:
    few, file = tmp_path / "few.txt", tmp_path / "guard.yaml"
    few.write_text("one\ntwo\nthree")
    refused = on_disk("suite", "guard", world.base, "-o", file, "--prompts", few)
    assert (refused.code, "the base answers 3 of 3 prompts" in refused.err) == (1, True), refused.err
    many = on_disk("suite", "guard", world.base, "-o", file, "--examples", 1000)
    assert (many.code, f"has {len(INSTRUCTIONS)} instructions" in many.err) == (2, True), many.err
    assert not file.exists()
