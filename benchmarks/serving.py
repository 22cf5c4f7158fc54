"""The cost of a promotion for the servers that follow it, on doubles of vLLM.

.venv/bin/python -m benchmarks.serving [agents] [moves]

- From a move's answer until agents have changed their routes: one agent, then several with a server each.
- Requests of four clients, through the front, while the channel moves: how many fail or meet another adapter.
- Streams through the front beside direct ones: 32 at a time, of about a second each, interleaved.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import httpx2

from benchmarks.harness import ADAPTORY
from registry.agent import loop
from registry.agent.directory import MirrorDirectory
from registry.agent.health import Health
from registry.agent.mirror import Duties, Mirror, Options
from registry.agent.servers.vllm import VllmServer
from registry.agent.switching import KeptServer
from registry.client.api import Api
from tests import services
from tests.eventually import eventually
from tests.scenarios.world import Cli, build_world
from tests.serving import double
from tests.serving.double import answers, weights_hash

CHANNEL = "acme/sql@prod"
STREAMS = 32


@contextmanager
def registry(home: Path) -> Generator[tuple[Api, dict[str, str]]]:
    """A server whose channel serves acme/sql:1.0.0, and the hashes of both versions' weights by name."""
    world = build_world(home / "world")
    embedded = Cli({"ADAPTORY_HOME": str(home / "registry"), "ADAPTORY_USER": "bench"})
    embedded.ok("base", "add", world.base, "--name", "tiny")
    adapters = {"1.0.0": world.adapters["sql"], "1.1.0": world.adapters["other-sql"]}
    for version, directory in adapters.items():
        embedded.ok("push", directory, f"acme/sql:{version}", "--base", "tiny")
    embedded.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    hashes = {f"acme/sql@{version}": weights_hash(directory) for version, directory in adapters.items()}
    limits = {"ADAPTORY_STREAMS": "300", "ADAPTORY_STREAMS_PER_TOKEN": "300", "ADAPTORY_RATE_LIMIT": ""}
    environment = {"ADAPTORY_HOME": str(home / "registry"), "ADAPTORY_LOOPBACK_OPEN": "true", **limits}
    port = services.free_port()
    url = f"http://127.0.0.1:{port}"
    with running([ADAPTORY, "serve", "--no-worker", "--port", port], f"{url}/readyz", environment):
        api = Api(url)
        yield api, hashes
        api.close()


@contextmanager
def running(words: Sequence[object], ready: str, environment: dict[str, str] | None = None) -> Generator[None]:
    """A process, once that address answers 200."""
    process = subprocess.Popen([*map(str, words)], env=os.environ | (environment or {}), stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: answers(ready), within_s=60)
        yield
    finally:
        process.kill()
        process.wait()


def move(api: Api, number: int) -> tuple[str, float]:
    """Promotes the other version. Returns its name and the time of the answer."""
    version = ("1.1.0", "1.0.0")[number % 2]
    api.put("/v1/adapters/acme/sql/channels/prod", {"version": version})
    return f"acme/sql@{version}", time.monotonic()


@contextmanager
def doubles(count: int, seconds: float) -> Generator[Sequence[str]]:
    """Addresses of servers in one process."""
    port = services.free_port()
    base = f"http://127.0.0.1:{port}"
    urls = [f"{base}/{number}" for number in range(count)] if count > 1 else [base]
    words = [sys.executable, "-m", "tests.serving.double", "vllm", port, seconds, 2, count]
    with running(words, f"{urls[-1]}/v1/models"):
        yield urls


def start_agent(url: str, kept_in: Path, address: str) -> MirrorDirectory:
    """An agent in threads of this process, without end."""
    api, directory, health = Api(url), MirrorDirectory(kept_in), Health()
    (kept_in / "by-commit").mkdir(parents=True)
    kept = KeptServer(VllmServer(address), directory, None, 600.0)
    duties = Duties()
    mirror = Mirror(api, directory, [kept], Options(), duties)
    followed = loop.Followed(api, [CHANNEL], health, lambda _text: None)
    threading.Thread(target=lambda: loop.run(mirror, followed, None, None, health), daemon=True).start()
    return directory


def measure_moves(api: Api, home: Path, agents: int, moves: int) -> None:
    with doubles(agents, 0.02) as urls:
        directories = [start_agent(api.url, home / f"agent-{agents}-{n}", url) for n, url in enumerate(urls)]
        eventually(lambda: all(routed(directory) for directory in directories), within_s=120)
        first, last = list[float](), list[float]()
        for number in range(moves):
            name, at_s = move(api, number)
            times = dict[Path, float]()
            while len(times) < len(directories):
                for directory in directories:
                    if directory.root not in times and routed(directory) == name:
                        times[directory.root] = time.monotonic() - at_s
                time.sleep(0.002)
            first.append(min(times.values()))
            last.append(max(times.values()))
            time.sleep(0.3)
    for which, seconds in (("first", first), ("last", last))[-agents:]:
        p99 = sorted(seconds)[int(0.99 * len(seconds))]
        print(f"{agents} agents, {moves} moves, {which} route changed: {median(seconds):.2f} s p50, {p99:.2f} s p99")


def routed(directory: MirrorDirectory) -> str | None:
    version = directory.routes().version(CHANNEL)
    return version.name if version else None


@contextmanager
def front(directory: Path, port: int) -> Generator[str]:
    url = f"http://127.0.0.1:{port}"
    with running([ADAPTORY, "route", directory, "--listen", f"127.0.0.1:{port}"], f"{url}/healthz"):
        yield url


def measure_requests(api: Api, home: Path, hashes: dict[str, str], moves: int) -> None:
    """Counts requests, failures and wrong adapters while the channel moves."""
    stop, lock, outcomes = threading.Event(), threading.Lock(), list[bool]()
    wrong = list[str]()

    def client(url: str) -> None:
        with httpx2.Client(timeout=60) as http:
            while not stop.is_set():
                answer = http.post(f"{url}/v1/completions", json={"model": CHANNEL, "prompt": "x"})
                served = answer.headers.get("x-served-model", "")
                is_right = answer.status_code == 200 and answer.json()["choices"][0]["text"] == hashes[served]
                with lock:
                    outcomes.append(is_right)
                    if not is_right:
                        wrong.append(f"{answer.status_code} {served} {answer.text[:200]}")

    port, listen, kept_in = services.free_port(), services.free_port(), home / "served"
    words = [ADAPTORY, "mirror", CHANNEL, kept_in, "--front", f"http://127.0.0.1:{port}"]
    words += ["--listen", f"127.0.0.1:{listen}"]
    environment = {"ADAPTORY_HOME": str(home / "client"), "ADAPTORY_URL": api.url}
    with (
        doubles(1, 0.02) as (address,),
        running([*words, "--server", f"vllm={address}"], f"http://127.0.0.1:{listen}/healthz", environment),
        front(kept_in, port),
    ):
        directory = MirrorDirectory(kept_in)
        eventually(lambda: routed(directory), within_s=60)
        threads = [threading.Thread(target=client, args=(f"http://127.0.0.1:{port}",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(moves):
            name, _ = move(api, number)
            eventually(lambda name=name: routed(directory) == name, within_s=60, every_s=0.01)
        stop.set()
        for thread in threads:
            thread.join()
    print(f"{moves} moves beside {len(outcomes)} requests of 4 clients: {len(wrong)} failed or met another adapter")
    for text in wrong[:5]:
        print(f"  {text}")


def measure_front(home: Path, rounds: int = 7) -> None:
    """Prints the time of a stream through the front as a ratio to a direct one, by round."""
    world = build_world(home / "streams")
    with ExitStack() as stack:
        (address,) = stack.enter_context(doubles(1, 1.0))
        name = "acme/sql@1.0.0"
        body = {"lora_name": name, "lora_path": str(world.adapters["sql"])}
        httpx2.post(f"{address}/v1/load_lora_adapter", json=body).raise_for_status()
        directory = MirrorDirectory(home / "routes")
        directory.root.mkdir()
        directory.write_routes(double.one_route(CHANNEL, name, address))
        url = stack.enter_context(front(directory.root, services.free_port()))
        http = stack.enter_context(
            httpx2.Client(timeout=60, limits=httpx2.Limits(max_connections=2 * STREAMS, keepalive_expiry=2))
        )
        threads = stack.enter_context(ThreadPoolExecutor(STREAMS))

        def once(target: str, model: str) -> float:
            began_s = time.monotonic()
            with http.stream(
                "POST", f"{target}/v1/completions", json={"model": model, "prompt": "x", "stream": True}
            ) as answer:
                for _ in answer.iter_raw():
                    pass
            return time.monotonic() - began_s

        ways: dict[str, Callable[[], float]] = {
            "direct": lambda: once(address, name),
            "front": lambda: once(url, CHANNEL),
        }
        ratios = list[float]()
        for number in range(rounds + 1):
            p50s = {
                way: median(threads.map(lambda _n, ask=ways[way]: ask(), range(2 * STREAMS)))
                for way in sorted(ways, reverse=number % 2 == 0)
            }
            if number:  # the first round opens connections
                ratios.append(p50s["front"] / p50s["direct"])
        print(f"{STREAMS} streams of a second, {rounds} rounds: p50 through the front {median(ratios):.3f} of direct,")
        print(f"  {min(ratios):.3f} to {max(ratios):.3f}")


def main() -> None:
    agents, moves = ([*map(int, sys.argv[1:]), 20, 100][:2]) if len(sys.argv) < 3 else map(int, sys.argv[1:3])
    print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        measure_front(home)
        with registry(home) as (api, hashes):
            measure_moves(api, home, 1, moves)
            measure_moves(api, home, agents, max(10, moves // 5))
            measure_requests(api, home, hashes, moves)
    os._exit(0)  # the agents' threads have no end


if __name__ == "__main__":
    main()
