"""Pages against the JSON that they show, over 10,000 repositories: the server's time for each, asked in turn.

`own` is the JSON that the page links to, `all` every document with a fact that the page shows, one request after the
other. Each round asks for another repository, so that no page is in memory from before.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import update

from benchmarks import harness, load, resolve, stock
from registry.database.engine import Database
from registry.database.tables import Release, RevisionFile
from registry.formats.references import Digest
from registry.storage.local import LocalStore

CALLS = 20
ASKED = 200
"""Repositories that are asked about."""
CARD = "# A card\n\n" + "Trained again on last week's tickets, **carefully**.\n" * 55
LAYERS, MODULES = 30, ("self_attn.q_proj", "self_attn.v_proj")
Paths = Callable[[str], tuple[str, Sequence[str]]]


def _release(name: str) -> tuple[str, Sequence[str]]:
    own = f"/v1/adapters/{name}/releases/1.0.0"
    beside = (f"{own}/spectrum", f"{own}/moves", f"{own}/descendants", f"/v1/adapters/{name}/channels?version=1.0.0")
    return f"/{name}/1.0.0", (own, *beside)


def _repository(name: str) -> tuple[str, Sequence[str]]:
    own = f"/v1/adapters/{name}"
    return f"/{name}", (f"{own}/releases?limit=20", own, f"{own}/channels")


def _channel(name: str) -> tuple[str, Sequence[str]]:
    own = f"/v1/adapters/{name}/channels/{stock.CHANNEL}"
    return f"/{name}@{stock.CHANNEL}", (own, f"{own}/history", f"{own}/policy", f"{own}/promotions")


def _compare(name: str) -> tuple[str, Sequence[str]]:
    listed = [f"/v1/adapters/{name}/releases/{version}" for version in ("1.0.0", "1.1.0")]
    return f"/{name}/compare/1.0.0...1.1.0", listed


def _history(name: str) -> tuple[str, Sequence[str]]:
    return f"/{name}/history", (f"/v1/adapters/{name}/releases",)


PAGES: Mapping[str, Paths] = {
    "home": lambda _: ("/", ["/v1/releases?limit=10"]),
    "search": lambda name: (
        f"/search?base={stock.BASES[0]}&max_rank=16&text={name.rpartition('-')[2]}",
        [f"/v1/releases?base={stock.BASES[0]}&max_rank=16&text={name.rpartition('-')[2]}&limit=25"],
    ),
    "search, a full page": lambda _: (
        f"/search?base={stock.BASES[0]}&max_rank=16",
        [f"/v1/releases?base={stock.BASES[0]}&max_rank=16&limit=25"],
    ),
    "repository": _repository,
    "release": _release,
    "channel": _channel,
    "compare": _compare,
    "history": _history,
    "conflicts, the form": lambda _: ("/conflicts", ["/v1/releases?latest=true&limit=25"]),
    "compose": lambda _: ("/compose", ["/v1/releases?latest=true&limit=25", "/v1/suites"]),
}


def main() -> None:
    chosen = harness.options(__doc__, rounds=20)
    repositories = 500 if chosen.quick else 10_000
    harness.announce("pages", "sqlalchemy", "fastapi", "uvicorn", "jinja2")
    with TemporaryDirectory(prefix="bench-pages-") as directory, ExitStack() as stack:
        home = Path(directory)
        count = repositories * stock.RELEASES_EACH
        urls = stack.enter_context(stock.databases(home, chosen.postgres, chosen.base, count))
        numbers = random.Random(7).sample(range(1, repositories + 1), ASKED)  # noqa: S311
        for name, url in urls.items():
            _complete(url, home, numbers)
            with ExitStack() as servers:
                port = resolve.adaptory(url, home, servers)
                client = servers.enter_context(closing(load.Client(port)))
                _report(f"{name}, {repositories:,} repositories", client, numbers, chosen.rounds)


def _complete(url: str, home: Path, numbers: Sequence[int]) -> None:
    """Gives the first releases of repositories what their pages show besides rows: a card, and a spectrum."""
    store = LocalStore(home / "store")
    card = home / "card"
    with closing(Database(url)) as database, database.write() as session:
        for number in numbers:
            release = (number - 1) * stock.RELEASES_EACH + 1
            readme = session.get_one(RevisionFile, (release, "README.md"))
            card.write_text(CARD.ljust(readme.size_bytes)[: readme.size_bytes], encoding="utf-8")
            store.put(Digest(readme.sha256), card)
            session.execute(
                update(Release).where(Release.id.in_((release, release + 1))).values(spectrum=_spectrum(), yanked=False)
            )


def _spectrum() -> dict[str, Any]:
    summary = {"norm": 2.0, "effective_rank": 3.0, "rank_95": 4, "rank_99": 6, "energy": {"1": 0.6, "2": 0.8, "4": 1.0}}
    modules = [
        {"module": f"model.layers.{layer}.{name}", "rank": 8, "near_zero": False, **summary, "norm": 1 + layer / LAYERS}
        for layer in range(LAYERS)
        for name in MODULES
    ]
    return {**summary, "near_zero": 0, "modules": modules, "left_out": []}


def _report(title: str, client: load.Client, numbers: Sequence[int], rounds: int) -> None:
    rows = [["page", "kB", "ms, p50 and p95", "of its own JSON", "of all JSON", "p95 of all JSON's p95"]]
    names = cycle([stock.repository_name(number) for number in numbers])
    for page, paths in PAGES.items():
        taken = _measured(client, paths, names, rounds)
        shares = [
            [one / other for one, other in zip(taken["page"], taken[against], strict=True)]
            for against in ("own", "all")
        ]
        size = len(client.call(_request(paths(next(names))[0], "text/html"))) / 1e3
        high = {case: harness.percentile(times, 0.95) for case, times in taken.items()}
        rows.append(
            [
                page,
                f"{size:.0f}",
                f"{median(taken['page']) * 1e3:.1f}, {high['page'] * 1e3:.1f}",
                f"{median(shares[0]):.2f}",
                f"{median(shares[1]):.2f}",
                f"{high['page'] / high['all']:.2f}",
            ]
        )
    harness.table(f"Pages, {title} ({rounds} rounds of {CALLS} calls)", rows)
    print(f"load average {os.getloadavg()[0]:.1f}")


def _measured(client: load.Client, paths: Paths, names: Iterator[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of the page, of its own JSON and of all; page and JSON take turns in being asked first."""
    taken: dict[str, list[float]] = {"page": [], "own": [], "all": []}
    for number in range((rounds + 1) * CALLS):
        page, documents = paths(next(names))
        cases = {"page": [_request(page, "text/html")], "all": [_request(document, "*/*") for document in documents]}
        times = {case: _seconds(client, cases[case]) for case in (cases if number % 2 else reversed(cases))}
        times["own"] = _seconds(client, cases["all"][:1])
        if number >= CALLS:
            for case, seconds in times.items():
                taken[case].append(seconds)
    return taken


def _seconds(client: load.Client, requests: Sequence[bytes]) -> float:
    started = time.perf_counter()
    for request in requests:
        client.call(request)
    return time.perf_counter() - started


def _request(path: str, accept: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n".encode()


if __name__ == "__main__":
    main()
