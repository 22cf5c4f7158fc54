"""Answers of llama.cpp while a channel moves: each move is a second process, and then the end of the first.

.venv/bin/python -m benchmarks.llamacpp [moves]

Runs llama.cpp's own server with a small Llama, an agent and a front. Four clients send requests; counts those that fail
or meet another adapter, and measures the time from a move's answer to the changed route.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import httpx2

from benchmarks.harness import ADAPTORY
from benchmarks.serving import CHANNEL, front, move, registry, routed, running
from registry.agent.directory import MirrorDirectory
from registry.client.api import Api
from tests import services
from tests.eventually import eventually
from tests.scenarios.world import World
from tests.serving.conftest import llama_processes
from tests.serving.llama_base import write_llama
from tests.serving.llama_server import command, port_range
from tests.serving.test_llamacpp import text_of

ASK = {"prompt": "abc", "max_tokens": 8, "temperature": 0}
CLIENTS = 4


def main() -> None:
    moves = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    load = " ".join(f"{load:.1f}" for load in os.getloadavg())
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        with registry(home) as (api, _):
            base, kept_in, port, listen = (
                home / "base.gguf",
                home / "served",
                services.free_port(),
                services.free_port(),
            )
            write_llama(home / "world" / "base", base)
            adapters = {name: home / "world" / name for name in ("sql", "other-sql")}
            world = World(home / "world" / "base", adapters, {})
            right = {"acme/sql@1.0.0": text_of(world, "sql"), "acme/sql@1.1.0": text_of(world, "other-sql")}
            text, url = command(base, port_range()), f"http://127.0.0.1:{port}"
            words = [ADAPTORY, "mirror", CHANNEL, kept_in, "--server", f"llamacpp={text}", "--front", url]
            environment = {"ADAPTORY_HOME": str(home / "client"), "ADAPTORY_URL": api.url}
            health = f"http://127.0.0.1:{listen}/healthz"
            with (
                llama_processes(text, MirrorDirectory(kept_in)) as processes,
                running([*words, "--listen", f"127.0.0.1:{listen}"], health, environment),
                front(kept_in, port),
            ):
                measure(api, MirrorDirectory(kept_in), url, right, moves, lambda: set(processes.loaded()))
    print(f"load average {load} before")


def measure(
    api: Api, directory: MirrorDirectory, url: str, right: Mapping[str, str], moves: int, loaded: Callable[[], set[str]]
) -> None:
    """`right` has PEFT's answer of each version."""
    eventually(lambda: routed(directory), within_s=120)
    stop, lock, wrong, counted = threading.Event(), threading.Lock(), list[str](), [0]

    def client() -> None:
        with httpx2.Client(timeout=60) as http:
            while not stop.is_set():
                answer = http.post(f"{url}/v1/completions", json={"model": CHANNEL, **ASK})
                served = answer.headers.get("x-served-model", "")
                said = answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
                with lock:
                    counted[0] += 1
                    if said is None or said != right.get(served):
                        wrong.append(f"{answer.status_code} {served} {answer.text[:200]}")

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    seconds, most = list[float](), 0
    for number in range(moves):
        name, at_s = move(api, number)
        eventually(lambda name=name: routed(directory) == name, within_s=120, every_s=0.01)
        seconds.append(time.monotonic() - at_s)
        most = max(most, len(loaded()))
        eventually(lambda name=name: loaded() == {name}, within_s=120)
    stop.set()
    for thread in threads:
        thread.join()
    print(f"{moves} moves, {most} processes at most, beside {counted[0]} requests of {CLIENTS} clients:")
    print(f"  {len(wrong)} failed or met another adapter")
    p99 = sorted(seconds)[int(0.99 * len(seconds))]
    print(f"  from a move's answer to the changed route: {median(seconds):.2f} s p50, {p99:.2f} s p99")
    for row in wrong[:5]:
        print(f"  {row}")


if __name__ == "__main__":
    main()
