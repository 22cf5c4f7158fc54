"""A canary behind `adaptory mirror --front` and `adaptory route`: its share, and what live figures do."""

from pathlib import Path

import httpx2
import yaml

from tests import services
from tests.eventually import eventually
from tests.forked import start_command
from tests.scenarios.world import own_environment
from tests.serving.conftest import Site, mirrored
from tests.serving.double import double
from tests.serving.test_mirror import NEW, OLD, SQL, front

REQUESTS = 200
WATCH = {"for": "1s", "steps": [50, 100], "min": 50, "rules": ["errors <= served + 0.01"]}


STAGING = "acme/sql@staging"


def served_by(url: str, prompt: str, count: int = REQUESTS, channel: str = SQL) -> dict[str, int]:
    """Sends requests to a channel; returns how many each version answered, or failed to."""
    versions = dict[str, int]()
    with httpx2.Client(timeout=60) as http:
        for number in range(count):
            body = {"model": channel, "prompt": prompt, "user": str(number)}
            name = http.post(f"{url}/v1/completions", json=body).headers["x-served-model"]
            versions[name] = versions.get(name, 0) + 1
    return versions


def test_a_failing_canary_is_rolled_back_by_live_figures_and_a_sound_one_is_promoted(
    site: Site, tmp_path: Path
) -> None:
    """With two fronts, whose requests are counted together."""
    policy, ports = tmp_path / "policy.yaml", (services.free_port(), services.free_port())
    policy.write_text(yaml.safe_dump({"version": 1, "watch": WATCH}))
    site.cli.ok("policy", "set", SQL, policy)
    site.cli.ok("promote", "acme/sql:1.0.0", "--to", "staging", "--new-channel")
    words = [word for port in ports for word in ("--front", f"http://127.0.0.1:{port}")]
    words += ["--group", "gpus", "--node", "a"]
    refused = site.cli("promote", "acme/sql:1.1.0", "--to", "prod", "--canary", "50%")
    assert "no node that reports" in refused.err
    with (
        double(seconds=0.001) as (server, _),
        mirrored(site, "--server", f"vllm={server}", *words, channels=(SQL, STAGING)) as agent,
        front(agent, ports[0]) as url,
        front(agent, ports[1]) as other,
    ):
        agent.wait_for(OLD)
        eventually(lambda: site.cli("promote", "acme/sql:1.1.0", "--to", "prod", "--canary", "50%").code == 0)
        site.cli.ok("promote", "acme/sql:1.1.0", "--to", "staging", "--canary", "50%")
        eventually(lambda: NEW in served_by(url, "x", 4), within_s=30)
        commit = site.cli.json("show", "acme/sql:1.0.0")["commit"]
        assert commit in site.cli.ok("pull", SQL).out
        assert httpx2.get(f"{site.url}/api/models/acme/sql/revision/prod").json()["sha"] == commit
        shares = served_by(url, f"fails on {NEW}")
        assert 0.3 < shares[NEW] / REQUESTS < 0.7

        def is_rolled_back() -> bool:
            served_by(url, f"fails on {NEW}", 20)
            return "rolled back" in site.cli("watch", SQL, "--once").out

        eventually(is_rolled_back)
        ended = site.cli("watch", SQL)
        assert (ended.code, "broken: errors <= served + 0.01" in ended.out) == (1, True), ended.out
        eventually(lambda: served_by(url, f"fails on {NEW}", 20) == {OLD: 20}, within_s=30)
        assert site.cli.json("watch", STAGING, "--once")["requests"] == [0, 0]
        served_by(url, "x", 12, STAGING)
        served_by(other, "x", 8, STAGING)
        eventually(lambda: sum(site.cli.json("watch", STAGING, "--once")["requests"]) == 20, within_s=30)

        site.cli.ok("promote", "acme/sql:1.1.0", "--to", "prod", "--canary", "50%")
        log = tmp_path / "watch.log"
        watching = start_command(["watch", SQL], own_environment(site.cli), log)

        def is_promoted() -> bool:
            served_by(url, "x", 20)
            return agent.routed() == NEW

        eventually(is_promoted, within_s=60)
        watching.join(30)
        assert (watching.exitcode, "50 % running" in log.read_text(), "promoted" in log.read_text()) == (0, True, True)
        assert "canary 1.1.0 beside 1.0.0" in site.cli.ok("watch", SQL, "--once").out
