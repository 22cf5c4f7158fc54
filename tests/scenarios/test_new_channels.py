"""A promotion to a misspelt channel is noticed, and such a channel can be deleted; one that serves is kept."""

import json
import os
from pathlib import Path

import pytest

from tests.scenarios.terminal import on_terminal
from tests.scenarios.world import Cli, World


def test_a_promotion_says_that_it_creates_a_channel_and_needs_a_word_where_there_are_others(team: Cli) -> None:
    first = team.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    assert "creates channel prod" in first.err, "the first one needs no agreement"
    refused = team("promote", "acme/sql:1.0.0", "--to", "prdo")
    assert (refused.code, "creates channel prdo; channels here: prod" in refused.err) == (2, True)
    assert "--new-channel" in refused.err
    assert team("show", "acme/sql@prdo").code == 3
    made = team.ok("promote", "acme/sql:1.0.0", "--to", "staging", "--new-channel")
    assert "creates channel staging; channels here: prod" in made.err
    pushed = team("push", "--help")
    assert "--new-channel" in pushed.out


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize(("answer", "code"), [("n", 2), ("y", 0)])
def test_on_a_terminal_the_command_asks(team: Cli, answer: str, code: int) -> None:
    team.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    shown = on_terminal(team, "promote", "acme/sql:1.0.0", "--to", "prdo")
    shown.read_until("Go on?")
    os.write(shown.terminal, f"{answer}\n".encode())
    assert (shown.end(), "channels here: prod" in shown.text) == (code, True), shown.text
    assert team("show", "acme/sql@prdo").code == (0 if code == 0 else 3)


def test_a_push_to_a_misspelt_channel_publishes_nothing(team: Cli, world: World) -> None:
    team.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    path = world.adapters["other-sql"]
    refused = team("push", path, "acme/sql:1.1.0", "--base", "tiny", "--channel", "prdo")
    assert (refused.code, "channels here: prod" in refused.err) == (2, True)
    assert team("show", "acme/sql:1.1.0").code == 3, "the question comes before what cannot be undone"
    team.ok("push", path, "acme/sql:1.1.0", "--base", "tiny", "--channel", "canary", "--new-channel")


def test_a_channel_that_serves_nothing_is_not_created_again(team: Cli, world: World) -> None:
    team.ok("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny")
    team.ok("promote", "acme/sql:1.1.0", "--to", "prod")
    team.ok("promote", "acme/sql:1.0.0", "--to", "canary", "--new-channel")
    team.ok("yank", "acme/sql:1.0.0", "--reason", "wrong data")
    assert "creates" not in team.ok("promote", "acme/sql:1.1.0", "--to", "canary").err


def test_repeating_a_promotion_says_that_nothing_changed(team: Cli) -> None:
    team.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "first")
    again = team.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "second")
    assert "acme/sql@prod serves 1.0.0 already: no change" in again.out
    assert not team.json("promote", "acme/sql:1.0.0", "--to", "prod")["changed"]
    assert len(team.json("history", "acme/sql@prod")["items"]) == 1


def test_a_channel_that_serves_is_not_deleted_unless_an_admin_names_what_it_serves(team: Cli, world: World) -> None:
    team.ok("promote", "acme/sql:1.0.0", "--to", "prdo")
    refused = team("channel", "delete", "acme/sql@prdo")
    assert (refused.code, "acme/sql@prdo serves 1.0.0." in refused.err) == (1, True)
    assert team("channel", "delete", "acme/sql@prdo", "--serving", "1.1.0").code == 1
    assert team("channel", "delete", "acme/sql@prdo", "--serving", "1.0.0").code == 2, "it says why"
    deleted = team.json("channel", "delete", "acme/sql@prdo", "--serving", "1.0.0", "--reason", "a typing error")
    assert deleted == {"repository": "acme/sql", "channel": "prdo", "served": "1.0.0"}
    assert team("show", "acme/sql@prdo").code == 3
    assert team("channel", "delete", "acme/sql@prdo").code == 3
    (row,) = [row for row in team.json("audit", "--namespace", "acme")["items"] if row["act"] == "channel:delete"]
    assert (row["subject"], row["reason"], row["before"]["version"]) == ("acme/sql@prdo", "a typing error", "1.0.0")
    assert team.ok("fsck").code == 0
    team.ok("promote", "acme/sql:1.0.0", "--to", "prdo", "--reason", "after all")
    kinds = [move["kind"] for move in team.json("history", "acme/sql@prdo")["items"]]
    assert kinds == ["promote", "delete", "promote"], "history only grows"
    assert team("rollback", "acme/sql@prdo").code == 1, "there is nothing to go back to"
    assert team.ok("fsck").code == 0


def test_a_channel_that_serves_nothing_is_deleted_and_one_with_a_policy_is_not(team: Cli) -> None:
    team.ok("promote", "acme/sql:1.0.0", "--to", "dev")
    team.ok("gate", "acme/sql@dev", "--rule", "sql-exact.nll <= 100")
    team.ok("yank", "acme/sql:1.0.0", "--reason", "leaks")
    refused = team("channel", "delete", "acme/sql@dev")
    assert (refused.code, "has a policy" in refused.err) == (1, True)
    team.ok("policy", "set", "acme/sql@dev", "--clear")
    assert json.loads(team.ok("channel", "delete", "acme/sql@dev", "--json").out)["served"] is None


def test_a_time_in_a_deleted_channel_ends_with_the_deletion(team: Cli, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\nsoak: [{channel: canary, hours: 0.000001}]\n")
    team.ok("policy", "set", "acme/sql@prod", policy)
    team.ok("promote", "acme/sql:1.0.0", "--to", "canary")
    policy.write_text("version: 1\nsoak: [{channel: canary, hours: 1}]\n")
    team.ok("policy", "set", "acme/sql@prod", policy)
    team.ok("channel", "delete", "acme/sql@canary", "--serving", "1.0.0", "--reason", "test")
    refused = team("promote", "acme/sql:1.0.0", "--to", "prod", "--new-channel")
    assert (refused.code, "canary served it for" in refused.err) == (1, True), refused.err
