"""Webhooks: who manages them, what they are owed, in which order, and what an attempt may connect to."""

import json
import threading
from collections.abc import Generator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from composer.formats.recipes.recipe import parse_recipe
from registry.database.tables import FleetDrift, FleetNode, WebhookDelivery, WebhookSecret
from registry.domain.compositions import compositions
from registry.domain.jobs import queue
from registry.domain.rollouts import drift
from registry.domain.webhooks import deliveries
from registry.domain.webhooks.deliveries import DEAD, FAILED, DeliveryOutcome
from registry.formats.webhooks import EVENTS, PAUSES
from registry.worker.deliverer import Deliverer
from tests import services
from tests.access.browser import Browser
from tests.access.house import HOST, OTHER, PRIVATE, House, copy_of, entered, furnished_house
from tests.elapsed import let_deliveries_elapse
from tests.eventually import eventually
from tests.receiver import Receiver, deliver_due, receiving

Json = dict[str, Any]
DAY = timedelta(days=1)


@pytest.fixture(params=services.PAIRINGS)
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[House]:
    """`prod` of each namespace serves 1.1.0, and served 1.0.0 before. Webhooks may reach this machine."""
    furnished = furnished_house(request.param)
    copy = entered(furnished, copy_of(furnished, tmp_path / "home"), webhook_networks="127.0.0.0/8", rate_limit="")
    yield copy
    copy.close()


@pytest.fixture
def receiver() -> Generator[Receiver]:
    with receiving() as running:
        yield running


def add(house: House, receiver: Receiver, caller: str = "admin", **more: Any) -> Json:
    body = {"namespace": PRIVATE, "url": receiver.url, **more}
    answer = house.ask(caller, "POST", "/v1/webhooks", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def move(house: House, version: str, name: str = "sql", namespace: str = PRIVATE, channel: str = "prod") -> None:
    kind = "models" if name == "merged" else "adapters"
    path = f"/v1/{kind}/{namespace}/{name}/channels/{channel}"
    answer = house.ask("operator", "PUT", path, json={"version": version, "reason": "<because>"})
    assert answer.status_code in (200, 201), answer.text


def listed(house: House, hook: Json, **query: str) -> list[Json]:
    answer = house.ask("admin", "GET", f"/v1/webhooks/{hook['id']}/deliveries", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


def test_only_admins_of_its_namespace_see_or_change_a_webhook(house: House, receiver: Receiver) -> None:
    hook = add(house, receiver)
    everywhere = add(house, receiver, caller="operator", namespace=None)
    ways = [
        ("GET", "/deliveries"), ("POST", "/test"), ("POST", "/rotate"), ("POST", "/replay"),
        ("POST", "/deliveries/1/replay"), ("DELETE", ""),
    ]  # fmt: skip
    for caller, status in {"nobody": 401, "reader": 403, "releaser": 403, "narrowed": 403, "stranger": 404}.items():
        for method, path in ways:
            answers = [
                house.ask(caller, method, f"/v1/webhooks/{webhook}{path}")
                for webhook in (hook["id"], everywhere["id"], "aaaaaaaaaaaa")
            ]
            assert [answer.status_code for answer in answers] == [status] * 3, (caller, method, path)
            assert len({answer.json()["code"] for answer in answers}) == 1
    assert house.ask("stranger", "GET", "/v1/webhooks").json()["items"] == []
    assert house.ask("admin", "DELETE", f"/v1/webhooks/{everywhere['id']}").status_code == 404
    for caller, namespace, status in (
        ("stranger", PRIVATE, 404), ("admin", OTHER, 404), ("admin", None, 403), ("releaser", PRIVATE, 403),
    ):  # fmt: skip
        body = {"namespace": namespace, "url": receiver.url}
        assert house.ask(caller, "POST", "/v1/webhooks", json=body).status_code == status, (caller, namespace)
    seen = {caller: house.ask(caller, "GET", "/v1/webhooks").json()["items"] for caller in ("admin", "operator")}
    assert {caller: sorted(row["id"] for row in rows) for caller, rows in seen.items()} == {
        "admin": [hook["id"]],
        "operator": sorted([hook["id"], everywhere["id"]]),
    }
    texts = json.dumps([seen, house.ask("operator", "GET", "/v1/audit", params={"limit": 500}).json()])
    assert hook["secret"] not in texts
    assert everywhere["secret"] not in texts
    assert house.ask("admin", "DELETE", f"/v1/webhooks/{hook['id']}").status_code == 200
    with house.resources.read() as session:
        kept = session.scalars(select(WebhookSecret.webhook_id)).all()
    assert kept == [everywhere["id"]]


def test_a_failing_delivery_holds_back_its_repository_alone_and_nothing_is_lost_or_doubled(
    house: House, receiver: Receiver
) -> None:
    hook = add(house, receiver, events=["channel.moved"])
    add(house, receiver, repository="merged", format="slack", events=["channel.moved"])
    receiver.answers = [503]
    move(house, "1.0.0")
    assert deliver_due(house.resources) == 1
    move(house, "1.1.0")
    move(house, "1.0.0", "merged")
    move(house, "1.0.0", namespace=OTHER)
    assert deliver_due(house.resources) == 2, "merged, once for each webhook"
    [failed] = listed(house, hook, state="failed")
    assert (failed["status"], failed["attempts"], failed["ordered_by"]) == (503, 1, "acme/sql")
    assert [row["event"] for row in listed(house, hook, state="pending")] == ["channel.moved"]
    let_deliveries_elapse(house.resources, PAUSES[0])
    assert deliver_due(house.resources) == 2
    got = [(request.headers["webhook-id"], request.event) for request in receiver.got]
    slack = [event for _, event in got if "text" in event]
    assert slack == [{"text": "acme/merged@prod now serves 1.0.0 instead of 1.1.0, by operator: &lt;because&gt;"}]
    moves = [(key, event) for key, event in got if event.get("subject") == "acme/sql@prod"]
    assert [event["data"]["after"]["version"] for _, event in moves] == ["1.0.0", "1.0.0", "1.1.0"]
    assert moves[0][0] == moves[1][0] != moves[2][0], "an attempt has the id of the one before"
    assert {row["state"] for row in listed(house, hook)} == {"delivered"}


def test_attempts_follow_the_stated_pauses_until_the_delivery_is_dead_and_it_can_be_replayed(
    house: House, receiver: Receiver
) -> None:
    hook = add(house, receiver)
    house.ask("admin", "POST", f"/v1/webhooks/{hook['id']}/test")
    now, pauses = datetime.now(UTC) + DAY, list[timedelta]()
    for attempt in range(1, len(PAUSES) + 2):
        with house.resources.write() as session:
            [sent] = deliveries.claim(session, [row for row, _ in deliveries.due(session, now, 4, {})], now)
            assert sent.attempt == attempt
            state = deliveries.finish(session, sent, DeliveryOutcome(500), now)
        with house.resources.read() as session:
            row = session.scalars(select(WebhookDelivery)).one()
        assert (row.state, state) == ((FAILED, FAILED) if row.due_at else (DEAD, DEAD))
        if row.due_at is None:
            break
        pauses.append(row.due_at - now)
        with house.resources.read() as session:
            assert not deliveries.due(session, row.due_at - timedelta(seconds=1), 4, {})
        now = row.due_at
    assert tuple(pauses) == PAUSES
    assert (pauses[:3], pauses[-1]) == ([timedelta(seconds=5), timedelta(seconds=30), timedelta(minutes=5)], DAY)
    assert house.ask("admin", "POST", f"/v1/webhooks/{hook['id']}/replay").json() == {"replayed": 1}
    assert deliver_due(house.resources) == 1
    [delivered] = listed(house, hook)
    assert (delivered["state"], delivered["attempts"]) == ("delivered", 1)
    again = house.ask("admin", "POST", f"/v1/webhooks/{hook['id']}/deliveries/{delivered['id']}/replay")
    assert (again.status_code, again.json()["state"]) == (202, "pending")
    assert deliver_due(house.resources) == 1
    assert len({request.headers["webhook-id"] for request in receiver.got}) == 1
    with house.resources.write() as session:
        deliveries.forget(session, datetime.now(UTC) + deliveries.KEPT + DAY)
    assert listed(house, hook) == []


def test_for_a_day_after_a_rotation_both_secrets_sign_and_earlier_ones_never(house: House, receiver: Receiver) -> None:
    hook = add(house, receiver)
    rotate = f"/v1/webhooks/{hook['id']}/rotate"
    secrets = [hook["secret"], *(house.ask("admin", "POST", rotate).json()["secret"] for _ in range(2))]
    house.ask("admin", "POST", f"/v1/webhooks/{hook['id']}/test")
    deliver_due(house.resources)
    assert [receiver.got[0].is_signed_by(secret) for secret in secrets] == [False, True, True]
    with house.resources.write() as session:
        for row in session.scalars(select(WebhookSecret).where(WebhookSecret.until.is_not(None))):
            row.until = row.until and row.until - DAY
    house.ask("admin", "POST", f"/v1/webhooks/{hook['id']}/test")
    deliver_due(house.resources)
    assert [receiver.got[1].is_signed_by(secret) for secret in secrets] == [False, False, True]


def test_a_receiver_that_hangs_holds_back_no_other_webhook_and_two_workers_never_share_a_delivery(
    house: House, receiver: Receiver
) -> None:
    with ExitStack() as stack:
        slow = stack.enter_context(receiving())
        slow.goes_on.clear()
        for each in (slow, receiver):
            add(house, each, events=["channel.moved"])
        stop = threading.Event()
        workers = [threading.Thread(target=Deliverer(house.resources).run, args=(stop,)) for _ in range(2)]
        for worker in workers:
            worker.start()
        stack.callback(lambda: [worker.join() for worker in workers])
        stack.callback(stop.set)
        for version in ("1.0.0", "1.1.0", "1.0.0"):
            move(house, version)
        eventually(lambda: len(receiver.got) == 3 and slow.got)
        assert len(slow.got) == 1, "the next of a repository waits for it"
        slow.goes_on.set()
        eventually(lambda: len(slow.got) == 3)
    for each in (slow, receiver):
        assert [got.event["data"]["after"]["version"] for got in each.got] == ["1.0.0", "1.1.0", "1.0.0"]


def test_each_event_comes_once_and_what_did_not_happen_is_not_announced(house: House, receiver: Receiver) -> None:
    add(house, receiver)
    sql = f"/v1/adapters/{PRIVATE}/sql"
    policy = {"version": 1, "rules": [], "approval": {}}
    assert house.ask("admin", "PUT", f"{sql}/channels/canary/policy", json=policy).status_code == 200
    refused = house.ask("releaser", "PUT", f"{sql}/channels/prod", json={"version": "9.9.9"})
    assert refused.status_code == 404
    for version in ("1.1.0", "1.0.0"):  # the second replaces the first
        waiting = house.ask("releaser", "PUT", f"{sql}/channels/canary", json={"version": version})
        assert waiting.status_code == 202, waiting.text
    approval = {"version": "1.0.0", "reason": "fine"}
    assert house.ask("admin", "POST", f"{sql}/channels/canary/approvals", json=approval).status_code in (200, 201)
    assert house.ask("releaser", "POST", f"{sql}/releases/1.1.0/yank", json={"reason": "bad"}).status_code == 200
    assert house.ask("releaser", "POST", f"{sql}/releases/1.1.0/unyank", json={"reason": "good"}).status_code == 200
    body = {"recipe": {"inputs": [f"{PRIVATE}/sql:1.1.0"], "method": "stack", "base": "tiny"}, "plan": True}
    begun = house.ask("publisher", "POST", "/v1/compositions", json=body)
    job = begun.json()["job"]
    assert house.ask("publisher", "POST", f"/v1/jobs/{job}/cancel").status_code == 200
    assert house.ask("admin", "POST", f"{sql}/releases/1.0.0/takedown", json={"reason": "data"}).status_code == 200
    deliver_due(house.resources)
    seen = receiver.seen
    canary = [kind for kind, subject in seen if subject == "acme/sql@canary"]
    assert canary[:5] == [
        "promotion.waiting", "promotion.refused", "promotion.waiting", "promotion.approved", "channel.moved",
    ]  # fmt: skip
    released = [kind for kind, subject in seen if subject == "acme/sql:1.1.0"]
    assert released[:2] == ["release.yanked", "release.unyanked"], "the takedown yanks both: they have the same files"
    assert seen.count(("release.taken_down", "acme/sql:1.0.0")) == 1
    assert seen.count(("job.ended", f"job/{job}")) == 1
    assert {kind for kind, _ in seen} <= set(EVENTS)
    assert len({request.headers["webhook-id"] for request in receiver.got}) == len(receiver.got)


def test_a_job_that_failed_does_not_name_inputs_that_admins_of_its_namespace_may_not_read(
    house: House, receiver: Receiver
) -> None:
    add(house, receiver, events=["job.ended"])
    output, secret = f"{PRIVATE}/sql:2.0.0", f"{OTHER}/sql:1.0.0"
    recipe = parse_recipe({"base": "tiny", "inputs": [{"adapter": secret}], "method": "stack", "adapter": output})
    with house.resources.write() as session:
        job = queue.find(session, compositions.create(session, HOST, recipe, plan_only=False).job_id)
        job.state, job.worker, job.heartbeat_at = "running", "w", house.resources.clock()
        error = {"code": "release_yanked", "detail": f"{secret} was yanked."}
        session.flush()
        assert queue.finish(session, job.id, "w", "failed", house.resources.clock(), error)
        shown = f"/v1/jobs/{job.id}"
    assert house.ask("admin", "GET", shown).status_code == 404
    assert house.ask("operator", "GET", shown).json()["error"]["detail"] == error["detail"]
    assert deliver_due(house.resources) == 1
    [sent] = receiver.got
    assert sent.event["data"]["after"] == {"state": "failed", "error": {"code": "release_yanked"}}
    assert OTHER not in house.ask("admin", "GET", "/v1/audit?act=job:end").text


def test_admins_see_the_last_deliveries_on_a_page_and_replay_them_there(house: House, receiver: Receiver) -> None:
    hook = add(house, receiver)
    add(house, receiver, caller="operator", namespace=None, events=["job.ended"])
    receiver.answers = [503]
    house.ask("admin", "POST", f"/v1/webhooks/{hook['id']}/test")
    deliver_due(house.resources)
    page = f"/{PRIVATE}/-/webhooks"
    with Browser(house) as browser, Browser(house) as other:
        browser.sign_in(house.secrets["admin"])
        other.sign_in(house.secrets["releaser"])
        shown = browser.open(page).text
        for words in (hook["id"], "webhook.test", "failed", "503", receiver.url):
            assert words in shown, words
        assert hook["secret"] not in shown
        assert shown.count("<h2") == 1, "that of the registry is not a webhook of the namespace"
        [delivery] = listed(house, hook)
        assert delivery["ordered_by"].startswith(f"webhook/{hook['id']}/")
        assert other.open(page).status_code == 403
        answer = browser.post(f"{page}/{hook['id']}/replay", {"delivery": str(delivery["id"])})
        assert (answer.status_code, answer.headers["location"]) == (303, page)
        assert deliver_due(house.resources) == 1
        assert browser.post(f"{page}/{hook['id']}/replay", {"delivery": "x"}).status_code == 400
        assert "delivered" in browser.open(page).text


@pytest.mark.parametrize(("silent_s", "state"), [(0, "behind"), (61, "silent")])
def test_nodes_get_time_to_follow_a_move_and_to_report_after_an_outage(
    house: House, receiver: Receiver, silent_s: int, state: str
) -> None:
    add(house, receiver, events=["fleet.drifted", "fleet.recovered"])
    behind = {"channel": f"{PRIVATE}/sql@prod", "state": "following", "since": "2026-01-01T00:00:00Z"}
    body = {"agent": "adaptory", "channels": [behind]}
    assert house.ask("agent", "PUT", "/v1/fleet/prod/gpu-1", json=body).status_code == 200
    with house.resources.read() as session:
        began = session.scalars(select(FleetNode.seen_at)).one() + timedelta(seconds=silent_s)
    for seconds in (0, 30):
        with house.resources.write() as session:
            drift.record(session, began + timedelta(seconds=seconds))
        assert deliver_due(house.resources) == 0
    with house.resources.write() as session:
        for row in session.scalars(select(FleetDrift)):
            row.since -= drift.PATIENCE[state]
    with house.resources.write() as session:
        drift.record(session, began + timedelta(seconds=30))
    assert deliver_due(house.resources) == 1
    assert receiver.got[0].event["data"]["detail"]["nodes"][0]["state"] == state


def test_nodes_out_of_step_are_announced_once_and_once_more_when_they_are_back(
    house: House, receiver: Receiver
) -> None:
    add(house, receiver, events=["fleet.drifted", "fleet.recovered"])
    followed = {"channel": f"{PRIVATE}/sql@prod", "state": "failed", "since": "2026-01-01T00:00:00Z", "error": "full"}
    for node in ("gpu-1", "gpu-2"):
        body = {"agent": "adaptory", "channels": [followed]}
        assert house.ask("agent", "PUT", f"/v1/fleet/prod/{node}", json=body).status_code == 200
    for _ in range(2):
        with house.resources.write() as session:
            drift.record(session, datetime.now(UTC))
    release = house.ask("agent", "GET", f"/v1/adapters/{PRIVATE}/sql/releases/1.1.0").json()
    served = {"state": "following", "version": "1.1.0", "commit": release["commit"], "move": 1, "error": None}
    body = {"agent": "adaptory", "channels": [followed | served]}
    assert house.ask("agent", "PUT", "/v1/fleet/prod/gpu-1", json=body).status_code == 200
    with house.resources.write() as session:
        drift.record(session, datetime.now(UTC))
    deliver_due(house.resources)
    drifted, recovered = (request.event for request in receiver.got)
    assert (drifted["type"], drifted["subject"]) == ("adaptory.fleet.drifted", "acme/sql@prod")
    assert (recovered["type"], recovered["data"]["detail"]) == (
        "adaptory.fleet.recovered",
        {"nodes": [{"group": "prod", "node": "gpu-1"}], "count": 1},
    )
    assert drifted["data"]["detail"]["count"] == 2
    assert drifted["data"]["detail"]["nodes"][0]["error"] == "full"


REFUSED = (
    "http://ops.example/hook", "https://localhost/hook", "https://127.0.0.1/", "https://[::1]/", "https://10.0.0.7/",
    "https://169.254.169.254/latest/meta-data", "https://[::ffff:169.254.169.254]/", "https://[fd00:ec2::254]/",
    "https://user:secret@ops.example/", "https://user@ops.example/", "https://ops.example/#part",
    "https://ops.example/\r\nX-Admin: 1", "https://ops.example/ x", "https://ops.example:0/", "https://ops.example:x/",
    "ftp://ops.example/", "https:///hook", "https://ops.example\\@10.0.0.7/", "https://ops.ex\u00e4mple/",
)  # fmt: skip


def test_addresses_that_may_not_be_reached_cannot_be_added(tmp_path: Path) -> None:
    furnished = furnished_house(services.PAIRINGS[0])
    house = entered(furnished, copy_of(furnished, tmp_path / "home"))
    for url in REFUSED:
        answer = house.ask("admin", "POST", "/v1/webhooks", json={"namespace": PRIVATE, "url": url})
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_webhook"), url
    answer = house.ask(
        "admin", "POST", "/v1/webhooks", json={"namespace": PRIVATE, "url": "https://ops.example:8443/a?b"}
    )
    assert (answer.status_code, answer.json()["url"]) == (201, "https://ops.example:8443/a?…")
    house.close()
