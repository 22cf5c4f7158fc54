"""The cost of pages: statements and bytes; and nothing that a strict content security policy would refuse."""

import gzip
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import event

from registry.api.app import create_app
from registry.api.pages.html import drawings, scores
from registry.api.pages.html.render import coded
from registry.client.inprocess import InProcessTransport
from registry.domain.catalog import releases, repositories, suites
from registry.domain.catalog.releases import NewRelease
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.domain.channels import promotions, withdrawals
from registry.domain.channels.moves import PromotionRequest
from registry.domain.channels.serving import channels_of_repository
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName, Version
from registry.transfer.resources import Resources
from tests.access.browser import Browser
from tests.access.house import FACTS, HOST, House

PAGES = Path(drawings.__file__).parents[1]
TEMPLATES = sorted((PAGES / "templates").glob("*.html"))
MAX_PAGE_BYTES, MAX_CSS_BYTES, MAX_STATEMENTS = 100_000, 20_000, 30
ADDRESSES = (
    "/",
    "/search?base=tiny",
    "/acme",
    "/acme/sql",
    "/acme/sql/1.1.0",
    "/acme/sql/1.0.0",
    "/acme/sql/compare/1.0.0...1.1.0",
    "/acme/sql/history",
    "/acme/sql@prod",
    "/acme/sql@prod/approve",
    "/acme/sql@prod/cancel",
    "/bases",
    "/bases/tiny",
    "/suites",
    "/suites/exact",
    "/conflicts?with=acme/sql:1.0.0&with=acme/sql:1.1.0",
    "/jobs",
    "/compositions/1",
    "/audit",
    "/acme/-/webhooks",
)


@contextmanager
def single_user(resources: Resources) -> Generator[httpx2.Client]:
    transport = InProcessTransport(create_app(resources))
    with httpx2.Client(base_url="http://localhost", transport=transport, headers={"Accept": "text/html"}) as http:
        yield http


@contextmanager
def counted(resources: Resources) -> Generator[list[str]]:
    """The statements that any connection sends meanwhile; SQLAlchemy does not see all of them."""
    sent: list[str] = []

    def listen(connection: Any, *_: object) -> None:
        connection.set_trace_callback(lambda text: sent.append(text) if text.startswith(("SELECT", "WITH")) else None)

    event.listen(resources.database.engine, "checkout", listen)
    yield sent
    event.remove(resources.database.engine, "checkout", listen)


def statements(resources: Resources) -> dict[str, int]:
    with single_user(resources) as http, counted(resources) as sent:
        for address in ADDRESSES:  # read once for all pages
            assert http.get(address).status_code == 200, address
        numbers: dict[str, int] = {}
        for address in ADDRESSES:
            sent.clear()
            http.get(address)
            numbers[address] = len(sent)
    return numbers


def test_head_answers_as_get_does(house: House) -> None:
    with single_user(house.resources) as http:
        for address in (*ADDRESSES, "/acme/nothing"):
            head, get = http.head(address), http.get(address)
            assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"])


def test_longer_lists_take_no_more_statements(house: House) -> None:
    before = statements(house.resources)
    name = RepositoryName("acme", "sql")
    with house.resources.write() as session:
        row = repositories.find(session, name)
        old = releases.find(session, name, Version(1, 1, 0))
        [file] = releases.files_of(session, old)[old.revision_id]
        for patch in range(1, 9):
            version = Version(1, 0, patch)
            files = [ManifestFile(f"{patch}.safetensors", file.size_bytes, Digest(file.sha256))]
            new = NewRelease(name, Kind.ADAPTER, version, None, files, old.base_digest, FACTS)
            releases.publish(session, HOST, new)
            for channel in ("prod", f"team-{patch}"):
                promotions.request(session, HOST, PromotionRequest(name, version, channel))
        promotions.request(session, HOST, PromotionRequest(name, Version(1, 1, 0), "prod"))
        assert len(channels_of_repository(session, row, after="", limit=100)) == 9
    after = statements(house.resources)
    assert after == before
    assert max(after.values()) <= MAX_STATEMENTS, after


@pytest.mark.parametrize(
    ("page", "document"),
    [
        ("/{}/sql@prod", "/v1/adapters/{}/sql/channels/prod"),
        ("/{}/sql/1.1.0", "/v1/adapters/{}/sql/releases/1.1.0"),
        ("/{}/sql/history", "/v1/adapters/{}/sql/releases"),
        ("/{}/sql/compare/1.0.0...1.1.0", "/v1/adapters/{}/sql/releases/1.0.0"),
        ("/{}/sql/1.1.0/modules", "/v1/adapters/{}/sql/releases/1.1.0/spectrum"),
        ("/bases", "/v1/bases"),
        ("/bases/tiny", "/v1/bases/tiny"),
        ("/suites", "/v1/suites"),
        ("/suites/exact", "/v1/suites/exact"),
        ("/jobs", "/v1/jobs"),
        ("/jobs/1", "/v1/jobs/1"),
        ("/compositions/1", "/v1/compositions/1"),
        ("/audit", "/v1/audit"),
    ],
)
def test_a_stranger_sees_of_a_page_what_rest_shows(house: House, page: str, document: str) -> None:
    for namespace in ("acme", "open"):
        shown = house.ask("nobody", "GET", page.format(namespace), headers={"Accept": "text/html"})
        stated = house.ask("nobody", "GET", document.format(namespace))
        assert shown.status_code == stated.status_code, (shown.text, stated.text)
        assert "{" not in page or namespace == "open" or shown.status_code == 404


@pytest.mark.parametrize(("layers", "table"), [(36, True), (80, False)])
def test_the_page_of_a_large_adapter_is_small(house: House, layers: int, table: bool) -> None:
    """Seven modules per layer. A table and a map whose cells show their values, or a link and a plain map."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    summary = {"norm": 1.0, "effective_rank": 3.0, "rank_95": 6, "rank_99": 8, "energy": {"1": 0.5}}
    modules = [
        {"module": f"model.layers.{layer}.mlp.{kind}", "rank": 16, "near_zero": False, **summary, "norm": layer + 0.5}
        for layer in range(layers)
        for kind in kinds
    ]
    with house.resources.write() as session:
        row = releases.find(session, RepositoryName("acme", "sql"), Version(1, 0, 0))
        row.spectrum = {**summary, "near_zero": 0, "left_out": [], "modules": modules}
    with single_user(house.resources) as http:
        page = http.get("/acme/sql/1.0.0")
        of_modules = http.get("/acme/sql/1.0.0/modules")
    assert page.status_code == of_modules.status_code == 200
    assert len(page.content) <= MAX_PAGE_BYTES
    assert ("<details><summary>The same as a table" in page.text) == table
    assert ('href="/acme/sql/1.0.0/modules"' in page.text) != table
    assert of_modules.text.count('<tr><th scope="row">') == 7 * layers
    assert page.text.count("<title>layer") == (7 * layers if table else 0)


def test_the_first_page_has_the_last_moves_of_what_its_reader_may_read(house: House) -> None:
    with house.resources.write() as session:
        for namespace in ("acme", "open"):
            wanted = PromotionRequest(RepositoryName(namespace, "sql"), Version(1, 0, 0), "news", reason="for everyone")
            promotions.request(session, HOST, wanted)
    for caller, seen in (("nobody", {"open"}), ("stranger", {"open"}), ("reader", {"acme", "open"})):
        with Browser(house) as browser:
            if caller != "nobody":
                browser.sign_in(house.secrets[caller])
            text = browser.open("/").text
        channels = {namespace for namespace in ("acme", "open") if f'href="/{namespace}/sql@news"' in text}
        assert (channels, "for everyone" in text) == (seen, True), caller


def test_a_history_has_the_newest_thirty_versions_that_are_not_yanked(house: House) -> None:
    name = RepositoryName("open", "sql")
    with house.resources.write() as session:
        old = releases.find(session, name, Version(1, 1, 0))
        [file] = releases.files_of(session, old)[old.revision_id]
        suite = suites.find(session, "exact")
        for minor in range(2, 34):
            files = [ManifestFile(f"{minor}.safetensors", file.size_bytes, Digest(file.sha256))]
            new = NewRelease(name, Kind.ADAPTER, Version(1, minor, 0), None, files, old.base_digest, FACTS)
            release, _ = releases.publish(session, HOST, new)
            metrics = ("nll", *(f"f{number}" for number in range(8)))
            measured = [
                Measurement(suite.digest, metric, 1 / minor, 0.01, 1, higher_is_better=False) for metric in metrics
            ]
            suites.record(session, HOST, release, measured)
        withdrawals.yank(session, HOST, releases.find(session, name, Version(1, 20, 0)), "wrong data")
    with single_user(house.resources) as http:
        of_repository, of_release = http.get("/open/sql"), http.get("/open/sql/1.21.0")
        of_metric, unknown = (
            http.get("/open/sql/history?metric=exact.nll"),
            http.get("/open/sql/history?metric=exact.none"),
        )
        (old_one, yanked) = (http.get(f"/open/sql/{version}") for version in ("1.0.0", "1.20.0"))
    points = re.findall(r"<title>(1\.\d+\.0): ", of_repository.text)
    assert len(points) == scores.POINTS, "metrics beyond are on the history's page"
    points = points[: scores.VERSIONS]
    assert points == [f"1.{minor}.0" for minor in range(3, 34) if minor != 20]
    assert "<title>1.33.0: 0.0303, 95 % 0.0107 to 0.0499, n=1</title>" in of_repository.text
    assert re.search(r"<circle class=\"dot now\"[^>]*><title>1\.21\.0: ", of_release.text)
    assert (of_metric.text.count("<tr data-points="), "data-metric" in of_metric.text) == (34, True)
    assert (unknown.status_code, "metric_unknown" in unknown.text) == (404, True)
    for page, version in ((old_one, "1.0.0"), (yanked, "1.20.0")):
        assert f"<title>{version}: " in page.text, "the page's own version is there in any case"
    assert max(len(page.content) for page in (of_repository, of_release, of_metric)) <= MAX_PAGE_BYTES


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_a_template_has_nothing_that_the_policy_refuses(template: Path) -> None:
    text = template.read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|<style|\son[a-z]+=|hx-on|hx-vars|javascript:|[\"']js:", text)
    assert not re.search(r"<script(?![^>]*\ssrc=)", text)
    triggers = re.findall(r'hx-trigger="([^"]*)"', text)
    assert not [trigger for trigger in triggers if "[" in trigger], "a filter of a trigger is evaluated"
    unsafe = re.findall(r"\|\s*safe\b", text)
    assert not unsafe, "only drawings and the sanitizer make markup"


def test_the_style_sheet_and_the_scripts_are_small() -> None:
    css, htmx = ((PAGES / "assets" / name).read_bytes() for name in ("adaptory.css", "htmx.min.js"))
    assert len(css) <= MAX_CSS_BYTES
    assert len(gzip.compress(htmx)) <= 14_000


def test_maps_of_one_scale_have_the_same_size_and_colours() -> None:
    small, large = {("q_proj", 0): 1.0}, {("q_proj", 0): 2.0, ("v_proj", 3): 4.0}
    frame = {*small, *large}
    one, other = (str(drawings.layer_map("Size", cells, 4.0, frame)) for cells in (small, large))
    assert re.search('width="[0-9]+" height="[0-9]+"', one)[0] == re.search('width="[0-9]+" height="[0-9]+"', other)[0]  # type: ignore[index]
    assert 'class="c2"' in one
    assert 'class="c7"' in other
    assert "most in layer 3 v_proj: 4" in other


def test_what_a_message_has_between_backticks_is_shown_as_code_and_nothing_of_it_is_markup() -> None:
    shown = coded("`adaptory list <b>` shows <i>it</i>, `and` a lone ` stays")
    assert shown == (
        "<code>adaptory list &lt;b&gt;</code> shows &lt;i&gt;it&lt;/i&gt;, <code>and</code> a lone ` stays"
    )


def test_a_large_map_is_drawn_in_a_few_paths() -> None:
    cells = {(f"kind-{kind}", layer): kind + layer / 80 for kind in range(7) for layer in range(80)}
    drawn = str(drawings.layer_map("Size", cells))
    assert len(drawn) <= 16_000
    assert drawn.count("<rect") == 0
    assert drawn.count("<title>") == 1
