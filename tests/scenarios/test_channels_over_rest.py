"""Channels, moves and gates as a deployment tool uses them: plain HTTP, ETags and conditions."""

import threading
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.scenarios.conftest import USER, stock
from tests.scenarios.world import Cli, World, server

LINE = "/v1/adapters/acme/sql"
PROD = f"{LINE}/channels/prod"
VERSIONS = ("1.0.0", "1.1.0", "1.2.0")


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def http(request: pytest.FixtureRequest, tmp_path: Path, world: World) -> Generator[httpx2.Client]:
    """A real server with a repository of three releases."""
    environment = {"ADAPTORY_USER": USER}
    if request.param == "PostgreSQL":
        environment["ADAPTORY_DATABASE_URL"] = request.getfixturevalue("fresh_postgres")
    with server(tmp_path / "server", **environment) as (url, _):
        cli = stock(Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": url}), world)
        for version, adapter in zip(VERSIONS, ("sql", "other-sql", "support"), strict=True):
            cli.ok("push", world.adapters[adapter], f"acme/sql:{version}", "--base", "tiny")
        with httpx2.Client(base_url=url, timeout=30) as client:
            yield client


def promote(http: httpx2.Client, version: str, **headers: str) -> httpx2.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return http.put(PROD, json={"version": version, "reason": "because"}, headers=names)


def roll_back(http: httpx2.Client, to: str | None = None, **headers: str) -> httpx2.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return http.post(f"{PROD}/rollback", json={"to": to, "reason": "worse"}, headers=names)


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    told = answer.json()
    assert (told["code"], told["type"]) == (code, f"urn:adaptory:problem:{code}")
    return told


def test_a_channel_moves_only_from_where_its_mover_saw_it(http: httpx2.Client) -> None:
    problem(http.get(PROD), 404, "channel_unknown")
    problem(promote(http, "1.0.0", If_Match='"12345"'), 412, "channel_moved")
    problem(http.get(PROD), 404, "channel_unknown")

    created = promote(http, "1.0.0", If_None_Match="*")
    assert created.status_code == 200
    move = created.json()
    assert (move["kind"], move["from_version"], move["to_version"]) == ("promote", None, "1.0.0")
    assert (move["actor"], move["reason"], move["forced"], move["gates"]) == (USER, "because", False, [])
    problem(promote(http, "1.1.0", If_None_Match="*"), 412, "channel_moved")

    seen = http.get(PROD)
    assert seen.headers["ETag"] == created.headers["ETag"] == f'"{move["id"]}"'
    assert (seen.json()["version"], seen.json()["moved_by"]) == ("1.0.0", USER)
    assert len(seen.json()["commit"]) == 40

    moved = promote(http, "1.1.0", If_Match=seen.headers["ETag"])
    assert moved.status_code == 200
    assert http.get(PROD).headers["ETag"] == moved.headers["ETag"] != seen.headers["ETag"]
    problem(promote(http, "1.2.0", If_Match=seen.headers["ETag"]), 412, "channel_moved")
    problem(roll_back(http, If_Match=seen.headers["ETag"]), 412, "channel_moved")
    assert http.get(PROD).json()["version"] == "1.1.0"
    assert roll_back(http, If_Match=f"W/{moved.headers['ETag']}").json()["to_version"] == "1.0.0"
    assert promote(http, "1.2.0", If_Match="*").status_code == 200

    problem(promote(http, "1.0.0", If_Match="yesterday"), 400, "bad_precondition")
    problem(promote(http, "1.0.0", If_None_Match='"7"'), 400, "bad_precondition")
    problem(promote(http, "9.0.0"), 404, "release_unknown")
    problem(promote(http, "newest"), 400, "bad_version")
    assert http.get(PROD).json()["version"] == "1.2.0"


def race(http: httpx2.Client, moves: list[tuple[str, dict[str, str]]]) -> list[httpx2.Response]:
    """All at once, each from a thread and a connection of its own."""
    start = threading.Barrier(len(moves))

    def move(version: str, headers: dict[str, str]) -> httpx2.Response:
        with httpx2.Client(base_url=http.base_url, timeout=60) as own:
            own.get("/healthz")
            start.wait(30)
            return promote(own, version, **headers)

    with ThreadPoolExecutor(len(moves)) as pool:
        return list(pool.map(lambda one: move(*one), moves))


def test_of_eight_moves_that_saw_the_same_exactly_one_wins(http: httpx2.Client) -> None:
    created = race(http, [(VERSIONS[number % 2], {"If_None_Match": "*"}) for number in range(8)])
    statuses = Counter(answer.status_code for answer in created)
    assert statuses[200] == 1, statuses
    assert set(statuses) <= {200, 409, 412}
    for expected_moves in (2, 3, 4):
        seen = http.get(PROD)
        others = [version for version in VERSIONS if version != seen.json()["version"]]
        answers = race(http, [(others[number % 2], {"If_Match": seen.headers["ETag"]}) for number in range(8)])
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses[200] == 1, statuses
        assert set(statuses) <= {200, 409, 412}
        winner = next(answer for answer in answers if answer.status_code == 200)
        assert http.get(PROD).headers["ETag"] == winner.headers["ETag"]
        moves = http.get(f"{PROD}/history").json()["items"]
        assert len(moves) == expected_moves
        assert [move["from_version"] for move in moves[:-1]] == [move["to_version"] for move in moves[1:]]


def test_moves_without_a_condition_at_once_leave_an_unbroken_history(http: httpx2.Client) -> None:
    promote(http, "1.2.0")
    answers = race(http, [(VERSIONS[number % 2], {}) for number in range(8)])
    assert {answer.status_code for answer in answers} <= {200, 409}
    moves = http.get(f"{PROD}/history").json()["items"]
    assert [move["from_version"] for move in moves[:-1]] == [move["to_version"] for move in moves[1:]]
    assert http.get(PROD).json()["version"] == moves[0]["to_version"]


def test_history_comes_in_pages_the_newest_first(http: httpx2.Client) -> None:
    for number in range(7):
        assert promote(http, VERSIONS[number % 3]).status_code == 200
    assert roll_back(http).status_code == 200
    whole = http.get(f"{PROD}/history").json()
    assert whole["next"] is None
    pages, cursor = [], None
    while True:
        page = http.get(f"{PROD}/history", params={"limit": 3, **({"cursor": cursor} if cursor else {})}).json()
        pages.append(page["items"])
        cursor = page["next"]
        if cursor is None:
            break
        promote(http, VERSIONS[len(pages) % 2])  # what happens meanwhile does not shift the pages
    assert [len(page) for page in pages] == [3, 3, 2]
    assert [move for page in pages for move in page] == whole["items"]
    assert [move["id"] for move in whole["items"]] == sorted((move["id"] for move in whole["items"]), reverse=True)
    problem(http.get(f"{PROD}/history", params={"cursor": "bm9uc2Vuc2U"}), 400, "bad_cursor")


def test_gates_are_set_read_and_judged_with_numbers(http: httpx2.Client) -> None:
    assert http.get(f"{LINE}/gates").json() == {"gates": {}}
    rules = ["sql-exact.nll <= 3", "guard-exact.nll within 0.5 of served"]
    put = http.put(f"{LINE}/gates", json={"channel": "prod", "rules": rules})
    assert put.json() == http.get(f"{LINE}/gates").json() == {"gates": {"prod": rules}}
    problem(http.put(f"{LINE}/gates", json={"channel": "prod", "rules": ["be nice"]}), 400, "bad_rule")
    assert http.get(f"{LINE}/gates").json() == {"gates": {"prod": rules}}

    told = problem(promote(http, "1.0.0"), 422, "gate_failed")
    assert [gate["passed"] for gate in told["findings"]] == [False, False], "what was not measured was not passed"
    problem(http.get(PROD), 404, "channel_unknown")
    record(http, "1.0.0", {"sql-exact": 2.0, "guard-exact": 1.0})
    record(http, "1.1.0", {"sql-exact": 2.5, "guard-exact": 1.6})
    record(http, "1.2.0", {"sql-exact": 2.5, "guard-exact": 1.5})
    first = promote(http, "1.0.0").json()
    assert [gate["passed"] for gate in first["gates"]] == [True, True]
    told = problem(promote(http, "1.1.0"), 422, "gate_failed")
    assert [(gate["rule"], gate["passed"]) for gate in told["findings"]] == [(rules[0], True), (rules[1], False)]
    assert "worse by 0.6" in told["findings"][1]["detail"]
    assert promote(http, "1.2.0").status_code == 200, "worse by just the margin passes"
    assert roll_back(http).status_code == 200, "going back is never held up by a gate"
    forced = http.put(PROD, json={"version": "1.1.0", "reason": "demo at noon", "force": True}).json()
    assert forced["forced"]
    assert [gate["passed"] for gate in forced["gates"]] == [True, False]


def record(http: httpx2.Client, version: str, values: dict[str, float]) -> None:
    digests = {suite["name"]: suite["digest"] for suite in http.get("/v1/suites").json()["items"]}
    rows = [
        {"suite_digest": digests[suite], "metric": "nll", "value": value, "stderr": 0.1, "n": 6, "higher_is_better": False}
        for suite, value in values.items()
    ]  # fmt: skip
    assert http.post(f"{LINE}/releases/{version}/scores", json={"scores": rows}).status_code == 200


def test_the_routes_of_adapters_are_there_for_models_and_do_not_mix_kinds(http: httpx2.Client) -> None:
    promote(http, "1.0.0")
    assert [channel["channel"] for channel in http.get(f"{LINE}/channels").json()["items"]] == ["prod"]
    models = LINE.replace("adapters", "models")
    for method, path in (
        ("GET", ""), ("GET", "/channels"), ("GET", "/channels/prod"), ("GET", "/channels/prod/history"), ("GET", "/gates"),
        ("GET", "/releases"), ("GET", "/releases/1.0.0"), ("GET", "/releases/1.0.0/scores"),
    ):  # fmt: skip
        assert http.request(method, LINE + path).status_code == 200
        problem(http.request(method, models + path), 404, "repository_unknown")
    answer = http.put(f"{models}/channels/prod", json={"version": "1.0.0"})
    problem(answer, 404, "repository_unknown")
    assert http.get("/v1/models").json() == {"items": [], "next": None}
