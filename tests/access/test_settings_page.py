"""The settings page of a namespace does what the command line does, and requests what needs a second admin."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests import services
from tests.access.browser import Browser
from tests.access.house import OTHER, PRIVATE, House, new_house

PAGE = f"/{PRIVATE}/-/settings"


@pytest.fixture(params=services.PAIRINGS[:1])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[House]:
    furnished = new_house(request.param, tmp_path / "home")
    yield furnished
    furnished.close()


@pytest.fixture
def browser(house: House) -> Generator[Browser]:
    """Signed in as an admin of the namespace, on its settings."""
    with Browser(house) as opened:
        opened.sign_in(house.secrets["admin"])
        opened.open(PAGE)
        yield opened


def settings(house: House) -> dict[str, object]:
    return house.ask("admin", "GET", f"/v1/namespaces/{PRIVATE}").json()


def test_forms_set_what_the_commands_set(house: House, browser: Browser) -> None:
    assert browser.post(PAGE, {"public": "no", "main": "commit"}).status_code == 303
    assert (settings(house)["public"], settings(house)["main"]) == (False, "commit")
    rules = {"keep_yanked_days": "30", "channels": "dev=30, canary = 60"}
    assert browser.post(f"/{PRIVATE}/-/retention", {**rules, "do": "set"}).status_code == 303
    assert settings(house)["keep_channel_days"] == {"dev": 30, "canary": 60}
    assert browser.post(f"/{PRIVATE}/-/quota", {"max_releases": "9"}).status_code == 403, (
        "only for the registry's admins"
    )
    for wrong in ({"channels": "dev"}, {"keep_yanked_days": "soon"}, {"channels": "a/b=3"}):
        refused = browser.post(f"/{PRIVATE}/-/retention", {**wrong, "do": "set"})
        assert refused.status_code in (400, 422), wrong
    browser.sign_in(house.secrets["operator"])
    browser.open(PAGE)
    assert browser.post(f"/{PRIVATE}/-/quota", {"max_releases": "9"}).status_code == 303
    assert settings(house)["max_releases"] == 9


def test_a_plan_of_retention_is_shown_and_sets_nothing(house: House, browser: Browser) -> None:
    house.ask("releaser", "POST", f"/v1/adapters/{PRIVATE}/sql/releases/1.0.0/yank", json={"reason": "wrong"})
    shown = browser.post(f"/{PRIVATE}/-/retention", {"keep_yanked_days": "1", "do": "plan"})
    assert (shown.status_code, "Nothing would be taken down now" in shown.text) == (200, True)
    assert settings(house)["keep_yanked_days"] is None


def test_a_suite_is_shared_and_one_of_another_namespace_is_not(house: House, browser: Browser) -> None:
    suite = {"kind": "target", "chat": False, "examples": [{"prompt": "a", "completion": "b"}]}
    assert house.ask("admin", "POST", "/v1/suites", json={"name": f"{PRIVATE}/long", **suite}).status_code == 201
    assert house.ask("stranger", "POST", "/v1/suites", json={"name": f"{OTHER}/long", **suite}).status_code == 201
    assert f"Share {PRIVATE}/long" in browser.open(PAGE).text
    form = {"suite": f"{PRIVATE}/long", "shared": "yes"}
    assert browser.post(f"/{PRIVATE}/-/suites", form).status_code == 303
    assert house.ask("stranger", "GET", f"/v1/suites/{PRIVATE}/long").json()["shared"]
    assert browser.post(f"/{PRIVATE}/-/suites", {"suite": f"{OTHER}/long", "shared": "yes"}).status_code == 400
    assert not house.ask("stranger", "GET", f"/v1/suites/{OTHER}/long").json()["shared"]


def test_where_two_admins_are_needed_a_form_requests_the_change(house: House, browser: Browser) -> None:
    assert browser.post(PAGE, {"changes": "two"}).headers["location"] == PAGE
    browser.open(PAGE)
    waits = browser.post(f"/{PRIVATE}/-/members", {"user": "eve", "role": "admin"})
    assert (waits.status_code, waits.headers["location"]) == (303, "/inbox")
    assert "eve" not in house.ask("admin", "GET", f"/v1/namespaces/{PRIVATE}/members").json()["members"]
    assert f"eve: admin in {PRIVATE}" in browser.open("/inbox").text
    browser.open(PAGE)
    assert browser.post(PAGE, {"changes": "one"}).headers["location"] == "/inbox"
    assert settings(house)["changes"] == "two"
