"""Nodes that serve channels: who may report, how long a report counts, who may switch, and what users see of it."""

import os
import subprocess
import sys
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest

from registry.api.app import create_app
from registry.client.inprocess import InProcessTransport
from registry.domain.access import tokens
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.access.tokens import NewToken
from registry.domain.rollouts import fleet
from registry.transfer.collect import collect, sweep
from registry.wire.access import RoleName
from tests import services
from tests.access.browser import Browser
from tests.access.house import HOST, OTHER, PRIVATE, PUBLIC, House, copy_of, entered, furnished_house
from tests.clocks import JumpingClocks

SQL = f"/v1/adapters/{PRIVATE}/sql"
ROLLOUT = f"{SQL}/channels/prod/rollout"
Json = dict[str, Any]


@dataclass
class Clock:
    """The time of the server, which a test moves."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __call__(self) -> datetime:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module", params=services.PAIRINGS)
def furnished(request: pytest.FixtureRequest) -> House:
    return furnished_house(request.param)


@pytest.fixture
def house(furnished: House, tmp_path: Path, clock: Clock) -> Generator[House]:
    """`prod` of each namespace serves 1.1.0, and served 1.0.0 before."""
    copy = entered(furnished, copy_of(furnished, tmp_path / "home"))
    copy.transport.close()
    copy.resources = replace(copy.resources, clock=clock)
    copy.transport = InProcessTransport(create_app(copy.resources, tokens=True))
    yield copy
    copy.close()


def live(version: str | None = "1.1.0", channel: str = f"{PRIVATE}/sql@prod", **more: Any) -> Json:
    """A channel of a report, with the commit of the furnished releases, which all have the same files."""
    served = {"version": version, "commit": more.pop("commit", None), "move": 1 if version else None}
    return {"channel": channel, "state": "following", "since": "2026-01-01T00:00:00Z", **served, **more}


def commit(house: House, namespace: str = PRIVATE) -> str:
    return house.ask("operator", "GET", f"/v1/adapters/{namespace}/sql/releases/1.1.0").json()["commit"]


def put(house: House, node: str, *channels: Json, caller: str = "agent", **more: Any) -> httpx2.Response:
    body = {"agent": "adaptory 0.2.0", "channels": list(channels), **more}
    return house.ask(caller, "PUT", f"/v1/fleet/prod/{node}", json=body)


def reported(house: House, node: str, *channels: Json, **more: Any) -> bool:
    """Reports; returns whether the node may switch."""
    answer = put(house, node, *channels, **more)
    assert answer.status_code == 200, answer.text
    assert 45 <= answer.json()["lease_s"] <= 60
    return answer.json()["switch"]


def rollout(house: House, caller: str = "reader") -> Json:
    answer = house.ask(caller, "GET", ROLLOUT)
    assert answer.status_code == 200, answer.text
    return answer.json()


def states(house: House) -> Mapping[str, str]:
    shown = rollout(house)
    by_node = {node["node"]: node["state"] for node in shown["nodes"]}
    assert shown["totals"] == {state: [*by_node.values()].count(state) for state in fleet.STATES}
    return by_node


def holder(house: House, user: str, role: str, scope: Mapping[str, Role] | None = None) -> str:
    """Grants the role in acme, and makes a token; returns the name to ask with."""
    members = f"/v1/namespaces/{PRIVATE}/members"
    assert house.ask("admin", "PUT", members, json={"user": user, "role": role}).status_code == 200
    with house.resources.write() as session:
        new = NewToken(user, "", scope or {EVERYWHERE: Role.ADMIN}, None)
        _, house.secrets[f"{user} {scope}"] = tokens.create(session, HOST, new)
    return f"{user} {scope}"


def test_two_agents_that_report_as_one_node_are_no_node_that_follows(house: House, clock: Clock) -> None:
    """Their reports would replace each other, so that one of them could stay behind unseen."""
    now = live(commit=commit(house))

    def state(instance: str) -> str:
        clock.passes(5)
        reported(house, "a", now, instance=instance)
        return states(house)["a"]

    assert [state(instance) for instance in ("1", "1", "2", "2")] == ["following"] * 4, "restarted once"
    assert [state(instance) for instance in ("1", "2", "2", "1", "3", "1", "1")] == ["failed"] * 7
    [node] = rollout(house)["nodes"]
    assert node["error"] == "Two agents report as prod/a: start each with a --node of its own."
    assert house.ask("reader", "GET", "/v1/fleet").json()["items"][0]["channels"][0]["state"] == "failed"
    clock.passes(60)
    assert [state(instance) for instance in ("1", "1", "4", "4")] == ["following"] * 4, "the others have ended"


def test_only_the_role_agent_reports_and_it_does_nothing_else(house: House) -> None:
    for caller in ("reader", "publisher", "releaser", "admin", "operator"):
        refused = put(house, "gpu-1", live(), caller=caller)
        assert (refused.status_code, refused.json()["code"]) == (403, "role_missing"), caller
        assert put(house, "gpu-1", caller=caller).status_code == 403, "nor without channels"
    assert put(house, "gpu-1", live()).status_code == 200
    assert house.ask("agent", "GET", f"{SQL}/releases/1.1.0").status_code == 200
    for method, path, body in (
        ("PUT", f"{SQL}/channels/prod", {"version": "1.0.0"}),
        ("POST", f"{SQL}/releases/1.1.0/yank", {"reason": "because"}),
        ("PUT", f"{SQL}/channels/prod/policy", {"version": 1}),
        ("POST", "/v1/uploads", {"namespace": PRIVATE, "files": [{"path": "a", "size_bytes": 1, "sha256": "1" * 64}]}),
    ):
        assert house.ask("agent", method, path, json=body).status_code == 403, path


def test_a_channel_of_others_is_refused_like_one_that_does_not_exist(house: House) -> None:
    answers = [put(house, "gpu-1", live(channel=f"{name}/sql@prod")) for name in (OTHER, "ghost")]
    assert [answer.status_code for answer in answers] == [404, 404]
    texts = [answer.json()["detail"].replace(name, "X") for answer, name in zip(answers, (OTHER, "ghost"), strict=True)]
    assert texts[0] == texts[1]
    assert put(house, "gpu-1", live(), live(channel=f"{OTHER}/sql@prod")).status_code == 404
    assert rollout(house)["nodes"] == [], "a report is taken as it is, or not at all"
    assert put(house, "gpu-1", live(channel=f"{PRIVATE}/sql@gone")).status_code == 200, "a channel that was deleted"


def test_a_role_beside_the_ladder_joins_one_of_it_and_a_scope_narrows_both(house: House) -> None:
    assert set(get_args(RoleName)) == {role.value for role in Role}
    both = holder(house, "ann", "releaser+agent")
    assert house.ask(both, "GET", "/v1/whoami").json()["grants"] == {PRIVATE: "releaser+agent"}
    assert put(house, "gpu-1", live(), caller=both).status_code == 200
    assert house.ask(both, "PUT", f"{SQL}/channels/prod", json={"version": "1.0.0"}).status_code == 200
    narrow = holder(house, "ann", "releaser+agent", {PRIVATE: Role.AGENT})
    assert house.ask(narrow, "GET", "/v1/whoami").json()["grants"] == {PRIVATE: "agent"}
    assert put(house, "gpu-1", live(), caller=narrow).status_code == 200
    assert house.ask(narrow, "PUT", f"{SQL}/channels/prod", json={"version": "1.1.0"}).status_code == 403
    ladder = holder(house, "ann", "releaser+agent", {PRIVATE: Role.RELEASER})
    assert put(house, "gpu-1", live(), caller=ladder).json()["code"] == "scope_too_narrow"
    members = f"/v1/namespaces/{PRIVATE}/members"
    refused = house.ask("admin", "PUT", members, json={"user": "ann", "role": "agent+releaser"})
    assert refused.status_code == 422, "each role has one name"


def test_a_report_counts_for_a_minute_and_its_node_is_silent_then(house: House, clock: Clock) -> None:
    served = live(commit=commit(house))
    reported(house, "gpu-1", served)
    clock.passes(59)
    assert states(house) == {"gpu-1": "following"}
    clock.passes(1)
    assert states(house) == {"gpu-1": "silent"}
    assert house.ask("reader", "GET", "/v1/fleet").json()["items"][0]["silent"] is True
    reported(house, "gpu-1", served)
    assert states(house) == {"gpu-1": "following"}


def test_what_was_recorded_before_the_registrys_clock_was_set_back_does_not_count(house: House, clock: Clock) -> None:
    served = live(commit=commit(house))
    for node in ("gpu-1", "gpu-2"):
        reported(house, node, served)
    assert reported(house, "gpu-1", served, switch={"max_unavailable": 1})
    clock.passes(-3600)
    assert states(house) == {"gpu-1": "silent", "gpu-2": "silent"}
    assert {row["silent"] for row in house.ask("reader", "GET", "/v1/fleet").json()["items"]} == {True}
    assert reported(house, "gpu-2", served, switch={"max_unavailable": 1}), "the permission of an ended node, too"
    assert states(house) == {"gpu-1": "silent", "gpu-2": "following"}


def test_servers_of_one_database_go_by_its_clock(house: House, tmp_path: Path) -> None:
    """Else one whose own clock is wrong shows all nodes as silent that report to another."""
    clocks = JumpingClocks(tmp_path)
    clocks.jump(600)
    code = """
from registry.environment.settings import Settings
from registry.transfer.resources import open_resources
resources = open_resources(Settings())
with resources.read():
    print(resources.clock().isoformat())
"""
    environ = {"PATH": os.environ["PATH"], **house.environ, **clocks.environment}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    ahead = datetime.fromisoformat(ran.stdout.strip()) - datetime.now(UTC)
    expected = timedelta(seconds=600 if house.resources.database.is_sqlite else 0)
    assert abs(ahead - expected) < timedelta(seconds=30)


def test_the_list_of_nodes_shows_a_permission_to_switch_while_it_counts(house: House, clock: Clock) -> None:
    def until() -> str | None:
        (node,) = house.ask("reader", "GET", "/v1/fleet").json()["items"]
        return node["switch_until"]

    assert reported(house, "gpu-1", live(), switch={"max_unavailable": 1})
    assert until() is not None
    clock.passes(61)
    assert until() is None


def test_a_report_that_repeats_the_last_one_is_recorded_after_a_while_and_says_how_long_it_counts(
    house: House, clock: Clock
) -> None:
    def leases(*waits: int, **more: Any) -> list[tuple[int, bool]]:
        """What each report answers, and whether it was recorded."""
        seen = []
        for wait_s in waits:
            clock.passes(wait_s)
            lease_s = put(house, "gpu-1", live(), **more).json()["lease_s"]
            [node] = house.ask("reader", "GET", "/v1/fleet").json()["items"]
            seen.append((lease_s, datetime.fromisoformat(node["seen_at"]) == clock.now))
        return seen

    assert leases(0, 5, 5, 4, 1, 14) == [(60, True), (55, False), (50, False), (46, False), (60, True), (46, False)]
    assert leases(0, agent="adaptory 0.3.0") == [(60, True)]
    assert leases(0, switch={"max_unavailable": 1}) == [(60, True)]
    assert leases(1, 1) == [(60, True), (59, False)], "a permission is given back"
    reported(house, "gpu-1", live("1.0.0"))
    assert states(house) == {"gpu-1": "behind"}


def test_each_state_has_its_rule(house: House, clock: Clock) -> None:
    own = commit(house)
    proof = {"verdict": "proved", "at": clock.now.isoformat(), "share": 0.998, "worst_nats": 0.08}
    failed = {"verdict": "failed", "at": clock.now.isoformat(), "share": -0.007, "worst_nats": 14.3}
    reported(house, "a", live(commit=own, check=proof))
    reported(house, "b", live("1.0.0", commit=own))
    reported(house, "c", live("1.0.0", commit=own, state="switching"))
    reported(house, "d", live("1.0.0", commit=own, state="failed", check=failed, error="The check failed."))
    reported(house, "e", live(None))
    reported(house, "f", live("1.1.0", commit="0" * 40))
    expected = {"a": "following", "b": "behind", "c": "switching", "d": "failed", "e": "behind", "f": "behind"}
    assert states(house) == expected
    shown = rollout(house)
    assert (shown["version"], shown["commit"], shown["proved"]) == ("1.1.0", own, 1)
    node = next(node for node in shown["nodes"] if node["node"] == "d")
    assert (node["version"], node["error"], node["check"]["worst_nats"]) == ("1.0.0", "The check failed.", 14.3)
    house.ask("releaser", "POST", f"{SQL}/releases/1.1.0/yank", json={"reason": "wrong"})
    assert states(house) == {**expected, "a": "behind", "b": "following"}, "a yank changes what is wanted"


def test_a_report_replaces_the_last_one_and_one_without_channels_removes_the_node(house: House) -> None:
    for _ in range(2):
        reported(house, "gpu-1", live(), live(channel=f"{PRIVATE}/sql@canary"))
        [node] = house.ask("reader", "GET", "/v1/fleet").json()["items"]
        assert [row["channel"] for row in node["channels"]] == [f"{PRIVATE}/sql@canary", f"{PRIVATE}/sql@prod"]
    reported(house, "gpu-1", live("1.0.0"))
    [node] = house.ask("reader", "GET", "/v1/fleet").json()["items"]
    assert [(row["channel"], row["version"]) for row in node["channels"]] == [(f"{PRIVATE}/sql@prod", "1.0.0")]
    reported(house, "gpu-1")
    assert house.ask("reader", "GET", "/v1/fleet").json()["items"] == []


def test_nodes_switch_in_turn_and_a_permission_ends_or_is_given_back(house: House, clock: Clock) -> None:
    def asks(node: str, most: int = 1) -> bool:
        return reported(house, node, live(), switch={"max_unavailable": most})

    assert asks("a")
    assert not asks("b")
    assert asks("a"), "it keeps what it has"
    assert asks("b", most=2)
    assert not asks("c", most=2)
    reported(house, "a", live())
    assert asks("c", most=2)
    clock.passes(59)
    assert not asks("d")
    clock.passes(1)
    assert asks("d")
    others = house.ask("agent", "PUT", "/v1/fleet/canary/a", json={
        "agent": "x", "channels": [live()], "switch": {"max_unavailable": 1},
    })  # fmt: skip
    assert others.json()["switch"], "another group has its own turns"


def test_of_nodes_that_ask_at_the_same_time_no_more_may_switch_than_each_allows(house: House) -> None:
    def asks(number: int) -> bool:
        return reported(house, f"gpu-{number}", *channels[number % 2 :], switch={"max_unavailable": 2})

    channels = [live(channel=f"{PUBLIC}/sql@prod"), live()]  # nodes with even numbers follow both
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(asks, range(8))) == 2, "nodes that are new"
        for _ in range(3):
            for number in range(8):
                reported(house, f"gpu-{number}", *channels[number % 2 :])
            assert sum(pool.map(asks, range(8))) == 2, "nodes that are known"


def test_nodes_of_two_namespaces_with_the_same_names_do_not_meet(house: House) -> None:
    members = f"/v1/namespaces/{OTHER}/members"
    assert house.ask("stranger", "PUT", members, json={"user": "stranger", "role": "admin+agent"}).status_code == 200
    server: Json = {"url": "http://gpu-1:8000", "kind": "vllm", "ready": True, "error": f"{OTHER}/sql@1.0.0 is odd"}
    names = [f"{PRIVATE}/sql@1.1.0", f"{OTHER}/sql@1.0.0", "base"]
    server["loaded"] = [{"name": name} for name in names]
    assert reported(house, "gpu-1", live(), servers=[server], switch={"max_unavailable": 1})
    foreign = live(channel=f"{OTHER}/sql@prod")
    assert reported(house, "gpu-1", foreign, caller="stranger", switch={"max_unavailable": 1})
    [own] = house.ask("reader", "GET", "/v1/fleet").json()["items"]
    assert (own["namespace"], own["group"], own["node"]) == (PRIVATE, "prod", "gpu-1")
    [shown] = own["servers"]
    assert [row["name"] for row in shown["loaded"]] == [f"{PRIVATE}/sql@1.1.0"]
    assert shown["error"] is None, "it names a release of others"
    [theirs] = house.ask("stranger", "GET", "/v1/fleet").json()["items"]
    assert theirs["namespace"] == OTHER
    reported(house, "gpu-1", caller="stranger")
    assert len(house.ask("operator", "GET", "/v1/fleet").json()["items"]) == 1, "each removes its own"


def test_strangers_see_how_many_nodes_serve_a_public_channel_and_not_which(house: House) -> None:
    reported(house, "gpu-1", live(channel=f"{PUBLIC}/sql@prod", commit=commit(house, PUBLIC)))
    for caller, count in {"reader": 1, "stranger": 0, "nobody": 0}.items():
        shown = house.ask(caller, "GET", f"/v1/adapters/{PUBLIC}/sql/channels/prod/rollout").json()
        assert (shown["totals"]["following"], len(shown["nodes"])) == (1, count), caller
        assert len(house.ask(caller, "GET", "/v1/fleet").json()["items"]) == count, caller


def test_nodes_are_listed_by_pages(house: House) -> None:
    for number in range(5):
        reported(house, f"gpu-{number}", live())
    seen, cursor = [], ""
    while cursor is not None:
        after = {"cursor": cursor} if cursor else {}
        answer = house.ask("reader", "GET", "/v1/fleet", params={"limit": 2, **after}).json()
        seen += [node["node"] for node in answer["items"]]
        cursor = answer["next"]
    assert seen == [f"gpu-{number}" for number in range(5)]
    other = house.ask("reader", "GET", "/v1/adapters", params={"limit": 1}).json()["next"]
    assert house.ask("reader", "GET", "/v1/fleet", params={"cursor": other}).json()["code"] == "bad_cursor"


def test_nodes_of_a_namespace_are_bounded_and_silent_ones_make_room(
    house: House, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "MAX_NODES", 2)
    reported(house, "a", live())
    clock.passes(1)
    reported(house, "b", live())
    refused = put(house, "c", live())
    assert (refused.status_code, refused.json()["code"]) == (422, "fleet_full")
    assert "2 nodes" in refused.json()["detail"]
    clock.passes(59)
    reported(house, "c", live())
    assert states(house) == {"b": "behind", "c": "behind"}


@pytest.mark.parametrize(
    "odd",
    [
        {"agent": ""},
        {"channels": [live(state="lost")]},
        {"channels": [live(), live()]},
        {"channels": [live(commit="abc")]},
        {"channels": [live(error="x" * 1001)]},
        {"channels": [live(channel=f"{PRIVATE}/sql:1.0.0")]},
        {"channels": [live(check={"verdict": "proved", "at": "2026-01-01T00:00:00Z", "share": float("1e400")})]},
        {"channels": [live()] * 1001},
        {"switch": {"max_unavailable": 0}},
        {"servers": [{"url": "u", "kind": "vllm", "ready": True, "loaded": [{"name": "n"}] * 1001}]},
    ],
)
def test_odd_reports_are_refused(house: House, odd: Json) -> None:
    body = {"agent": "adaptory", "channels": [live()], **odd}
    content = str(body).replace("'", '"').replace("None", "null").replace("True", "true").replace("inf", "1e400")
    answer = house.ask(
        "agent", "PUT", "/v1/fleet/prod/a", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 422), answer.text
    assert rollout(house)["nodes"] == []


@pytest.mark.parametrize("name", ["GPU-1", "-a", "a" * 101, "a%00b", "a b"])
def test_names_of_nodes_are_like_those_of_hosts(house: House, name: str) -> None:
    assert put(house, name, live()).json()["code"] in ("bad_name", "bad_value")
    assert put(house, "gpu-1.rack.example.org", live()).status_code == 200


def test_retention_keeps_what_a_node_has_loaded_until_its_row_goes(house: House, clock: Clock) -> None:
    limits = {"keep_yanked_days": 1, "keep_prerelease_days": None}
    assert house.ask("admin", "PUT", f"/v1/namespaces/{PRIVATE}/retention", json=limits).status_code == 200
    for version in ("1.0.0", "1.1.0"):
        house.ask("releaser", "POST", f"{SQL}/releases/{version}/yank", json={"reason": "wrong"})
    loaded = {"url": "http://a:8000", "kind": "vllm", "ready": True, "loaded": [{"name": f"{PRIVATE}/sql@1.0.0"}]}
    reported(house, "a", live(None), servers=[loaded])

    def expired() -> tuple[int, int]:
        """Releases that retention takes down, and those that stay since nodes have them loaded."""
        looked = collect(house.resources, grace=timedelta(days=30), dry_run=True)
        return looked.releases, looked.loaded

    clock.passes(2 * 86_400)
    assert expired() == (0, 2), "an outage of the registry makes all nodes silent"
    clock.passes(5 * 86_400 - 1)
    sweep(house.resources, clock.now)
    assert states(house) == {"a": "silent"}
    clock.passes(2)
    sweep(house.resources, clock.now)
    assert rollout(house)["nodes"] == []
    assert expired() == (2, 0)


def test_a_yank_and_a_takedown_name_the_nodes_that_have_the_release_loaded(house: House, clock: Clock) -> None:
    reported(house, "a", live("1.1.0", commit=commit(house)))
    clock.passes(60)
    reported(house, "b", live("1.1.0", commit=commit(house)))
    reported(house, "c", live("1.1.0", commit="0" * 40))
    expected = [{"group": "prod", "node": "a", "silent": True}, {"group": "prod", "node": "b", "silent": False}]
    for body in ({"reason": "wrong", "dry_run": True}, {"reason": "wrong"}):
        done = house.ask("releaser", "POST", f"{SQL}/releases/1.1.0/yank", json=body).json()
        assert done["loaded_on"] == expected
    planned, taken = (
        house.ask("admin", "POST", f"{SQL}/releases/1.1.0/takedown", json={"reason": "personal data", **more}).json()
        for more in ({"dry_run": True}, {})
    )
    assert planned == taken, "the dry run has not changed anything"
    assert (taken["loaded_on"], len(taken["releases"])) == (expected, 2)


def test_a_node_that_has_ended_is_removed_by_its_agents_and_admins(house: House) -> None:
    reported(house, "a", live())
    path = f"/v1/fleet/prod/a?namespace={PRIVATE}"
    for caller, status in {"nobody": 404, "stranger": 404, "reader": 403, "releaser": 403, "admin": 200}.items():
        assert house.ask(caller, "DELETE", path).status_code == status, caller
    assert house.ask("agent", "DELETE", path).json()["code"] == "node_unknown"
    rows = house.ask("admin", "GET", "/v1/audit?act=node:remove").json()["items"]
    assert [(row["subject"], row["actor"]) for row in rows] == [("prod/a", "admin")]


def test_metrics_count_nodes_by_state_and_channels_that_keep_a_yanked_release(house: House) -> None:
    def gauges() -> set[str]:
        lines = house.ask("reader", "GET", "/metrics").text.splitlines()
        return {line for line in lines if line.startswith(("adaptory_rollout_nodes", "adaptory_yanked_channels"))}

    reported(house, "a", live(commit=commit(house)), live(channel=f"{PRIVATE}/sql@gone"))
    assert {'adaptory_rollout_nodes{state="following"} 1.0', 'adaptory_rollout_nodes{state="behind"} 1.0'} <= gauges()
    assert "adaptory_yanked_channels 0.0" in gauges()
    house.ask("admin", "PUT", f"{SQL}/channels/prod/policy", json={"version": 1, "on_yank": "keep"})
    house.ask("releaser", "POST", f"{SQL}/releases/1.1.0/yank", json={"reason": "wrong"})
    assert "adaptory_yanked_channels 1.0" in gauges()


def test_the_page_of_a_channel_shows_the_rollout(house: House, clock: Clock) -> None:
    def page(caller: str = "reader", of: str = PRIVATE) -> str:
        with Browser(house) as browser:
            if caller != "nobody":
                browser.sign_in(house.secrets[caller])
            return browser.open(f"/{of}/sql@prod").text

    own = commit(house)
    assert "Rollout" not in page(), "no node follows it"
    proof = {
        "verdict": "proved",
        "at": clock.now.isoformat(),
        "share": 0.998,
        "worst_nats": 0.08,
        "tolerance_nats": 0.6,
    }
    for node in ("a", "b"):
        reported(house, node, live(commit=own, check=proof))
    clock.passes(40)
    assert "1.1.0 is proved on 2 of 2 nodes, 40 s ago." in page()
    assert "proved within 0.6 nats: share 0.998, worst token 0.08 nats, 40 s ago" in page()
    failed = {"verdict": "failed", "at": clock.now.isoformat(), "share": -0.007, "worst_nats": 14.3}
    reported(house, "b", live("1.0.0", commit=own, state="failed", check=failed, error="<b>The check failed.</b>"))
    text = page()
    assert "1 of 2 nodes serves 1.1.0, 1 of them proved; 1 failed." in text
    assert "failed: share -0.007, worst token 14.30 nats, 0 s ago" in text
    assert "&lt;b&gt;The check failed.&lt;/b&gt;" in text
    clock.passes(30)
    assert "0 of 2 nodes serve 1.1.0; 1 failed; 1 silent." in page()
