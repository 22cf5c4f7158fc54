"""A canary on the channel's page, in a browser: its nodes, its share, and how it ends, without a reload."""

from pathlib import Path
from typing import Any

import httpx2
import yaml
from playwright.sync_api import Page, expect

from tests.browser.conftest import Site, grave_findings
from tests.scenarios.world import World

CHANNEL = "acme/watched@prod"  # other tests count the releases of the site's own repositories
WATCH = {"for": "30m", "steps": [10, 50, 100], "rules": ["errors <= served + 0.01"]}


def _begin(site: Site, world: World, directory: Path) -> None:
    """A node that splits requests follows the channel, and 1.1.0 gets a tenth of them."""
    policy = directory / "policy.yaml"
    policy.write_text(yaml.safe_dump({"version": 1, "watch": WATCH}))
    words = ("--base", "tiny", "--allow-breaking", "story")
    site.cli.ok("push", world.adapters["support"], "acme/watched:1.0.0", "--base", "tiny", "--channel", "prod")
    site.cli.ok("push", world.adapters["terraform"], "acme/watched:1.1.0", *words)
    site.cli.ok("policy", "set", CHANNEL, policy)
    served = site.cli.json("show", CHANNEL)
    live = {"channel": CHANNEL, "state": "following", "splits": True, "since": "2026-01-01T00:00:00Z"}
    live |= {"version": served["version"], "commit": served["commit"]}
    _sent(site, "PUT", "/v1/fleet/gpus/a", {"agent": "test", "channels": [live]})
    site.cli.ok("promote", "acme/watched:1.1.0", "--to", "prod", "--canary", "10%")


def _report(site: Site, requests: int, failed: int) -> None:
    body = {"1.1.0": {"requests": requests, "errors": failed}, "1.0.0": {"requests": 9 * requests}}
    _sent(site, "POST", "/v1/adapters/acme/watched/channels/prod/watch", {"source": "front", "versions": body})


def _sent(site: Site, method: str, path: str, body: Any) -> None:
    answer = httpx2.request(method, f"{site.url}{path}", json=body)
    assert answer.status_code == 200, answer.text


def test_the_page_of_a_channel_shows_its_canary_live(
    site: Site, world: World, tab: Page, complaints: list[str], tmp_path: Path
) -> None:
    _begin(site, world, tmp_path)
    tab.goto(f"{site.url}/{CHANNEL}")
    rollout = tab.get_by_role("region", name="Rollout")
    expect(rollout.get_by_role("row", name="gpus/a")).to_contain_text("1.0.0")
    expect(rollout.get_by_role("progressbar", name="Nodes that follow")).to_have_attribute("value", "1")
    canary = tab.get_by_role("region", name="Canary of 1.1.0")
    expect(canary).to_contain_text("1.1.0 gets 10 % of the requests")
    expect(canary).to_contain_text("Then 50 %.")
    _report(site, 0, 0)
    _report(site, 40, 1)
    expect(canary).to_contain_text("40 so far, and 360 to 1.0.0")
    expect(canary.get_by_role("row", name="errors <= served + 0.01")).to_contain_text("0.025")
    assert grave_findings(tab) == []
    _report(site, 400, 100)
    expect(canary).to_contain_text("It was rolled back")
    expect(canary).to_contain_text("broken: errors <= served + 0.01.")
    expect(tab.get_by_role("region", name="prod serves 1.0.0.")).to_be_visible()
    assert complaints == []
