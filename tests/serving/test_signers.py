"""What an agent with `--verify` serves: releases that the key signed, whenever their files came."""

from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.scenarios.test_signatures import Keys
from tests.serving.conftest import Agent, Site, loaded, mirrored
from tests.serving.double import double

OLD, NEW = "acme/sql@1.0.0", "acme/sql@1.1.0"


@pytest.fixture
def key(tmp_path: Path) -> Keys:
    return Keys(tmp_path, "team")


def sign(site: Site, version: str, key: Keys) -> None:
    site.cli.ok("namespace", "set", "acme", "--signing-key", key.public)
    site.cli.ok("sign", f"acme/sql:{version}", "--key", key.private)


def restart(agent: Agent, *words: object) -> None:
    agent.kill()
    agent.words = (*agent.words, *words)
    agent.start()


def test_an_unsigned_release_is_not_served(site: Site, key: Keys) -> None:
    with (
        double() as (server, _),
        mirrored(site, "--server", f"vllm={server}", "--verify", key.public) as agent,
    ):
        agent.wait_for_problem("sign")
        assert agent.routed() is None
        assert loaded(server) == {}


def test_a_key_that_is_named_later_counts_for_files_that_are_there_already(site: Site, key: Keys) -> None:
    with double() as (server, _), mirrored(site, "--server", f"vllm={server}") as agent:
        for version, name in (("1.1.0", NEW), ("1.0.0", OLD)):
            site.promote(version)
            agent.wait_for(name)
        restart(agent, "--verify", key.public)
        agent.wait_for_problem("not signed")
        assert agent.routed() == OLD, "what is served goes on"
        site.promote("1.1.0")
        agent.wait_for_problem("not signed")
        assert agent.routed() == OLD
        sign(site, "1.1.0", key)
        agent.wait_for(NEW)
        eventually(lambda: agent.problems() == [], within_s=30)


def test_without_the_registry_a_new_agent_serves_what_the_key_was_seen_to_have_signed(site: Site, key: Keys) -> None:
    sign(site, "1.0.0", key)
    with (
        double() as (server, _),
        mirrored(site, "--server", f"vllm={server}", "--verify", key.public) as agent,
    ):
        agent.wait_for(OLD)
        agent.kill()
        site.stop()
        with double() as (second, _):
            restart(agent, "--server", f"vllm={second}")
            eventually(lambda: OLD in loaded(second), within_s=30)


def test_another_key_does_not_count(site: Site, key: Keys, tmp_path: Path) -> None:
    sign(site, "1.0.0", key)
    other = Keys(tmp_path, "other")
    with (
        double() as (server, _),
        mirrored(site, "--server", f"vllm={server}", "--verify", key.public) as agent,
    ):
        agent.wait_for(OLD)
        restart(agent, "--verify", other.public)
        agent.wait_for_problem("was not made by")
        with double() as (second, _):
            restart(agent, "--server", f"vllm={second}")
            agent.wait_for_problem("was not made by")
            assert loaded(second) == {}
