"""Resolving a channel: `adaptory serve` against a bare FastAPI route with the same single statement, on both databases.

Both answer over HTTP from their own process, with the same server, drivers, pool and pragmas. The same clients call
them in turn, so that neither runs at a better moment.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode

from benchmarks import harness, load, stock

CLIENTS = (1, 8)
REPOSITORY = stock.repository_name(17)
FLOOR = "bare route, same statement"


def main() -> None:
    chosen = harness.options(__doc__, rounds=15)
    releases, seconds = (1_000, 0.5) if chosen.quick else (10_000, 2.0)
    harness.announce("resolve", "sqlalchemy", "fastapi", "uvicorn", "psycopg")
    with TemporaryDirectory(prefix="bench-resolve-") as directory, ExitStack() as stack:
        home = Path(directory)
        urls = stack.enter_context(stock.databases(home, chosen.postgres, chosen.base, releases))
        for name, url in urls.items():
            with ExitStack() as servers:
                ports = {FLOOR: floor(url, servers)[0], "adaptory serve": adaptory(url, home, servers)}
                _compare(f"{name}, {releases:,} releases", ports, chosen.rounds, seconds)


def floor(url: str, stack: ExitStack) -> tuple[int, int]:
    """Port and process id of the bare route over that database."""
    port = load.free_port()
    command = [sys.executable, "-m", "benchmarks.floor", url, str(port)]
    return port, stack.enter_context(load.process(port, command))


def bare_path() -> str:
    namespace, _, name = REPOSITORY.partition("/")
    return f"/resolve?{urlencode({'namespace': namespace, 'repository': name, 'channel': stock.CHANNEL})}"


def adaptory(url: str, home: Path, stack: ExitStack) -> int:
    """Port of a server without a worker over that database."""
    return started(url, home, stack)[0]


def started(url: str, home: Path, stack: ExitStack, processes: int = 1) -> tuple[int, int]:
    """The server's port and process id."""
    port = load.free_port()
    command = [str(harness.ADAPTORY), "serve", "--port", str(port), "--no-worker", "--processes", str(processes)]
    environment = {"ADAPTORY_HOME": str(home), "ADAPTORY_DATABASE_URL": url}
    return port, stack.enter_context(load.process(port, command, **environment, ADAPTORY_LOOPBACK_OPEN="true"))


def _compare(title: str, ports: dict[str, int], rounds: int, seconds: float) -> None:
    paths = {
        FLOOR: bare_path(),
        "adaptory serve": f"/v1/resolve?{urlencode({'ref': f'{REPOSITORY}@{stock.CHANNEL}'})}",
    }
    rates: dict[tuple[str, int], list[float]] = {(case, clients): [] for clients in CLIENTS for case in ports}
    for number in range(rounds + 1):
        order = list(rates) if number % 2 else list(reversed(rates))
        for case, clients in order:
            rate = load.requests_per_second(ports[case], load.get(paths[case]), clients, seconds)
            if number:
                rates[case, clients].append(rate)
    rows = [["case", "clients", "requests/s (min..max)", "of the bare route's"]]
    for (case, clients), measured in rates.items():
        shares = [one / other for one, other in zip(measured, rates[FLOOR, clients], strict=True)]
        rows.append([case, str(clients), harness.spread(measured), harness.spread(shares)])
    harness.table(f"Resolve a channel, {title}, {seconds:g} s a round ({rounds} rounds)", rows)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
