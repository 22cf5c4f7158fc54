"""Followed channels: what a follower sees of moves and yanks, what it does not see, and what it costs."""

import json
import re
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.api.http import events
from registry.database.prepared import Prepared
from registry.domain.access import namespaces, tokens
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.catalog import releases
from registry.domain.channels import promotions, withdrawals
from registry.domain.channels.moves import PromotionRequest
from registry.formats.references import RepositoryName, Version
from tests import services
from tests.access.house import HOST, OTHER, PRIVATE, PUBLIC, House, borrowed, copy_of, entered, furnished_house
from tests.eventually import eventually

SQL, OPEN = f"{PRIVATE}/sql@prod", f"{PUBLIC}/sql@prod"
NAME = RepositoryName(PRIVATE, "sql")
OLD, NEW = Version(1, 0, 0), Version(1, 1, 0)
Event = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module", params=services.PAIRINGS)
def furnished(request: pytest.FixtureRequest) -> House:
    return furnished_house(request.param)


@pytest.fixture
def house(furnished: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[House]:
    """`prod` of each namespace serves 1.1.0, and served 1.0.0 before."""
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.3)  # in this process, a disconnect is noticed at the next message
    copy = entered(
        furnished, copy_of(furnished, tmp_path / "home"), access_cache_s=0.3, streams_per_token=3, streams=30
    )
    yield copy
    copy.close()


def promote(house: House, version: Version, channel: str = "prod") -> None:
    with house.resources.write() as session:
        promotions.request(session, HOST, PromotionRequest(NAME, version, channel))


def yank(house: House, version: Version, *, undo: bool = False) -> None:
    with house.resources.write() as session:
        release = releases.find(session, NAME, version)
        (withdrawals.unyank if undo else withdrawals.yank)(session, HOST, release, "wrong data")


@contextmanager
def following(
    house: House, channels: str, caller: str = "reader", last: str | None = None
) -> Generator[tuple[httpx2.Response, Generator[Event]]]:
    """An open stream and its events as they come; leaving hangs up."""
    headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
    if caller != "nobody":
        headers["Authorization"] = f"Bearer {house.secrets[caller]}"
    client = httpx2.Client(base_url="http://registry", transport=borrowed(house))
    with client, client.stream("GET", f"/v1/follow?channels={channels}", headers=headers) as answer:
        yield answer, _events(answer)


def _events(answer: httpx2.Response) -> Generator[Event]:
    for part in answer.iter_text():
        for text in filter(None, part.split("\n\n")):
            if not text.startswith(":"):
                event = re.fullmatch(r"id: ([0-9a-f]{16})\ndata: (\{.*\})", text)
                assert event, text
                yield event[1], json.loads(event[2])["channels"]


def served(state: Mapping[str, Any], channel: str = SQL) -> str | None:
    return state[channel]["version"]


def ask(house: House, path: str, caller: str = "reader", **headers: str) -> httpx2.Response:
    return house.ask(caller, "GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_a_promotion_and_a_yank_are_events_with_the_state_of_all_channels_that_are_followed(house: House) -> None:
    with following(house, f"{SQL},{OPEN}") as (answer, stream):
        _, state = next(stream)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (served(state), served(state, OPEN)) == ("1.1.0", "1.1.0")
        yank(house, NEW)
        _, state = next(stream)
        assert (served(state), served(state, OPEN)) == ("1.0.0", "1.1.0")
        yank(house, NEW, undo=True)
        assert served(next(stream)[1]) == "1.1.0"
        promote(house, OLD)
        last, state = next(stream)
        assert served(state) == "1.0.0"
        commit = house.ask("reader", "GET", f"/v1/adapters/{NAME}/releases/1.0.0").json()["commit"]
        assert state[SQL]["commit"] == commit
    yank(house, OLD)
    with following(house, f"{SQL},{OPEN}", last=last) as (_, stream):
        assert served(next(stream)[1]) == "1.1.0", "the yank that came between two connections"


def test_who_reconnects_with_the_last_event_gets_the_next_one_alone(house: House) -> None:
    with following(house, SQL) as (_, stream):
        last, _ = next(stream)
    with following(house, SQL, last=last) as (_, stream):
        threading.Timer(0.5, promote, [house, OLD]).start()
        began = time.monotonic()
        assert served(next(stream)[1]) == "1.0.0"
        assert time.monotonic() - began > 0.3


def test_channels_that_may_not_be_read_look_like_those_that_do_not_exist(house: House) -> None:
    asked = f"{SQL},{OTHER}/sql@prod,{PRIVATE}/nothing@prod,{PRIVATE}/sql@canary"
    with following(house, asked) as (_, stream):
        _, state = next(stream)
        assert [name for name, one in state.items() if one] == [SQL]
        promote(house, OLD, "canary")
        assert served(next(stream)[1], f"{PRIVATE}/sql@canary") == "1.0.0", "created later"
    answer = ask(house, f"/v1/follow?channels={asked}", "stranger").json()["channels"]
    assert [name for name, one in answer.items() if one] == [f"{OTHER}/sql@prod"]
    assert ask(house, f"/v1/follow?channels={OPEN}", "nobody").json()["channels"][OPEN]["version"] == "1.1.0"
    assert ask(house, f"/v1/follow?channels={SQL}", "nobody").status_code == 401, "a forgotten token is an error"
    assert ask(house, f"/v1/follow?channels={SQL}", "revoked").status_code == 401


def test_a_poll_waits_for_a_change_as_long_as_it_prefers(house: House) -> None:
    path = f"/v1/follow?channels={SQL}"
    first = ask(house, path)
    tag = first.headers["etag"]
    assert (first.status_code, first.json()["channels"][SQL]["version"]) == (200, "1.1.0")
    assert ask(house, path, If_None_Match=tag).status_code == 304
    began = time.monotonic()
    same = ask(house, path, If_None_Match=tag, Prefer="wait=1")
    assert (same.status_code, same.headers["preference-applied"]) == (304, "wait=1")
    assert 0.9 < time.monotonic() - began < 10
    threading.Timer(0.5, yank, [house, NEW]).start()
    changed = ask(house, path, If_None_Match=tag, Prefer="respond-async, wait=30")
    assert (changed.status_code, changed.json()["channels"][SQL]["version"]) == (200, "1.0.0")
    assert time.monotonic() - began < 15
    assert ask(house, path, If_None_Match=tag, Prefer="wait=30").status_code == 200, (
        "what has changed is not waited for"
    )


def test_a_poll_sees_what_was_committed_before_it(house: House) -> None:
    path = f"/v1/follow?channels={SQL}"
    with following(house, SQL) as (_, stream):  # the reader has a state already
        next(stream)
        for version in (OLD, NEW) * 5:
            promote(house, version)
            answer = ask(house, path, If_None_Match='"something"', Prefer="wait=5")
            assert answer.json()["channels"][SQL]["version"] == str(version)


@pytest.mark.parametrize(
    "asked", ["", ",", "acme/sql", "acme/sql:1.0.0", "acme", ",".join(f"a/b{n}@c" for n in range(101))]
)
def test_what_names_no_channel_is_refused(house: House, asked: str) -> None:
    answer = ask(house, f"/v1/follow?channels={asked}")
    assert (answer.status_code, answer.json()["family"]) == (400, "usage")


def test_a_token_that_is_revoked_or_a_role_that_is_lost_ends_what_its_stream_shows(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    with house.resources.write() as session:
        row, house.secrets["short"] = tokens.create(
            session, HOST, tokens.NewToken("reader", "short", {EVERYWHERE: Role.ADMIN}, None)
        )
    with following(house, f"{SQL},{OPEN}") as (_, kept), following(house, SQL, "short") as (_, stream):
        next(stream), next(kept)
        monkeypatch.setattr(events, "KEEP_ALIVE_S", 60.0)  # so that no keep-alive is what notices it
        time.sleep(0.5)
        with house.resources.write() as session:
            tokens.revoke(session, HOST, row.id)
        assert list(stream) == [], "the stream has ended"
        monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.3)
        with house.resources.write() as session:
            namespaces.set_member(session, HOST, PRIVATE, "reader", None)
        _, state = next(kept)
        assert state[SQL] is None
        assert served(state, OPEN) == "1.1.0"
        promote(house, OLD)
        threading.Timer(2.0, _move_the_open_one, [house]).start()
        assert served(next(kept)[1], OPEN) == "1.0.0", "no event about what it may no longer read"


def test_a_poll_that_waits_ends_when_its_token_is_revoked_or_its_role_is_lost(house: House) -> None:
    path = f"/v1/follow?channels={SQL}"
    with house.resources.write() as session:
        row, house.secrets["short"] = tokens.create(
            session, HOST, tokens.NewToken("reader", "short", {EVERYWHERE: Role.ADMIN}, None)
        )
    tag = ask(house, path).headers["etag"]

    def revoke() -> None:
        with house.resources.write() as session:
            tokens.revoke(session, HOST, row.id)

    def leave() -> None:
        with house.resources.write() as session:
            namespaces.set_member(session, HOST, PRIVATE, "reader", None)

    began = time.monotonic()
    threading.Timer(0.5, revoke).start()
    assert ask(house, path, "short", If_None_Match=tag, Prefer="wait=50").status_code == 401
    threading.Timer(0.5, leave).start()
    assert ask(house, path, If_None_Match=tag, Prefer="wait=50").json()["channels"] == {SQL: None}
    assert time.monotonic() - began < 25


def _move_the_open_one(house: House) -> None:
    with house.resources.write() as session:
        promotions.request(session, HOST, PromotionRequest(RepositoryName(PUBLIC, "sql"), OLD, "prod"))


def test_streams_and_polls_of_a_token_are_limited_and_are_free_again_after_a_hang_up(house: House) -> None:
    with ExitStack() as open_ones:
        streams = [open_ones.enter_context(following(house, SQL))[1] for _ in range(3)]
        assert {served(next(stream)[1]) for stream in streams} == {"1.1.0"}
        refused = ask(house, f"/v1/follow?channels={SQL}", Prefer="wait=9")
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert "3 for a token" in refused.json()["detail"]
        assert ask(house, f"/v1/follow?channels={SQL}").status_code == 200, "answers at once are not streams"
        assert ask(house, f"/v1/follow?channels={SQL}", "publisher", Prefer="wait=1").status_code == 200
    eventually(lambda: ask(house, f"/v1/follow?channels={SQL}", Prefer="wait=1").status_code == 200, within_s=10)


@pytest.mark.long
def test_an_idle_registry_is_not_read_however_many_follow(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as open_ones:
        callers = ("reader", "publisher", "releaser") * 3
        streams = [open_ones.enter_context(following(house, SQL, caller))[1] for caller in callers]
        assert {served(next(stream)[1]) for stream in streams} == {"1.1.0"}
        time.sleep(0.5)
        sent: list[str] = []
        monkeypatch.setattr(Prepared, "watch", staticmethod(lambda _, text: sent.append(text) or nullcontext()))
        time.sleep(2)
        assert not sent
        promote(house, OLD)
        assert {served(next(stream)[1]) for stream in streams} == {"1.0.0"}
        assert 1 <= len([text for text in sent if "served_id" in text]) <= 2, "one read for all"


def test_the_etag_of_a_channel_covers_what_it_serves(house: House) -> None:
    path = f"/v1/adapters/{NAME}/channels/prod"
    first = ask(house, path)
    move, tag = first.json()["move"], first.headers["etag"]
    assert tag == f'"{move}-1.1.0"'
    assert ask(house, path, If_None_Match=tag).status_code == 304
    yank(house, NEW)
    assert ask(house, path, If_None_Match=tag).json()["version"] == "1.0.0"
    body = {"version": "1.0.0"}
    stale = house.ask("releaser", "PUT", path, json=body, headers={"If-Match": tag})
    assert (stale.status_code, stale.json()["code"]) == (412, "channel_moved"), "a yank has come between"
    rolled = house.ask("releaser", "POST", f"{path}/rollback", json={}, headers={"If-Match": tag})
    assert (rolled.status_code, rolled.json()["code"]) == (412, "channel_moved")
    moved = house.ask("releaser", "PUT", path, json=body, headers={"If-Match": f'"{move}"'})
    assert moved.status_code == 200, "a move's own tag leaves out what is served"
    assert moved.headers["etag"] == ask(house, path).headers["etag"] == f'"{moved.json()["id"]}-1.0.0"'


def test_a_yank_that_changes_a_channel_is_in_its_history_and_its_audit(house: House) -> None:
    path = f"/v1/adapters/{NAME}"
    dry = house.ask("releaser", "POST", f"{path}/releases/1.1.0/yank", json={"reason": "wrong", "dry_run": True}).json()
    assert (dry["yanked"], dry["channels"]) == (False, [{"channel": "prod", "before": "1.1.0", "after": "1.0.0"}])
    assert ask(house, f"{path}/channels/prod").json()["version"] == "1.1.0", "a dry run changes nothing"
    done = house.ask("releaser", "POST", f"{path}/releases/1.1.0/yank", json={"reason": "wrong"}).json()
    assert (done["yanked"], done["channels"]) == (True, dry["channels"])
    yank(house, OLD)
    yank(house, OLD, undo=True)
    yank(house, NEW, undo=True)
    history = ask(house, f"{path}/channels/prod/history").json()["items"]
    assert [(entry["kind"], entry["from_version"], entry["to_version"]) for entry in history] == [
        ("unyank", "1.0.0", "1.1.0"),
        ("unyank", None, "1.0.0"),
        ("yank", "1.0.0", "1.0.0"),
        ("yank", "1.1.0", "1.0.0"),
        ("promote", "1.0.0", "1.1.0"),
        ("promote", None, "1.0.0"),
    ]
    assert history[3]["reason"] == "wrong"
    rows = house.ask("operator", "GET", f"/v1/audit?subject={SQL}").json()["items"]
    acts = [(row["act"], row["before"]["version"], row["after"]["version"]) for row in rows if row["before"]]
    assert acts[:4] == [
        ("channel:unyank", "1.0.0", "1.1.0"),
        ("channel:unyank", None, "1.0.0"),
        ("channel:yank", "1.0.0", None),
        ("channel:yank", "1.1.0", "1.0.0"),
    ]
    rolled = house.ask("releaser", "POST", f"{path}/channels/prod/rollback", json={}).json()
    assert (rolled["from_version"], rolled["to_version"]) == ("1.1.0", "1.0.0"), "a rollback never returns to a yank"


def test_a_policy_may_keep_a_yanked_release_until_the_next_move(house: House) -> None:
    path, policy = f"/v1/adapters/{NAME}/channels/prod", {"version": 1, "on_yank": "keep"}
    assert house.ask("admin", "PUT", f"{path}/policy", json=policy).status_code == 200
    with following(house, SQL) as (_, stream):
        next(stream)
        yank(house, NEW)
        kept = ask(house, path).json()
        assert (kept["version"], kept["yanked"], kept["passes_over"]) == ("1.1.0", True, None)
        resolved = ask(house, f"/v1/resolve?ref={SQL}").json()
        assert resolved["release"]["version"] == "1.1.0"
        assert "is yanked (wrong data); the policy of acme/sql@prod keeps it" in resolved["warning"]
        house.ask("admin", "PUT", f"{path}/policy", json={"version": 1})
        assert served(next(stream)[1]) == "1.0.0", "without the policy, the channel falls back"
        house.ask("admin", "PUT", f"{path}/policy", json=policy)
        assert served(next(stream)[1]) == "1.1.0"
    kinds = [entry["kind"] for entry in ask(house, f"{path}/history").json()["items"]]
    assert kinds == ["policy", "policy", "promote", "promote"]
    house.ask("admin", "POST", f"/v1/adapters/{NAME}/releases/1.1.0/takedown", json={"reason": "has personal data"})
    assert ask(house, path).json()["version"] is None, "what has no files cannot be kept; 1.0.0 had the same"


def test_an_approval_of_the_release_that_a_channel_falls_back_to_is_not_spent_by_the_yank(house: House) -> None:
    path = f"/v1/adapters/{NAME}/channels/prod"
    house.ask("admin", "PUT", f"{path}/policy", json={"version": 1, "approval": {"role": "releaser"}})
    assert house.ask("admin", "POST", f"{path}/approvals", json={"version": "1.0.0"}).status_code == 200
    yank(house, NEW)
    moved = house.ask("releaser", "PUT", path, json={"version": "1.0.0"})
    assert (moved.status_code, moved.json()["to_version"]) == (200, "1.0.0")
