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
            found = Axe().run(tab).response["violations"]
            grave = [
                f"{one['id']}: {node['html'][:200]}" for one in found if one["impact"] in GRAVE for node in one["nodes"]
            ]
            assert not grave, f"{path}, {theme}, {width} px: {grave}"
    expected = [said for said in complaints if status != 200 and f"status of {status}" in said]
    assert complaints == expected
