"""Every request of a client of the hub API gets an answer that the client understands."""

from collections.abc import Generator
from string import Formatter
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import services
from tests.access.house import House, new_house
from tests.access.test_every_route import ROUTES
from tests.fuzz.test_rest import FACTOR

HUB = [(method, path) for method, path, _ in ROUTES if not path.startswith(("/v1/", "/healthz", "/readyz"))]
KNOWN = {
    "namespace": "acme", "name": "sql", "revision": "1.0.0", "path": "weights.safetensors", "directory": "",
}  # fmt: skip
PARAMETERS = ["blobs", "expand", "limit", "cursor", "recursive", "search", "author", "filter", "sort", "include_prs"]
TEXT = st.text(max_size=60) | st.sampled_from(["..", ".", "%00", "\0", "a/b", "-1", "1e9", "v1.0.0", "main", "é"])


@pytest.fixture(scope="module", params=services.STRICTER_PAIRING)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    house = new_house(request.param, tmp_path_factory.mktemp("house"))
    yield house
    house.close()


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize(("method", "path"), HUB, ids=[" ".join(route) for route in HUB])
def test_whatever_the_hub_api_is_asked_it_answers_and_says_why_not(house: House, method: str, path: str) -> None:
    template = path.replace(":path}", "}")
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    parts = st.fixed_dictionaries({name: st.just(KNOWN.get(name, "x")) | TEXT for name in names})
    query = st.dictionaries(st.sampled_from(PARAMETERS), TEXT, max_size=3)
    body = st.binary(max_size=80) | st.just(b"paths=weights.safetensors&expand=true")

    @settings(max_examples=12 * FACTOR, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(parts, query, body)
    def ask(given_parts: dict[str, str], given_query: dict[str, str], content: bytes) -> None:
        filled = template.format(**{name: quote(value, safe="") for name, value in given_parts.items()})
        sent: dict[str, Any] = {"content": content} if method in ("POST", "PUT", "PATCH") else {}
        answer = house.ask("operator", method, filled, params=given_query, **sent)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.headers.get("X-Error-Message"), f"{method} {filled} {given_query}: {answer.text}"

    ask()
