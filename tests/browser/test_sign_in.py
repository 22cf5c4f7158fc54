"""Sign-in in a real browser, with its own handling of cookies and of the headers that tell where a form comes from."""

from collections.abc import Generator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests import services
from tests.access.house import PRIVATE, new_house
from tests.scenarios.world import server

GRAVE = ("serious", "critical")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[str, str]]:
    """The address of a server on this machine by its name, and the token of an admin."""
    home = tmp_path_factory.mktemp("served") / "home"
    house = new_house(services.PAIRINGS[0], home)
    house.close()
    with server(home, ADAPTORY_ACCESS="tokens") as (url, _):
        yield url.replace("127.0.0.1", "localhost"), house.secrets["admin"]


def readable(tab: Page) -> None:
    """On a phone, in both themes: axe reports nothing serious, and the page does not scroll sideways."""
    for theme in ("light", "dark"):
        tab.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
        tab.set_viewport_size({"width": 390, "height": 844})
        wrong = [violation["id"] for violation in Axe().run(tab).response["violations"] if violation["impact"] in GRAVE]
        assert wrong == [], tab.url
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, tab.url


@pytest.mark.long
def test_somebody_signs_in_changes_a_member_creates_a_token_and_signs_out(
    served: tuple[str, str], browser: Browser
) -> None:
    url, token = served
    context = browser.new_context(reduced_motion="reduce")
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    tab.goto(f"{url}/")
    tab.get_by_role("link", name="Sign in").click()
    readable(tab)
    tab.get_by_label("Token").fill(token)
    tab.get_by_role("button", name="Sign in").click()
    expect(tab.get_by_role("link", name="admin", exact=True)).to_be_visible()
    assert tab.url == f"{url}/"

    tab.goto(f"{url}/search?base=tiny&include=related&include=refused&loads_in=vllm:32&max_rank=64")
    readable(tab)
    tab.goto(f"{url}/{PRIVATE}")
    readable(tab)
    tab.get_by_role("link", name="Settings").click()
    readable(tab)
    tab.get_by_label("User").fill("new")
    tab.get_by_role("button", name="Add", exact=True).click()
    expect(tab.get_by_role("button", name="Remove new")).to_be_visible()
    tab.get_by_role("button", name="Remove new").click()
    expect(tab.get_by_role("button", name="Remove new")).not_to_be_visible()

    tab.goto(f"{url}/account")
    readable(tab)
    tab.get_by_role("button", name="Create token").click()
    expect(tab.get_by_role("heading", name="New token of admin")).to_be_visible()
    readable(tab)
    tab.goto(f"{url}/account")
    tab.get_by_role("button", name="Sign out").click()
    expect(tab.get_by_role("heading", name="Sign in")).to_be_visible()
    assert context.cookies() == []
    assert said == []
    context.close()


def test_a_page_of_another_site_posts_no_form_here(served: tuple[str, str], browser: Browser, tmp_path: Path) -> None:
    url, token = served
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(f"{url}/login")
    tab.get_by_label("Token").fill(token)
    tab.get_by_role("button", name="Sign in").click()
    expect(tab.get_by_role("link", name="admin", exact=True)).to_be_visible()
    evil = tmp_path / "evil.html"
    evil.write_text(
        f'<form method="post" action="{url}/{PRIVATE}/-/members"><input name="user" value="eve">'
        '<input name="role" value="admin"><button>Win</button></form>'
    )
    tab.goto(evil.as_uri())
    with tab.expect_response(lambda answer: answer.url.endswith("/-/members")) as answered:
        tab.get_by_role("button", name="Win").click()
    assert answered.value.status == 403
    tab.goto(f"{url}/{PRIVATE}/-/settings")
    expect(tab.get_by_role("button", name="Remove reader")).to_be_visible()
    expect(tab.get_by_role("button", name="Remove eve")).not_to_be_visible()
    context.close()
