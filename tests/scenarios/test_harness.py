"""Tasks of lm-evaluation-harness on adapters and their base, from YAML files and data on this disk."""

from pathlib import Path

import pytest
import yaml

from tests.composer.harness_tasks import CHOICES, LOSS, WORDS, write_task
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


def test_harness_tasks_are_recorded_as_suites_with_the_version_of_the_harness(
    team: Cli, world: World, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks"
    write_task(tasks, "colours", CHOICES, [0, 1, 2, 0, 1])
    write_task(tasks, "Words", WORDS, ["a", "b", "c"], version="2.1")
    write_task(tasks, "loss", LOSS, ["", "", ""])
    asked = ("--harness", "colours,Words", "--harness", "loss", "--harness-path", tasks)
    done = team.json("eval", "acme/sql", "acme/terraform", "tiny", *asked, "--suite", "sql-exact")["items"]
    assert [subject["subject"] for subject in done] == ["acme/sql", "acme/terraform", "tiny"]
    rows = {(row["suite"], row["metric"]): row for row in done[0]["scores"]}
    names = [("colours", "acc"), ("colours", "acc_norm"), ("words", "exact_match_strict"), ("loss", "bits_per_byte")]
    assert [*rows] == [("sql-exact", "nll"), ("sql-exact", "accuracy"), *names]
    assert [rows[name]["n"] for name in names] == [5, 5, 3, 3]
    assert rows["colours", "acc"]["stderr"] > 0
    assert (rows["loss", "bits_per_byte"]["higher_is_better"], rows["colours", "acc"]["higher_is_better"]) == (
        False,
        True,
    )
    losses = [next(row["value"] for row in subject["scores"] if row["suite"] == "loss") for subject in done]
    assert len(set(losses)) == 3, "each adapter was active for its own run, and none for the base"

    shown = {(row["suite"], row["metric"]): row for row in team.json("show", "acme/sql")["scores"]}
    assert {name: shown[name]["value"] for name in names} == {name: rows[name]["value"] for name in names}
    assert all((shown[name]["task"], shown[name]["reported"]) == ("harness", False) for name in names)
    assert all(shown[name]["source"].startswith("lm-eval 0.") for name in names)
    suites = {row["name"]: row for row in team.json("suite", "list")["items"]}
    assert suites["colours"]["version"].startswith("1.0.0-lm-eval.0.")
    assert suites["words"]["version"].startswith("2.1.0-lm-eval.0.")
    assert (suites["colours"]["task"], suites["colours"]["examples"], suites["loss"]["metrics"]) == (
        "harness",
        5,
        {"bits_per_byte": "lower"},
    )
    with api_of(team) as api:
        kept = api.get("/v1/adapters/acme/sql/releases/1.0.0/scores/colours/results")
    assert (kept["metric"], len(kept["examples"])) == ("acc", 5)
    assert {row["answer"] for row in kept["examples"]} <= {"red", "green", "blue"}
    assert sum(row["score"] for row in kept["examples"]) / 5 == rows["colours", "acc"]["value"]
    compared = team.json("diff", "acme/sql", "acme/terraform", "--examples")
    assert next(row for row in compared["scores"] if row["metric"] == "acc")["paired"]["n"] == 5

    team.ok("gate", "acme/sql@prod", "--rule", "colours.acc >= 0", "--rule", "loss.bits_per_byte within 9 of base")
    team.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    refused = team("eval", "acme/sql", "--suite", "colours")
    assert (refused.code, "--harness colours" in refused.err) == (2, True)
    recipe = {
        "adapter": "acme/both:1.0.0",
        "base": "tiny",
        "inputs": [{"adapter": "acme/sql:1.0.0"}],
        "method": "stack",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": ["colours"]}))
    planned = team("compose", tmp_path / "recipe.yaml", "--plan")
    assert (planned.code, "it is a task of an evaluation harness" in planned.err) == (2, True)


@pytest.mark.long
def test_the_content_of_a_task_is_its_configuration_and_documents_wherever_these_are(team: Cli, tmp_path: Path) -> None:
    for copy in ("first", "second"):
        write_task(tmp_path / copy, "colours", CHOICES, [0, 1, 2])
        team.ok("eval", "acme/sql", "--harness", "colours", "--harness-path", tmp_path / copy)
    (suite,) = (row for row in team.json("suite", "list")["items"] if row["name"] == "colours")
    assert suite["version"] is not None, "both are one content"
    changed = tmp_path / "changed"
    write_task(changed, "colours", CHOICES, [0, 1, 1])
    noted = team.ok("eval", "acme/sql", "--harness", "colours", "--harness-path", changed)
    assert "recorded without a version" in noted.err
    (now,) = (row for row in team.json("suite", "list")["items"] if row["name"] == "colours")
    assert (now["digest"] == suite["digest"], now["version"]) == (False, None)
    write_task(changed, "colours", CHOICES, [0, 1, 1], version=2)
    team.ok("eval", "acme/sql", "--harness", "colours", "--harness-path", changed)
    assert team.json("suite", "list")["items"][-1]["version"].startswith("2.0.0-lm-eval.")


def test_a_harness_task_does_not_take_the_name_of_a_suite_and_errors_are_said_in_one_line(
    team: Cli, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks"
    write_task(tasks, "sql-exact", CHOICES, [0, 1])
    taken = team("eval", "acme/sql", "--harness", "sql-exact", "--harness-path", tasks)
    assert (taken.code, "sql-exact is a suite with examples" in taken.err) == (4, True)
    unknown = team("eval", "acme/sql", "--harness", "other", "--harness-path", tasks)
    assert (unknown.code, "has sql-exact" in unknown.err) == (3, True)
    write_task(tasks, "broken", {**CHOICES, "doc_to_text": "{{ 1 / 0 }}"}, [0, 1])
    broken = team("eval", "acme/sql", "--harness", "broken", "--harness-path", tasks)
    assert (broken.code, "lm-eval cannot load broken: ZeroDivisionError" in broken.err) == (6, True)
    assert team("eval", "acme/sql").code == 2
    for option in (("--num-fewshot", "0"), ("--apply-chat-template",)):
        idle = team("eval", "acme/sql", "--suite", "sql-exact", *option)
        assert (idle.code, f"{option[0]} has no effect without --harness" in idle.err) == (2, True)


def test_a_run_on_the_first_documents_alone_is_not_recorded(team: Cli, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "colours", CHOICES, [0, 1, 2] * 4)
    asked = ("--harness", "colours", "--harness-path", tmp_path / "tasks", "--limit", "7")
    sliced = team.json("eval", "acme/sql", *asked)
    assert (sliced["recorded"], sliced["scores"][0]["n"]) == (False, 7)
    assert team.json("show", "acme/sql")["scores"] == []
    assert all(row["name"] != "colours" for row in team.json("suite", "list")["items"])


def test_a_group_has_the_score_that_the_harness_makes_of_its_tasks(team: Cli, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    for name, answers in (("warm", [0, 0, 0]), ("cold", [2])):
        write_task(tasks, name, CHOICES, answers)
    group = {"group": "hues", "task": ["warm", "cold"], "metadata": {"version": 1}}
    group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (tasks / "hues.yaml").write_text(yaml.safe_dump(group))
    done = team.json("eval", "acme/sql", "--harness", "hues", "--harness-path", tasks)
    rows = {(row["suite"], row["metric"]): row for row in done["scores"]}
    mean = (3 * rows["warm", "acc"]["value"] + rows["cold", "acc"]["value"]) / 4
    assert (rows["hues", "acc"]["value"], rows["hues", "acc"]["n"]) == (pytest.approx(mean), 4)


def test_how_a_task_is_asked_is_a_part_of_its_content_and_of_its_version(team: Cli, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    write_task(tasks, "colours", CHOICES, [0, 1, 2, 0, 1])
    write_task(tasks, "fixed", CHOICES | {"num_fewshot": 0}, [0, 1, 2])
    asked = ("eval", "acme/sql", "--harness", "colours,fixed", "--harness-path", tasks)
    scores: dict[str, float] = {}
    for options in ((), ("--num-fewshot", "2"), ("--apply-chat-template",), ("--num-fewshot", "0")):
        rows = team.json(*asked, *options)["scores"]
        assert [row["n"] for row in rows] == [5, 5, 3, 3]
        scores[" ".join(options)] = rows[1]["suite_digest"]
        current = {row["name"]: row["version"] for row in team.json("suite", "list")["items"]}
        how = {"--num-fewshot 2": ".2-shot", "--apply-chat-template": ".chat"}.get(" ".join(options), "")
        assert (current["colours"] or "").partition("lm-eval.0.4.")[2].lstrip("0123456789") == how
    assert scores["--num-fewshot 0"] == scores[""], "the task's own number"
    assert len(set(scores.values())) == 3


@pytest.mark.long
def test_a_worker_runs_a_task_if_it_makes_the_same_content_of_it(team: Cli, tmp_path: Path) -> None:
    tasks, others = tmp_path / "tasks", tmp_path / "others"
    for directory, answers in ((tasks, [0, 1, 2, 0, 1]), (others, [0, 1, 2, 0, 2])):
        write_task(directory, "colours", CHOICES, answers)
        write_task(directory, "Words", WORDS, ["a", "b"])
        group = {"group": "hues", "task": ["colours"], "aggregate_metric_list": [{"metric": "acc"}]}
        (directory / "hues.yaml").write_text(yaml.safe_dump(group))
    asked = ("--harness", "hues,Words", "--harness-path", tasks, "--num-fewshot", "1")
    here = team.json("eval", "acme/terraform", *asked)["scores"]
    worker = Cli(team.environment | {"ADAPTORY_HARNESS_PATH": str(tasks)}, team.served_with)
    done = worker.json("eval", "acme/terraform", "acme/sql", *asked, "--queue", "--suite", "sql-exact")
    assert done["state"] == "done"
    measured = {(item["repository"], item["suite"]): item["scores"] for item in done["items"]}
    assert {suite for _, suite in measured} == {"sql-exact", "colours", "words", "hues"}
    for row in here:
        again = next(result for result in measured["acme/terraform", row["suite"]] if result["metric"] == row["metric"])
        assert again["value"] == pytest.approx(row["value"], rel=1e-5)
    shown = {(row["suite"], row["metric"]): row for row in team.json("show", "acme/sql")["scores"]}
    assert shown["hues", "acc"]["source"].startswith("lm-eval 0.")
    with api_of(team) as api:
        assert len(api.get("/v1/adapters/acme/sql/releases/1.0.0/scores/colours/results")["examples"]) == 5

    worker.ok("eval", "acme/sql", "--suite", "colours", "--queue")
    elsewhere = Cli(team.environment | {"ADAPTORY_HARNESS_PATH": str(others)}, team.served_with)
    refused = elsewhere("eval", "acme/sql", "--suite", "colours", "--suite", "words", "--queue")
    assert (refused.code, "documents differ" in " ".join(refused.err.split())) == (1, True)
