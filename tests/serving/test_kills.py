"""An agent, a server and a registry that are killed at random moments: everything converges, and no directory of a
loaded name is lost."""

import os
import random
import time
from pathlib import Path

import pytest

from tests import services
from tests.doses import further
from tests.eventually import eventually
from tests.serving.conftest import Site, loaded, mirrored
from tests.serving.double import double


@pytest.mark.parametrize("kills", [6, *further(60)])
def test_whatever_is_killed_and_whenever_servers_end_with_what_channels_serve(site: Site, kills: int) -> None:
    seed = int(os.environ.get("ADAPTORY_TEST_SEED", "7"))
    chance, port = random.Random(seed), services.free_port()
    server = double(port=port)
    url, _ = server.__enter__()
    try:
        with mirrored(site, "--server", f"vllm={url}", "--keep", "0", "--grace", "1s") as agent:
            agent.wait_for("acme/sql@1.0.0")
            for number in range(kills):
                version = ("1.1.0", "1.0.0")[number % 2]
                site.promote(version)
                time.sleep(chance.uniform(0, 0.4))
                killed = ("agent", "server", "registry")[number % 3]
                if killed == "agent":
                    agent.kill()
                    agent.start()
                elif killed == "server":
                    server.__exit__(None, None, None)
                    server = double(port=port)
                    server.__enter__()
                else:
                    site.stop()
                    site.start()
                agent.wait_for(f"acme/sql@{version}", within_s=60)
                eventually(lambda name=f"acme/sql@{version}": name in loaded(url), within_s=60)
                lost = [path for path in loaded(url).values() if not Path(path).is_dir()]
                assert lost == [], f"seed {seed}, kill {number} of the {killed}"
            eventually(lambda: len(loaded(url)) == 1, within_s=60)
    finally:
        server.__exit__(None, None, None)
