"""`adaptory rollout`, and the waits of `promote` and `rollback`, with nodes that report over REST."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from registry.errors import Refused
from registry.sdk import Registry
from tests.eventually import eventually
from tests.forked import start_command
from tests.scenarios.world import Cli, World, environment, own_environment

CHANNEL = "acme/sql@prod"


def pushed(cli: Cli, world: World) -> None:
    """Two releases of one adapter with files of their own; prod serves the first."""
    for version, name in {"1.0.0": "sql", "1.1.0": "terraform"}.items():
        cli.ok(
            "push", world.adapters[name], f"acme/sql:{version}", "--base", "tiny", "--allow-breaking", "other modules"
        )
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod")


def report(cli: Cli, node: str, version: str, **more: Any) -> None:
    """Reports that the node gives users the version."""
    with environment(cli.environment, []), Registry() as registry:
        commit = registry.resolve(f"acme/sql:{version}").commit
        move = registry.rollout(CHANNEL).move
        since = datetime.now(UTC).isoformat()
        served = {"state": "following", "version": version, "commit": commit, "move": move, "since": since}
        body = {"agent": "adaptory 0.2.0", "channels": [{"channel": CHANNEL, **served, **more}]}
        registry.api.put(f"/v1/fleet/prod/{node}", body)


def test_a_promotion_waits_until_every_node_that_reports_follows(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli, errors = stocked_embedded, tmp_path / "err"
    pushed(cli, world)
    report(cli, "a", "1.0.0")
    report(cli, "b", "1.0.0")
    words = ["promote", "acme/sql:1.1.0", "--to", "prod", "--wait", "2m"]
    errors.touch()
    process = start_command(words, own_environment(cli), tmp_path / "out", errors)
    eventually(lambda: "2 behind" in errors.read_text(), within_s=60)
    report(cli, "a", "1.1.0")
    eventually(lambda: "1 following, 1 behind" in errors.read_text(), within_s=30)
    assert process.is_alive()
    report(cli, "b", "1.1.0")
    process.join(30)
    assert process.exitcode == 0, errors.read_text()
    assert "1.0.0 -> 1.1.0" in (tmp_path / "out").read_text().replace("→", "->")


def test_a_wait_names_the_nodes_that_do_not_follow_with_their_errors(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    pushed(cli, world)
    without = cli.ok("promote", "acme/sql:1.1.0", "--to", "prod", "--wait", "5m")
    assert "no node follows it" in without.err
    report(cli, "a", "1.1.0")
    report(cli, "b", "1.0.0", state="failed", error="The disk is full.")
    report(cli, "c", "1.0.0")
    ran = cli("rollback", CHANNEL, "--wait", "1s", "--json")
    assert ran.code == 1
    assert ran.json["to_version"] == "1.0.0", "the channel has moved, and stdout is the document of the move"
    assert f"2 of 3 nodes do not follow {CHANNEL} after 1 s." in ran.err
    assert "prod/a is behind and serves 1.1.0" in ran.err
    assert "prod/b is failed and serves 1.0.0: The disk is full." in ran.err
    assert "prod/c" not in ran.err
    assert "next: `adaptory rollout status" in ran.err
    with environment(cli.environment, []), Registry() as registry:
        with pytest.raises(Refused, match="2 of 3 nodes") as refused:
            registry.rollout(CHANNEL, wait_s=0)
        assert [finding["subject"] for finding in refused.value.findings] == ["prod/a", "prod/b"]
        report(cli, "a", "1.0.0")
        report(cli, "b", "1.0.0")
        assert registry.rollout(CHANNEL, wait_s=30).totals["following"] == 3


def test_the_status_shows_each_node_and_a_node_that_has_ended_is_removed(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    pushed(cli, world)
    assert cli.ok("rollout", "status", CHANNEL).out.endswith("; no node follows it\n")
    figures = {"share": 0.998, "worst_nats": 0.08, "tolerance_nats": 0.3}
    check = {"verdict": "proved", "at": "2026-12-01T12:00:00Z", **figures}
    report(cli, "a", "1.0.0", check=check)
    report(cli, "b", "1.1.0", state="failed", error="The check failed.")
    shown = cli.ok("--wide", "rollout", "status", CHANNEL).out
    assert "1 following, 1 failed; proved on 1 of 2 nodes" in shown
    assert "proved within 0.3 nats (share 0.998, worst 0.08 nats)" in shown
    assert "The check failed." in shown
    document = cli.json("rollout", "status", CHANNEL)
    assert document["totals"] == {"following": 1, "switching": 0, "behind": 0, "failed": 1, "silent": 0}
    assert cli.ok("yank", "acme/sql:1.1.0", "--reason", "wrong", "--dry-run").err.endswith("loaded on prod/b\n")
    planned = cli.ok("takedown", "acme/sql:1.1.0", "--reason", "personal data", "--dry-run")
    assert planned.out.startswith("would take down acme/sql:1.1.0: personal data\n")
    assert "loaded on prod/b" in planned.err
    assert cli.json("show", "acme/sql:1.1.0")["taken_down"] is None
    taken = cli.ok("takedown", "acme/sql:1.1.0", "--reason", "personal data")
    assert "loaded on prod/b, which serve it until they switch" in taken.err
    cli.ok("rollout", "forget", "acme", "prod/b")
    assert [node["node"] for node in cli.json("rollout", "status", CHANNEL)["nodes"]] == ["a"]
    assert cli("rollout", "forget", "acme", "prod/b").code == 3


@pytest.mark.parametrize("wait", ["", "5", "m", "5 minutes", "-1s"])
def test_a_wait_that_is_not_a_time_is_refused_before_anything_moves(
    stocked_embedded: Cli, world: World, wait: str
) -> None:
    cli = stocked_embedded
    pushed(cli, world)
    ran = cli("promote", "acme/sql:1.1.0", "--to", "prod", f"--wait={wait}")
    assert ran.code == 2
    assert "is not a duration" in ran.err
    assert cli("promote", "acme/sql:1.1.0", "--to", "prod", "--wait", "5m", "--no-wait").code == 2
    assert cli.json("rollout", "status", CHANNEL)["version"] == "1.0.0"


def test_an_agent_reports_with_a_token_of_its_role(team: Cli) -> None:
    team.ok("namespace", "grant", "acme", "serving", "agent")
    assert "serving  agent" in team.ok("namespace", "members", "acme").out
    refused = team("namespace", "grant", "acme", "serving", "agents")
    assert refused.code == 6
    assert "releaser+agent" in refused.err
    scope = team.json("token", "create", "--user", "serving", "--scope", "acme=agent")["scope"]
    assert scope == {"acme": "agent"}
