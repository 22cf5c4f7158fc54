"""The pictures of the documentation, taken of the demo's registry: `make screenshots`. Each is also a test of its page.
They are taken only with `--screenshots HOME`, the home of the registry that `make demo` leaves behind."""

import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import compare, grave_findings
from tests.scenarios.world import Cli, server

IMAGES = Path(__file__).parents[2] / "docs" / "images"
MAX_BYTES = 150_000
WIDTH, HEIGHT, SCALE = 1360, 930, 0.8
"""CSS pixels, and pixels of a picture for each."""
THREE = ("acme/sql-migration@prod", "acme/terraform-review@prod", "acme/support-macros@prod")
CHOSEN = "&".join(f"with={adapter}" for adapter in THREE)


@dataclass(frozen=True)
class Picture:
    """A page, in the colours of `theme`. `shows` is a heading that it has, and `at` the one to scroll to."""

    name: str
    path: str
    shows: str
    theme: str = "light"
    height: int = HEIGHT
    at: str = ""


PICTURES = (
    Picture("release", "/acme/sql-migration/1.1.0", "prod serves this release."),
    Picture("release-dark", "/acme/sql-migration/1.1.0", "prod serves this release.", "dark"),
    Picture("refused", "/acme/sql-migration@prod/promote?version=1.0.0", "Some rules of prod fail.", height=640),
    Picture("channel", "/acme/sql-migration@prod", "prod serves 1.1.0."),
    Picture("conflicts", f"/conflicts?{CHOSEN}", "Not measured: weights alone do not show a risk.", height=880),
    Picture("losses", "/compositions/{published}/conflicts", "What each one loses"),
    Picture("compose", f"/compose?{CHOSEN}&method=ties", "Inputs"),
    Picture("composition", "/compositions/{published}", "It published", at="Scores beside the inputs"),
)


@dataclass(frozen=True)
class Demo:
    """The demo's registry, served, and the number of the composition that published."""

    url: str
    published: int


@pytest.fixture(scope="module")
def demo(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Generator[Demo]:
    home = tmp_path_factory.mktemp("demo") / "home"
    shutil.copytree(Path(pytestconfig.getoption("--screenshots")), home)
    cli = Cli({"ADAPTORY_HOME": str(home), "ADAPTORY_USER": "mia"})
    jobs = [item["state"] for item in cli.json("jobs")["items"] if item["kind"] == "composition"]
    with server(home, ADAPTORY_USER="mia") as (url, _):
        compare(url, *THREE)
        yield Demo(url, jobs[::-1].index("done") + 1)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_is_taken(picture: Picture, demo: Demo, browser: Browser) -> None:
    context = browser.new_context(
        viewport={"width": WIDTH, "height": picture.height},
        device_scale_factor=SCALE,
        color_scheme=picture.theme,  # type: ignore[arg-type]
        reduced_motion="reduce",
    )
    tab = context.new_page()
    tab.goto(demo.url + picture.path.format(published=demo.published))
    expect(tab.get_by_role("heading", name=picture.shows).first).to_be_visible()
    assert grave_findings(tab) == []
    _take(tab, picture)
    context.close()


def _take(tab: Page, picture: Picture) -> None:
    if picture.at:
        tab.get_by_role("heading", name=picture.at).evaluate("one => one.scrollIntoView()")
    path = IMAGES / f"{picture.name}.png"
    tab.screenshot(path=path)
    assert path.stat().st_size <= MAX_BYTES
