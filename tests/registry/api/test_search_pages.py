"""The content and the links of a row of a search."""

import re
from collections.abc import Generator

import pytest

from registry.domain.channels import promotions
from registry.domain.channels.moves import PromotionRequest
from registry.formats.references import RepositoryName, Version
from tests.access.browser import Browser
from tests.access.house import HOST, PRIVATE, PUBLIC, House

NAME = RepositoryName(PRIVATE, "sql")


@pytest.fixture
def reader(house: House) -> Generator[Browser]:
    with Browser(house) as browser:
        browser.sign_in(house.secrets["reader"])
        yield browser


@pytest.mark.parametrize("address", ["/", "/search"])
def test_a_row_has_the_channels_that_serve_the_release(house: House, reader: Browser, address: str) -> None:
    with house.resources.write() as session:
        for channel in ("canary", "rows"):
            promotions.request(session, HOST, PromotionRequest(NAME, Version(1, 0, 0), channel))
    [row] = re.findall(
        rf'<tr>\s*<th scope="row"><a href="/{NAME}/1\.0\.0">.*?</tr>', reader.open(address).text, re.DOTALL
    )
    assert re.findall(rf'href="/{NAME}@([a-z]+)"', row)[:2] == ["canary", "rows"]


def test_a_stranger_is_led_to_no_page_that_strangers_may_not_see(house: House) -> None:
    with Browser(house) as stranger:
        for page in ("/", "/search", f"/{PUBLIC}/sql", f"/{PUBLIC}/sql/1.0.0"):
            links = set(re.findall(r'href="(/[^"]*)"', stranger.open(page).text.replace("&amp;", "&")))
            refused = [link for link in links if stranger.http.get(link).status_code in (401, 403)]
            assert (len(links) > 5, refused) == (True, []), page


def test_a_search_says_how_many_more_do_not_load_and_leads_to_them(reader: Browser) -> None:
    page = reader.open("/search?base=tiny&loads_in=vllm:1").text
    [(address, number)] = re.findall(r'<a href="([^"]+)">(\d+) more do(?:es)? not load in vllm:1</a>', page)
    shown = reader.open(address.replace("&amp;", "&")).text
    assert shown.count("does not load in vllm:1") == int(number) > 0
    assert " more do" not in shown


def test_a_program_is_led_to_the_repositories_of_a_namespace(reader: Browser) -> None:
    answer = reader.http.get(f"/{PRIVATE}", headers={"Accept": "application/json"})
    assert (answer.status_code, answer.headers["location"]) == (302, f"/v1/adapters?namespace={PRIVATE}")


def test_related_bases_can_be_ticked(reader: Browser) -> None:
    ticked = 'value="related" checked'
    assert ticked in reader.open("/search?base=tiny&include=related").text
    without_base = reader.open("/search?include=related")
    assert (without_base.status_code, ticked in without_base.text) == (200, False)


@pytest.mark.parametrize("query", ["max_rank=many", "score=nonsense", "base=nobody"])
def test_a_search_that_fails_keeps_its_form_without_scripts_too(reader: Browser, query: str) -> None:
    answer = reader.open(f"/search?text=sql+tables&{query}")
    assert (answer.status_code in (400, 404, 422), 'role="alert"' in answer.text) == (True, True)
    assert 'name="text" type="search" value="sql tables"' in answer.text
    name, _, value = query.partition("=")
    assert re.search(rf'name="{name}" value="{value}"', answer.text)
