"""Retention says what it will do before it does it, and spares what is in use."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from registry.domain.access.quotas import RetentionPolicy
from registry.domain.channels import retention
from registry.transfer.collect import collect
from tests.scenarios.test_takedowns import adapter, push
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli

__all__ = ["adapter"]

NONE = timedelta(0)


def publish(cli: Cli, directory: Path, *versions: str) -> None:
    for version in versions:
        (directory / "data.txt").write_text(version)
        push(cli, directory, f"acme/sql:{version}")


@pytest.mark.on("SQLite", "PostgreSQL")
def test_what_a_channel_served_goes_after_its_days_unless_another_has_served_it(
    stocked_embedded: Cli, adapter: Path
) -> None:
    cli = stocked_embedded
    publish(cli, adapter, "1.0.0", "1.1.0", "1.2.0", "1.3.0", "1.4.0")
    moves = "1.0.0 dev, 1.0.0 prod, 1.1.0 prod, 1.1.0 dev, 1.2.0 dev, 1.3.0 dev"
    for version, channel in (move.split() for move in moves.split(", ")):
        cli.ok("promote", f"acme/sql:{version}", "--to", channel, "--new-channel")
    cli.ok("namespace", "retention", "acme", "--channel", "dev=30")
    held = opened(cli)
    began = held.clock()

    def later(days: int) -> int:
        much_later = replace(held, clock=lambda: began + timedelta(days=days))
        counted = collect(much_later, grace=NONE, dry_run=True).releases
        assert collect(much_later, grace=NONE).releases == counted
        return counted

    assert [later(days) for days in (29, 31, 1000)] == [0, 1, 0]
    held.close()
    down = {row["version"]: row["taken_down"] for row in cli.json("log", "acme/sql")["items"] if row["taken_down"]}
    assert [*down] == ["1.2.0"], "1.0.0 and 1.1.0 were in prod, dev serves 1.3.0, and no channel has served 1.4.0"
    assert down["1.2.0"]["reason"] == "the namespace keeps what dev served for 30 days afterwards"


@pytest.mark.on("SQLite", "PostgreSQL")
def test_a_plan_names_the_rule_of_each_release_and_what_spares_it(stocked_embedded: Cli, adapter: Path) -> None:
    cli = stocked_embedded
    publish(cli, adapter, "1.0.0-rc.1", "1.0.0-rc.2", "1.0.0")
    cli.ok("promote", "acme/sql:1.0.0-rc.1", "--to", "dev")
    planned = cli.ok("namespace", "retention", "acme", "--prereleases", 1, "--dry-run").out
    assert "0 releases would be taken down" in planned, "they are not old enough"
    held = opened(cli)
    with held.read() as session:
        later = held.clock() + timedelta(days=2)
        rows = retention.plan(session, "acme", RetentionPolicy(keep_prerelease_days=1), later, 10)
        assert [(row.release, row.reason, row.spared_by) for row in rows] == [
            ("acme/sql:1.0.0-rc.1", "keeps pre-releases for 1 day", "a channel serves it"),
            ("acme/sql:1.0.0-rc.2", "keeps pre-releases for 1 day", ""),
        ]
        assert retention.expired(session, later, limit=None) == [], "a plan sets no rule"
    held.close()


def test_days_of_a_channel_that_cannot_be_read_are_named(stocked_embedded: Cli) -> None:
    for text in ("dev", "dev=0", "dev=x", "=3"):
        refused = stocked_embedded("namespace", "retention", "acme", "--channel", text)
        assert (refused.code, f"--channel {text} is not NAME=DAYS" in refused.err) == (2, True)
