"""Canaries: who may begin, report and stop them, what live figures decide, and what everybody else sees meanwhile."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from registry.domain.rollouts import canaries
from tests.access.house import PRIVATE, PUBLIC, House
from tests.access.test_fleet import SQL, Clock, Json, clock, furnished, holder, house, live, put

__all__ = ["clock", "furnished", "house"]

CANARY, WATCH, CHANNEL = f"{SQL}/channels/prod/canary", f"{SQL}/channels/prod/watch", f"{SQL}/channels/prod"
POLICY = {
    "version": 1,
    "watch": {"for": "1m", "steps": [10, 50, 100], "rules": ["errors <= served + 0.01", "p95_seconds <= 1.2 x served"]},
}
FAST, SLOW = 20, 40
"""Indices of 0.067 and 0.45 seconds."""


def begun(house: House, version: str = "1.0.0", weight: int = 10, **more: Any) -> httpx2.Response:
    return house.ask("releaser", "PUT", CANARY, json={"version": version, "weight": weight, **more})


def figures(requests: int, errors: int = 0, at: int = FAST, **metrics: tuple[int, float]) -> Json:
    return {"requests": requests, "errors": errors, "seconds": {str(at): requests}, "metrics": metrics}


def report(house: House, candidate: Json, served: Json, source: str = "front") -> httpx2.Response:
    body = {"source": source, "versions": {"1.0.0": candidate, "1.1.0": served}}
    return house.ask("agent", "POST", WATCH, json=body)


def reported(house: House, candidate: Json, served: Json, source: str = "front") -> Json:
    answer = report(house, candidate, served, source)
    assert answer.status_code == 200, answer.text
    return answer.json()


def followed(house: House) -> Json:
    name = f"{PRIVATE}/sql@prod"
    return house.ask("reader", "GET", f"/v1/follow?channels={name}").json()["channels"][name]


@pytest.fixture
def splitting(house: House) -> House:
    """The channel's policy watches, and a node splits its requests."""
    assert house.ask("admin", "PUT", f"{CHANNEL}/policy", json=POLICY).status_code == 200
    assert put(house, "a", live(splits=True)).status_code == 200
    return house


def test_a_canary_with_good_figures_reaches_its_promotion_step_by_step(splitting: House, clock: Clock) -> None:
    house = splitting
    answer = begun(house)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["weight"], answer.json()["next_weight"]) == (10, 50)
    assert followed(house)["version"] == "1.1.0"
    assert followed(house)["candidate"] == {"version": "1.0.0", "weight": 10, "commit": followed(house)["commit"]}
    assert house.ask("reader", "GET", f"/v1/resolve?ref={PRIVATE}/sql@prod").json()["release"]["version"] == "1.1.0"
    reported(house, figures(0), figures(0))
    seen = list[int]()
    for minute in (1, 2):
        clock.passes(61)
        assert put(house, "a", live(splits=True)).status_code == 200
        shown = reported(house, figures(100 * minute, minute), figures(900 * minute, 9 * minute))
        seen.append(shown["weight"])
    assert seen == [50, 100]
    assert shown["state"] == "promoted"
    assert followed(house)["version"] == "1.0.0"
    assert followed(house)["candidate"] is None
    assert report(house, figures(400), figures(4000)).status_code == 409


def test_a_broken_rule_ends_the_canary_and_the_audit_has_the_figures(splitting: House) -> None:
    house = splitting
    assert begun(house).status_code == 200
    reported(house, figures(0), figures(0))
    assert reported(house, figures(100, 2), figures(900, 9))["state"] == "running"
    shown = reported(house, figures(300, 45), figures(2700, 27))
    assert (shown["state"], shown["why"]) == ("rolled_back", "broken: errors <= served + 0.01")
    assert followed(house)["candidate"] is None
    [row] = house.ask("admin", "GET", "/v1/audit?act=channel:watch").json()["items"]
    assert row["detail"]["figures"][0]["candidate"] == pytest.approx(0.15)


def test_one_failure_in_eight_against_one_in_fifty_is_seen_after_two_minutes_of_five_requests_a_second(
    splitting: House,
) -> None:
    house = splitting
    assert begun(house, weight=50).status_code == 200
    reported(house, figures(0), figures(0))
    assert reported(house, figures(300, 36), figures(300, 6))["state"] == "rolled_back"


def test_a_slow_candidate_and_a_worse_metric_break_their_rules(splitting: House) -> None:
    house = splitting
    watch = POLICY["watch"] | {"rules": ["p95_seconds <= 1.2 x served", "sql-live.accuracy >= served - 2 se"]}  # pyright: ignore[reportOperatorIssue]
    assert house.ask("admin", "PUT", f"{CHANNEL}/policy", json=POLICY | {"watch": watch}).status_code == 200
    for worse, rule in (
        (figures(300, at=SLOW), "p95_seconds <= 1.2 x served"),
        (figures(300, **{"sql-live.accuracy": (300, 150.0)}), "sql-live.accuracy >= served - 2 se"),
    ):
        assert begun(house).status_code == 200
        reported(house, figures(0), figures(0))
        served = figures(2700, **{"sql-live.accuracy": (2700, 2400.0)})
        assert reported(house, worse, served)["why"] == f"broken: {rule}"


def test_without_figures_a_canary_is_held_and_never_promoted(splitting: House, clock: Clock) -> None:
    house = splitting
    assert begun(house, weight=50).status_code == 200
    reported(house, figures(0), figures(0))
    reported(house, figures(400), figures(400))
    clock.passes(600)
    assert house.ask("reader", "GET", CANARY).json()["why"] == "held: no new requests"
    assert put(house, "a", live(splits=True)).status_code == 200
    assert reported(house, figures(400), figures(400))["why"] == "held: no new requests"
    assert reported(house, figures(500), figures(500))["state"] == "running"
    clock.passes(61)
    assert reported(house, figures(600), figures(600))["state"] == "promoted"


def test_a_canary_is_refused_where_nothing_splits_its_requests_or_a_gate_fails(house: House) -> None:
    assert begun(house).json()["code"] == "nothing_splits"
    assert put(house, "b", live()).status_code == 200
    assert begun(house).json()["code"] == "nothing_splits"
    assert put(house, "a", live(splits=True)).status_code == 200
    assert begun(house, "1.1.0").json()["code"] == "already_served"
    house.ask("admin", "PUT", f"{CHANNEL}/policy", json={"version": 1, "soak": [{"channel": "staging", "hours": 24}]})
    assert begun(house).json()["code"] == "gate_failed"


def test_one_node_that_splits_no_requests_is_named_and_prevents_no_canary(splitting: House) -> None:
    assert put(splitting, "b", live()).status_code == 200
    assert begun(splitting).json()["why"] == "prod/b split no requests: their users get 1.1.0."
    assert splitting.ask("reader", "GET", CANARY).json()["state"] == "running"


def test_a_rollback_waits_for_the_end_of_a_canary_and_a_promotion_replaces_it(splitting: House) -> None:
    house = splitting
    assert begun(house).status_code == 200
    refused = house.ask("releaser", "POST", f"{CHANNEL}/rollback", json={})
    assert refused.json()["code"] == "canary_running"
    stopped = house.ask("releaser", "DELETE", f"{CANARY}?reason=enough")
    assert (stopped.json()["state"], stopped.json()["why"]) == ("stopped", "enough")
    assert house.ask("releaser", "DELETE", CANARY).status_code == 409
    assert begun(house).status_code == 200
    assert begun(house, weight=20).json()["weight"] == 20
    assert house.ask("releaser", "PUT", CHANNEL, json={"version": "1.0.0"}).status_code == 200
    assert house.ask("reader", "GET", CANARY).json()["state"] == "promoted"


def test_a_yanked_candidate_gets_no_requests(splitting: House) -> None:
    house = splitting
    assert begun(house).status_code == 200
    assert house.ask("releaser", "POST", f"{SQL}/releases/1.0.0/yank", json={"reason": "wrong"}).status_code == 200
    assert followed(house)["candidate"] is None
    shown = house.ask("reader", "GET", CANARY).json()
    assert (shown["state"], shown["why"]) == ("rolled_back", "1.0.0 was yanked.")
    assert report(house, figures(0), figures(0)).json()["code"] == "no_canary"
    assert house.ask("releaser", "POST", f"{CHANNEL}/rollback", json={}).json()["code"] != "canary_running"


def test_a_yank_of_the_served_release_ends_its_canary(splitting: House) -> None:
    house = splitting
    assert begun(house, "1.0.0").status_code == 200
    assert house.ask("releaser", "POST", f"{SQL}/releases/1.1.0/yank", json={"reason": "wrong"}).status_code == 200
    assert followed(house)["candidate"] is None
    assert house.ask("reader", "GET", CANARY).json()["why"].endswith("serves another release now.")


def test_figures_of_several_sources_add_up_and_never_fall(splitting: House) -> None:
    house = splitting
    assert begun(house).status_code == 200
    reported(house, figures(1000), figures(1000))  # counted before the canary
    assert reported(house, figures(1010, 1), figures(1090, 1))["requests"] == [10, 90]
    assert reported(house, figures(5), figures(5), "second")["requests"] == [10, 90]
    assert reported(house, figures(6), figures(14), "second")["requests"] == [11, 99]
    assert report(house, figures(3), figures(3), "second").json()["code"] == "figures_fell"
    assert report(house, figures(6, at=SLOW), figures(14), "second").json()["code"] == "figures_fell"
    reported(house, figures(6, **{"sql-live.accuracy": (10, 0.0)}), figures(14), "second")
    worse = figures(6, **{"sql-live.accuracy": (11, 9.0)})
    assert report(house, worse, figures(14), "second").json()["code"] == "figures_fell"
    assert report(house, figures(3, 4), figures(3), "third").status_code == 422
    assert datetime.fromisoformat(house.ask("reader", "GET", CANARY).json()["figures_at"]) <= datetime.now(UTC)


def test_a_step_waits_for_requests_to_the_candidate_and_for_figures_of_each_rule(
    splitting: House, clock: Clock
) -> None:
    house = splitting
    watch = {"for": "1m", "steps": [10, 100], "rules": ["errors <= 0.1", "sql-live.accuracy >= served - 2 se"]}
    assert house.ask("admin", "PUT", f"{CHANNEL}/policy", json={"version": 1, "watch": watch}).status_code == 200
    assert begun(house).status_code == 200
    reported(house, figures(0), figures(0))

    def a_minute_later(candidate: Json, served: Json) -> tuple[str, str]:
        clock.passes(61)
        assert put(house, "a", live(splits=True)).status_code == 200
        shown = reported(house, candidate, served)
        return shown["state"], shown["why"]

    served = figures(5000, **{"sql-live.accuracy": (10, 9.0)})
    assert a_minute_later(figures(0), served) == ("running", "held: 1.0.0 has answered 0 of 20 requests")
    assert a_minute_later(figures(19), served)[1].startswith("held: 1.0.0 has answered")
    assert a_minute_later(figures(20), served) == ("running", "held: no figures for sql-live.accuracy >= served - 2 se")
    assert a_minute_later(figures(20, **{"sql-live.accuracy": (10, 9.0)}), served) == ("promoted", "")


def test_huge_and_odd_figures_are_counted_or_refused_and_never_an_error_of_the_server(splitting: House) -> None:
    house, most = splitting, 2**63 - 1
    assert begun(house).status_code == 200
    reported(house, figures(0), figures(0))
    for source in ("a", "b"):
        reported(house, figures(0), figures(0), source)
        reported(house, figures(most, m=(most, 0.5)), figures(most), source)
    assert house.ask("reader", "GET", CANARY).json()["requests"] == [2 * most, 2 * most]
    odd = (
        ("source", {"x\ud800": {}}),
        ("source", {"1.0.0": {"requests": most + 1}}),
        ("source", {"1.0.0": {"requests": 1, "seconds": {"117": 1}}}),
        ("source", {"1.0.0": {"requests": -1}}),
        ("source", {"1.0.0": {"requests": 1, "metrics": {"m": [1, float("nan")]}}}),
        ("source", {f"1.0.{number}": {"requests": 1} for number in range(101)}),
        ("so\x00urce", {}), ("so\ud800urce", {}), ("so\x1b[2Jurce", {}),
    )  # fmt: skip
    for source, versions in odd:
        body = json.dumps({"source": source, "versions": versions})
        answer = house.ask("agent", "POST", WATCH, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, (source, answer.text)


def test_reports_promotions_and_yanks_at_once_end_a_canary_once(splitting: House, clock: Clock) -> None:
    house = splitting
    assert begun(house, weight=50).status_code == 200
    for source in range(8):
        reported(house, figures(0), figures(0), f"front {source}")
    clock.passes(61)
    assert put(house, "a", live(splits=True)).status_code == 200

    def act(number: int) -> int:
        if number == 3:
            return house.ask("releaser", "PUT", CHANNEL, json={"version": "1.0.0"}).status_code
        if number == 6:
            yank = {"reason": "wrong"}
            return house.ask("releaser", "POST", f"{SQL}/releases/1.1.0/yank", json=yank).status_code
        return report(house, figures(500), figures(500), f"front {number}").status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(act, range(8))) <= {200, 201, 409}
    assert house.ask("reader", "GET", CANARY).json()["state"] in ("promoted", "rolled_back", "replaced", "stopped")
    moves = house.ask("admin", "GET", f"/v1/audit?act=channel:promote&subject={PRIVATE}/sql@prod&limit=50").json()
    assert sum(row["after"]["version"] == "1.0.0" for row in moves["items"]) <= 2, "the furnished one, and this"


def test_readers_without_a_role_see_no_live_figures(house: House) -> None:
    channel = f"/v1/adapters/{PUBLIC}/sql/channels/prod"
    watch = {"for": "1m", "rules": ["errors <= 0.5"]}
    assert house.ask("admin", "PUT", f"{channel}/policy", json={"version": 1, "watch": watch}).status_code == 200
    assert put(house, "a", live(channel=f"{PUBLIC}/sql@prod", splits=True)).status_code == 200
    body = {"version": "1.0.0", "weight": 10}
    assert house.ask("releaser", "PUT", f"{channel}/canary", json=body).status_code == 200
    for count in (0, 4321):
        counted = {"source": "front", "versions": {"1.0.0": figures(count), "1.1.0": figures(count)}}
        assert house.ask("agent", "POST", f"{channel}/watch", json=counted).status_code == 200
    assert house.ask("reader", "GET", f"{channel}/canary").json()["requests"] == [4321, 4321]
    for caller in ("nobody", "stranger"):
        shown = house.ask(caller, "GET", f"{channel}/canary").json()
        assert (shown["version"], shown["weight"], shown["requests"], shown["rules"]) == ("1.0.0", 10, None, [])
        assert "4,321" not in house.ask(caller, "GET", f"/{PUBLIC}/sql/channels/prod").text


def test_a_user_with_a_long_name_begins_a_canary_and_is_forgotten_when_removed(splitting: House) -> None:
    house, user = splitting, "u" * 120
    assert house.ask(holder(house, user, "releaser"), "PUT", CANARY, json={"version": "1.0.0", "weight": 9}).is_success
    assert house.ask("reader", "GET", CANARY).json()["actor"] == user
    assert house.ask("operator", "DELETE", f"/v1/users/{user}").status_code == 200
    assert house.ask("reader", "GET", CANARY).json()["actor"].startswith("removed-user-")


def test_a_canary_of_a_deleted_channel_ends(splitting: House) -> None:
    house = splitting
    assert begun(house).status_code == 200
    assert house.ask("admin", "PUT", f"{CHANNEL}/policy", json={"version": 1}).status_code == 200
    gone = house.ask("admin", "DELETE", f"{CHANNEL}?serving=1.1.0&reason=unused")
    assert gone.status_code == 200, gone.text
    assert house.ask("releaser", "PUT", CHANNEL, json={"version": "1.1.0"}).status_code == 200
    shown = house.ask("reader", "GET", CANARY).json()
    assert (shown["state"], shown["why"]) == ("replaced", "The channel was deleted.")


def test_figures_that_no_requests_since_the_last_report_can_have_are_refused(splitting: House) -> None:
    house = splitting
    assert begun(house).status_code == 200
    cases = (
        (figures(100), figures(101, 50)),
        (figures(100, m=(100, 0.0)), figures(101, m=(101, 50.0))),
        (figures(100, m=(100, 90.5)), figures(101, m=(101, 90.0))),
        (figures(100, m=(100, 9.0)), figures(101)),
        ({**figures(100), "seconds": {}}, figures(101)),
        (figures(100), {**figures(101), "seconds": {}}),
        (figures(100), figures(101, at=SLOW)),
    )
    for number, (first, then) in enumerate(cases):
        reported(house, first, first, f"front {number}")
        refused = report(house, then, figures(200), f"front {number}")
        assert (refused.status_code, refused.json()["code"]) == (422, "figures_fell"), (first, then)


def test_a_holder_of_the_role_agent_fills_no_room_of_another_and_names_no_source_of_its(
    splitting: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = splitting
    other = holder(house, "other-agent", "agent")
    monkeypatch.setattr(canaries, "MAX_SOURCES", 2)
    assert begun(house).status_code == 200
    reported(house, figures(5), figures(5))
    reported(house, figures(5), figures(5), "second")
    assert report(house, figures(5), figures(5), "third").json()["code"] == "too_many_sources"
    for count, requests in ((0, [0, 0]), (7, [7, 7])):
        body = {"source": "front", "versions": {"1.0.0": figures(count), "1.1.0": figures(count)}}
        answer = house.ask(other, "POST", WATCH, json=body)
        assert answer.json()["requests"] == requests, answer.text
    assert reported(house, figures(6), figures(6))["requests"] == [8, 8]


def test_the_audit_names_the_reporter_of_the_figures_that_ended_a_canary(splitting: House) -> None:
    house = splitting
    other = holder(house, "grader", "agent")
    assert begun(house).status_code == 200
    for failed in (0, 300):
        body = {"source": "g", "versions": {"1.0.0": figures(failed, failed), "1.1.0": figures(failed)}}
        assert house.ask(other, "POST", WATCH, json=body).status_code == 200
    [row] = house.ask("admin", "GET", "/v1/audit?act=channel:watch").json()["items"]
    assert (row["actor"], row["after"]["state"]) == ("grader", "rolled_back")
