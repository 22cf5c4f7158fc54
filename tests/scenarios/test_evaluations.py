"""Suites with versions and tasks; several releases on several suites; releases compared example by example."""

import json
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.scenarios.traces import api_of, opened, traces
from tests.scenarios.world import Cli, World


def write_suite(directory: Path, name: str, **fields: Any) -> Path:
    examples = [{"prompt": f"say {number}", "completion": f"{number}"} for number in range(8)]
    document = {"name": name, "kind": "target", "chat": True, "examples": examples} | fields
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def push_both(cli: Cli, world: World) -> None:
    for version, adapter in (("1.0.0", "sql"), ("1.1.0", "other-sql")):
        cli.ok("push", world.adapters[adapter], f"acme/sql:{version}", "--base", "tiny")


def test_a_version_labels_one_content_and_a_gate_says_when_its_suite_has_moved_on(
    stocked: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked
    first = cli.json("suite", "add", write_suite(tmp_path, "said", version="1.0.0"))
    assert (first["version"], first["task"]) == ("1.0.0", "teacher_forced")
    other = write_suite(tmp_path, "said", version="1.0.0", ends=False)
    taken = cli("suite", "add", other)
    assert (taken.code, "Raise `version`" in taken.err) == (4, True)
    relabelled = cli("suite", "add", write_suite(tmp_path, "said", version="2.0.0"))
    assert (relabelled.code, "already said@1.0.0" in relabelled.err) == (4, True)
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    cli.ok("eval", "acme/sql:1.0.0", "--suite", "said")
    cli.ok("gate", "acme/sql@prod", "--rule", "said.nll <= 1000")

    second = cli.json("suite", "add", write_suite(tmp_path, "said", version="1.1.0", ends=False))
    assert second["digest"] != first["digest"]
    assert "said@1.1.0" in cli.ok("suite", "list").out
    shown = cli.ok("policy", "show", "acme/sql@prod").out
    assert (
        "pinned to said 1.0.0, which is now 1.1.0 (`adaptory gate acme/sql@prod --repin` accepts the change)" in shown
    )
    moved = cli.json("promote", "acme/sql:1.0.0", "--to", "prod")
    assert "pinned to said 1.0.0, which is now 1.1.0" in moved["gates"][0]["detail"]
    cli.ok("gate", "acme/sql@staging", "--rule", "said.nll <= 1000")
    refused = cli("promote", "acme/sql:1.0.0", "--to", "staging")
    assert (refused.code, "the suite has moved on" in refused.err) == (1, True), refused.err
    assert "on 1.0.0, judged on 1.1.0" in refused.err.replace("\n        ", " ")
    old = cli.json("eval", "acme/sql:1.0.0", "--suite", "said@1.0.0")
    assert old["scores"][0]["suite_digest"] == first["digest"]
    assert cli("promote", "acme/sql:1.0.0", "--to", "staging").code == 1, "a rule compares one content alone"
    cli.ok("gate", "acme/sql@prod", "--repin")
    assert "which is now" not in cli.ok("policy", "show", "acme/sql@prod").out
    cli.ok("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny")
    cli.ok("eval", "acme/sql:1.1.0", "--suite", "said@1.0.0")
    assert cli("promote", "acme/sql:1.1.0", "--to", "prod").code == 1, "what is pinned now is 1.1.0"
    assert cli("eval", "acme/sql:1.0.0", "--suite", "said@3.0.0").code == 3
    cli.ok("eval", "acme/sql:1.0.0", "--suite", "said")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "staging")


def test_a_suite_that_gets_its_first_version_keeps_its_digest_and_scores(stocked_embedded: Cli, tmp_path: Path) -> None:
    before = stocked_embedded.json("suite", "add", write_suite(tmp_path, "said"))
    after = stocked_embedded.json("suite", "add", write_suite(tmp_path, "said", version="1.0.0"))
    assert (before["version"], after["version"]) == (None, "1.0.0")
    assert before["digest"] == after["digest"]


@pytest.mark.long
def test_several_releases_and_their_base_are_evaluated_on_several_suites_at_once(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    push_both(cli, world)
    cli.ok("suite", "add", write_suite(tmp_path, "spoken", task="generation", generation={"max_new_tokens": 4}))
    choices = [{"prompt": f"say {n}", "completion": f"{n}", "choices": ["0", "1", "2"]} for n in range(3)]
    cli.ok("suite", "add", write_suite(tmp_path, "chosen", task="multiple_choice", examples=choices))
    command = ("eval", "acme/sql:1.0.0", "acme/sql:1.1.0", "tiny", "--suite", "spoken", "--suite", "chosen")
    together = cli.json(*command)["items"]
    assert [row["subject"] for row in together] == ["acme/sql:1.0.0", "acme/sql:1.1.0", "tiny"]
    for evaluated in together:
        named = {(score["suite"], score["metric"]): score for score in evaluated["scores"]}
        assert {key: score["n"] for key, score in named.items()} == {
            ("spoken", "nll"): 8, ("spoken", "accuracy"): 8, ("chosen", "nll"): 3, ("chosen", "accuracy"): 3,
        }  # fmt: skip
    alone = cli.json("eval", "acme/sql:1.1.0", "--suite", "spoken", "--suite", "chosen")
    assert alone == together[1]
    shown = cli.json("show", "acme/sql:1.1.0")["scores"]
    assert {score["suite"] for score in shown} == {"spoken", "chosen"}
    with api_of(cli) as api:
        path = f"/v1/bases/{cli.json('base', 'show', 'tiny')['digest']}/scores/spoken/results"
        answers = [row["answer"] for row in api.get(path)["examples"]]
        assert len(answers) == 8
        assert all(len(answer) <= 4 for answer in answers)
    document = cli.json("diff", "tiny", "acme/sql:1.1.0", "--examples")
    values = {(row["suite"], row["metric"]): row["value"] for row in together[1]["scores"]}
    assert (document["old"], document["change"], document["deltas"]) == ("tiny", None, None)
    assert {(row["suite"], row["metric"]): row["new"] for row in document["scores"]} == values
    paired = {row["suite"]: row["paired"] for row in document["scores"] if row["metric"] == "nll"}
    assert {suite: row["n"] for suite, row in paired.items()} == {"spoken": 8, "chosen": 3}
    back = cli.json("diff", "acme/sql:1.1.0", "tiny")["scores"]
    assert [row["difference"] for row in back] == [pytest.approx(-row["difference"]) for row in document["scores"]]
    shown = cli.ok("diff", "tiny", "acme/sql:1.1.0").out
    assert paired["spoken"]["in_words"] in " ".join(shown.split())
    refused = cli("diff", "tiny", world.adapters["sql"])
    assert (refused.code, "a base" in refused.err, "Name a release" in refused.err) == (2, True, True)
    cli.ok("push", world.adapters["sql"], "acme/new:1.0.0", "--base", "tiny")
    assert "adaptory eval tiny acme/new:1.0.0 --suite" in cli.ok("diff", "tiny", "acme/new:1.0.0").err


def test_a_python_scorer_that_the_operator_has_not_enabled_does_not_run(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    cli.ok("suite", "add", write_suite(tmp_path, "queries", task="generation", scorer="sql_results"))
    refused = cli("eval", "tiny", "--suite", "queries")
    assert refused.code == 1
    assert "ADAPTORY_SCORERS=sql_results" in refused.err


def test_releases_are_compared_example_by_example_and_the_results_outlive_a_collection(
    stocked: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked
    push_both(cli, world)
    cli.ok("eval", "acme/sql:1.0.0", "acme/sql:1.1.0", "--suite", "sql-exact")
    stored = traces(cli).blobs
    cli.ok("gc", "--grace-hours", "0") if cli.environment.get("ADAPTORY_URL") is None else None
    document = cli.json("diff", "acme/sql:1.0.0", "acme/sql:1.1.0", "--examples")
    rows = {row["metric"]: row for row in document["scores"]}
    nll, accuracy = rows["nll"]["paired"], rows["accuracy"]["paired"]
    assert nll["difference"] == pytest.approx(rows["nll"]["difference"])
    assert nll["low"] < nll["difference"] < nll["high"]
    assert nll["n"] == nll["gained"] + nll["lost"] == 6
    assert (accuracy["gained"], accuracy["lost"], accuracy["verdict"]) == (0, 0, "undecided")
    assert accuracy["in_words"] == "the same on all 6 examples"
    assert document["examples"] == []
    assert nll["in_words"] in " ".join(cli.ok("diff", "acme/sql:1.0.0", "acme/sql:1.1.0").out.split())
    assert traces(cli).blobs == stored


@pytest.mark.long
def test_a_job_whose_worker_stops_inside_a_suite_goes_on_at_the_example_where_it_stopped(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_on_disk
    examples = [{"prompt": f"say {number}", "completion": "0"} for number in range(960)]
    generation = {"max_new_tokens": 8}
    cli.ok("suite", "add", write_suite(tmp_path, "long", task="generation", generation=generation, examples=examples))
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    asked = tmp_path / "policy.yaml"
    asked.write_text(yaml.safe_dump({"version": 1, "rules": ["long.nll <= 99"]}))
    cli.ok("policy", "set", "acme/sql@prod", asked)
    waiting = cli.json("promote", "acme/sql:1.0.0", "--to", "prod", "--no-wait")
    stop, kept = threading.Event(), Path(cli.environment["ADAPTORY_HOME"]) / "cache" / "eval"

    def journal() -> Path:
        deadline = time.monotonic() + 60
        while not (seen := [*kept.glob("*.jsonl")]) or seen[0].read_text().count("\n") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        stop.set()
        return seen[0]

    with closing(opened(cli)) as resources:
        watching = threading.Thread(target=journal)
        watching.start()
        assert run_one(resources, KINDS, "first", stop)
        watching.join()
        assert cli.json("jobs", waiting["job"])["state"] == "queued"
        [path] = kept.glob("*.jsonl")
        head, batch, *rest = path.read_text().splitlines()
        assert len(rest) < 50, "of 60 batches"
        rows = json.loads(batch)
        rows[0][6] = "measured before"
        path.write_text("\n".join([head, json.dumps(rows), *rest, ""]))
        assert run_one(resources, KINDS, "second")
    assert cli.json("jobs", waiting["job"])["state"] == "done"
    assert cli.json("show", "acme/sql@prod")["version"] == "1.0.0"
    with api_of(cli) as api:
        results = api.get("/v1/adapters/acme/sql/releases/1.0.0/scores/long/results")["examples"]
    assert len(results) == 960
    assert [row["answer"] for row in results].count("measured before") == 1
