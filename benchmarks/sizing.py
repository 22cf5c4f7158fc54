"""The needs of an installation: the figures of docs/how-to/size.md.

A server's requests are counted by the seconds of CPU that its process took, and those of its connections' PostgreSQL
processes: neighbours on the machine hardly change them, while requests a second depend on everything. Memory is what
the kernel counts for a process. A worker composes a model of 1.1 GB from two adapters of rank 16.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode

import yaml
from sqlalchemy import select, text

from benchmarks import harness, load, models, resolve, stock
from registry.database import portable
from registry.database.engine import Database
from registry.database.tables import RevisionFile
from registry.formats.references import Digest
from registry.storage.blobs import blob_key

SIZES, QUICK_SIZES = (1_000, 10_000, 100_000), (200, 1_000)
CLIENTS = 4
WEIGHTS = "adapter_model.safetensors"
REPOSITORY = stock.repository_name(17)
RECIPE = {
    "inputs": [{"adapter": "acme/one:1.0.0"}, {"adapter": "acme/two:1.0.0"}],
    "method": "linear", "probe": 0, "adapter": "acme/both:1.0.0", "model": "acme/merged:1.0.0",
}  # fmt: skip


def main() -> None:
    chosen = harness.options(__doc__, rounds=5)
    harness.announce("sizing", "sqlalchemy", "fastapi", "uvicorn")
    with TemporaryDirectory(dir=chosen.base.parent, prefix="bench-sizing-") as name:
        directory = Path(name)
        sizes = QUICK_SIZES if chosen.quick else SIZES
        growth = [["releases", "database", "bytes a release", "rows", "dump, s", "load into SQLite, s"]]
        for releases in sizes:
            with ExitStack() as stack:
                home = directory / str(releases)
                home.mkdir()
                urls = stack.enter_context(stock.databases(home, chosen.postgres, chosen.base, releases))
                growth += [_growth(kind, url, releases, home) for kind, url in urls.items()]
                if releases == sizes[-1]:
                    for kind, url in urls.items():
                        _serving(kind, url, home, chosen.rounds, 0.5 if chosen.quick else 3.0)
        harness.table("Databases of releases with four scores each, without audit and jobs", growth)
        _composing(directory, 2 if chosen.quick else 10, 1 if chosen.quick else min(3, chosen.rounds))
    print(f"load average {os.getloadavg()[0]:.1f}")


def _growth(kind: str, url: str, releases: int, home: Path) -> list[str]:
    """The size of a database, and how long the rows of a backup of it take."""
    with closing(Database(url)) as database:
        if database.is_sqlite:
            size = Path(str(database.url.database)).stat().st_size
        else:
            with database.read() as session:
                size = session.scalar(text("SELECT pg_database_size(current_database())"))
        began = time.perf_counter()
        with database.snapshot() as session:
            lines = list(portable.dump(session, portable.tables()))
        dumped = time.perf_counter() - began
    loaded = _loaded(lines, home)
    row = (f"{releases:,} {kind}", f"{size / 1e6:.0f} MB", f"{size / releases:,.0f}", f"{len(lines):,}")
    return [*row, f"{dumped:.1f}", f"{loaded:.1f}"]


def _loaded(lines: list[bytes], home: Path) -> float:
    from registry.database.migrate import migrate

    with closing(Database(f"sqlite:///{home / 'loaded.db'}")) as database:
        migrate(database)
        began = time.perf_counter()
        with database.write() as session:
            portable.load(session, lines)
        seconds = time.perf_counter() - began
    (home / "loaded.db").unlink()
    return seconds


@dataclass(frozen=True)
class Usage:
    """Seconds of CPU and requests of a load."""

    requests: int
    server_s: float
    database_s: float


def _serving(kind: str, url: str, home: Path, rounds: int, seconds: float) -> None:
    file = f"/v1/adapters/{REPOSITORY}/releases/1.0.0/files/{WEIGHTS}"
    query = urlencode({"base": stock.BASES[0], "max_rank": 16, "targets_within": "q_proj,v_proj"})
    paths = {
        "resolve a channel": f"/v1/resolve?{urlencode({'ref': f'{REPOSITORY}@{stock.CHANNEL}'})}",
        "a release": f"/v1/adapters/{REPOSITORY}/releases/1.0.0",
        "search, a page of 50": f"/v1/releases?{query}",
        "search by words": "/v1/releases?text=train+ticket",
        "download 660 kB through the server": file,
    }
    _write_blob(url, home)
    with ExitStack() as stack:
        port, process = resolve.started(url, home, stack)
        idle = _resident(process)
        used: dict[str, list[Usage]] = {name: [] for name in paths}
        for number in range(rounds + 1):
            for name, path in paths.items():
                one = _load(url, port, process, path, seconds)
                if number:
                    used[name].append(one)
        rows = [["request", "requests a second of the server's CPU", "server, ms", "database, ms"]]
        for name, several in used.items():
            rows.append(
                [
                    name,
                    harness.spread([sample.requests / sample.server_s for sample in several]),
                    harness.spread([1e3 * sample.server_s / sample.requests for sample in several]),
                    harness.spread([1e3 * sample.database_s / sample.requests for sample in several])
                    if kind != "SQLite"
                    else "in it",
                ]
            )
        harness.table(f"One server over {kind}, {CLIENTS} clients ({rounds} rounds of {seconds:g} s)", rows)
        print(f"memory of the server: {idle} MB idle, {_resident(process)} MB now, {_peak(process)} MB at its peak")
        if kind != "SQLite":
            print(f"its connections after that: {len(_backends(url))}")


def _write_blob(url: str, home: Path) -> None:
    """The file of a release, whose row the stock invented: a server sends what the store has."""
    with closing(Database(url)) as database, database.read() as session:
        wanted = select(RevisionFile.sha256, RevisionFile.size_bytes).where(
            RevisionFile.revision_id == 16 * stock.RELEASES_EACH + 1, RevisionFile.path == WEIGHTS
        )
        sha256, size = session.execute(wanted).one()
    path = home / "store" / blob_key(Digest(sha256))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))


def _load(url: str, port: int, process: int, path: str, seconds: float) -> Usage:
    before, backends = load.cpu_seconds(process), _backend_seconds(url)
    began = time.perf_counter()
    rate = load.requests_per_second(port, load.get(path), CLIENTS, seconds)
    lasted = time.perf_counter() - began
    after = _backend_seconds(url)
    took = sum(spent - backends.get(pid, 0.0) for pid, spent in after.items())
    return Usage(max(1, round(rate * lasted)), max(0.01, load.cpu_seconds(process) - before), took)


def _backends(url: str) -> list[int]:
    """Process ids of the connections to this database, except the one that reads them."""
    if not url.startswith("postgresql"):
        return []
    with closing(Database(url)) as database, database.read() as session:
        asked = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
        return list(session.scalars(asked))


def _backend_seconds(url: str) -> dict[int, float]:
    return {pid: load.cpu_seconds(pid) for pid in _backends(url)}


def _status(process: int, field: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1000)


def _resident(process: int) -> int:
    return _status(process, "VmRSS")


def _peak(process: int) -> int:
    return _status(process, "VmHWM")


def _composing(directory: Path, layers: int, rounds: int) -> None:
    """A composition from the queue to its two releases, in a process of its own."""
    made, home = directory / "made", directory / "home"
    made.mkdir()
    size = models.Size(layers)
    base = models.make_base(made / "base", size)
    adapters = {name: models.make_adapter(made / name, size, 16, seed) for seed, name in enumerate(("one", "two"), 1)}
    recipe = made / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    taken = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e9
    measured: Mapping[str, list[float]] = {"s": [], "CPU s": [], "MB": []}
    for _ in range(rounds):
        run = _commands(home)
        run("base", "add", base, "--name", "large")
        for name, adapter in adapters.items():
            run("push", adapter, f"acme/{name}:1.0.0", "--base", "large")
        seconds, cpu, peak = run("compose", recipe)
        measured["s"].append(seconds / taken)
        measured["CPU s"].append(cpu / taken)
        measured["MB"].append(peak)
        shutil.rmtree(home)
    rows = [["base", "s a GB", "CPU s a GB", "peak memory, MB"]]
    rows.append([f"{taken:.2f} GB", *(harness.spread(values) for values in measured.values())])
    harness.table(f"A composition: check, combine, merge, publish ({rounds} rounds)", rows)


def _commands(home: Path) -> Callable[..., tuple[float, float, float]]:
    """Runs `adaptory`; returns seconds, seconds of CPU, and peak memory in MB."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}

    def run(*words: object) -> tuple[float, float, float]:
        began = time.perf_counter()
        command = [str(harness.ADAPTORY), *map(str, words)]
        child = subprocess.Popen(command, env=environment | {"ADAPTORY_HOME": str(home)}, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
        return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000

    return run


if __name__ == "__main__":
    main()
