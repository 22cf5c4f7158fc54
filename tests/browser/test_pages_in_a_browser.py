"""Every page in a real browser, in light and dark, on a desk, a tablet and a phone."""

import re

import pytest
from _pytest.mark import ParameterSet
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Site, grave_findings

REFUSED = "/conflicts?with=acme/sql:1.0.0&with=acme/nothing"
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
    "/acme/long/history?metric=guard-exact.nll",
    "/acme/sql@prod",
    "/acme/sql@staging",
    "/acme/sql@prod/promote?version=1.0.0",
    "/acme/sql@prod/rollback",
    "/acme/sql@prod/policy",
    "/acme/sql@staging/approve",
    "/acme/sql@staging/cancel",
    "/acme/sql/1.2.0/yank",
    "/acme/sql/1.1.0/deprecate",
    "/acme/sql/compare/1.0.0...1.1.0...1.2.0",
    "/bases",
    "/bases/tiny",
    "/suites",
    "/suites/sql-exact",
    "/jobs",
    "/jobs/{job}",
    "/compositions/{refused}",
    "/compositions/{composition}",
    "/compositions/{composition}/conflicts",
    "/conflicts",
    "/conflicts?with=acme/sql:1.0.0&with=acme/terraform:1.0.0&with=acme/support:1.0.0",
    REFUSED,
    "/compose?with=acme/sql:1.0.0&with=acme/terraform:1.0.0*0.5&method=ties",
    "/acme/-/settings",
    "/acme/-/webhooks",
    "/inbox",
    "/audit",
    "/audit?act=channel:promote&since=2020-01-01",
    "/docs/errors/gate_failed",
    "/account",
    "/login",
    "/nobody/nothing",
)
STATUS = {"/nobody/nothing": 404, REFUSED: 404, "/search?score=nonsense": 400}
FURTHER = (
    "/acme/sql/1.0.0?channel=prod",
    "/acme/sql/1.2.0",
    "/acme/sql@staging",
    "/acme/sql/1.1.0/deprecate",
    "/acme/sql@staging/cancel",
    "/compositions/{refused}",
    "/conflicts?with=acme/sql:1.0.0&with=acme/terraform:1.0.0&with=acme/support:1.0.0",
    "/audit?act=channel:promote&since=2020-01-01",
)
"""Pages of a template that another page shows by default."""
VIEWS = (("light", 1280), ("light", 800), ("dark", 390))
CHECKED = (("light", 1280), ("dark", 390))
"""The variants that axe checks: both themes, one and two columns. By default each page in one of them, since the checks
take most of the file's time."""
MAX_BYTES = 100_000


def address_of(site: Site, path: str) -> str:
    return site.url + path.format(job=site.job, composition=site.composition, refused=site.composition - 1)


def _look(path: str, view: tuple[str, int], *, default: bool) -> ParameterSet:
    return pytest.param(path, view, id=f"{path} {view[0]}", marks=[] if default else [pytest.mark.long])


LOOKS = [
    _look(path, view, default=path not in FURTHER and (page + number) % 2 == 0)
    for page, path in enumerate(PAGES)
    for number, view in enumerate(CHECKED)
]


@pytest.mark.parametrize(("path", "checked"), LOOKS)
def test_a_page_reads_in_both_themes_and_all_widths(
    site: Site, tab: Page, complaints: list[str], path: str, checked: tuple[str, int]
) -> None:
    status = STATUS.get(path, 200)
    answer = tab.goto(address_of(site, path))
    assert answer is not None
    assert answer.status == status
    assert len(answer.body()) <= MAX_BYTES
    for theme, width in VIEWS:
        tab.emulate_media(color_scheme=theme, reduced_motion="reduce")
        tab.set_viewport_size({"width": width, "height": 800})
        across = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert across == 0, f"{path} scrolls sideways by {across} px at {width}"
        if (theme, width) == checked:
            grave = grave_findings(tab)
            assert not grave, f"{path}, {theme}, {width} px: {grave}"
    expected = [said for said in complaints if status != 200 and f"status of {status}" in said]
    assert complaints == expected


@pytest.mark.parametrize("path", ["/", "/search"])
def test_search_answers_while_one_types_and_the_address_can_be_shared(
    site: Site, tab: Page, complaints: list[str], path: str
) -> None:
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.goto(f"{site.url}{path}")
    status = tab.locator("#results [role=status]")
    words = tab.get_by_label("Text", exact=True)
    words.press_sequentially("support", delay=20)
    expect(status).to_have_text("1 release")
    expect(words).to_be_focused()
    expect(tab).to_have_url(f"{site.url}/search?text=support")
    tab.get_by_label("Maximum rank").press_sequentially("1")
    expect(status).to_have_text("0 releases")
    expect(tab).to_have_url(f"{site.url}/search?text=support&max_rank=1")
    tab.reload()
    expect(status).to_have_text("0 releases")
    assert complaints == []
    if path == "/":
        return
    tab.get_by_role("textbox", name="Score").press_sequentially("nonsense")
    expect(tab.locator("#results")).to_contain_text("cannot be read")
    expect(tab).to_have_url(f"{site.url}/search?text=support&max_rank=1&score=nonsense")
    tab.get_by_role("textbox", name="Score").fill("")
    tab.get_by_label("Maximum rank").fill("")
    expect(status).to_have_text("1 release")


def test_the_keyboard_skips_to_the_content_and_finds_the_search(site: Site, tab: Page) -> None:
    tab.goto(f"{site.url}/acme/sql/1.1.0")
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("link", name="Skip to content")).to_be_focused()
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
    pull = tab.get_by_label("command line", exact=True)
    expect(pull).to_have_text("adaptory pull acme/sql:1.1.0")
    tab.keyboard.press("ArrowRight")
    expect(tab.get_by_text("PeftModel.from_pretrained")).to_contain_text(f"HF_ENDPOINT={site.url}")
    expect(pull).to_be_hidden()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("pre[aria-label=vLLM]")).to_contain_text("--max-lora-rank 8")
    expect(tab.locator("pre[aria-label=vLLM]")).to_contain_text("sql-1.1.0=$( adaptory pull acme/sql:1.1.0)")
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
    tab.get_by_label("Text", exact=True).fill("support")
    tab.get_by_role("button", name="Search").click()
    expect(tab.locator("#results [role=status]")).to_have_text("1 release")
    tab.get_by_role("link", name="acme/support 1.0.0").click()
    expect(tab.get_by_role("heading", level=1)).to_have_text("support 1.0.0")
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


def test_a_channel_says_what_it_serves_since_when_and_why(site: Site, tab: Page) -> None:
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.goto(f"{site.url}/acme/sql@prod")
    answer = tab.get_by_role("region", name="prod serves 1.1.0.")
    expect(answer).to_contain_text("by a promotion that was forced: “the release party is at noon”")
    rows = tab.get_by_role("region", name="Moves, table").get_by_role("row")
    expect(rows).to_have_count(5)
    expect(rows.nth(1)).to_contain_text("forced")
    expect(rows.nth(2)).to_contain_text("it answers the wrong question")
    rows.nth(1).get_by_text("1 of 2 pass").click()
    expect(rows.nth(1)).to_contain_text("guard-exact.accuracy >= 0.99: 0 [0, 0.39] (n=6)")
    tab.goto(f"{site.url}/acme/sql@staging")
    waits = tab.get_by_role("region", name="1.1.0 waits to be promoted")
    expect(waits.get_by_role("row", name="waits: approval by another person")).to_contain_text("0 of 1")
    needs = tab.get_by_role("region", name="What a promotion needs")
    expect(needs).to_contain_text("by 1 person with the role releaser or higher, other than the one who promotes")


def test_a_release_answers_whether_it_can_be_promoted(site: Site, tab: Page) -> None:
    tab.goto(f"{site.url}/acme/sql/1.0.0?channel=prod")
    refused = tab.get_by_role("region", name="It cannot be promoted to prod: 1 of 2 gates fails.")
    expect(refused.get_by_role("row", name="failed: guard-exact.accuracy >= 0.99")).to_contain_text("0.990")
    tab.get_by_role("link", name="Served by staging").click()
    expect(tab.get_by_role("region", name="staging serves this release.")).to_be_visible()
    went = tab.get_by_role("region", name="Lineage")
    expect(went.get_by_role("link", name="acme/assistant 1.0.0")).to_be_visible()
    tab.goto(f"{site.url}/acme/sql/1.2.0")
    expect(tab.get_by_role("region", name="This release is yanked.")).to_contain_text("trained on the test set")


def test_a_composition_shows_its_result_beside_its_inputs_or_why_there_is_none(site: Site, tab: Page) -> None:
    tab.goto(f"{site.url}/compositions/{site.composition}")
    expect(tab.get_by_role("region", name="It published a release.")).to_contain_text("acme/assistant 1.0.0")
    scores = tab.get_by_role("region", name="Scores beside the inputs")
    of_guard = scores.get_by_role("row", name="guard-exact.nll")
    expect(of_guard).to_have_count(3)
    expect(of_guard.nth(0)).to_contain_text("result")
    expect(of_guard.nth(1).get_by_role("link")).to_have_text("acme/sql 1.0.0")
    tab.goto(f"{site.url}/compositions/{site.composition - 1}")
    expect(tab.get_by_role("region", name="It ended without a release.")).to_contain_text("Change weights, method")
    steps = tab.get_by_role("region", name="Steps, table")
    expect(steps.get_by_role("row", name="publish")).to_have_text(re.compile(r"^publish\s*not run\s*$"))


def test_a_comparison_has_what_differs(site: Site, tab: Page) -> None:
    tab.goto(f"{site.url}/acme/sql/compare/1.0.0...1.1.0")
    expect(tab.get_by_role("region", name="Scores, table").get_by_role("row", name="guard-exact.nll")).to_contain_text(
        "worse"
    )
    expect(tab.get_by_role("region", name="Facts, table").get_by_role("row", name="Base")).to_have_count(0)
    expect(tab.get_by_role("img", name="Size of the change of")).to_have_count(2)
    expect(tab.get_by_role("region", name="Files, table").get_by_role("row")).to_have_count(3)
    expect(tab.get_by_text("1 file the same in all.")).to_be_visible()


def test_a_long_history_is_plotted_and_its_table_has_the_values(site: Site, tab: Page, complaints: list[str]) -> None:
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.goto(f"{site.url}/acme/long")
    tab.get_by_role("link", name="guard-exact.nll").click()
    plot = tab.get_by_role("img", name="guard-exact.nll from 1.0.0 to 1.31.0; the table has the values")
    expect(plot).to_be_visible()
    tab.locator(".u-over").hover(position={"x": 5, "y": 50})
    expect(tab.locator(".u-legend")).to_contain_text("1.0.0")
    rows = tab.get_by_role("region", name="guard-exact.nll by version, table").get_by_role("row")
    expect(rows).to_have_count(33)
    assert complaints == []
