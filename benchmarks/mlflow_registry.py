"""Search and channel moves against MLflow's model registry: the same 10,000 versions, eight clients, both databases.

A version in MLflow has, as tags, which its search reads, the facts and scores that our search can filter by; a channel
is an alias. Its server runs with its defaults, four processes, in its own environment (`--venv`, created if missing);
ours runs with one process, and also with two. Each gets the same requests repeatedly: after the first time ours still
queries the database for releases, but renders them from memory.

For comparison, a bare FastAPI route answers the one statement of a resolve, whatever the others are asked: a server of
this kind on this machine cannot answer more.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from urllib.parse import urlencode

from sqlalchemy import text

from benchmarks import harness, load, resolve, stock
from benchmarks.load import Request
from registry.database.engine import Database

CLIENTS, LIMIT = 8, 50
BASE, RANK = stock.BASES[0], 16
FULL_PAGE, FEW, MOVE = "search, a full page", "search, few", "move a channel"
OURS, OURS_TWO, THEIRS, BARE = "adaptory", "adaptory, 2 processes", "MLflow", "bare route"


def main() -> None:
    chosen = _options()
    releases, seconds = (1_000, 1.0) if chosen.quick else (10_000, 4.0)
    python = _environment(chosen.venv)
    harness.announce("mlflow_registry", "sqlalchemy", "fastapi", "uvicorn", "psycopg")
    print(subprocess.run([python.with_name("mlflow"), "--version"], capture_output=True, text=True).stdout.strip())
    with TemporaryDirectory(prefix="bench-mlflow-") as directory, ExitStack() as stack:
        home = Path(directory)
        urls = stack.enter_context(stock.databases(home, chosen.postgres, chosen.base, releases))
        for kind, url in urls.items():
            with ExitStack() as servers:
                theirs = servers.enter_context(_mlflow(python, home, chosen.postgres, kind, releases))
                searches = _searches(releases)
                running = {OURS: resolve.started(url, home, servers), THEIRS: theirs}
                running[OURS_TWO] = resolve.started(url, home, servers, processes=2)
                ours, others = _ours(url, searches), _theirs(url, searches)
                requests = {case: others if case == THEIRS else ours for case in running}
                _check_answers({case: port for case, (port, _) in running.items()}, requests)
                running[BARE] = resolve.floor(url, servers)
                requests[BARE] = dict.fromkeys(ours, load.get(resolve.bare_path()))
                _compare(kind, running, requests, chosen.rounds, seconds)


def _options() -> argparse.Namespace:
    venv = Path(gettempdir()) / "adaptory-bench-mlflow"
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--venv", type=Path, default=venv, help="an environment with MLflow")
    mine, others = parser.parse_known_args()
    sys.argv[1:] = others
    chosen = harness.options(__doc__, rounds=5)
    chosen.venv = mine.venv
    return chosen


def _environment(directory: Path) -> Path:
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "mlflow", "psycopg2-binary"], check=True)
    return python


@contextmanager
def _mlflow(python: Path, home: Path, postgres: str | None, kind: str, releases: int) -> Generator[tuple[int, int]]:
    """Port and process id of a filled MLflow server on a database of the given kind."""
    with stock.empty_database(postgres if kind == "PostgreSQL" else None, home / "mlflow.db") as named:
        url = named.replace("postgresql:", "postgresql+psycopg2:")
        seen: dict[str, int] = {}
        lines: list[str] = []
        for name, tags in stock.versions(releases):
            seen[name] = seen.get(name, 0) + 1
            lines.append(json.dumps([_mlflow_name(name), seen[name], tags]))
        fill = [str(python), str(Path(__file__).with_name("mlflow_fill.py")), url]
        subprocess.run(fill, input="\n".join(lines), text=True, check=True)
        port = load.free_port()
        command = [str(python.with_name("mlflow")), "server", "--backend-store-uri", url, "--port", str(port)]
        with load.process(port, [*command, "--default-artifact-root", str(home / "artifacts")]) as process_id:
            yield port, process_id


def _searches(releases: int) -> dict[str, str]:
    """Target sets: the most frequent and the rarest among versions of that base and rank."""
    tags = [tags for _, tags in stock.versions(releases)]
    listed = Counter(tag["targets"] for tag in tags if (tag["base"], tag["rank"]) == (BASE, str(RANK))).most_common()
    return {FULL_PAGE: listed[0][0], FEW: listed[-1][0]}


def _mlflow_name(repository: str) -> str:
    return repository.replace("/", "--")  # MLflow allows no slash


def _ours(url: str, searches: dict[str, str]) -> dict[str, Request]:
    requests: dict[str, Request] = {}
    for name, targets in searches.items():
        asked = {"base": BASE, "min_rank": RANK, "max_rank": RANK, "targets_exact": targets, "limit": LIMIT}
        requests[name] = load.get(f"/v1/releases?{urlencode(asked)}&include_yanked=true")
    targets_of_moves = _two_versions(url)

    def move(number: int) -> bytes:
        repository, versions = targets_of_moves[number % len(targets_of_moves)]
        version = versions[number // len(targets_of_moves) % 2]
        path = f"/v1/adapters/{repository}/channels/{stock.CHANNEL}"
        return load.send("PUT", path, lambda _: json.dumps({"version": version}).encode())(number)

    return {**requests, MOVE: move}


def _theirs(url: str, searches: dict[str, str]) -> dict[str, Request]:
    requests: dict[str, Request] = {}
    for name, targets in searches.items():
        condition = f"tags.base = '{BASE}' AND tags.rank = '{RANK}' AND tags.targets = '{targets}'"
        query = urlencode({"filter": condition, "max_results": LIMIT})
        requests[name] = load.get(f"/api/2.0/mlflow/model-versions/search?{query}")
    targets_of_moves = _two_versions(url)

    def move(number: int) -> bytes:
        repository, _ = targets_of_moves[number % len(targets_of_moves)]
        version = number // len(targets_of_moves) % 2 + 2
        body = {"name": _mlflow_name(repository), "alias": stock.CHANNEL, "version": str(version)}
        path = "/api/2.0/mlflow/registered-models/alias"
        return load.send("POST", path, lambda _: json.dumps(body).encode())(number)

    return {**requests, MOVE: move}


def _two_versions(url: str) -> list[tuple[str, tuple[str, str]]]:
    """Two versions of each repository that are neither on its channel nor yanked, to move the channel between."""
    query = "SELECT namespace, name, version FROM releases JOIN repositories ON repositories.id = repository_id "
    query += "WHERE NOT yanked AND version <> '1.0.0' ORDER BY repositories.id, sort_key"
    versions_of: dict[str, list[str]] = {}
    with closing(Database(url)) as database, database.read() as session:
        for namespace, name, version in session.execute(text(query)):
            versions_of.setdefault(f"{namespace}/{name}", []).append(version)
    return [(name, (versions[0], versions[1])) for name, versions in versions_of.items()]


def _check_answers(ports: dict[str, int], requests: dict[str, dict[str, Request]]) -> None:
    """Checks that both return the same number of versions, so that the figures answer the same question."""
    for name in (FULL_PAGE, FEW):
        counts: dict[str, int] = {}
        for case, port in ports.items():
            with closing(load.Client(port)) as client:
                answer = json.loads(client.call(requests[case][name](0)))
                counts[case] = len(answer.get("model_versions" if case == THEIRS else "items", []))
        print(f"{name}: {counts[OURS]} versions a page")
        if len(set(counts.values())) > 1 or not counts[OURS]:
            raise RuntimeError(f"{name} finds {counts}")


def _compare(
    kind: str,
    running: dict[str, tuple[int, int]],
    requests: dict[str, dict[str, Request]],
    rounds: int,
    seconds: float,
) -> None:
    ours = [case for case in running if case != THEIRS]
    heading = [f"{case}, {what}" for what in ("requests/s", "ms of CPU") for case in running]
    rows = [["case", *heading, *(f"{case}, {what}" for what in ("times", "times CPU") for case in ours)]]
    for name in (FULL_PAGE, FEW, MOVE):
        rates: dict[str, list[float]] = {case: [] for case in running}
        costs: dict[str, list[float]] = {case: [] for case in running}
        asked = _counting(requests, name)
        for number in range(rounds + 1):
            for case, (port, process_id) in running.items():
                before = load.cpu_seconds(process_id)
                rate = load.requests_per_second(port, asked[case], CLIENTS, seconds)
                if number:
                    rates[case].append(rate)
                    costs[case].append((load.cpu_seconds(process_id) - before) / (rate * seconds) * 1e3)
        times = [[one / other for one, other in zip(rates[case], rates[THEIRS], strict=True)] for case in ours]
        cheaper = [[other / one for one, other in zip(costs[case], costs[THEIRS], strict=True)] for case in ours]
        figures = (*rates.values(), *costs.values(), *times, *cheaper)
        rows.append([name, *(harness.spread(values) for values in figures)])
    title = (
        f"{kind}, {CLIENTS} clients, {seconds:g} s a round ({rounds} rounds), CPU of the servers without the database's"
    )
    harness.table(title, rows)
    print(f"load average {os.getloadavg()[0]:.1f}")


def _counting(requests: dict[str, dict[str, Request]], name: str) -> dict[str, Request]:
    """Each continues where the previous round ended, so that every move changes something: on one database all share a
    counter."""
    numbers = {id(request[name]): count() for request in requests.values()}

    def following(request: Request) -> Request:
        return lambda _number: request(next(numbers[id(request)]))

    return {case: following(one[name]) for case, one in requests.items()}


if __name__ == "__main__":
    main()
