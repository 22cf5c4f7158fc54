"""Requests that the OpenAPI document allows, and some that it forbids, to every route: never an answer that it does not
state, and never a 5xx."""

import hashlib
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from registry.api.app import create_app
from registry.client.api import Api, line_path
from registry.client.inprocess import InProcessTransport
from registry.client.push import collect, push
from registry.client.selection import select_files
from registry.database.tables import BaseAlias
from registry.domain.access import namespaces, worker_keys
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.catalog.bases import find as find_base
from registry.domain.catalog.suites import find as find_suite
from registry.domain.webhooks import hooks
from registry.domain.webhooks.hooks import NewWebhook
from registry.errors import Invalid, Refused
from registry.formats.attestations import new_key, public_half
from registry.formats.references import RepositoryName
from registry.formats.webhooks import EVENTS
from registry.transfer.fsck import check
from registry.transfer.resources import Resources
from tests import services
from tests.access.house import HOST, NAMED, House, copy_of, furnished_house, opened
from tests.access.test_every_route import ROUTES
from tests.durability.breakable import Stock
from tests.durability.small import write_base
from tests.fuzz.malformed import Adapter, malformed
from tests.scenarios.world import Cli

FACTOR = int(os.environ.get("ADAPTORY_TEST_FUZZ", "1"))
REQUESTS = 2 * FACTOR if FACTOR > 1 else 1
"""The number of requests to a route about existing things; twice as many are about anything."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

STATED = [(method, path) for method, path, _ in ROUTES if path.startswith(("/v1/", "/healthz", "/readyz"))]
"""The routes of the OpenAPI document."""
GOOD = Stock("1.0.0", 1, 1, "", "", "")
"""Routes whose bodies are used: they get past the checks of single fields."""


ANNOUNCED = hashlib.sha256(b"acme!").hexdigest()
"""The sha256 of the upload in the house whose bytes were not sent."""
OF_WHAT_IS_THERE = {
    "results_unknown",
    "spectrum_unknown",
    "score_unknown",
    "part_unknown",
    "blob_missing",
    "policy_unknown",
    "exception_unknown",
    "promotion_unknown",
    "change_unknown",
    "upgrade_unknown",
    "evaluation_unknown",
    "publisher_unknown",
    "node_unknown",
    "evidence_unknown",
    "canary_unknown",
}
"""Codes with status 404 that concern a missing part of a thing that exists."""


@pytest.fixture(scope="module", params=services.STRICTER_PAIRING)
def furnished(request: pytest.FixtureRequest) -> House:
    return furnished_house(request.param)


@dataclass(frozen=True)
class Site:
    """A furnished registry with the token of an operator who may also report; `known` are names and ids of existing
    things."""

    schema: Any
    headers: Mapping[str, str]
    known: Mapping[str, Any]


@pytest.fixture(scope="module")
def document(furnished: House, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The OpenAPI document, which is the same for every registry and takes half a second to write."""
    resources = opened(copy_of(furnished, tmp_path_factory.mktemp("document") / "home"))
    described = create_app(resources, tokens=True).openapi()
    resources.close()
    return described


@pytest.fixture(scope="module")
def unchanged(furnished: House, document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Generator[Site]:
    """For routes that only read: separate registries would take longer than the requests."""
    yield from _sites(furnished, document, tmp_path_factory.mktemp("unchanged"))


@pytest.fixture
def site(method: str, unchanged: Site, furnished: House, document: dict[str, Any], tmp_path: Path) -> Generator[Site]:
    if method == "GET":
        yield unchanged
    else:
        yield from _sites(furnished, document, tmp_path)


def _sites(furnished: House, document: dict[str, Any], directory: Path) -> Generator[Site]:
    """One registry, which is closed afterwards."""
    resources = opened(copy_of(furnished, directory / "home"), rate_limit="")
    with resources.read() as session:
        suite = find_suite(session, "exact").digest
    with resources.write() as session:
        namespaces.set_member(session, HOST, EVERYWHERE, "operator", Role.ADMIN_AGENT)
        session.add(BaseAlias(alias="tiny-alias", base_digest=find_base(session, "tiny").digest))
        hook, _ = hooks.add(session, HOST, NewWebhook("acme", None, "https://ops.example/", "slack", [*EVENTS]))
        delivery = hooks.send_test(session, HOST, hook.id).id
        key = worker_keys.register(session, "gpu-1", public_half(new_key()), HOST).id
    things = furnished.things["acme"]
    known = {
        "namespace": "acme", "version": "1.0.0", "channel": "prod", "base": "tiny", "suite": "exact",
        "sha256": things.sha256, "job_id": things.job_id, "composition_id": things.composition_id,
        "upload_id": things.upload_id, "token_id": furnished.ids["expired"], "path": "weights.safetensors",
        "ref": "acme/sql:1.0.0", "upload": things.upload_id, "suite_digest": suite, "metric": "nll", "user": "reader",
        "repository": "acme/sql", "to": "1.0.0", "derived_from": "tiny", "size_bytes": 15, "method": "stack",
        "alias": "tiny-alias", "number": 1, "old": "tiny", "new": "tiny-alias", "promotion_id": 1, "successor": None,
        "releases": ["acme/sql:1.0.0"], "bases": ["tiny"], "suites": ["exact"],
        "webhook_id": hook.id, "delivery_id": delivery, "key": key,
    }  # fmt: skip
    app = create_app(resources, tokens=True)
    app.openapi_schema = document
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    yield Site(schema, {"Authorization": f"Bearer {furnished.secrets['operator']}"}, known)
    resources.close()


Choose = Callable[[], bool]


def led_further(value: Any, known: Mapping[str, Any], choose: Choose) -> Any:
    """The same document with the chosen names and ids replaced by existing ones."""
    if isinstance(value, dict):
        return {
            key: known[key] if key in known and choose() else led_further(item, known, choose)
            for key, item in value.items()
        }
    return [led_further(item, known, choose) for item in value] if isinstance(value, list) else value


SIGNED = "/v1/files/{sha256}"
"""Only an address from the registry leads anywhere there."""


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize(("method", "path"), STATED, ids=[" ".join(route) for route in STATED])
def test_whatever_a_route_is_asked_its_answer_is_one_that_the_document_states(
    site: Site, method: str, path: str
) -> None:
    operation = site.schema[path.replace(":path}", "}")][method]
    good, known = GOOD.body(method, path).get("json"), site.known | ({"sha256": ANNOUNCED} if method == "PUT" else {})
    allowed = operation.as_strategy()

    def ask(case: schemathesis.Case, choose: Choose) -> bool:
        """Sends the request; returns whether the answer concerns an existing thing."""
        if choose():
            name = next((name for kind, (name, _) in NAMED.items() if path.startswith(f"/v1/{kind}s")), "sql")
            case.path_parameters = {key: known.get(key, name) for key in case.path_parameters}
        case.query = led_further(case.query, known, choose)
        if good and isinstance(case.body, dict) and choose():
            case.body = good | {key: value for key, value in case.body.items() if choose()}
        case.body = led_further(case.body, known, choose)
        answer = case.call_and_validate(headers=dict(site.headers), checks=CHECKS)
        return answer.status_code != 404 or answer.json()["code"] in OF_WHAT_IS_THERE

    past_the_door: list[bool] = []

    @settings(max_examples=REQUESTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(allowed)
    def ask_of_what_is_there(case: schemathesis.Case) -> None:
        past_the_door.append(ask(case, lambda: True))

    @settings(max_examples=2 * REQUESTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(allowed | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), st.data())
    def ask_anything(case: schemathesis.Case, chance: st.DataObject) -> None:
        ask(case, lambda: chance.draw(st.booleans()))

    ask_of_what_is_there()  # first: some existing things may be removed later
    assert past_the_door[0] or path == SIGNED, "it was about nothing that is there"
    ask_anything()


@pytest.fixture
def embedded(pairing: dict[str, str], tmp_path: Path) -> Generator[Resources]:
    environ = {"ADAPTORY_HOME": str(tmp_path / "home"), **pairing}
    Cli(environ).ok("base", "add", write_base(tmp_path / "base"), "--name", "tiny")
    resources = opened(environ)
    yield resources
    resources.close()


@pytest.fixture
def api(embedded: Resources) -> Generator[Api]:
    opened = Api("http://localhost", InProcessTransport(create_app(embedded)))
    yield opened
    opened.close()


@pytest.mark.long
@pytest.mark.parametrize("pairing", services.PAIRINGS, indirect=True)
def test_malformed_adapters_are_refused_by_the_registry_and_leave_nothing_published(
    embedded: Resources, api: Api, tmp_path: Path
) -> None:
    name = RepositoryName("acme", "sql")
    refused: list[str] = []

    @settings(max_examples=30 * FACTOR, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(malformed())
    def try_to_push(adapter: Adapter) -> None:
        files = collect(select_files(adapter.write(tmp_path / "adapter")))
        with pytest.raises((Invalid, Refused)) as raised:
            push(api, files, name, "adapter", {"version": "1.0.0", "base": "tiny"}, lambda _count: None)
        assert raised.value.code
        assert raised.value.subject
        refused.append(raised.value.code)

    try_to_push()
    assert len(refused) >= 30 * FACTOR
    assert api.get("/v1/releases")["items"] == []
    assert list(embedded.work_directory.iterdir()) == []
    assert [finding for finding in check(embedded) if finding.severity == "error"] == []
    good = collect(select_files(Adapter().write(tmp_path / "adapter")))
    push(api, good, name, "adapter", {"version": "1.0.0", "base": "tiny"}, lambda _count: None)
    assert api.get(f"{line_path(name)}/releases/1.0.0")["adapter"]["rank_max"] == 4
