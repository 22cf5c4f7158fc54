"""The page of each error code, which `help` of a problem document leads to."""

import re
from collections.abc import Generator
from html import unescape
from pathlib import Path

import pytest

from registry.errors.translation import CODES
from tests import services
from tests.access.house import House, new_house


@pytest.fixture
def house(tmp_path: Path) -> Generator[House]:
    furnished = new_house(services.PAIRINGS[0], tmp_path / "home")
    yield furnished
    furnished.close()


def test_help_of_an_error_leads_a_stranger_to_a_page_that_says_what_to_do(house: House) -> None:
    problem = house.ask("nobody", "GET", "/v1/resolve?ref=acme").json()
    page = house.ask("nobody", "GET", problem["help"])
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert problem["code"] in page.text
    for family, codes in CODES.items():
        for code, fix in codes.items():
            text = house.ask("nobody", "GET", f"/docs/errors/{code}").text
            read = unescape(re.sub("</?code>", "`", text))
            assert fix in read, code
            assert f"<dd>{family.status}</dd>" in text, code
    listed = house.ask("nobody", "GET", "/docs/errors").text
    assert all(f'href="/docs/errors/{code}"' in listed for codes in CODES.values() for code in codes)


def test_a_code_that_no_error_has_is_an_unknown_page(house: House) -> None:
    assert house.ask("nobody", "GET", "/docs/errors/gate_faild").status_code == 404
    assert "is the next step" in house.ask("nobody", "GET", "/docs/errors/layout_other").text
