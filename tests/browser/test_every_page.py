"""Every page in a real browser, in light and dark, on a desk, a tablet and a phone."""

from collections.abc import Generator
from itertools import product

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Site

PAGES = (
    "/",
    "/search?base=tiny&loads_in=vllm:8",
    "/search?score=nonsense",
    "/acme",
    "/acme/sql",
    "/acme/sql/1.1.0",
    "/acme/sql/1.0.0?channel=prod",
    "/acme/sql/1.2.0",
    "/acme/sql/1.1.0/modules",
    "/acme/assistant/1.0.0",
    "/acme/sql@prod",
    "/acme/sql@staging",
    "/acme/sql/compare/1.0.0...1.1.0...1.2.0",
    "/bases",
    "/bases/tiny",
    "/suites",
    "/suites/sql-exact",
    "/jobs",
    "/jobs/{job}",
    "/compositions/{refused}",
    "/compositions/{composition}",
    "/audit",
    "/audit?act=channel:promote&since=2020-01-01",
    "/nobody/nothing",
)
STATUS = {"/nobody/nothing": 404, "/search?score=nonsense": 400}
THEMES = ("light", "dark")
WIDTHS = (1280, 800, 390)
GRAVE = ("serious", "critical")
MAX_BYTES = 100_000


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Generator[Page]:
    """One tab for the module: opening one for each page would take half of the time."""
    context = browser.new_context(reduced_motion="reduce")
    yield context.new_page()
    context.close()


@pytest.fixture
def complaints(tab: Page) -> Generator[list[str]]:
    """What the browser's console says, violations of the content security policy included."""
    said: list[str] = []

    def listen(message: object) -> None:
        said.append(f"{getattr(message, 'type', 'error')}: {getattr(message, 'text', message)}")

    tab.on("console", listen)
    tab.on("pageerror", listen)
    yield said
    tab.remove_listener("console", listen)
    tab.remove_listener("pageerror", listen)


def address_of(site: Site, path: str) -> str:
    return site.url + path.format(job=site.job, composition=site.composition, refused=site.composition - 1)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_reads_in_both_themes_and_all_widths(site: Site, tab: Page, complaints: list[str], path: str) -> None:
    status = STATUS.get(path, 200)
    answer = tab.goto(address_of(site, path))
    assert answer is not None
    assert answer.status == status
    assert len(answer.body()) <= MAX_BYTES
    for theme, width in product(THEMES, WIDTHS):
        tab.emulate_media(color_scheme=theme, reduced_motion="reduce")
        tab.set_viewport_size({"width": width, "height": 800})
        across = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert across == 0, f"{path} scrolls sideways by {across} px at {width}"
        if width != 800:  # one and two columns; the tablet differs only in the side
            violations = Axe().run(tab).response["violations"]
            grave = [
                f"{one['id']}: {node['html'][:200]}"
                for one in violations
                if one["impact"] in GRAVE
                for node in one["nodes"]
            ]
            assert not grave, f"{path}, {theme}, {width} px: {grave}"
    expected = [said for said in complaints if status != 200 and f"status of {status}" in said]
    assert complaints == expected


def test_search_answers_while_one_types_and_the_address_can_be_shared(
    site: Site, tab: Page, complaints: list[str]
) -> None:
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.goto(f"{site.url}/search")
    status = tab.locator("#results [role=status]")
    expect(status).to_have_text("5 releases")
    words = tab.get_by_label("Words")
    words.press_sequentially("terraform", delay=20)
    expect(status).to_have_text("1 release")
    expect(words).to_be_focused()
    expect(tab).to_have_url(f"{site.url}/search?text=terraform")
    tab.get_by_label("Largest rank").press_sequentially("1")
    expect(status).to_have_text("0 releases")
    expect(tab).to_have_url(f"{site.url}/search?text=terraform&max_rank=1")
    tab.reload()
    expect(status).to_have_text("0 releases")
    assert complaints == []
    tab.get_by_label("Score").press_sequentially("nonsense")
    expect(tab.locator("#results")).to_contain_text("is not a condition on a score")
    tab.get_by_label("Score").fill("")
    tab.get_by_label("Largest rank").fill("")
    expect(status).to_have_text("1 release")


def test_the_keyboard_skips_to_the_content_and_finds_the_search(site: Site, tab: Page) -> None:
    tab.goto(f"{site.url}/acme/sql/1.1.0")
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("link", name="To the content")).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.locator("#main")).to_be_focused()
    tab.keyboard.press("/")
    search = tab.locator("#q")
    expect(search).to_be_focused()
    search.press_sequentially("sql/1")
    expect(search).to_have_value("sql/1")
    search.press("Enter")
    expect(tab).to_have_url(f"{site.url}/search?text=sql%2F1")


def test_radios_choose_the_snippet_and_the_map(site: Site, tab: Page) -> None:
    tab.goto(f"{site.url}/acme/sql/1.1.0")
    tab.get_by_label("CLI").focus()
    expect(tab.get_by_text("adaptory pull acme/sql:1.1.0")).to_be_visible()
    tab.keyboard.press("ArrowRight")
    expect(tab.get_by_text("PeftModel.from_pretrained")).to_be_visible()
    expect(tab.get_by_text("adaptory pull acme/sql:1.1.0")).to_be_hidden()
    sizes, ranks = (tab.get_by_role("img", name=name) for name in ("Size of the change", "Rank in use"))
    expect(sizes).to_be_visible()
    tab.get_by_role("radio", name="rank in use").check()
    expect(ranks).to_be_visible()
    expect(sizes).to_be_hidden()


def test_pages_read_without_scripts(site: Site, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(f"{site.url}/acme/sql/1.1.0")
    tab.get_by_role("radio", name="vLLM").check()
    expect(tab.get_by_text("vllm serve")).to_be_visible()
    tab.goto(f"{site.url}/search")
    tab.get_by_label("Words").fill("terraform")
    tab.get_by_role("button", name="Search").click()
    expect(tab.locator("#results [role=status]")).to_have_text("1 release")
    tab.get_by_role("link", name="acme/terraform 1.0.0").click()
    expect(tab.get_by_role("heading", level=1)).to_have_text("terraform 1.0.0")
    context.close()


def test_a_snippet_is_copied_and_said(site: Site, browser: Browser) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    tab.goto(f"{site.url}/acme/sql@prod")
    tab.get_by_role("button", name="Copy: command line").click()
    expect(tab.locator("body > [role=status]")).to_have_text("Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == "adaptory pull acme/sql@prod"
    context.close()


def test_a_job_is_followed_until_it_ends(site: Site, tab: Page, complaints: list[str]) -> None:
    tab.goto(f"{site.url}/jobs/{site.job}")
    expect(tab.locator("#live .title .badge")).to_have_text("done", timeout=20_000)
    assert "hx-get" not in (tab.locator("#live").evaluate("one => one.outerHTML.slice(0, 40)"))
    assert complaints == []
