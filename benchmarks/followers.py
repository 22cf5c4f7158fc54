"""What idle streams of events cost: CPU of a server process with N followers of one job, and a read beside them.

.venv/bin/python -m benchmarks.followers [followers] [seconds]
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2

from registry.domain.access import namespaces, tokens
from registry.domain.access.roles import EVERYWHERE, Role
from tests import services
from tests.access.house import HOST, build_house, new_environment
from tests.access.test_jobs import new_job
from tests.services import free_port

PER_USER = 20


def cpu_s(process: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(url: str, process: int, secrets: list[str], job_id: int, seconds: float) -> None:
    """Opens the streams, waits until all have had their first event, and measures."""
    address = httpx2.URL(url)
    for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else 190):
        _, writer = await asyncio.open_connection(address.host, address.port)
        lines = [f"GET /v1/jobs/{job_id}/events HTTP/1.1", f"Host: {address.host}"]
        lines.append(f"Authorization: Bearer {secrets[number // PER_USER]}")
        writer.write("\r\n".join([*lines, "", ""]).encode())
        STREAMS.append(writer)
    await asyncio.sleep(5)
    before, began, slowest = cpu_s(process), time.monotonic(), list[float]()
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {secrets[0]}"}) as http:
        while time.monotonic() - began < seconds:
            asked = time.monotonic()
            (await http.get(f"{url}/v1/adapters/acme/sql/releases/1.0.0")).raise_for_status()
            slowest.append(time.monotonic() - asked)
            await asyncio.sleep(0.1)
    share = (cpu_s(process) - before) / (time.monotonic() - began)
    slowest.sort()
    print(f"{len(STREAMS)} followers: {share:.1%} of a core")
    print(f"a release: {slowest[len(slowest) // 2] * 1e3:.1f} ms median, {slowest[-1] * 1e3:.1f} ms at most")


STREAMS: list[asyncio.StreamWriter] = []

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        house = build_house(new_environment(services.PAIRINGS[0], Path(directory) / "home"))
        job = new_job(house)[1]
        made = list[str]()
        for user in range(30):
            with house.resources.write() as session:
                namespaces.set_member(session, HOST, EVERYWHERE, f"user{user}", Role.ADMIN)
                new = tokens.NewToken(f"user{user}", "bench", {EVERYWHERE: Role.ADMIN}, None)
                made.append(tokens.create(session, HOST, new)[1])
        house.close()
        port = free_port()
        environment = os.environ | {"ADAPTORY_HOME": f"{directory}/home", "ADAPTORY_ACCESS": "tokens"}
        command = [Path(sys.executable).with_name("adaptory"), "serve", "--no-worker", "--port", str(port)]
        running = subprocess.Popen(command, env=environment | {"ADAPTORY_RATE_LIMIT": "", "ADAPTORY_ACCESS_LOG": "off"})
        try:
            time.sleep(8)
            length = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
            asyncio.run(measure(f"http://127.0.0.1:{port}", running.pid, made, job, length))
        finally:
            running.kill()
