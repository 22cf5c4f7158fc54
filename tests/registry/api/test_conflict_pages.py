"""The page about adapters that might fight: its addresses, whom it answers, and how large it gets."""

import re
from collections.abc import Generator
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx2
import pytest

from composer.conflicts.render.text import document
from composer.conflicts.report import conflicts
from composer.conflicts.view import MEASURES
from registry.api.pages.html import drawings
from registry.api.pages.jobs import report
from registry.api.pages.jobs.chosen import Chosen
from registry.database.tables import ConflictCheck
from registry.domain.catalog import releases
from registry.domain.catalog.releases import NewRelease
from registry.domain.catalog.repositories import Kind
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName, Version
from tests.access.browser import Browser
from tests.access.house import FACTS, HOST, PRIVATE, PUBLIC, House
from tests.composer.conflicts.test_page import STORED, adapter, schema_1

MAX_PAGE_BYTES = 100_000
LARGE = 12
"""Adapters, of 66 pairs."""
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def reader(house: House) -> Generator[Browser]:
    with Browser(house) as browser:
        browser.sign_in(house.secrets["reader"])
        yield browser


def pair_of(namespace: str) -> str:
    return f"/conflicts?with={namespace}/sql:1.0.0&with={namespace}/sql:1.1.0*0.5"


def test_the_form_leads_to_an_address_that_can_be_shared(reader: Browser) -> None:
    fields = {
        "adapter": ["acme/sql:1.0.0", "acme/docs@prod", "acme/sql@prod", ""],
        "weight": ["1", "1", "0.5", "1"],
        "method": "ties",
        "settings": " density=0.4  lambda=0.7",
        "drop": "1",
    }
    answer = reader.http.get("/conflicts", params=fields)
    assert answer.status_code == 303
    shared = "with=acme/sql:1.0.0&with=acme/sql@prod*0.5&method=ties&set=density=0.4&set=lambda=0.7"
    assert answer.headers["location"] == f"/conflicts?{shared}"
    page = reader.open(answer.headers["location"])
    assert page.status_code == 200
    assert 'value="acme/sql@prod"' in page.text
    assert 'value="density=0.4 lambda=0.7"' in page.text


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("acme/sql@prod*0.8", ("acme/sql@prod", "0.8")),
        ("acme/sql@prod", ("acme/sql@prod", "1")),
        ("acme/sql:1.*", ("acme/sql:1.*", "1")),
        ("acme/sql:1.**2", ("acme/sql:1.*", "2")),
        ("acme/sql:^1.0*-0.5", ("acme/sql:^1.0", "-0.5")),
    ],
)
def test_a_weight_stands_after_the_last_star(written: str, read: tuple[str, str]) -> None:
    chosen = Chosen.of_address([("with", written)])
    assert chosen.members == (read,)
    query = httpx2.URL(chosen.address("/conflicts")).params.multi_items()
    assert Chosen.of_address(query) == chosen


def test_a_check_is_requested_once_and_shown_to_all_who_may_read_its_adapters(house: House, reader: Browser) -> None:
    page = reader.open(pair_of(PRIVATE))
    assert "Nobody has compared these yet." in page.text
    fields = {"adapter": f"{PRIVATE}/sql:1.0.0", "weight": "1", "method": "stack", "settings": ""}
    one = reader.post("/conflicts", fields)
    assert (one.status_code, "at least 2" in one.text) == (422, True), "the form says what is missing"
    requested = house.ask(
        "reader", "POST", "/v1/conflicts", json=Chosen.of_address(query_of(pair_of(PRIVATE))).document()
    )
    assert "waiting for a worker" in reader.open(pair_of(PRIVATE)).text
    stated = reader.http.get(pair_of(PRIVATE), headers={"Accept": "application/json"})
    assert stated.headers["location"] == f"/v1/conflicts/{requested.json()['id']}"
    house.ask("admin", "POST", f"/v1/jobs/{requested.json()['job']}/cancel")
    assert "could not be computed" in reader.open(pair_of(PRIVATE)).text


def test_the_page_answers_those_that_rest_answers(house: House) -> None:
    for caller in ("nobody", "stranger", "reader"):
        with Browser(house) as browser:
            if caller != "nobody":
                browser.sign_in(house.secrets[caller])
            for namespace in (PRIVATE, PUBLIC):
                document = Chosen.of_address(query_of(pair_of(namespace))).document()
                shown, stated = (
                    browser.open(pair_of(namespace)),
                    house.ask(caller, "POST", "/v1/conflicts", json=document),
                )
                starts = stated.status_code == 202
                hidden = stated.status_code == 404
                assert (shown.status_code, hidden) == (404 if hidden else 200, hidden), (caller, namespace, stated.text)
                assert starts or hidden or (caller == "nobody" and stated.status_code == 401)


def query_of(address: str) -> list[tuple[str, str]]:
    return httpx2.URL(address).params.multi_items()


def test_what_cannot_be_combined_is_said_beside_the_form(reader: Browser) -> None:
    for query, status, said in (
        ("with=acme/sql:1.0.0&with=acme/none:1.0.0", 404, "The adapter acme/none does not exist"),
        ("with=acme/sql:1.0.0&with=acme/sql:1.0.0", 400, "is named 2 times"),
        ("with=acme/sql:1.0.0&with=acme/sql:1.1.0&method=none", 422, "unknown method"),
        ("with=acme/sql:1.0.0&with=acme/sql:1.1.0&method=ties&set=density=2", 422, "density"),
        ("with=acme/sql:1.0.0&with=acme/sql:1.1.0*nan", 422, "finite"),
    ):
        page = reader.open(f"/conflicts?{query}")
        assert (page.status_code, said in page.text) == (status, True), page.text
        assert 'value="acme/sql:1.0.0"' in page.text


def large_report() -> dict[str, Any]:
    """The report for a base of 32 layers with seven modules each, all changed by all adapters."""
    modules = [f"model.layers.{layer}.self_attn.{kind}" for layer in range(32) for kind in KINDS]
    names = [f"acme/sql:1.0.{number}" for number in range(1, LARGE + 1)]
    numbers = {"cosine": 0.1, "input_excess": -0.2, "output_excess": 0.3, "interference": 1.2, "dominance": 0.6}
    rows = [{"module": module, **numbers} for module in modules]
    advice = ["Shrink the sum: --set lambda=0.7, or --method mean.", "Find it: --optimize (optimize: {} in a recipe)."]
    of_pair = {"verdict": "unmeasured", "risk": None, "risk_unit": None, "risk_low": None, "probe": None, **numbers}
    return {
        "verdict": "warn",
        "summary": {"headline": "warn", "lines": ["They cancel."], "fix": ""},
        "adapters": [{"name": name, "share": 1 / LARGE, "modules": rows} for name in names],
        "pairs": [
            {"a": a, "b": b, **of_pair, "causes": [{"module": modules[0], "share": 0.5}], "modules": rows}
            for a, b in combinations(names, 2)
        ],
        "whole": {"advice": advice, "probe": None},
        "findings": [
            {"code": "cancelling", "severity": "warning", "message": f"{name} cancels."} for name in names * 9
        ],
    }


def test_a_page_that_waits_is_loaded_again_once_there_is_a_report_though_the_job_has_not_ended(
    house: House, reader: Browser
) -> None:
    chosen = Chosen.of_address(query_of(f"{pair_of(PRIVATE)}&method=linear"))
    check = house.ask("reader", "POST", "/v1/conflicts", json=chosen.document()).json()
    waits = chosen.address("/conflicts", wait="yes")
    assert "hx-refresh" not in reader.open(waits).headers
    with house.resources.write() as session:
        session.get_one(ConflictCheck, check["id"]).report = large_report()
    assert house.ask("reader", "GET", f"/v1/conflicts/{check['id']}").json()["state"] == "queued"
    assert reader.open(waits).headers["hx-refresh"] == "true"


def test_the_page_of_many_large_adapters_is_small(house: House, reader: Browser) -> None:
    name = RepositoryName(PRIVATE, "sql")
    with house.resources.write() as session:
        old = releases.find(session, name, Version(1, 1, 0))
        [file] = releases.files_of(session, old)[old.revision_id]
        for patch in range(1, LARGE + 1):
            files = [ManifestFile(f"{patch}.safetensors", file.size_bytes, Digest(file.sha256))]
            new = NewRelease(name, Kind.ADAPTER, Version(1, 0, patch), None, files, old.base_digest, FACTS)
            releases.publish(session, HOST, new)
    chosen = Chosen(tuple((f"{PRIVATE}/sql:1.0.{patch}", "1") for patch in range(1, LARGE + 1)))
    check = house.ask("reader", "POST", "/v1/conflicts", json=chosen.document()).json()
    with house.resources.write() as session:
        session.get_one(ConflictCheck, check["id"]).report = large_report()
    page = reader.open(chosen.address("/conflicts"))
    assert page.status_code == 200
    assert len(page.content) <= MAX_PAGE_BYTES
    assert page.text.count('class="map"') == report.MAX_CELLS // (32 * len(KINDS))
    assert f"The worst {report.MAX_PAIRS} of 66 pairs." in page.text
    for option in ("method=mean", "set=lambda=0.7", "optimize=yes"):
        assert re.search(rf'<a href="/compose\?[^"]*{option}"><code>--', page.text), option


def test_a_map_tells_below_from_above() -> None:
    pairs = [
        {"a": "one", "b": "two", "modules": [_row(0, 0.5), _row(1, -0.5)]},
        {"a": "one", "b": "three", "modules": [_row(0, 0.001)]},
    ]
    stated = {"pairs": pairs, "adapters": [{"modules": [{"module": "layers.3.q_proj"}]}]}
    drawn = report.maps(stated, "cosine")
    first, second = (
        str(drawings.layer_map("cosine", pair_map.in_layers, drawn.top, drawn.frame, signed=True))
        for pair_map in drawn.drawn
    )
    assert ('class="h7"' in first, 'class="c7"' in first) == (True, True)
    assert 'class="z"' in second, "a small difference keeps no colour on a common scale"
    assert (drawn.top, len(drawn.drawn)) == (0.5, drawn.pairs)
    assert re.search('width="[0-9]+"', first)[0] == re.search('width="[0-9]+"', second)[0]  # type: ignore[index]


@pytest.mark.parametrize("stored", [STORED, schema_1()], ids=["schema 2", "schema 1"])
def test_a_stored_report_of_an_earlier_schema_is_shown(house: House, reader: Browser, stored: dict[str, Any]) -> None:
    chosen = Chosen.of_address(query_of(f"{pair_of(PRIVATE)}&method=ties&set=density=0.{stored['schema']}"))
    check = house.ask("reader", "POST", "/v1/conflicts", json=chosen.document()).json()
    with house.resources.write() as session:
        session.get_one(ConflictCheck, check["id"]).report = stored
    page = reader.open(chosen.address("/conflicts"))
    assert page.status_code == 200
    assert "red on red-exact loses +0.30" in page.text
    assert page.text.count('class="map"') == 1
    assert ("by the rules of an earlier version" in page.text) is (stored["schema"] == 1)


def test_a_report_is_shown_as_the_composer_writes_it(house: House, reader: Browser, tmp_path: Path) -> None:
    members = [adapter(tmp_path, name, 10 * seed) for seed, name in enumerate(("red", "green"), 1)]
    chosen = Chosen.of_address(query_of(f"{pair_of(PRIVATE)}&method=svd&set=rank=4"))
    check = house.ask("reader", "POST", "/v1/conflicts", json=chosen.document()).json()
    with house.resources.write() as session:
        session.get_one(ConflictCheck, check["id"]).report = document(conflicts(members, [1.0, 0.5]))
    for measure, one in MEASURES.items():
        page = reader.open(chosen.address("/conflicts", show=measure))
        assert page.status_code == 200, measure
        assert f"{one.name} of red + green" in page.text
    assert " % of the energy</span>" in page.text


def _row(layer: int, value: float) -> dict[str, Any]:
    return {"module": f"layers.{layer}.q_proj", "cosine": value}
