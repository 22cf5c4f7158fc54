"""A release manager's story in a browser: refused, forced, rolled back; and one whose page is out of date."""

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Site, grave_findings
from tests.scenarios.world import World


def _prepare(site: Site, world: World) -> None:
    """`prod` serves 1.0.0 above 1.0.1, and its rule refuses 1.1.0."""
    site.cli.ok(
        "push", world.adapters["other-sql"], "acme/terraform:1.1.0", "--base", "tiny", "--allow-breaking", "story"
    )
    site.cli.ok(
        "push", world.adapters["support"], "acme/terraform:1.0.1", "--base", "tiny", "--allow-breaking", "story"
    )
    for version in ("1.0.1", "1.0.0"):
        site.cli.ok("promote", f"acme/terraform:{version}", "--to", "prod")
    site.cli.ok("gate", "acme/terraform@prod", "--rule", "guard-exact.accuracy >= 0.99")
    site.cli.ok("eval", "acme/terraform:1.1.0", "--suite", "guard-exact")


def test_a_promotion_is_refused_forced_and_rolled_back(
    site: Site, world: World, tab: Page, complaints: list[str]
) -> None:
    _prepare(site, world)

    tab.goto(f"{site.url}/acme/terraform/1.1.0?channel=prod")
    tab.get_by_role("link", name="Promote to prod").click()
    dialog = tab.get_by_role("dialog", name="Promote 1.1.0 to prod?")
    dialog.get_by_role("link", name="Cancel").click()
    expect(dialog).to_have_count(0)
    expect(tab.get_by_role("link", name="Promote to prod")).to_be_focused()
    tab.keyboard.press("Enter")
    refused = dialog.get_by_role("region", name="Some rules of prod fail.")
    expect(refused).to_contain_text("prod serves 1.0.0 now")
    expect(refused.get_by_role("row", name="failed: guard-exact.accuracy >= 0.99")).to_be_visible()
    assert grave_findings(tab) == []
    tab.get_by_role("button", name="Force the promotion").click()
    expect(dialog).to_be_visible()  # the browser requires a reason
    tab.get_by_label("Reason (required)").fill("the release party is at noon")
    tab.get_by_label("Promote although rules fail.").check()
    tab.get_by_role("button", name="Force the promotion").click()
    expect(tab).to_have_url(f"{site.url}/acme/terraform@prod")
    expect(tab.get_by_role("region", name="prod serves 1.1.0.")).to_contain_text("that was forced")

    late = tab.context.new_page()
    late.goto(f"{site.url}/acme/terraform@prod/rollback")
    tab.get_by_role("link", name="Roll back").click()
    expect(tab.locator("select[name=to] option").first).to_have_text("1.0.0, the one before")
    tab.get_by_label("Reason (required)").fill("it answers the wrong question")
    tab.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    back = tab.get_by_role("region", name="prod serves 1.0.0.")
    expect(back).to_contain_text("by a rollback from 1.1.0: “it answers the wrong question”")
    assert site.cli.json("show", "acme/terraform@prod")["version"] == "1.0.0"
    tab.get_by_role("link", name="Roll back").click()
    expect(tab.locator("select[name=to]")).to_have_text("1.0.1, the one before")  # not 1.1.0, which has just been left
    tab.get_by_role("dialog").get_by_role("link", name="Cancel").click()

    late.get_by_label("Reason (required)").fill("I have seen it too")
    late.get_by_role("button", name="Roll back").click()
    expect(late.get_by_role("alert")).to_contain_text("has moved since you looked")
    expect(late.get_by_text("prod serves 1.0.0 now")).to_be_visible()
    expect(late.get_by_label("Reason (required)")).to_have_value("I have seen it too")
    late.close()
    assert not [complaint for complaint in complaints if "412" not in complaint]


@pytest.mark.long
def test_a_release_is_deprecated_and_yanked_with_reasons(site: Site, world: World, tab: Page) -> None:
    site.cli.ok("push", world.adapters["sql"], "acme/withdrawn:1.0.0", "--base", "tiny", "--channel", "prod")
    tab.goto(f"{site.url}/acme/withdrawn/1.0.0")
    tab.get_by_role("link", name="Deprecate").click()
    dialog = tab.get_by_role("dialog")
    dialog.get_by_label("Reason (required)").fill("the next one is shorter")
    dialog.get_by_label("Use instead").fill("acme/sql")
    assert grave_findings(tab) == []
    dialog.get_by_role("button", name="Deprecate").click()
    expect(tab.get_by_text("the next one is shorter; use acme/sql")).to_be_visible()
    tab.get_by_role("link", name="Yank").click()
    expect(dialog).to_contain_text("prod would serve nothing instead of 1.0.0")
    tab.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    tab.goto(f"{site.url}/acme/withdrawn/1.0.0/yank")
    tab.get_by_label("Reason (required)").fill("trained on the test set")
    tab.get_by_role("button", name="Yank").click()
    expect(tab.get_by_role("region", name="This release is yanked.")).to_contain_text("trained on the test set")
    tab.get_by_role("link", name="Undo the yank").click()
    dialog.get_by_label("Reason (required)").fill("it was not")
    dialog.get_by_role("button", name="Undo the yank").click()
    expect(tab.get_by_role("region", name="prod serves this release.")).to_be_visible()


def test_forms_have_pages_of_their_own_without_scripts(site: Site, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(f"{site.url}/acme/sql@prod")
    tab.get_by_role("link", name="Roll back").click()
    expect(tab).to_have_url(f"{site.url}/acme/sql@prod/rollback")
    expect(tab.get_by_role("heading", level=1)).to_have_text("Roll back prod?")
    tab.go_back()
    tab.get_by_label("Version").select_option("1.0.0")
    tab.get_by_role("button", name="Promote").click()
    expect(tab).to_have_url(f"{site.url}/acme/sql@prod/promote?version=1.0.0")
    expect(tab.get_by_role("heading", level=1)).to_have_text("Promote 1.0.0 to prod?")
    context.close()
