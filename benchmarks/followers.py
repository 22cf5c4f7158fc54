"""The cost of a channel's followers for a server process, and the time until they notice a move.

.venv/bin/python -m benchmarks.followers [followers] [idle seconds] [moves] [postgresql]

Prints CPU and memory of the process with N idle streams, and for each move the seconds from its answer until the first
and the last follower have its event.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import httpx2

from benchmarks.harness import ADAPTORY
from registry.domain.access import tokens
from registry.domain.access.roles import EVERYWHERE, Role
from tests import services
from tests.access.house import HOST, PRIVATE, new_house
from tests.eventually import eventually
from tests.services import free_port

CHANNEL = f"{PRIVATE}/sql@prod"
PATH = f"/v1/adapters/{PRIVATE}/sql/channels/prod"


def cpu_s(process: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Followers:
    """Streams of one channel, and when each move's event came, by the move's id."""

    def __init__(self, address: httpx2.URL, token: str) -> None:
        self._address, self._token = address, token
        self.noticed: dict[int, list[float]] = {}
        self._seen, self._news = 0, asyncio.Event()

    async def open(self, count: int) -> list[asyncio.Task[None]]:
        tasks: list[asyncio.Task[None]] = []
        for number in range(count):
            tasks.append(asyncio.create_task(self._follow()))
            if number % 50 == 0:
                await asyncio.sleep(0.05)
        while any(not task.done() for task in tasks) and self._seen < count:
            await self.news()
        return tasks

    async def news(self) -> None:
        """Returns after the next event of any stream."""
        self._news.clear()
        await self._news.wait()

    async def _follow(self) -> None:
        reader, writer = await asyncio.open_connection(self._address.host, self._address.port)
        lines = [f"GET /v1/follow?channels={CHANNEL} HTTP/1.1", f"Host: {self._address.host}"]
        lines += ["Accept: text/event-stream", f"Authorization: Bearer {self._token}", "", ""]
        writer.write("\r\n".join(lines).encode())
        while line := await reader.readline():
            if line.startswith(b"data: "):
                move = json.loads(line[6:])["channels"][CHANNEL]["move"]
                self.noticed.setdefault(move, []).append(time.monotonic())
                self._seen += 1
                self._news.set()


async def measure(url: str, process: int, token: str, count: int, idle_s: float, moves: int) -> None:
    """Opens the streams, lets them idle, then moves the channel to and fro."""
    followers, before_mb = Followers(httpx2.URL(url), token), rss_mb(process)
    began_s, idle_cpu_s = time.monotonic(), cpu_s(process)
    await asyncio.sleep(idle_s)
    alone = (cpu_s(process) - idle_cpu_s) / (time.monotonic() - began_s)
    tasks = await followers.open(count)
    await asyncio.sleep(2)
    began_s, idle_cpu_s = time.monotonic(), cpu_s(process)
    await asyncio.sleep(idle_s)
    share = (cpu_s(process) - idle_cpu_s) / (time.monotonic() - began_s)
    more_mb = rss_mb(process) - before_mb
    print(f"{count} idle followers: {share:.2%} of a core ({alone:.2%} without), {more_mb:.0f} MB more")
    first, last = list[float](), list[float]()
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {token}"}) as http:
        for number in range(moves):
            answer = await http.put(f"{url}{PATH}", json={"version": ("1.0.0", "1.1.0")[number % 2]})
            moved_s, move = time.monotonic(), answer.raise_for_status().json()["id"]
            with suppress(TimeoutError):
                async with asyncio.timeout(30):
                    while len(followers.noticed.get(move, ())) < count:
                        await followers.news()
            assert len(followers.noticed[move]) == count, "a follower missed the move"
            first.append(min(followers.noticed[move]) - moved_s)
            last.append(max(followers.noticed[move]) - moved_s)
            await asyncio.sleep(0.05 + number % 7 * 0.03)
    for named, seconds in (("first", first), ("all", last)):
        p99 = sorted(seconds)[int(0.99 * len(seconds))]
        print(
            f"{moves} moves, {named} noticed: {median(seconds):.3f} s p50, {p99:.3f} s p99, {max(seconds):.3f} s worst"
        )
    for task in tasks:
        task.cancel()


def main() -> None:
    given = [*sys.argv[1:], *("1000", "20", "100", "")[len(sys.argv) - 1 :]]
    pairing = services.PAIRINGS["postgresql" in sys.argv]
    with tempfile.TemporaryDirectory() as directory:
        os.environ[services.DIRECTORY] = directory
        house = new_house(pairing, Path(directory) / "home")
        environ = dict(house.environ)
        with house.resources.write() as session:
            new = tokens.NewToken("operator", "bench", {EVERYWHERE: Role.ADMIN}, None)
            token = tokens.create(session, HOST, new)[1]
        house.close()
        port, count = free_port(), given[0]
        limits = {"ADAPTORY_STREAMS": count, "ADAPTORY_STREAMS_PER_TOKEN": count, "ADAPTORY_RATE_LIMIT": ""}
        environment = os.environ | environ | limits | {"ADAPTORY_ACCESS": "tokens", "ADAPTORY_ACCESS_LOG": "off"}
        server = subprocess.Popen([ADAPTORY, "serve", "--no-worker", "--port", str(port)], env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            eventually(lambda: _answers(url))
            asyncio.run(measure(url, server.pid, token, int(count), float(given[1]), int(given[2])))
        finally:
            server.kill()


def _answers(url: str) -> bool:
    with suppress(httpx2.TransportError):
        return httpx2.get(f"{url}/healthz").status_code == 200
    return False


if __name__ == "__main__":
    main()
