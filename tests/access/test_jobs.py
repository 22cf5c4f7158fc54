"""Jobs: the right to raise a priority, and server-sent events without losses or repetitions after a reconnection."""

import json
import re
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from composer.formats.recipes.recipe import parse_recipe
from registry.api.http import events
from registry.domain.access import tokens
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.compositions import compositions
from registry.domain.jobs import queue
from registry.domain.jobs.queue import Amount
from tests import services
from tests.access.house import HOST, PRIVATE, PUBLIC, House, borrowed, entered, new_house
from tests.eventually import eventually
from tests.registry.api.test_pages import counted


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    directory: Path = tmp_path_factory.mktemp("house")
    built = new_house(services.PAIRINGS[0], directory, ADAPTORY_ACCESS_CACHE_S="0.2")
    yield built
    built.close()


def new_job(house: House) -> tuple[int, int]:
    """The number of a composition, and of its job."""
    recipe = parse_recipe({"base": "tiny", "inputs": [{"adapter": "acme/sql:1.0.0"}], "method": "stack"})
    with house.resources.write() as session:
        made = compositions.create(session, HOST, recipe, plan_only=True)
        return made.id, made.job_id


def move(house: House, job_id: int, done: int | None) -> None:
    """A worker's writes: claims the job, records progress or, with None, finishes it."""
    with house.resources.write() as session:
        now = house.resources.clock()
        if done == 0:
            row = queue.find(session, job_id)
            row.state, row.worker, row.heartbeat_at = "running", "w", now
        progress = Amount(40, 40, "units") if done is None else Amount(done, 40, "units", redone=done // 10)
        assert queue.note_step(session, job_id, "w", "check", state="running", progress=progress)
        if done is None:
            assert queue.finish(session, job_id, "w", "done", now)


Event = tuple[str, dict[str, Any]]


def parsed(text: str) -> list[Event]:
    """Ids and documents."""
    parts = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    matched = [re.fullmatch(r"id: ([0-9a-f]{16})\ndata: (\{.*\})", part) for part in parts]
    assert all(matched), text
    return [(match[1], json.loads(match[2])) for match in matched if match]


@contextmanager
def opened(house: House, path: str, last: str | None = None) -> Generator[httpx2.Response]:
    """A stream that is read as it arrives; leaving the block hangs up."""
    headers = {"Authorization": f"Bearer {house.secrets['admin']}", **({"Last-Event-ID": last} if last else {})}
    client = httpx2.Client(base_url="http://registry", transport=borrowed(house))
    with client, client.stream("GET", path, headers=headers) as answer:
        yield answer


def read(answer: httpx2.Response, count: int) -> list[Event]:
    """The next events."""
    text = ""
    for part in answer.iter_text():
        text += part
        if len(events_read := parsed(text)) == count:
            return events_read
    return parsed(text)


def test_a_client_that_connects_again_gets_what_has_changed_and_nothing_twice(house: House) -> None:
    _, job_id = new_job(house)
    path, seen = f"/v1/jobs/{job_id}/events", list[Event]()
    for done in (0, 10, 20, 30, None):
        move(house, job_id, done)
        with opened(house, path, seen[-1][0] if seen else None) as answer:
            seen += read(answer, 1)
    assert [document["steps"][0]["done"] for _, document in seen] == [0, 10, 20, 30, 40]
    assert [document["steps"][0]["redone"] for _, document in seen] == [0, 1, 2, 3, 3]
    assert [document["state"] for _, document in seen] == ["running"] * 4 + ["done"]
    assert len({name for name, _ in seen}) == 5
    again = house.ask("admin", "GET", path, headers={"Last-Event-ID": seen[-1][0]})
    assert (again.status_code, again.text) == (204, ""), "a browser does not connect again"
    assert parsed(house.ask("admin", "GET", path, headers={"Last-Event-ID": "other"}).text) == [seen[-1]]


def test_a_client_that_has_seen_the_current_state_gets_the_next_one_and_signs_of_life_are_no_event(
    house: House,
) -> None:
    _, job_id = new_job(house)
    move(house, job_id, 0)
    path = f"/v1/jobs/{job_id}/events"
    with opened(house, path) as answer:
        [(name, _)] = read(answer, 1)

    def beat_and_end() -> None:
        with house.resources.write() as session:
            assert queue.extend_lease(session, job_id, "w", house.resources.clock())
        time.sleep(0.8)
        move(house, job_id, None)

    threading.Timer(0.3, beat_and_end).start()
    with opened(house, path, name) as answer:
        assert [document["state"] for _, document in read(answer, 2)] == ["done"]


@pytest.mark.parametrize("of", ["jobs", "compositions"])
def test_a_stream_says_that_it_lives_ends_with_the_job_and_is_not_collected_into_blocks(
    house: House, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.0)
    composition, job_id = new_job(house)

    def cancel() -> None:
        with house.resources.write() as session:
            compositions.cancel(session, HOST, composition)

    threading.Timer(1.2, cancel).start()
    answer = house.ask("admin", "GET", f"/v1/{of}/{job_id if of == 'jobs' else composition}/events")
    assert ": keep-alive\n\n" in answer.text
    assert [document["state"] for _, document in parsed(answer.text)] == ["queued", "cancelled"]
    assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-store")
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_a_role_that_is_lost_ends_a_stream_and_who_has_none_gets_no_event(house: House) -> None:
    _, job_id = new_job(house)
    path = f"/v1/jobs/{job_id}/events"
    assert house.ask("nobody", "GET", path).status_code in (401, 404)
    assert house.ask("stranger", "GET", path).status_code == 404
    with house.resources.write() as session:
        row, secret = tokens.create(session, HOST, tokens.NewToken("admin", "short", {EVERYWHERE: Role.ADMIN}, None))
        house.secrets["short"] = secret
        token_id = row.id

    def revoke() -> None:
        with house.resources.write() as session:
            tokens.revoke(session, HOST, token_id)

    threading.Timer(0.7, revoke).start()
    began = time.monotonic()
    assert [document["state"] for _, document in parsed(house.ask("short", "GET", path).text)] == ["queued"]
    assert time.monotonic() - began < 15


def test_a_token_has_a_limited_number_of_streams_and_gets_one_back_by_hanging_up(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.3)  # in this process, a disconnect is noticed at the next message
    _, job_id = new_job(house)
    path = f"/v1/jobs/{job_id}/events"
    limited = entered(house, house.environ, streams_per_token=2, streams=2)

    def another(streams: ExitStack) -> list[httpx2.Response]:
        """Another open stream, once one that was hung up has been noticed."""
        answer = streams.enter_context(opened(limited, path))
        return [answer] if answer.status_code == 200 else []

    with ExitStack() as both:
        for _ in range(2):
            read(another(both)[0], 1)
        refused = limited.ask("admin", "GET", path)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert "2 for a token" in refused.json()["detail"]
        assert limited.ask("operator", "GET", path).json()["code"] == "too_many_streams", "of all callers together"
    with ExitStack() as one_of_them:
        eventually(partial(another, one_of_them), within_s=10)
    limited.ask("admin", "POST", f"/v1/jobs/{job_id}/cancel")  # ends the last stream at once
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "a hang-up is not a defect"
    limited.close()


@pytest.mark.long
def test_one_reader_reads_a_job_once_for_all_streams_that_follow_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many follow, a commit costs the same statements; all of them get each change."""
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 60.0)
    house = entered(house, house.environ, access_cache_s=5)
    job_ids = [new_job(house)[1] for _ in range(2)]
    states = list[list[str]]()

    def follow(job_id: int) -> None:
        answer = house.ask("admin", "GET", f"/v1/jobs/{job_id}/events")
        states.append([document["state"] for _, document in parsed(answer.text)])

    threads = [threading.Thread(target=follow, args=(job_id,)) for job_id in job_ids * 9]
    for thread in threads:
        thread.start()
    time.sleep(2)
    with counted(house.resources) as sent:
        for _ in range(5):
            with house.resources.write() as session:
                queue.find(session, job_ids[0]).heartbeat_at = house.resources.clock()
            time.sleep(0.4)
        statements = len(sent)
    for job_id in job_ids:
        house.ask("admin", "POST", f"/v1/jobs/{job_id}/cancel")
    for thread in threads:
        thread.join(20)
    assert states == [["queued", "cancelled"]] * 18
    house.close()
    assert 5 <= statements <= 5 * 12, "five commits of at most twelve statements, their own included"


def test_publishers_order_their_jobs_and_a_high_priority_needs_a_releaser(house: House) -> None:
    recipe = {"base": "tiny", "inputs": ["acme/sql:1.0.0"], "method": "stack"}

    def asked(caller: str, priority: str) -> httpx2.Response:
        body = {"recipe": recipe, "plan": True, "priority": priority}
        return house.ask(caller, "POST", "/v1/compositions", json=body)

    refused = asked("publisher", "high")
    assert (refused.status_code, refused.json()["code"]) == (403, "role_missing")
    assert asked("releaser", "higher").status_code == 422
    job = asked("publisher", "low").json()["job"]
    path = f"/v1/jobs/{job}/priority"
    assert house.ask("publisher", "GET", f"/v1/jobs/{job}").json()["priority"] == "low"
    assert house.ask("reader", "POST", path, json={"priority": "low"}).status_code in (403, 404)
    assert house.ask("stranger", "POST", path, json={"priority": "low"}).status_code == 404
    assert house.ask("publisher", "POST", path, json={"priority": "normal"}).json()["priority"] == "normal"
    assert house.ask("publisher", "POST", path, json={"priority": "high"}).status_code == 403
    assert house.ask("releaser", "POST", path, json={"priority": "high"}).json()["priority"] == "high"
    house.ask("publisher", "POST", f"/v1/jobs/{job}/cancel")
    assert house.ask("releaser", "POST", path, json={"priority": "low"}).json()["code"] == "job_finished"
    rows = house.ask("operator", "GET", f"/v1/audit?subject=job/{job}").json()["items"]
    changes = [(row["actor"], row["before"], row["after"]) for row in rows if row["act"] == "job:priority"]
    assert changes == [
        ("releaser", {"priority": "normal"}, {"priority": "high"}),
        ("publisher", {"priority": "low"}, {"priority": "normal"}),
    ]


def test_a_narrowed_token_neither_sees_nor_changes_what_its_user_evaluates_elsewhere(house: House) -> None:
    suite = house.ask("operator", "GET", "/v1/suites").json()["items"][0]["name"]
    asked = {"releases": [f"{PRIVATE}/sql:1.0.0"], "suites": [suite]}
    job = house.ask("publisher", "POST", "/v1/evaluations", json=asked).json()["job"]
    seen = [
        ("GET", f"/v1/jobs/{job}", {}),
        ("GET", f"/v1/evaluations/{job}", {}),
        ("GET", f"/v1/jobs/{job}/events", {}),
    ]
    changed = [
        ("POST", f"/v1/jobs/{job}/priority", {"json": {"priority": "low"}}),
        ("POST", f"/v1/jobs/{job}/cancel", {}),
    ]

    def answers(scope: dict[str, str], requests: list[tuple[str, str, dict[str, Any]]]) -> set[int]:
        made = house.ask("publisher", "POST", "/v1/tokens", json={"scope": scope}).json()
        house.secrets["weak"] = made["token"]
        return {house.ask("weak", method, path, **more).status_code for method, path, more in requests}

    assert answers({PUBLIC: "reader"}, [*seen, *changed]) == {404}
    assert answers({PRIVATE: "reader"}, seen[:2]) == {200}
    assert answers({PRIVATE: "reader"}, changed) == {403}
    assert answers({PRIVATE: "publisher"}, changed) == {200}
