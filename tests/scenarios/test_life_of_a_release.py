"""Push, find, promote, regret, roll back: through the command line, embedded and against real servers."""

import json
import os
import shutil
from pathlib import Path

import pytest

from registry.errors import Invalid, Usage
from tests.forked import start_command
from tests.scenarios import stored
from tests.scenarios.conftest import USER
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World, own_environment


@pytest.mark.on("PostgreSQL")
def test_a_release_lives_from_push_to_rollback(stocked: Cli, world: World, tmp_path: Path) -> None:
    cli = stocked
    first = cli.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--notes", "the first")
    assert first["created"]
    facts = first["release"]["adapter"]
    assert (facts["type"], facts["rank_max"], facts["targets"]) == ("lora", 4, ["q_proj", "v_proj"])
    cli.ok("push", world.adapters["terraform"], "acme/terraform:1.0.0", "--base", "Acme/Tiny-Llama")

    cli.ok("eval", "tiny", "--suite", "sql-exact", "--suite", "guard-exact")
    scores = cli.json("eval", "acme/sql", "--suite", "sql-exact", "--suite", "guard-exact")["scores"]
    measured = {(score["suite"], score["metric"], score["n"]) for score in scores}
    assert measured == {(suite, metric, 6) for suite in ("sql-exact", "guard-exact") for metric in ("nll", "accuracy")}
    shown = cli.json("show", "acme/sql")
    assert {score["metric"] for score in shown["scores"]} == {"nll", "accuracy"}
    assert all(score["stderr"] is not None for score in shown["scores"])

    hits = cli.json(
        "search",
        "--base",
        "tiny",
        "--max-rank",
        "4",
        "--targets-within",
        "q_proj,v_proj",
        "--score",
        "sql-exact.nll<=99",
    )
    assert [release["repository"] for release in hits["items"]] == ["acme/sql"]

    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "ready")
    cli.ok("push", world.adapters["other-sql"], "acme/sql", "--bump", "minor", "--base", "tiny")
    cli.ok("promote", "acme/sql:1.1.0", "--to", "prod", "--reason", "better")
    assert cli.json("show", "acme/sql@prod")["version"] == "1.1.0"
    moved = cli.json("rollback", "acme/sql@prod", "--reason", "it was not better")
    assert (moved["kind"], moved["from_version"], moved["to_version"], moved["actor"]) == (
        "rollback",
        "1.1.0",
        "1.0.0",
        USER,
    )

    moves = cli.json("history", "acme/sql@prod")["items"]
    assert [(move["kind"], move["to_version"], move["reason"]) for move in moves] == [
        ("rollback", "1.0.0", "it was not better"), ("promote", "1.1.0", "better"), ("promote", "1.0.0", "ready"),
    ]  # fmt: skip

    cli.ok("pull", "acme/sql@prod", "-o", tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (world.adapters["sql"] / name).read_bytes()


def test_the_same_push_again_is_a_no_op_and_other_content_is_a_conflict(stocked: Cli, world: World) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    again = stocked.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert not again["created"]
    other = stocked("push", world.adapters["other-sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert other.code == 4
    assert "never changes" in other.err
    assert len(stocked.json("log", "acme/sql")["items"]) == 1


@pytest.mark.long
def test_yanked_releases_are_skipped_but_still_there_by_name(stocked: Cli, world: World) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod")
    stocked.ok("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny", "--channel", "prod")
    for moving in ("acme/sql", "acme/sql:^1.0", "acme/sql@prod"):
        refused = stocked("yank", moving, "--reason", "leaks customer names")
        assert (refused.code, "can mean a different release" in refused.err) == (2, True)
    stocked.ok("yank", "acme/sql:1.1.0", "--reason", "leaks customer names")
    assert stocked.json("show", "acme/sql")["version"] == "1.0.0"
    assert stocked.json("show", "acme/sql:^1.0")["version"] == "1.0.0"
    on_channel = stocked.ok("show", "acme/sql@prod", "--json")
    assert on_channel.json["version"] == "1.0.0"
    assert "leaks customer names" in on_channel.err
    exact = stocked.ok("show", "acme/sql:1.1.0", "--json")
    assert exact.json["yanked"]
    assert "leaks customer names" in exact.err
    for command in (("inspect",), ("eval", "--suite", "sql-exact"), ("conflicts", "acme/sql:1.0.0")):
        assert "leaks customer names" in stocked.ok(*command, "acme/sql:1.1.0").err, command
    assert stocked("promote", "acme/sql:1.1.0", "--to", "canary", "--new-channel").code == 1
    back = stocked.ok("unyank", "acme/sql:1.1.0", "--reason", "the names were invented")
    assert "warning:" not in back.err, "that it was yanked is why it is unyanked"
    assert stocked.json("show", "acme/sql@prod")["version"] == "1.1.0"


def test_a_yank_and_taking_it_back_are_refused_without_a_reason(stocked: Cli, world: World) -> None:
    release = "/v1/adapters/acme/sql/releases/1.0.0"
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    for act, reason in (("yank", "leaks customer names"), ("unyank", "the names were invented")):
        before = stocked.json("show", "acme/sql:1.0.0")["yanked"]
        assert stocked(act, "acme/sql:1.0.0").code == 2
        blank = stocked(act, "acme/sql:1.0.0", "--reason", " ")
        assert (blank.code, "State a reason with --reason." in blank.err) == (2, True)
        for body in (None, {}, {"reason": ""}, {"reason": " "}):
            with api_of(stocked) as api, pytest.raises((Invalid, Usage)):
                api.post(f"{release}/{act}", body)
        assert stocked.json("show", "acme/sql:1.0.0")["yanked"] == before
        stocked.ok(act, "acme/sql:1.0.0", "--reason", reason)
    events = stocked.json("audit", "--subject", "acme/sql:1.0.0")["items"][:-1]
    assert [(event["act"], event["reason"], event["after"]["yanked"]) for event in events] == [
        ("release:unyank", "the names were invented", False),
        ("release:yank", "leaks customer names", True),
    ]


@pytest.mark.on("SQLite")
def test_a_yank_may_get_a_better_reason_and_one_that_is_not_there_leaves_no_trace_of_being_taken_back(
    stocked: Cli, world: World
) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert "acme/sql:1.0.0 is not yanked" in stocked.ok("unyank", "acme/sql:1.0.0", "--reason", "by mistake").out
    for reason in ("wrong data", "wrong data", "leaks customer names"):
        stocked.ok("yank", "acme/sql:1.0.0", "--reason", reason)
        assert stocked.json("show", "acme/sql:1.0.0")["yank_reason"] == reason
    stocked.ok("unyank", "acme/sql:1.0.0", "--reason", "the names were invented")
    with api_of(stocked) as api:
        again = api.post("/v1/adapters/acme/sql/releases/1.0.0/unyank", {"reason": "once more"})
    assert not again["yanked"]
    events = stocked.json("audit", "--subject", "acme/sql:1.0.0")["items"][-2::-1]
    assert [(event["act"], event["before"]["yank_reason"], event["reason"]) for event in events] == [
        ("release:yank", None, "wrong data"),
        ("release:yank", "wrong data", "leaks customer names"),
        ("release:unyank", "leaks customer names", "the names were invented"),
    ]


def test_a_gate_refuses_a_worse_release_and_force_leaves_a_trace(stocked: Cli, world: World) -> None:
    cli = stocked
    for version, adapter in (("1.0.0", "sql"), ("1.1.0", "other-sql")):
        cli.ok("push", world.adapters[adapter], f"acme/sql:{version}", "--base", "tiny")
        cli.ok("eval", f"acme/sql:{version}", "--suite", "sql-exact")
    nll = {
        version: next(s["value"] for s in cli.json("show", f"acme/sql:{version}")["scores"] if s["metric"] == "nll")
        for version in ("1.0.0", "1.1.0")
    }
    better, worse = sorted(nll, key=lambda version: nll[version])
    assert nll[worse] - nll[better] > 0.01
    cli.ok("promote", f"acme/sql:{better}", "--to", "prod")
    cli.ok("gate", "acme/sql@prod", "--rule", "sql-exact.nll <= 1000", "--rule", "sql-exact.nll within 0.001 of served")
    refused = cli("promote", f"acme/sql:{worse}", "--to", "prod")
    assert refused.code == 1
    assert f"worse by {nll[worse] - nll[better]:.4g}" in refused.err
    assert "pass  sql-exact.nll <= 1000" in refused.err
    assert cli.json("show", "acme/sql@prod")["version"] == better
    assert cli("promote", f"acme/sql:{worse}", "--to", "prod", "--force").code == 2, "force needs a reason"
    forced = cli.json("promote", f"acme/sql:{worse}", "--to", "prod", "--force", "--reason", "demo at noon")
    assert forced["forced"]
    assert [gate["passed"] for gate in forced["gates"]] == [True, False]
    acts = [event["act"] for event in cli.json("audit", "--subject", "acme/sql@prod")["items"]]
    assert acts == ["channel:promote", "gate:set", "channel:promote"], "the newest first"


def test_a_push_whose_channel_refuses_it_tells_what_it_has_published(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod")
    cli.ok("gate", "acme/sql@prod", "--rule", "sql-exact.nll <= 1000")
    push = ("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny", "--channel", "prod")
    refused = cli(*push)
    assert (refused.code, refused.out.startswith("published acme/sql:1.1.0 ")) == (1, True), refused.out
    assert "FAIL  sql-exact.nll <= 1000" in refused.err
    again = cli(*push, "--json")
    assert (again.code, again.json["release"]["version"], again.json["move"]) == (1, "1.1.0", None)
    assert (again.json["error"]["code"], again.json["created"]) == ("gate_failed", False)


def test_all_that_a_push_brings_into_being_is_in_the_audit(stocked: Cli, world: World) -> None:
    for name in ("acme/sql:1.0.0", "acme/sql:1.0.0", "acme/other:1.0.0"):
        stocked.ok("push", world.adapters["sql"], name, "--base", "tiny")
    rows = stocked.json("audit", "--namespace", "acme")["items"][::-1]
    assert [(row["act"], row["subject"]) for row in rows] == [
        ("namespace:create", "acme"),
        ("repository:create", "acme/sql"),
        ("release:publish", "acme/sql:1.0.0"),
        ("repository:create", "acme/other"),
        ("release:publish", "acme/other:1.0.0"),
    ]


def test_a_list_that_is_cut_off_says_so_and_how_it_goes_on(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod")
    every = cli.json("audit")
    numbers = [row["id"] for row in every["items"]]
    assert (numbers, every["next"]) == (sorted(numbers, reverse=True), None)
    assert len(numbers) > 4
    shown = cli.ok("audit", "--limit", 2)
    first = cli.json("audit", "--limit", 2)
    assert (first["items"], shown.err) == (every["items"][:2], f"more: --cursor {first['next']}\n")
    rest = cli.json("audit", "--cursor", first["next"])
    assert (rest["items"], rest["next"]) == (every["items"][2:], None)
    in_order = [json.loads(line)["id"] for line in cli.ok("audit", "--jsonl").out.splitlines()]
    assert in_order == numbers[::-1]
    assert cli("audit", "--jsonl", "--cursor", first["next"]).code == 2


@pytest.mark.on("SQLite")
def test_what_unicode_calls_the_end_of_a_line_ends_no_row_of_an_export(stocked: Cli, world: World) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    reason = "leaks\u2028customer\x85names\x0b\x1c"
    stocked.ok("yank", "acme/sql:1.0.0", "--reason", reason)
    (line, end) = stocked.ok("audit", "--jsonl", "--act", "release:yank").out.split("\n")
    assert (json.loads(line)["reason"], end) == (reason, "")


def test_lists_come_in_pages_that_neither_repeat_nor_lose(stocked_embedded: Cli, world: World) -> None:
    from registry.cli.console.connect import connected
    from tests.scenarios.world import environment

    for number in range(7):
        stocked_embedded.ok("push", world.adapters["sql"], f"acme/sql:1.{number}.0", "--base", "tiny")
    with environment(stocked_embedded.environment, ["adaptory"]), connected() as connection:
        for path in ("/v1/releases", "/v1/adapters/acme/sql/releases"):
            versions, cursor, sizes = [], None, []
            while True:
                page = connection.api.get(path, limit=3, cursor=cursor)
                versions += [release["version"] for release in page["items"]]
                sizes.append(len(page["items"]))
                cursor = page["next"]
                if cursor is None:
                    break
            assert versions == [f"1.{number}.0" for number in reversed(range(7))]
            assert sizes == [3, 3, 1]


def test_two_pulls_into_one_directory_never_mix_their_bytes(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    adapter = tmp_path / "adapter"
    shutil.copytree(world.adapters["sql"], adapter)
    (adapter / "large.dat").write_bytes(os.urandom(8 << 20))
    cli.ok("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "large.dat")
    command = ["pull", "acme/sql:1.0.0", "-o", tmp_path / "out"]
    logs = [tmp_path / f"pull-{number}.log" for number in range(3)]
    pulls = [start_command(command, own_environment(cli), log) for log in logs]
    for pull in pulls:
        pull.join(60)
    codes = [pull.exitcode for pull in pulls]
    assert {0} <= set(codes) <= {0, 4}, [log.read_text() for log in logs]
    for file in adapter.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.long
def test_a_yanked_release_on_a_channel_is_no_yardstick_for_its_gate(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    suite = cli.json("suite", "list")["items"]
    digest = next(suite["digest"] for suite in suite if suite["name"] == "sql-exact")
    for version, nll in (("1.0.0", 1.0), ("2.0.0", 5.0), ("3.0.0", 4.9)):
        cli.ok("push", world.adapters["sql"], f"acme/sql:{version}", "--base", "tiny")
        score = {"suite_digest": digest, "metric": "nll", "value": nll, "n": 6, "higher_is_better": False}
        with api_of(cli) as api:
            api.post(f"/v1/adapters/acme/sql/releases/{version}/scores", {"scores": [score]})
            with pytest.raises(Invalid, match="higher_is_better is False"):
                api.post(
                    f"/v1/adapters/acme/sql/releases/{version}/scores",
                    {"scores": [score | {"higher_is_better": True}]},
                )
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    cli.ok("promote", "acme/sql:2.0.0", "--to", "prod")
    cli.ok("yank", "acme/sql:2.0.0", "--reason", "worse")
    cli.ok("gate", "acme/sql@prod", "--rule", "sql-exact.nll within 0.1 of served")
    refused = cli("promote", "acme/sql:3.0.0", "--to", "prod")
    assert refused.code == 1
    assert "worse by 3.9" in refused.err


def test_a_base_cannot_be_hidden_behind_a_name_that_looks_like_a_digest(stocked_embedded: Cli, world: World) -> None:
    digest = stocked_embedded.json("base", "show", "tiny")["digest"]
    for name in (digest, digest[:12]):
        refused = stocked_embedded("base", "add", world.base, "--name", "other", "--alias", name)
        assert refused.code == 2
    assert stocked_embedded.json("base", "show", digest[:12])["name"] == "tiny"


def test_a_lost_blob_comes_back_with_the_next_push(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    cli = stocked_embedded
    for file in cli.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")["release"]["files"]:
        stored.lose(cli, file["sha256"])
    assert not cli.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")["created"]
    cli.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "out")


def test_a_value_that_no_measurement_gives_is_no_score(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    digest = next(item["digest"] for item in cli.json("suite", "list")["items"] if item["name"] == "sql-exact")
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    directions = {"nll": False, "accuracy": True, "points": True}
    with api_of(cli) as api:

        def record(metric: str, value: float) -> None:
            score = {"suite_digest": digest, "metric": metric, "value": value, "n": 6}
            body = {"scores": [score | {"higher_is_better": directions[metric]}]}
            api.post("/v1/adapters/acme/sql/releases/1.0.0/scores", body)

        for metric, value, allowed in (
            ("nll", -5.0, "0 to 1e+100"),
            ("accuracy", 1.01, "0 to 1"),
            ("accuracy", -0.1, "0"),
        ):
            with pytest.raises(Invalid, match="is out of range") as raised:
                record(metric, value)
            assert allowed in raised.value.next_step
        assert cli.json("show", "acme/sql")["scores"] == []
        for metric, value in (("nll", 0.0), ("nll", 400.0), ("accuracy", 0.0), ("accuracy", 1.0), ("points", -5.0)):
            record(metric, value)


def test_a_yank_is_no_way_back_to_a_release_that_was_rolled_back(stocked_embedded: Cli, world: World) -> None:
    """Only a promotion, judged by the policy, brings back a release that a rollback has left."""
    cli = stocked_embedded
    for version, name in (("1.0.0", "sql"), ("1.1.0", "other-sql")):
        cli.ok("push", world.adapters[name], f"acme/sql:{version}", "--base", "tiny")
    for version in ("1.0.0", "1.1.0", "1.0.0"):
        cli.ok("promote", f"acme/sql:{version}", "--to", "prod")
    cli.ok("rollback", "acme/sql@prod", "--reason", "1.0.0 is broken")
    assert cli.json("show", "acme/sql@prod")["version"] == "1.1.0"
    cli.ok("yank", "acme/sql:1.1.0", "--reason", "to get round the gates")
    assert cli("show", "acme/sql@prod").code == 3, "it serves nothing"
    assert cli.ok("fsck").code == 0
    cli.ok("unyank", "acme/sql:1.1.0", "--reason", "it was fine")
    assert cli.json("show", "acme/sql@prod")["version"] == "1.1.0"
