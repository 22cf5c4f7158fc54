"""Webhooks as an admin uses them on the command line: events reach a real receiver, and backups have no secrets."""

import gzip
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from registry.domain.webhooks.deliveries import LEASE
from registry.transfer.resources import Resources
from tests.elapsed import let_deliveries_elapse
from tests.eventually import eventually
from tests.forked import start_command
from tests.receiver import LOCAL, Receiver, deliver_due, receiving
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli, own_environment


@pytest.fixture
def receiver() -> Generator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture
def cli(small_team: Cli) -> Cli:
    """A registry whose operator lets webhooks reach this machine."""
    return replace(small_team, environment=small_team.environment | LOCAL)


@pytest.fixture
def resources(cli: Cli) -> Generator[Resources]:
    held = opened(cli)
    yield held
    held.close()


def test_a_promotion_reaches_the_receiver_signed_and_the_admin_sees_the_delivery(
    cli: Cli, resources: Resources, receiver: Receiver
) -> None:
    added = cli.json("webhook", "add", receiver.url, "--namespace", "acme", "--event", "channel.moved")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "canary", "--new-channel", "--reason", "try it")
    assert deliver_due(resources) == 1
    [request] = receiver.got
    assert request.is_signed_by(added["secret"])
    assert request.headers["content-type"].startswith("application/cloudevents+json")
    event = request.event
    assert (event["specversion"], event["type"], event["subject"]) == (
        "1.0",
        "adaptory.channel.moved",
        "acme/sql@canary",
    )
    assert event["data"]["after"]["version"] == "1.0.0"
    assert event["data"]["reason"] == "try it"
    [delivery] = cli.json("webhook", "deliveries", added["id"])["items"]
    assert (delivery["state"], delivery["status"], delivery["attempts"]) == ("delivered", 204, 1)
    assert delivery["message_id"] == request.headers["webhook-id"]
    listed = cli.ok("webhook", "list").out + cli.ok("webhook", "list", "--json").out + cli.ok("audit", "--json").out
    assert added["id"] in listed
    assert added["secret"] not in listed


def test_an_attempt_of_a_worker_that_is_killed_is_made_again_with_the_same_id(
    cli: Cli, resources: Resources, receiver: Receiver, tmp_path: Path
) -> None:
    added = cli.json("webhook", "add", receiver.url, "--repo", "acme/sql")
    receiver.goes_on.clear()
    worker = start_command(["worker"], own_environment(cli), tmp_path / "worker.log")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "canary", "--new-channel")
    eventually(lambda: receiver.got)
    worker.kill()
    worker.join()
    receiver.goes_on.set()
    assert deliver_due(resources) == 0, "its lease lasts"
    let_deliveries_elapse(resources, LEASE)
    assert deliver_due(resources) == 1
    assert len({request.headers["webhook-id"] for request in receiver.got}) == 1
    assert len(receiver.got) == 2
    [delivery] = cli.json("webhook", "deliveries", added["id"], "--state", "delivered")["items"]
    assert delivery["attempts"] == 2
    cli.ok("webhook", "replay", added["id"], delivery["id"])
    assert deliver_due(resources) == 1
    assert cli("webhook", "replay", added["id"]).code == 2
    assert "0 go out again" in cli.ok("webhook", "replay", added["id"], "--all-dead").out


def test_a_backup_has_no_secret_and_a_restored_webhook_gets_nothing_before_a_rotation(
    cli: Cli, receiver: Receiver, tmp_path: Path
) -> None:
    added = cli.json("webhook", "add", receiver.url, "--namespace", "acme")
    cli.ok("webhook", "test", added["id"])
    cli.ok("backup", tmp_path / "saved")
    [rows] = (tmp_path / "saved" / "snapshots").glob("*/rows.jsonl.gz")
    assert added["secret"].encode() not in gzip.decompress(rows.read_bytes())
    elsewhere = Cli({**LOCAL, "ADAPTORY_HOME": str(tmp_path / "elsewhere"), "ADAPTORY_USER": "mia"})
    elsewhere.ok("restore", tmp_path / "saved")
    [restored] = elsewhere.json("webhook", "list")["items"]
    assert (restored["id"], restored["signed"]) == (added["id"], False)
    assert "webhook rotate" in elsewhere.ok("webhook", "list").err
    held = opened(elsewhere)
    assert deliver_due(held) == 0
    rotated = elsewhere.ok("webhook", "rotate", added["id"]).out.strip()
    assert deliver_due(held) == 1
    held.close()
    assert receiver.got[0].is_signed_by(rotated)
    elsewhere.ok("webhook", "remove", added["id"])
    assert elsewhere.json("webhook", "list")["items"] == []
