"""One search over 10,000 releases on SQLite and one channel resolved: as a verb, through the application, over HTTP.

The search asks for a base, a maximum rank, a set of targets and a score: a full page of 50, and nine rare releases.
The floor reads one row by its key with the same libraries and is called the same way. Clients are threads of this
process and share the machine with the server, so a throughput is what both reach together.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode

from sqlalchemy import event, text

from benchmarks import floor, harness, stock
from benchmarks.harness import Case, Sample
from registry import resolve, search
from registry.cli.connect import EMBEDDED_URL
from registry.client.api import Api
from registry.client.inprocess import InProcessTransport
from registry.names import parse_reference
from registry.resources import Resources, open_resources
from registry.search import Query
from registry.settings import Settings
from registry.suites import parse_condition
from registry.web.app import create_app
from registry.web.views import release_page

RELEASES = 10_000
BASE, MAX_RANK, TARGETS, LIMIT = stock.BASES[0], 16, ("q_proj", "v_proj"), 50
SCORES = {"search, full page": "sql-exact.accuracy>=0.5", "search, rare": "sql-exact.accuracy>=0.99"}
REFERENCE = f"{stock.repository_name(17)}@{stock.CHANNEL}"
FLOOR = "one row by its key"
CLIENTS = (1, 8)
START_S = 60

REQUESTS: dict[str, tuple[str, dict[str, object]]] = {
    FLOOR: ("/releases/17", {}),
    "resolve a channel": ("/v1/resolve", {"ref": REFERENCE}),
    **{
        name: (
            "/v1/releases",
            {"base": BASE, "max_rank": MAX_RANK, "targets_within": TARGETS, "score": score, "limit": LIMIT},
        )
        for name, score in SCORES.items()
    },
}
"""Path and query of each case."""

Call = Callable[[], object]


def main() -> None:
    chosen = harness.options(__doc__, rounds=15)
    count, seconds = (20, 0.5) if chosen.quick else (100, 3.0)
    harness.announce("search", "sqlalchemy", "fastapi", "pydantic", "uvicorn")
    with TemporaryDirectory(prefix="bench-search-") as directory, ExitStack() as stack:
        home = Path(directory)
        resources = stack.enter_context(closing(open_resources(Settings(home=home))))
        stock.fill(resources, chosen.base, RELEASES)
        size = (home / "registry.db").stat().st_size
        print(f"{RELEASES:,} releases, {size / harness.MB:.0f} MB of SQLite")
        explain(resources)
        cases = {name: partial(harness.calls, call, count) for name, call in _verbs(resources).items()}
        _one_at_a_time("as a verb, in a read transaction", cases, chosen.rounds)
        with ExitStack() as here:
            cases = {name: partial(harness.calls, call, count) for name, call in _in_process(resources, here).items()}
            _one_at_a_time("through the application, in process", cases, chosen.rounds)
        ports = _serve(home, resources, stack)
        cases = {name: partial(_http_calls, port, path, count) for name, (port, path) in ports.items()}
        _one_at_a_time("over HTTP", cases, chosen.rounds)
        _throughput(ports, max(2, chosen.rounds // 3), seconds)


def wanted(condition: str) -> Query:
    return Query(
        base=BASE, max_rank=MAX_RANK, targets_within=TARGETS, scores=[parse_condition(condition)], limit=LIMIT + 1
    )


def explain(resources: Resources) -> None:
    """Prints SQLite's plan of every statement of a search, of the page made of it, and of a resolve."""
    seen: list[tuple[str, object]] = []

    def remember(_connection: object, _cursor: object, statement: str, parameters: object, *_rest: object) -> None:
        seen.append((statement, parameters))

    event.listen(resources.database.engine, "before_cursor_execute", remember)
    with resources.read() as session:
        release_page(session, search.search(session, wanted(SCORES["search, full page"])))
        resolve.resolve(session, parse_reference(REFERENCE))
    event.remove(resources.database.engine, "before_cursor_execute", remember)
    with resources.read() as session:
        connection = session.connection()
        for statement, parameters in [(one, given) for one, given in seen if one.startswith("SELECT")]:
            table = statement.partition("FROM ")[2].split()[0]
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)  # pyright: ignore
            print(f"\n{table}:")
            print("\n".join(f"    {detail}" for _, _, _, detail in plan))


def _verbs(resources: Resources) -> dict[str, Call]:
    reference = parse_reference(REFERENCE)
    trivial = text("SELECT version FROM releases WHERE id = 17")

    def read(run: Callable[..., object], *given: object) -> None:
        with resources.read() as session:
            run(session, *given)

    return {
        FLOOR: partial(read, lambda session: session.execute(trivial).scalar_one()),
        "resolve a channel": partial(read, resolve.resolve, reference),
        **{name: partial(read, search.search, wanted(score)) for name, score in SCORES.items()},
    }


def _in_process(resources: Resources, stack: ExitStack) -> dict[str, Call]:
    def api(application: object) -> Api:
        return stack.enter_context(closing(Api(EMBEDDED_URL, InProcessTransport(application))))  # pyright: ignore

    bare, ours = api(floor.create_app(resources.settings.effective_database_url)), api(create_app(resources))
    return {
        name: partial((bare if name == FLOOR else ours).get, path, **query) for name, (path, query) in REQUESTS.items()
    }


def _one_at_a_time(where: str, cases: Mapping[str, Case], rounds: int) -> None:
    results = harness.interleave(cases, rounds)
    count = len(results[FLOOR][0].calls)
    harness.report(f"One call after the other, {where}, {count} a round", results, FLOOR, "ms")


Ports = Mapping[str, tuple[int, str]]


def _serve(home: Path, resources: Resources, stack: ExitStack) -> Ports:
    """The floor and a real `adaptory serve`, each in a process of its own: name -> port and path."""
    floor_port, port = _free_port(), _free_port()
    database = resources.settings.effective_database_url
    stack.enter_context(_process(floor_port, [sys.executable, "-m", "benchmarks.floor", database, str(floor_port)]))
    command = [str(harness.ADAPTORY), "serve", "--port", str(port), "--no-worker"]
    stack.enter_context(_process(port, command, ADAPTORY_HOME=str(home)))
    return {
        name: (floor_port if name == FLOOR else port, f"{path}?{urlencode(query, doseq=True)}")
        for name, (path, query) in REQUESTS.items()
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def _process(port: int, command: Sequence[str], **environment: str) -> Generator[None]:
    """Yields once the port takes connections. Raises RuntimeError when the process ends or the time is up."""
    server = subprocess.Popen(command, env={**os.environ, **environment})
    deadline = time.monotonic() + START_S
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not answer")
            time.sleep(0.05)
        yield
    finally:
        server.terminate()
        server.wait(START_S)


@contextmanager
def _client(port: int, path: str) -> Generator[Call]:
    """GETs `path` over one kept connection, by the plainest client there is: its time is in the figure."""
    with closing(HTTPConnection("127.0.0.1", port)) as connection:

        def get() -> None:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise RuntimeError(f"{path} answered {response.status}: {body[:500]!r}")

        yield get


def _http_calls(port: int, path: str, count: int) -> Sample:
    """A connection for each round: the server closes one that rests for five seconds."""
    with _client(port, path) as get:
        return harness.calls(get, count)


def _throughput(ports: Ports, rounds: int, seconds: float) -> None:
    rates: dict[tuple[str, int], list[float]] = {(name, clients): [] for clients in CLIENTS for name in ports}
    for _ in range(rounds):
        for (name, clients), found in rates.items():
            found.append(_requests_per_second(*ports[name], clients, seconds))
    rows = [["case", "clients", "requests/s (min..max)", "of the floor's"]]
    for (name, clients), found in rates.items():
        shares = [one / other for one, other in zip(found, rates[FLOOR, clients], strict=True)]
        rows.append([name, str(clients), harness.spread(found), harness.spread(shares)])
    harness.table(f"Throughput over HTTP, {seconds:g} s a round ({rounds} rounds)", rows)


def _requests_per_second(port: int, path: str, clients: int, seconds: float) -> float:
    done: list[int] = []
    until = time.perf_counter() + seconds

    def work() -> None:
        count = 0
        with _client(port, path) as get:
            while time.perf_counter() < until:
                get()
                count += 1
        done.append(count)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(done) != clients:
        raise RuntimeError(f"{clients - len(done)} of {clients} clients of {path} failed.")
    return sum(done) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
