"""`adaptory follow` and what a yank says before it is done, in an embedded registry and through a server's restart."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from registry.sdk import Registry
from tests import services
from tests.eventually import eventually
from tests.forked import start_command
from tests.scenarios.world import Cli, World, environment, own_environment, server


def pushed(cli: Cli, world: World, *versions: str) -> None:
    """Releases of one adapter, the first of them promoted to prod."""
    for version in versions:
        cli.ok("push", world.adapters["sql"], f"acme/sql:{version}", "--base", "tiny")
    cli.ok("promote", f"acme/sql:{versions[0]}", "--to", "prod")


def lines_of(log: Path, count: int) -> Sequence[str]:
    return eventually(lambda: lines if len(lines := log.read_text().splitlines()) >= count else [], within_s=30)


@pytest.mark.on("PostgreSQL")
def test_a_line_and_a_command_for_each_change_until_interrupted(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli, log, ran = stocked_embedded, tmp_path / "out", tmp_path / "ran"
    pushed(cli, world, "1.0.0", "1.1.0")
    command = f'echo "$FOLLOWED_CHANNEL $FOLLOWED_BEFORE $FOLLOWED_VERSION" >> {ran}; exit 3'
    asked = ["follow", "acme/sql@prod", "acme/sql@canary", "--exec", command]
    process = start_command(asked, own_environment(cli), log, tmp_path / "err")
    lines_of(log, 2)
    cli.ok("promote", "acme/sql:1.1.0", "--to", "prod")
    lines_of(log, 3)
    cli.ok("yank", "acme/sql:1.1.0", "--reason", "wrong data")
    shown = [line.partition("acme")[2] for line in lines_of(log, 4)]
    assert shown == [
        "/sql@prod serves 1.0.0",
        "/sql@canary serves nothing",
        "/sql@prod serves 1.1.0, after 1.0.0",
        "/sql@prod serves 1.0.0, after 1.1.0",
    ]
    assert ran.read_text().splitlines()[2:] == ["acme/sql@prod 1.0.0 1.1.0", "acme/sql@prod 1.1.0 1.0.0"]
    assert "ended with 3" in (tmp_path / "err").read_text(), "a command that fails is named, and the next one runs"
    assert process.pid
    process.terminate()
    process.join(20)
    assert process.exitcode in (130, 143, -signal.SIGTERM)


@pytest.mark.long
def test_a_follower_goes_on_after_the_server_has_restarted(
    stocked_embedded: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli, log = stocked_embedded, tmp_path / "out"
    pushed(cli, world, "1.0.0", "1.1.0")
    home, port = Path(cli.environment["ADAPTORY_HOME"]), services.free_port()
    environment = own_environment(cli)
    monkeypatch.setattr(services, "free_port", lambda: port)
    with server(home, **environment) as (url, _):
        client = Cli({"ADAPTORY_HOME": str(tmp_path / "client"), "ADAPTORY_URL": url})
        process = start_command(
            ["follow", "acme/sql@prod", "--json"], own_environment(client), log, errors := tmp_path / "err"
        )
        assert json.loads(lines_of(log, 1)[0])["version"] == "1.0.0"
    cli.ok("promote", "acme/sql:1.1.0", "--to", "prod")
    eventually(lambda: "Trying again" in errors.read_text(), within_s=30)
    with server(home, **environment):
        changed = json.loads(lines_of(log, 2)[1])
        assert (changed["channel"], changed["before"], changed["version"]) == ("acme/sql@prod", "1.0.0", "1.1.0")
        assert "answers again" in errors.read_text()
    process.kill()
    process.join(20)


def test_a_yank_says_what_channels_serve_before_it_is_done_and_a_dry_run_only_says_it(
    stocked_embedded: Cli, world: World
) -> None:
    cli = stocked_embedded
    pushed(cli, world, "1.0.0", "1.1.0")
    cli.ok("promote", "acme/sql:1.1.0", "--to", "prod")
    dry = cli.ok("yank", "acme/sql:1.1.0", "--reason", "wrong", "--dry-run")
    assert dry.err.endswith("acme/sql@prod would serve 1.0.0 instead of 1.1.0\n")
    assert cli.json("show", "acme/sql:1.1.0")["yanked"] is False
    done = cli.ok("yank", "acme/sql:1.1.0", "--reason", "wrong")
    assert done.err.endswith("acme/sql@prod will serve 1.0.0 instead of 1.1.0\n")
    assert done.out == "yanked acme/sql:1.1.0: wrong\n"
    assert "no channel will serve another release" in cli.ok("yank", "acme/sql:1.1.0", "--reason", "worse").err
    assert "acme/sql@prod will serve 1.1.0 instead of 1.0.0" in cli.ok("unyank", "acme/sql:1.1.0", "--reason", "x").err
    kinds = [row["kind"] for row in cli.json("history", "acme/sql@prod")["items"]]
    assert kinds == ["unyank", "yank", "promote", "promote"]


def test_python_follows_a_channel(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    pushed(cli, world, "1.0.0", "1.1.0")
    with environment(cli.environment, []), Registry() as registry:
        changes = registry.follow("acme/sql@prod")
        first = next(changes)
        assert first.now is not None
        assert (first.channel, first.before, first.now.version) == ("acme/sql@prod", None, "1.0.0")
        registry.promote("acme/sql:1.1.0", "prod")
        second = next(changes)
        assert second.now is not None
        assert (second.before, second.now.version) == (first.now, "1.1.0")
