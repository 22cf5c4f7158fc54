"""The inbox: what waits for whom, as REST and its page show it."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests import services
from tests.access.browser import Browser
from tests.access.house import PRIVATE, House, new_house

PROD = f"/v1/adapters/{PRIVATE}/sql/channels/prod"
POLICY = {"version": 1, "approval": {"role": "releaser", "count": 1}}


@pytest.fixture(params=services.PAIRINGS[:2])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[House]:
    """`releaser` has promoted a release that waits for an approval, and `admin` has requested a change."""
    furnished = new_house(request.param, tmp_path / "home")
    ok(furnished, "admin", "PUT", f"{PROD}/policy", POLICY)
    ok(furnished, "releaser", "PUT", PROD, {"version": "1.0.0"})
    ok(furnished, "admin", "PUT", f"/v1/namespaces/{PRIVATE}", {"changes": "two"})
    change = {"kind": "member", "user": "eve", "role": "admin"}
    ok(furnished, "admin", "POST", f"/v1/namespaces/{PRIVATE}/changes", {"change": change})
    yield furnished
    furnished.close()


def ok(house: House, caller: str, method: str, path: str, body: object) -> None:
    answer = house.ask(caller, method, path, json=body)
    assert answer.is_success, answer.text


def inbox(house: House, caller: str) -> dict[str, bool]:
    """What waits, and whether it is for the caller."""
    items = house.ask(caller, "GET", "/v1/inbox").json()["items"]
    return {item["subject"]: item["for_you"] for item in items}


def test_a_member_sees_promotions_an_admin_also_changes_and_a_stranger_neither(house: House) -> None:
    promotion, change = f"{PRIVATE}/sql@prod", f"{PRIVATE}/changes/1"
    assert inbox(house, "stranger") == {}
    assert inbox(house, "reader") == {promotion: False}, "it lacks the role"
    assert inbox(house, "releaser") == {promotion: False}, "it is the releaser's own"
    assert inbox(house, "admin") == {promotion: True, change: False}
    assert inbox(house, "operator") == {promotion: True, change: True}
    assert house.ask("nobody", "GET", "/v1/inbox").status_code == 401
    waits = house.ask("admin", "GET", "/v1/inbox").json()["items"]
    assert any("0 of 1" in text for item in waits for text in item["waits_for"])


def test_what_ended_or_was_approved_leaves_the_inbox(house: House) -> None:
    ok(house, "operator", "POST", f"/v1/namespaces/{PRIVATE}/changes/1/approve", None)
    ok(house, "admin", "POST", f"{PROD}/approvals", {"version": "1.0.0"})
    assert inbox(house, "operator") == {}


def test_the_page_shows_what_is_for_the_reader_first_and_approves_a_change(house: House) -> None:
    with Browser(house) as browser:
        browser.sign_in(house.secrets["operator"])
        page = browser.open("/inbox")
        assert page.text.index("For you") < page.text.index(f"{PRIVATE}/sql@prod")
        assert f'href="/{PRIVATE}/sql@prod/approve"' in page.text
        assert browser.post(f"/{PRIVATE}/-/changes/1/approve").status_code in (200, 303)
        assert "change 1" not in browser.open("/inbox").text
    assert "eve" in house.ask("admin", "GET", f"/v1/namespaces/{PRIVATE}/members").text
