"""Many clients at once: every accepted move is in the history once and in order, and one of many pushes wins."""

import itertools
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, text

from registry.api.http.threads import SEARCH_THREADS
from registry.client.api import Api, line_path
from registry.client.push import push
from registry.database.tables import AuditRow, Move, Release
from registry.errors import Conflict, Invalid, NotFound, Refused, RegistryError
from registry.formats.references import RepositoryName
from tests import services
from tests.doses import further
from tests.durability.conftest import broken_promises, opened
from tests.durability.processes import CHANNEL, NAME, kill, serve, wait_for_port
from tests.durability.small import RANK, adapter_files
from tests.forked import start

CLIENTS = 16
VERSIONS = 6
WAITING_FOR_LOCKS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


@pytest.fixture
def url(environ: dict[str, str]) -> Generator[str]:
    """Two server processes over one registry: races are between machines, not only between threads."""
    ports = [services.free_port() for _ in range(2)]
    servers = [start(serve, environ, port) for port in ports]
    for port in ports:
        wait_for_port(port)
    yield " ".join(f"http://127.0.0.1:{port}" for port in ports)
    for process in servers:
        kill(process)


@contextmanager
def clients(url: str) -> Generator[list[Api]]:
    addresses = url.split()
    apis = [Api(addresses[number % len(addresses)]) for number in range(CLIENTS)]
    yield apis
    for api in apis:
        api.close()


def push_version(api: Api, directory: Path, version: str, seed: int) -> dict[str, Any]:
    return push_numbered(api, directory, {"version": version}, seed)


def push_numbered(api: Api, directory: Path, number: dict[str, str], seed: int, rank: int = RANK) -> dict[str, Any]:
    files = adapter_files(directory / str(seed), seed, rank)
    return dict(push(api, files, NAME, "adapter", {**number, "base": "tiny"}, lambda _count: None)[0].document)


def together(apis: list[Api], act: Callable[[int, Api], object]) -> list[object]:
    """Runs all at the same moment; an error of the registry is an answer too."""
    gate = threading.Barrier(len(apis))

    def run(number: int) -> object:
        gate.wait()
        try:
            return act(number, apis[number])
        except RegistryError as error:
            return error

    with ThreadPoolExecutor(len(apis)) as pool:
        return list(pool.map(run, range(len(apis))))


@pytest.mark.long
@pytest.mark.parametrize("enough_moves", [200, 2_000])
def test_sixteen_clients_move_one_channel_and_history_has_every_accepted_move_once_in_order(
    environ: dict[str, str], url: str, tmp_path: Path, enough_moves: int
) -> None:
    with clients(url) as apis:
        for number in range(VERSIONS):
            push_version(apis[0], tmp_path, f"1.{number}.0", number)
        accepted: list[list[int]] = [[] for _ in apis]
        asked: dict[int, str] = {}  # the version requested in a promotion, by its move
        enough = threading.Event()

        def move(number: int, api: Api) -> None:
            turn = 0
            while not enough.is_set():
                turn += 1
                version = f"1.{(number + turn) % VERSIONS}.0"
                try:
                    if turn % 3 == 0:
                        answer = api.post(f"{CHANNEL}/rollback", {})
                    else:
                        answer = api.put(CHANNEL, {"version": version})
                        assert asked.setdefault(answer["id"], version) == version
                except (Conflict, NotFound, Refused) as error:
                    if error.code not in ("channel_moved", "raced", "nothing_below", "channel_unknown"):
                        raise
                    continue
                accepted[number].append(answer["id"])
                if len({move for listed in accepted for move in listed}) >= enough_moves:
                    enough.set()

        assert together(apis, move) == [None] * CLIENTS
        history = list(apis[0].pages(f"{CHANNEL}/history", limit=500))

    resources = opened(environ)
    with resources.read() as session:
        count = session.scalar(select(func.count()).select_from(Move))
        moves = session.scalars(select(AuditRow.after).where(AuditRow.act.like("channel:%"))).all()
    resources.close()
    ids = [move["id"] for move in history]
    assert len(ids) == count >= enough_moves
    assert ids == sorted(set(ids), reverse=True)
    assert {move for moves in accepted for move in moves} == set(ids)
    assert sorted(after["move"] for after in moves if after) == sorted(ids)
    for later, earlier in itertools.pairwise(history):
        assert later["from_version"] == earlier["to_version"]
    assert history[-1]["from_version"] is None
    assert asked.items() <= {move["id"]: move["to_version"] for move in history}.items()
    for moves in accepted:
        assert moves == sorted(moves), "a client saw its moves in another order"
    assert broken_promises(environ) == []


@pytest.mark.parametrize("races", [1, *further(3)])
def test_of_many_different_pushes_of_one_version_one_wins_and_the_others_are_refused(
    environ: dict[str, str], url: str, tmp_path: Path, races: int
) -> None:
    with clients(url) as apis:
        for version in ("1.0.0", "1.0.1", "1.0.2")[:races]:
            offset = int(version[-1]) * 100

            def race(number: int, api: Api, version: str = version, offset: int = offset) -> object:
                return push_version(api, tmp_path, version, offset + number)

            answers = together(apis, race)
            winners = [answer for answer in answers if isinstance(answer, dict)]
            losers = [answer for answer in answers if isinstance(answer, RegistryError)]
            assert len(winners) == 1, losers
            assert {error.code for error in losers} == {"version_exists"}
            shown = apis[0].get(f"{line_path(NAME)}/releases/{version}")
            assert shown["commit"] == winners[0]["release"]["commit"]
    assert broken_promises(environ, read_bytes=True) == []


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize("races", [2, *further(5)])
def test_of_two_releases_at_once_that_break_each_other_only_one_is_published(
    environ: dict[str, str], url: str, tmp_path: Path, races: int
) -> None:
    """Each fits the existing releases: N.1.0, of half the rank, and N.2.0, which would then raise it again."""
    with clients(url) as apis:
        for major in range(1, races + 1):
            push_version(apis[0], tmp_path, f"{major}.0.0", 10 * major)

            def race(number: int, api: Api, major: int = major) -> object:
                version, rank = [(f"{major}.1.0", RANK // 2), (f"{major}.2.0", RANK)][number]
                return push_numbered(api, tmp_path, {"version": version}, 10 * major + 1 + number, rank)

            refused = [answer for answer in together(apis[:2], race) if isinstance(answer, Refused)]
            assert [error.code for error in refused] == ["breaking_change"]
    assert broken_promises(environ) == []


@pytest.mark.long
def test_many_pushes_that_ask_for_the_next_number_get_one_each(
    environ: dict[str, str], url: str, tmp_path: Path
) -> None:
    with clients(url) as apis:
        push_version(apis[0], tmp_path, "1.0.0", 1_000)
        answers = together(apis, lambda number, api: push_numbered(api, tmp_path, {"bump": "patch"}, 2_000 + number))
    refused = [answer for answer in answers if not isinstance(answer, dict)]
    assert refused == []
    given = [answer["release"]["version"] for answer in answers if isinstance(answer, dict)]
    assert sorted(given) == sorted(f"1.0.{patch}" for patch in range(1, len(apis) + 1))
    assert broken_promises(environ, read_bytes=True) == []


@pytest.mark.on("PostgreSQL")
def test_of_many_equal_pushes_one_makes_the_release_and_all_succeed(
    environ: dict[str, str], url: str, tmp_path: Path
) -> None:
    files = adapter_files(tmp_path / "adapter", 7)
    with clients(url) as apis:

        def race(_number: int, api: Api) -> object:
            published, _ = push(api, files, NAME, "adapter", {"version": "1.0.0", "base": "tiny"}, lambda _count: None)
            return published.document

        answers = together(apis, race)
        assert all(isinstance(answer, dict) for answer in answers), answers
        assert [answer["created"] for answer in answers].count(True) == 1  # type: ignore[index]
    resources = opened(environ)
    with resources.read() as session:
        assert session.scalar(select(func.count()).select_from(Release)) == 1
    resources.close()
    assert broken_promises(environ) == []


@pytest.mark.long
@pytest.mark.parametrize("turns", [6, 20])
def test_yanks_at_the_same_moment_wait_for_each_other_and_each_tells_what_was_before(
    environ: dict[str, str], url: str, tmp_path: Path, turns: int
) -> None:
    with clients(url) as apis:
        push_version(apis[0], tmp_path, "1.0.0", 7)
        path = f"{line_path(NAME)}/releases/1.0.0"

        def race(number: int, api: Api) -> object:
            for turn in range(turns):
                what = "unyank" if (number + turn) % 3 == 0 else "yank"
                api.post(f"{path}/{what}", {"reason": f"{number} in turn {turn}"})
            return None

        assert together(apis, race) == [None] * CLIENTS
    resources = opened(environ)
    with resources.read() as session:
        query = select(AuditRow.before, AuditRow.after).where(AuditRow.act.like("release:%yank"))
        changes = session.execute(query.order_by(AuditRow.id)).all()
    resources.close()
    assert len(changes) > CLIENTS
    for (_, earlier), (later, _) in itertools.pairwise(changes):
        assert later == earlier
    assert broken_promises(environ) == []


@pytest.mark.long
@pytest.mark.parametrize("acts", [30, 200])
def test_what_is_read_beside_yanks_is_of_one_moment(
    environ: dict[str, str], url: str, tmp_path: Path, acts: int
) -> None:
    """1.1.0 is yanked and unyanked repeatedly: at any moment all references lead to it, or all to 1.0.0."""
    with clients(url) as apis:
        for seed, version in enumerate(("1.0.0", "1.1.0")):
            push_version(apis[0], tmp_path, version, seed)
            apis[0].put(CHANNEL, {"version": version, "reason": "because"})
        over = threading.Event()

        def yank(api: Api) -> None:
            for number in range(acts):
                act = ("yank", "unyank")[number % 2]
                api.post(f"{line_path(NAME)}/releases/1.1.0/{act}", {"reason": "because"})
            over.set()

        def search(api: Api, **asked: object) -> object:
            return [(item["version"], item["yanked"]) for item in api.get("/v1/releases", **asked)["items"]]

        def resolve(api: Api, reference: str) -> object:
            resolved = api.get("/v1/resolve", ref=reference)
            warned = f"{NAME}:1.1.0 is yanked" in resolved["warning"]
            assert warned == (reference.startswith(f"{NAME}@") and resolved["release"]["version"] == "1.0.0")
            return [(resolved["release"]["version"], resolved["release"]["yanked"])]

        def heads(api: Api) -> object:
            shown = api.get(line_path(NAME))
            assert {shown["latest"]} == set(shown["channels"].values())
            return [(shown["latest"], False)]

        looks: list[Callable[[Api], object]] = [
            lambda api: search(api, channel="prod"),
            lambda api: search(api, latest=True, namespace=NAME.namespace),
            lambda api: resolve(api, f"{NAME}@prod"),
            lambda api: resolve(api, f"{NAME}:^1"),
            heads,
        ]

        def look(api: Api, ask: Callable[[Api], object]) -> list[object]:
            served: list[object] = []
            while not over.is_set():
                served.append(ask(api))
            return served

        with ThreadPoolExecutor(1 + len(looks)) as pool:
            yanked = pool.submit(yank, apis[0])
            seen = list(pool.map(look, apis[1:], looks))
            yanked.result()
    for answers in seen:
        assert {str(answer) for answer in answers} == {"[('1.0.0', False)]", "[('1.1.0', False)]"}


@pytest.mark.parametrize("metrics", [4, *further(10)])
def test_of_the_first_scores_of_a_metric_all_say_the_same_of_what_is_better(
    environ: dict[str, str], url: str, tmp_path: Path, metrics: int
) -> None:
    examples = [{"prompt": "1 + 1 =", "completion": " 2"}]
    suite = {"name": "sums", "kind": "target", "description": "", "chat": False, "examples": examples}
    with clients(url) as apis:
        digest = apis[0].post("/v1/suites", suite)["digest"]
        for version in ("1.0.0", "1.0.1"):
            push_version(apis[0], tmp_path, version, int(version[-1]))

        def race(number: int, api: Api, metric: str) -> object:
            better = number % 2 == 0
            row = {"suite_digest": digest, "metric": metric, "value": 0.5, "n": 1, "higher_is_better": better}
            api.post(f"{line_path(NAME)}/releases/1.0.{number // 2 % 2}/scores", {"scores": [row]})
            return better

        for turn in range(metrics):
            answers = together(apis[:8], lambda number, api, metric=f"m{turn}": race(number, api, metric))
            assert len({answer for answer in answers if isinstance(answer, bool)}) == 1, answers
            assert sum(isinstance(answer, Invalid) for answer in answers) == 4, answers


@pytest.mark.long
def test_many_first_pushes_into_a_namespace_that_is_not_there_yet_all_arrive(
    environ: dict[str, str], url: str, tmp_path: Path
) -> None:
    with clients(url) as apis:

        def race(number: int, api: Api) -> object:
            files = adapter_files(tmp_path / str(number), number)
            name = RepositoryName("fresh", f"line-{number}")
            while True:
                try:
                    request = {"version": "1.0.0", "base": "tiny"}
                    return push(api, files, name, "adapter", request, lambda _count: None)[0].document
                except Conflict as error:
                    if error.code != "raced":
                        raise

        answers = together(apis, race)
        assert all(isinstance(answer, dict) for answer in answers), answers
    assert broken_promises(environ) == []


@pytest.mark.long
@pytest.mark.parametrize("pairing", services.PAIRINGS[1:], indirect=True)
def test_searches_that_wait_for_the_database_hold_up_nobody_else(
    environ: dict[str, str], url: str, tmp_path: Path
) -> None:
    with clients(url) as apis:
        push_version(apis[0], tmp_path, "1.0.0", 0)
    held, addresses = opened(environ), url.split()
    with ThreadPoolExecutor(100) as pool:
        with held.write() as session:
            session.execute(text("LOCK TABLE traits IN ACCESS EXCLUSIVE MODE"))
            asked = [f"{address}/v1/releases" for address in addresses for _ in range(50)]
            searches = [pool.submit(httpx2.get, search, timeout=60) for search in asked]
            with held.read() as looking:
                while looking.scalar(WAITING_FOR_LOCKS) < SEARCH_THREADS * len(addresses):
                    time.sleep(0.05)
            for address in addresses:
                resolved = httpx2.get(f"{address}/v1/resolve", params={"ref": f"{NAME}:1.0.0"}, timeout=10)
                assert resolved.json()["release"]["version"] == "1.0.0"
            while sum(search.done() for search in searches) < len(searches) - SEARCH_THREADS * len(addresses):
                time.sleep(0.05)
        answers = [search.result() for search in searches]
    held.close()
    pages = [answer.json()["items"] for answer in answers if answer.status_code == 200]
    assert [len(items) for items in pages] == [1] * SEARCH_THREADS * len(addresses)
    busy = {(answer.status_code, answer.json()["code"]) for answer in answers if answer.status_code != 200}
    assert busy == {(503, "searches_busy")}
