"""Channels, moves and gates as a deployment tool uses them: plain HTTP, ETags and conditions."""

import threading
import uuid
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from html import unescape
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from tests import services
from tests.scenarios.conftest import USER, serving, stock
from tests.scenarios.world import Cli, World

VERSIONS = ("1.0.0", "1.1.0", "1.2.0")


@pytest.fixture(scope="module", params=services.PAIRINGS)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, world: World
) -> Generator[tuple[Cli, httpx2.Client]]:
    """A real server that knows the base and the suites; each test has its own repository in it."""
    directory = tmp_path_factory.mktemp("rest")
    served = serving(services.pairing(request.param), directory)
    with served as cli, httpx2.Client(base_url=cli.environment["ADAPTORY_URL"], timeout=30) as client:
        yield stock(cli, world), client


@dataclass(frozen=True)
class Line:
    """A repository with three releases and its channel `prod`, over HTTP."""

    http: httpx2.Client
    path: str

    @property
    def prod(self) -> str:
        return f"{self.path}/channels/prod"

    def look(self) -> httpx2.Response:
        return self.http.get(self.prod)

    def history(self, **query: Any) -> httpx2.Response:
        return self.http.get(f"{self.prod}/history", params=query)

    def promote(self, version: str, **headers: str) -> httpx2.Response:
        return self.http.put(self.prod, json={"version": version, "reason": "because"}, headers=named(headers))

    def roll_back(self, to: str | None = None, **headers: str) -> httpx2.Response:
        return self.http.post(f"{self.prod}/rollback", json={"to": to, "reason": "worse"}, headers=named(headers))


def named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.fixture
def line(running: tuple[Cli, httpx2.Client], world: World) -> Line:
    cli, http = running
    name = f"sql-{uuid.uuid4().hex[:8]}"
    for version, adapter in zip(VERSIONS, ("sql", "other-sql", "support"), strict=True):
        cli.ok("push", world.adapters[adapter], f"acme/{name}:{version}", "--base", "tiny")
    return Line(http, f"/v1/adapters/acme/{name}")


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert (document["code"], document["type"]) == (code, f"urn:adaptory:problem:{code}")
    return document


def test_a_version_written_as_a_channel_is_answered_with_how_to_write_it(line: Line) -> None:
    missing = problem(line.http.get(f"{line.path}/channels/1.0.0"), 404, "channel_unknown")
    assert ":1.0.0" in missing["next"]


@pytest.mark.long
def test_a_channel_moves_only_from_where_its_mover_saw_it(line: Line) -> None:
    problem(line.look(), 404, "channel_unknown")
    problem(line.promote("1.0.0", If_Match='"12345"'), 412, "channel_moved")
    problem(line.look(), 404, "channel_unknown")

    created = line.promote("1.0.0", If_None_Match="*")
    assert created.status_code == 200
    move = created.json()
    assert (move["kind"], move["from_version"], move["to_version"]) == ("promote", None, "1.0.0")
    assert (move["actor"], move["reason"], move["forced"], move["gates"]) == (USER, "because", False, [])
    problem(line.promote("1.1.0", If_None_Match="*"), 412, "channel_moved")

    seen = line.look()
    assert seen.headers["ETag"] == created.headers["ETag"] == f'"{move["id"]}-1.0.0"'
    assert (seen.json()["version"], seen.json()["moved_by"]) == ("1.0.0", USER)
    assert len(seen.json()["commit"]) == 40

    moved = line.promote("1.1.0", If_Match=seen.headers["ETag"])
    assert moved.status_code == 200
    assert line.look().headers["ETag"] == moved.headers["ETag"] != seen.headers["ETag"]
    problem(line.promote("1.2.0", If_Match=seen.headers["ETag"]), 412, "channel_moved")
    problem(line.roll_back(If_Match=seen.headers["ETag"]), 412, "channel_moved")
    assert line.look().json()["version"] == "1.1.0"
    assert line.roll_back(If_Match=f"W/{moved.headers['ETag']}").json()["to_version"] == "1.0.0"
    assert line.promote("1.2.0", If_Match="*").status_code == 200

    problem(line.promote("1.0.0", If_Match="yesterday"), 400, "bad_precondition")
    problem(line.promote("1.0.0", If_None_Match='"7"'), 400, "bad_precondition")
    problem(line.promote("9.0.0"), 404, "release_unknown")
    problem(line.promote("newest"), 400, "bad_version")
    assert line.look().json()["version"] == "1.2.0"


def race(line: Line, moves: list[tuple[str, dict[str, str]]]) -> list[httpx2.Response]:
    """Runs all at once, each with its own thread and connection."""
    start = threading.Barrier(len(moves))

    def move(version: str, headers: dict[str, str]) -> httpx2.Response:
        with httpx2.Client(base_url=line.http.base_url, timeout=60) as own:
            own.get("/healthz")
            start.wait(30)
            return replace(line, http=own).promote(version, **headers)

    with ThreadPoolExecutor(len(moves)) as pool:
        return list(pool.map(lambda one: move(*one), moves))


@pytest.mark.on("PostgreSQL")
def test_of_eight_moves_that_saw_the_same_exactly_one_wins(line: Line) -> None:
    created = race(line, [(VERSIONS[number % 2], {"If_None_Match": "*"}) for number in range(8)])
    statuses = Counter(answer.status_code for answer in created)
    assert statuses[200] == 1, statuses
    assert set(statuses) == {200, 412}
    for expected_moves in (2, 3, 4):
        seen = line.look()
        others = [version for version in VERSIONS if version != seen.json()["version"]]
        answers = race(line, [(others[number % 2], {"If_Match": seen.headers["ETag"]}) for number in range(8)])
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses[200] == 1, statuses
        assert set(statuses) == {200, 412}
        winner = next(answer for answer in answers if answer.status_code == 200)
        assert line.look().headers["ETag"] == winner.headers["ETag"]
        moves = line.history().json()["items"]
        assert len(moves) == expected_moves
        assert [move["from_version"] for move in moves[:-1]] == [move["to_version"] for move in moves[1:]]


@pytest.mark.long
@pytest.mark.parametrize("there", [True, False], ids=["moves of a channel", "first moves"])
def test_moves_without_a_condition_at_once_all_succeed_and_leave_an_unbroken_history(line: Line, there: bool) -> None:
    if there:
        line.promote("1.2.0")
    answers = race(line, [(VERSIONS[number % 2], {}) for number in range(16)])
    assert {answer.status_code for answer in answers} == {200}
    moves = line.history().json()["items"]
    assert [move["from_version"] for move in moves] == [*(move["to_version"] for move in moves[1:]), None]
    assert line.look().json()["version"] == moves[0]["to_version"]
    times = [move["at"] for move in moves]
    assert times == sorted(times, reverse=True)


def test_history_comes_in_pages_the_newest_first(line: Line) -> None:
    for number in range(7):
        assert line.promote(VERSIONS[number % 3]).status_code == 200
    assert line.roll_back().status_code == 200
    history = line.history().json()
    assert history["next"] is None
    pages, cursor = [], None
    while True:
        page = line.history(limit=3, **({"cursor": cursor} if cursor else {})).json()
        pages.append(page["items"])
        cursor = page["next"]
        if cursor is None:
            break
        line.promote(VERSIONS[len(pages) % 2])  # concurrent changes do not shift the pages
    assert [len(page) for page in pages] == [3, 3, 2]
    assert [move for page in pages for move in page] == history["items"]
    assert [move["id"] for move in history["items"]] == sorted((move["id"] for move in history["items"]), reverse=True)
    problem(line.history(cursor="bm9uc2Vuc2U"), 400, "bad_cursor")


def test_a_version_has_the_channels_that_serve_it_and_its_moves(line: Line) -> None:
    for channel, version in (("prod", "1.0.0"), ("canary", "1.1.0"), ("prod", "1.1.0"), ("prod", "1.2.0")):
        body = {"version": version, "reason": "because"}
        assert line.http.put(f"{line.path}/channels/{channel}", json=body).status_code == 200

    def serving(version: str) -> list[tuple[str, str]]:
        items = line.http.get(f"{line.path}/channels", params={"version": version}).json()["items"]
        return [(item["channel"], item["moved_at"]) for item in items]

    def moved(version: str, **query: Any) -> list[tuple[str, str | None, str]]:
        items = line.http.get(f"{line.path}/releases/{version}/moves", params=query).json()["items"]
        return [(item["channel"], item["from_version"], item["to_version"]) for item in items]

    assert serving("1.0.0") == []
    assert serving("1.2.0") == [("prod", line.look().json()["moved_at"])]
    assert moved("1.1.0") == [("prod", "1.1.0", "1.2.0"), ("prod", "1.0.0", "1.1.0"), ("canary", None, "1.1.0")]
    assert moved("1.1.0", limit=1) == [("prod", "1.1.0", "1.2.0")]
    first = line.http.get(f"{line.path}/releases/1.1.0/moves", params={"limit": 1}).json()
    assert moved("1.1.0", limit=1, cursor=first["next"]) == [("prod", "1.0.0", "1.1.0")]
    yank = line.http.post(f"{line.path}/releases/1.2.0/yank", json={"reason": "leaks"})
    assert yank.status_code == 200
    assert [name for name, _ in serving("1.1.0")] == ["canary", "prod"], "what the channel serves instead"
    assert serving("1.2.0") == []
    for path in ("channels?version=9.9.9", "releases/9.9.9/moves"):
        problem(line.http.get(f"{line.path}/{path}"), 404, "release_unknown")


def test_gates_are_set_read_and_judged_with_numbers(line: Line) -> None:
    assert line.http.get(f"{line.path}/gates").json() == {"gates": {}}
    rules = ["sql-exact.nll <= 3", "guard-exact.nll within 0.5 of served"]
    put = line.http.put(f"{line.path}/gates", json={"channel": "prod", "rules": rules})
    assert put.json() == line.http.get(f"{line.path}/gates").json() == {"gates": {"prod": rules}}
    problem(line.http.put(f"{line.path}/gates", json={"channel": "prod", "rules": ["be nice"]}), 400, "bad_rule")
    assert line.http.get(f"{line.path}/gates").json() == {"gates": {"prod": rules}}

    refused = problem(line.promote("1.0.0"), 422, "gate_failed")
    assert [gate["passed"] for gate in refused["findings"]] == [False, False], "what was not measured was not passed"
    record(line, None, {"guard-exact": 1.0})
    problem(line.look(), 404, "channel_unknown")
    record(line, "1.0.0", {"sql-exact": 2.0, "guard-exact": 1.0})
    record(line, "1.1.0", {"sql-exact": 2.5, "guard-exact": 1.6})
    record(line, "1.2.0", {"sql-exact": 2.5, "guard-exact": 1.5})
    first = line.promote("1.0.0").json()
    assert [gate["passed"] for gate in first["gates"]] == [True, True]
    refused = problem(line.promote("1.1.0"), 422, "gate_failed")
    assert [(gate["rule"], gate["passed"]) for gate in refused["findings"]] == [(rules[0], True), (rules[1], False)]
    assert "worse by 0.6" in refused["findings"][1]["detail"]
    assert line.promote("1.2.0").status_code == 200, "worse by just the margin passes"
    assert line.roll_back().status_code == 200, "going back is never held up by a gate"
    forced = line.http.put(line.prod, json={"version": "1.1.0", "reason": "demo at noon", "force": True}).json()
    assert forced["forced"]
    assert [gate["passed"] for gate in forced["gates"]] == [True, False]


def test_a_rollback_to_a_version_goes_only_back(line: Line) -> None:
    for version in VERSIONS:
        assert line.promote(version).status_code == 200
    policy = {"version": 1, "rules": ["sql-exact.nll <= 3"], "missing": "refuse", "force": "never"}
    assert line.http.put(f"{line.prod}/policy", json=policy).status_code == 200
    assert line.roll_back("1.1.0").json()["to_version"] == "1.1.0"
    refused = problem(line.roll_back("1.2.0"), 422, "not_earlier")
    assert f"adaptory promote {line.path.removeprefix('/v1/adapters/')}:1.2.0 --to prod" in refused["next"]
    problem(line.promote("1.2.0"), 422, "gate_failed")
    assert line.roll_back("1.0.0").json()["to_version"] == "1.0.0"
    for version in ("1.1.0", "1.2.0"):
        problem(line.roll_back(version), 422, "not_earlier")
    problem(line.roll_back("1.0.0"), 422, "already_served")
    problem(line.roll_back("9.0.0"), 422, "never_served")
    assert line.look().json()["version"] == "1.0.0"


def test_each_result_has_its_numbers_its_limit_and_whether_the_error_stays_on_its_side(line: Line) -> None:
    rules = ["sql-exact.nll <= 3", "guard-exact.nll within 0.5 of served"]
    line.http.put(f"{line.path}/gates", json={"channel": "prod", "rules": rules})
    record(line, None, {"guard-exact": 0.9}, stderr=0.1)
    record(line, "1.0.0", {"sql-exact": 2.0, "guard-exact": 1.0}, stderr=0.1)
    record(line, "1.1.0", {"sql-exact": 2.9, "guard-exact": 1.6}, stderr=0.1)
    first = line.promote("1.0.0").json()["gates"]
    own = {"value": 2.0, "stderr": 0.1, "n": 6, "higher_is_better": False}
    assert first[0] == {
        "rule": rules[0], "passed": True, "detail": "2 ± 0.1 (n=6)", **own,
        "limit": 3.0, "at_least": False, "other": None, "sure": True, "policy": None,
    }  # fmt: skip
    assert (first[1]["value"], first[1]["limit"], first[1]["sure"]) == (1.0, 1.4, True)
    assert first[1]["other"] == {"value": 0.9, "stderr": 0.1, "n": 6}, "the base's, which users have until now"
    near, beside = problem(line.promote("1.1.0"), 422, "gate_failed")["findings"]
    assert (near["passed"], near["sure"]) == (True, False), "2.9 ± 0.196 reaches beyond 3"
    assert (beside["passed"], beside["limit"]) == (False, 1.5)
    assert beside["other"] == {"value": 1.0, "stderr": 0.1, "n": 6}
    assert beside["sure"] is False, "1.6 against 1.5, and both scores have an error"
    record(line, "1.1.0", {"guard-exact": 1.8}, stderr=0.1)
    assert problem(line.promote("1.1.0"), 422, "gate_failed")["findings"][1]["sure"] is True
    record(line, "1.1.0", {"guard-exact": 1.8})
    assert problem(line.promote("1.1.0"), 422, "gate_failed")["findings"][1]["sure"] is None, "no error, no interval"
    assert line.history().json()["items"][0]["gates"] == first, "and it is recorded with the move"


def test_a_guard_is_compared_with_the_base_while_the_channel_serves_nothing(line: Line) -> None:
    """The first release may ruin general ability as little as any later one."""
    rule = "guard-exact.nll within 0.3 of served"
    line.http.put(f"{line.path}/gates", json={"channel": "prod", "rules": [rule]})
    record(line, "1.0.0", {"guard-exact": 4.11})
    line.http.delete("/v1/bases/tiny/scores/guard-exact/nll")  # another story may have measured it
    [missing] = problem(line.promote("1.0.0"), 422, "gate_failed")["findings"]
    assert "the base has no nll on the current guard-exact" in missing["detail"]
    record(line, None, {"guard-exact": 0.78})
    [ruined] = problem(line.promote("1.0.0"), 422, "gate_failed")["findings"]
    assert ruined["detail"] == (
        "4.11 (n=6) against 0.78 (n=6): worse by 3.33; the channel serves nothing yet, so the base counts; "
        "costs 3.3 nats of general ability (base 0.78)"
    )
    record(line, "1.1.0", {"guard-exact": 0.9})
    [first] = line.promote("1.1.0").json()["gates"]
    assert first["detail"].endswith("; costs 0.12 nats of general ability (base 0.78)")
    record(line, "1.2.0", {"guard-exact": 1.19})
    [second] = line.promote("1.2.0").json()["gates"]
    assert second["detail"] == (
        "1.19 (n=6) against 0.9 (n=6): worse by 0.29; costs 0.41 nats of general ability (base 0.78)"
    ), "each step may be small: the detail says what they cost together"
    named = line.path.removeprefix("/v1/adapters/")
    page = line.http.get(f"/{named}/1.2.0").text
    assert "costs 0.41 nats of general ability (base 0.78)" in page
    assert "Tame it" not in page, "six examples are too few to fit on and to judge by"
    examples = [{"prompt": f"say {number}", "completion": f"{number}"} for number in range(8)]
    guard = {"name": "guard-of-eight", "kind": "guard", "chat": False, "examples": examples}
    assert line.http.post("/v1/suites", json=guard).status_code in (200, 201)
    record(line, None, {"guard-of-eight": 0.78}, n=8)
    record(line, "1.2.0", {"guard-of-eight": 1.19}, n=8)
    page = line.http.get(f"/{named}/1.2.0").text
    taming = f"/compose?tame={quote(named, safe='')}%3A1.2.0&amp;guard=guard-of-eight"
    assert [match in page for match in (taming, taming.replace("1.2.0", "1.1.0"))] == [True, False]
    form = line.http.get(unescape(taming)).text
    assert [text in form for text in (f'value="{named}-tamed:1.2.0"', "guard-of-eight.nll within 0.15 of base")] == [
        True
    ] * 2
    record(line, "1.2.0", {"guard-of-eight": 1.19}, n=3)
    page = line.http.get(f"/{named}/1.2.0").text
    assert "measured on 3 examples, the base on 8: they do not compare" in page
    assert "Tame it" not in page


def record(line: Line, version: str | None, values: dict[str, float], stderr: float | None = None, n: int = 6) -> None:
    """Records scores of a release, or of the base."""
    digests = {suite["name"]: suite["digest"] for suite in line.http.get("/v1/suites").json()["items"]}
    row = {"metric": "nll", "stderr": stderr, "n": n, "higher_is_better": False}
    rows = [{"suite_digest": digests[suite], "value": value, **row} for suite, value in values.items()]
    base = line.http.get("/v1/bases").json()["items"][0]["digest"]
    path = f"{line.path}/releases/{version}" if version else f"/v1/bases/{base}"
    assert line.http.post(f"{path}/scores", json={"scores": rows}).status_code == 200


def test_channels_are_listed_by_name_a_page_at_a_time(line: Line) -> None:
    for name in ("prod", "beta", "canary"):
        assert line.http.put(f"{line.path}/channels/{name}", json={"version": "1.0.0"}).status_code == 200
    first = line.http.get(f"{line.path}/channels", params={"limit": 2}).json()
    assert [item["channel"] for item in first["items"]] == ["beta", "canary"]
    rest = line.http.get(f"{line.path}/channels", params={"limit": 2, "cursor": first["next"]}).json()
    assert ([item["channel"] for item in rest["items"]], rest["next"]) == (["prod"], None)


def test_the_routes_of_adapters_are_there_for_models_and_do_not_mix_kinds(line: Line) -> None:
    line.promote("1.0.0")
    assert [channel["channel"] for channel in line.http.get(f"{line.path}/channels").json()["items"]] == ["prod"]
    models = line.path.replace("adapters", "models")
    for path in (
        "", "/channels", "/channels/prod", "/channels/prod/history", "/gates", "/releases", "/releases/1.0.0",
        "/releases/1.0.0/scores",
    ):  # fmt: skip
        assert line.http.get(line.path + path).status_code == 200
        problem(line.http.get(models + path), 404, "repository_unknown")
    answer = line.http.put(f"{models}/channels/prod", json={"version": "1.0.0"})
    problem(answer, 404, "repository_unknown")
    assert line.http.get("/v1/models").json() == {"items": [], "next": None}
