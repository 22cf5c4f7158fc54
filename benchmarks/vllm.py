"""A channel's moves on a real vLLM (on the CPU), and wrong adapters before its served check.

.venv/bin/python -m benchmarks.vllm [moves] [clients]

It needs `make .venv-vllm-server-0.32.0/.ready`, or ADAPTORY_TEST_VLLM=PYTHON.

- Requests of clients through the front while the channel moves: how many fail or meet another adapter.
- From the move's answer to the changed route, the served check of each version included.
- What a server may have loaded instead of a release: how much of it is proved.
"""

import os
import sys
import time
from contextlib import closing
from pathlib import Path
from statistics import median

from registry.agent.servers.vllm import VllmServer
from tests import services
from tests.eventually import eventually
from tests.serving import real
from tests.serving.conftest import Site, mirrored
from tests.serving.test_mirror import Users, front

CHANNEL = "acme/sql@prod"


def measure_checks(site: Site, url: str, home: Path) -> None:
    evidence, passed = real.evidence_of(site, "1.1.0"), 0
    things = real.wrong_things(home)
    name = real.NAMES[1]
    with closing(VllmServer(url)) as server:
        for what, adapter in things.items():
            if adapter is not None:
                real.load(url, name, adapter)
            began_s = time.monotonic()
            result = server.check(name if adapter is not None else "base", evidence)
            seconds = time.monotonic() - began_s
            server.unload(name)
            passed += what != "the release" and result.verdict != "failed"
            print(f"  {what}: {result.verdict}, {result.served}, {seconds:.1f} s for {len(evidence)} examples")
    print(f"{passed} of {len(things) - 1} wrong things pass the served check of a real vLLM")


def measure_moves(site: Site, url: str, base: Path, moves: int, clients: int) -> None:
    asked, port, seconds = real.question(base), services.free_port(), list[float]()
    texts = real.texts(url, asked)
    words = ("--server", f"vllm={url}", "--front", f"http://127.0.0.1:{port}", "--group", "serving")
    with mirrored(site, *words) as agent, front(agent, port) as address:
        agent.wait_for(real.NAMES[0], within_s=120)
        with Users(address, CHANNEL, texts, clients, asked) as users:
            for number in range(moves):
                version = ("1.1.0", "1.0.0")[number % 2]
                site.promote(version)
                began_s = time.monotonic()
                eventually(lambda name=f"acme/sql@{version}": agent.routed() == name, within_s=300, every_s=0.01)
                seconds.append(time.monotonic() - began_s)
                users.wait_for(f"acme/sql@{version}")
    total = sum(users.served.values())
    print(
        f"{moves} moves beside {total} requests of {clients} clients: {len(users.wrong)} failed or met another adapter"
    )
    for text in users.wrong[:5]:
        print(f"  {text}")
    slowest = max(seconds)
    print(f"from a move's answer to the changed route: {median(seconds):.2f} s p50, {slowest:.2f} s at most")


def main() -> None:
    moves, clients = [*map(int, sys.argv[1:]), *(20, 2)[len(sys.argv) - 1 :]]
    with services.without_pytest() as home:
        base = real.base_in(home)
        with real.vllm(base, home / "vllm.log") as url:
            site = real.stocked(home, base)
            site.start()
            print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
            measure_checks(site, url, home)
            measure_moves(site, url, base, moves, clients)
            print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
            site.stop()


if __name__ == "__main__":
    main()
