"""A composer's story in a browser: a comparison, a plan, a composition, and the result beside its inputs."""

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.conftest import Site


def compared(site: Site, tab: Page) -> Locator:
    """Chooses two adapters and lets a worker compare them. Returns the answer."""
    tab.goto(f"{site.url}/conflicts?with=acme/sql:1.0.0*0.5")
    tab.get_by_label("Adapter 2", exact=True).fill("acme/support@prod")
    tab.get_by_label("Weight of adapter 2").fill("0.5")
    tab.get_by_label("Weight of adapter 2").press("Enter")
    shared = f"{site.url}/conflicts?with=acme/sql:1.0.0*0.5&with=acme/support@prod*0.5"
    expect(tab).to_have_url(shared)
    tab.get_by_role("button", name="Compare them").click()
    expect(tab).to_have_url(shared)
    answer = tab.get_by_role("region", name="Not measured: weights alone do not show a risk.")
    expect(answer).to_contain_text("What to do before composing")
    expect(tab.get_by_role("img", name="input overlap of")).to_have_count(1)
    tab.get_by_role("link", name="dominance - 0.5").click()
    expect(tab.get_by_role("img", name="dominance - 0.5 of")).to_have_count(1)
    expect(tab).to_have_url(f"{shared}&show=dominance")
    return answer


def planned(tab: Page) -> None:
    """The recipe that the advice leads to is completed and planned."""
    tab.get_by_role("combobox", name="Method").select_option("ties")
    tab.get_by_role("textbox", name="density").fill("0.5")
    tab.get_by_role("textbox", name="rank").fill("8")
    tab.get_by_label("Examples of each input's suite").fill("1")
    tab.get_by_label("Suite 1").fill("sql-exact")
    tab.get_by_label("Suite 2").fill("support-exact")
    tab.get_by_label("guard-exact guard").check()
    tab.get_by_label("Gates, one a line").fill("guard-exact.nll within 1000 of inputs")
    tab.get_by_role("textbox", name="Adapter", exact=True).fill("acme/pair:1.0.0")
    tab.get_by_role("button", name="Plan").click()
    expect(tab.get_by_role("heading", level=1)).to_contain_text("Plan")
    expect(tab.get_by_role("region", name="The recipe can be composed")).to_be_visible()


@pytest.mark.long
def test_adapters_are_compared_planned_and_composed(site: Site, tab: Page, complaints: list[str]) -> None:
    tab.set_viewport_size({"width": 1280, "height": 800})
    compared(site, tab).get_by_role("link", name="--probe 8").click()
    expect(tab.get_by_label("Examples of each input's suite")).to_have_value("8")
    planned(tab)
    losses = tab.get_by_role("region", name="What each one loses")
    expect(losses.get_by_role("row", name="acme/sql:1.0.0 sql-exact")).to_be_visible()
    tab.get_by_role("link", name="All of the report").click()
    expect(tab.get_by_role("region", name="Where they meet")).to_be_visible()
    tab.go_back()

    tab.get_by_role("link", name="Compose it or change the recipe").click()
    expect(tab.get_by_role("textbox", name="density")).to_have_value("0.5")
    tab.get_by_role("button", name="Compose", exact=True).click()
    published = tab.get_by_role("region", name="It published a release.")
    expect(published.get_by_role("link", name="acme/pair 1.0.0")).to_be_visible()
    rows = tab.get_by_role("region", name="Scores beside the inputs").get_by_role("row", name="guard-exact.nll")
    expect(rows).to_have_count(3)
    expect(tab.get_by_role("button", name="Copy: recipe")).to_be_visible()
    assert complaints == []
    assert site.cli.json("show", "acme/pair:1.0.0")["inputs"][0]["weight"] == 0.5


def test_a_recipe_is_built_without_scripts_and_what_is_wrong_is_said_beside_it(site: Site, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(f"{site.url}/compose")
    tab.get_by_label("Adapter 1", exact=True).fill("acme/sql:1.0.0")
    tab.get_by_role("combobox", name="Method").select_option("ties")
    tab.get_by_role("button", name="Show its settings").click()
    density = tab.get_by_role("textbox", name="density")
    density.fill("2")
    density.press("Enter")  # plans
    expect(tab.get_by_role("alert")).to_contain_text("density")
    expect(tab.get_by_label("Adapter 1", exact=True)).to_have_value("acme/sql:1.0.0")
    density.fill("0.5")
    tab.get_by_role("button", name="Edit as text").click()
    expect(tab.get_by_label("Recipe, in YAML")).to_contain_text("density: 0.5")
    tab.get_by_role("button", name="Plan").click()
    expect(tab.get_by_role("heading", level=1)).to_contain_text("Plan")
    context.close()
