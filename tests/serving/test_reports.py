"""What agents report: rollouts that wait for them, nodes that switch in turn, and an agent whose report is refused."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import pytest
from transformers import LlamaForCausalLM

from tests.composer.small_model import save_adapter
from tests.eventually import eventually
from tests.scenarios.world import Cli, World
from tests.serving.conftest import Agent, Site, mirrored
from tests.serving.double import double

OLD, NEW = "acme/sql@1.0.0", "acme/sql@1.1.0"


@contextmanager
def nodes(site: Site, count: int, *words: object) -> Generator[list[Agent]]:
    """Agents of one group, each with a server of its own, that follow 1.0.0."""
    with ExitStack() as stack:
        agents: list[Agent] = []
        for number in range(count):
            url, _ = stack.enter_context(double())
            named = ("--server", f"vllm={url}", "--group", "serving", "--node", f"node-{number}", *words)
            agents.append(stack.enter_context(mirrored(site, *named, directory=f"served-{number}")))
        for agent in agents:
            agent.wait_for(OLD)
        yield agents


def states(cli: Cli) -> dict[str, str]:
    return {row["node"]: row["state"] for row in cli.json("rollout", "status", "acme/sql@prod")["nodes"]}


def test_a_promotion_waits_until_every_node_gives_users_the_release(site: Site) -> None:
    with nodes(site, 2) as agents:
        eventually(lambda: states(site.cli) == {"node-0": "following", "node-1": "following"}, within_s=60)
        ran = site.cli.ok("promote", "acme/sql:1.1.0", "--to", "prod", "--wait", "60s")
        assert [agent.routed() for agent in agents] == [NEW, NEW], ran.out


@pytest.mark.long
def test_a_node_that_cannot_follow_is_named_with_its_reason(site: Site, world: World) -> None:
    large = site.directory / "large"
    model = LlamaForCausalLM.from_pretrained(world.base)
    save_adapter(model, large, seed=9, r=32, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    site.cli.ok("push", large, "acme/sql:2.0.0", "--base", "tiny")
    with nodes(site, 1):
        eventually(lambda: states(site.cli) == {"node-0": "following"}, within_s=60)
        ran = site.cli("promote", "acme/sql:2.0.0", "--to", "prod", "--wait", "20s")
        assert ran.code == 1
        assert "node-0" in ran.err
        assert "max_lora_rank" in ran.err
        assert site.cli.json("rollout", "status", "acme/sql@prod")["nodes"][0]["version"] == "1.0.0"


@pytest.mark.long
def test_nodes_of_a_group_switch_in_turn(site: Site) -> None:
    with nodes(site, 3, "--max-unavailable", "1") as agents:
        eventually(lambda: set(states(site.cli).values()) == {"following"}, within_s=60)
        site.promote("1.1.0")
        for agent in agents:
            agent.wait_for(NEW, within_s=60)
        eventually(lambda: set(states(site.cli).values()) == {"following"}, within_s=60)
