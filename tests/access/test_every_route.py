"""Every route, with every kind of caller, on a private namespace, a public one, and one of somebody else. The routes
are listed from the application: a new one is tried automatically, and fails without a rule, or if its rule differs from
`STATED`."""

import re
from typing import Any

import httpx2
import pytest
from starlette.routing import compile_path

from registry.api.app import ROUTERS, create_app, hub_routers, page_routers, routers
from registry.api.http.request import SAFE_METHODS
from registry.api.http.routes import Route
from registry.api.http.rules import Rule, Where
from registry.api.hub.wire import HubRoute
from registry.domain.access.roles import Role, at_least
from tests.access.house import (
    CALLERS,
    NAMED,
    OTHER,
    PRIVATE,
    PUBLIC,
    ROLES,
    House,
    Things,
)
from tests.access.stated import STATED

EVERYBODY, OWN_TOKEN, WITH_TOKEN = "everybody", "token of a push", " with a token"
FOR_ALL: dict[str, int | str] = {"open": "allowed", "absent": 404, OWN_TOKEN: 401}


@pytest.fixture
def asked(method: str, unchanged: House, request: pytest.FixtureRequest) -> House:
    """The house that a route is tried in."""
    return unchanged if method in SAFE_METHODS else request.getfixturevalue("house")


def routes() -> list[tuple[str, str, Rule | None]]:
    """Method, path and rule of every route of the application."""
    listed: list[tuple[str, str, Rule | None]] = []
    for router in (*routers(), *hub_routers()):
        for route in router.routes:
            assert isinstance(route, Route | HubRoute), f"{route} takes parameters that it does not know"
            rules = _rules(route.dependant)
            assert len(set(rules)) <= 1, f"{route.path} has several rules"
            listed += [(method, route.path, rules[0] if rules else None) for method in sorted(route.methods or ())]
    return listed


def _rules(dependant: Any) -> list[Rule]:
    own = [dependant.call] if isinstance(dependant.call, Rule) else []
    return own + [rule for child in dependant.dependencies for rule in _rules(child)]


ROUTES = routes()


def test_the_application_serves_these_routes_and_no_others(house: House) -> None:
    served = house.ask("operator", "GET", "/openapi.json").json()["paths"]
    listed = {(method.upper(), path) for path, methods in served.items() for method in methods}
    rest = [
        (method, path) for method, path, _ in ROUTES if path.startswith(("/v1/", "/healthz", "/readyz", "/metrics"))
    ]
    assert listed == {(method, path.replace(":path}", "}")) for method, path in rest}


def test_nothing_is_served_beside_them(house: House) -> None:
    """Routes added to the application itself could be hidden from its description."""
    known = {id(route) for router in (*routers(), *hub_routers(), *page_routers()) for route in router.routes}
    beside = [route for route in create_app(house.resources, tokens=True).routes if id(route) not in known]
    assert [getattr(route, "path", route) for route in beside] == ["/openapi.json"]


def test_every_route_has_the_rule_that_is_stated() -> None:
    assert {(method, path): _summary(rule, STATED[method, path]) for method, path, rule in ROUTES} == STATED


def _summary(rule: Rule | None, stated: str) -> str:
    """The rule in the form of `STATED`; a route's own decisions are not visible from outside."""
    if rule is None:
        return stated if stated in ("absent", OWN_TOKEN) else "open"
    inside = stated if stated.startswith("inside: ") else "inside"
    return {
        Where.NAMESPACE: str(rule.role),
        Where.ANYWHERE: f"{rule.role} somewhere",
        Where.REGISTRY: "operator",
        Where.INSIDE: inside,
    }[rule.where]


def test_no_route_is_hidden_by_one_before_it() -> None:
    """`/v1/bases/{base:path}` matches everything below it, so a later route would never be called."""
    patterns = [(method, path, compile_path(path)[0]) for method, path, _ in ROUTES]
    for method, path, _ in ROUTES:
        requested = re.sub(r"\{[^}]*\}", "x", path)
        first = next(other for own, other, pattern in patterns if own == method and pattern.match(requested))
        assert first == path, f"{method} {path} is answered by {first}: put it before that"


@pytest.mark.parametrize(("method", "path"), [*STATED], ids=[" ".join(route) for route in STATED])
def test_a_route_answers_those_that_its_rule_names_and_nobody_else(method: str, path: str, asked: House) -> None:
    for namespace in (PRIVATE, PUBLIC):
        things = asked.things[namespace]
        for caller in CALLERS:
            answer = asked.ask(caller, method, _filled(method, path, things), **_body(method, path, things))
            expected = _expected(method, path, caller, namespace)
            seen = f"{caller} {method} {path} in {namespace}: {answer.status_code} {answer.text[:300]}"
            if expected == "allowed":
                assert not _denied(answer), seen
            else:
                assert answer.status_code == expected, seen
            assert answer.status_code < 500, seen


@pytest.mark.parametrize(("method", "path"), [*STATED], ids=[" ".join(route) for route in STATED])
def test_a_private_thing_and_one_that_is_not_there_answer_a_stranger_alike(
    method: str, path: str, unchanged: House
) -> None:
    whom = STATED[method, path]
    if (
        whom in ("open", "absent", "operator", OWN_TOKEN)
        or whom.endswith(" somewhere")
        or "{" not in path
        or "token_id" in path
    ):
        pytest.skip("not about a thing of one namespace")
    absent = Things("ghost", "0" * 64, 4_000, 4_000, "upload-ghost", "1" * 64, 4_000)
    there, gone = unchanged.things[PRIVATE], absent
    for caller in ("nobody", "stranger", "narrowed"):
        seen = [
            unchanged.ask(caller, method, _filled(method, path, things), **_body(method, path, things))
            for things in (there, gone)
        ]
        texts = [
            _without_ids(answer.text.replace(answer.headers["X-Request-Id"], ""), things)
            for answer, things in zip(seen, (there, gone), strict=True)
        ]
        assert seen[0].status_code == seen[1].status_code, (caller, [answer.text for answer in seen])
        assert texts[0] == texts[1], caller


def test_lists_show_only_what_the_caller_may_read(house: House) -> None:
    for path in ("/v1/adapters", "/v1/releases", "/v1/namespaces"):
        key = "namespace" if path.endswith("namespaces") else "repository"
        for caller, seen in {
            "nobody": {PUBLIC},
            "stranger": {PUBLIC, OTHER},
            "narrowed": {PUBLIC, OTHER},
            "reader": {PUBLIC, PRIVATE},
            "operator": {PUBLIC, PRIVATE, OTHER},
        }.items():
            items = house.ask(caller, "GET", path).json()["items"]
            assert {item[key].partition("/")[0] for item in items} == seen, (path, caller)


def test_an_admin_reads_the_audit_rows_of_the_own_namespaces_alone(house: House) -> None:
    for caller, seen in {"admin": {PRIVATE, PUBLIC}, "stranger": {OTHER}}.items():
        rows = house.ask(caller, "GET", "/v1/audit", params={"limit": 500}).json()["items"]
        assert {row["namespace"] for row in rows} == seen
        lines = house.ask(caller, "GET", "/v1/audit.jsonl").text.splitlines()
        assert len(lines) == len(rows)
    everything = house.ask("operator", "GET", "/v1/audit", params={"limit": 500}).json()["items"]
    assert {row["namespace"] for row in everything} == {PRIVATE, PUBLIC, OTHER, None}


def _denied(answer: httpx2.Response) -> bool:
    """Whether access was denied: a 404 after admission, such as an upload without bytes, does not count."""
    hidden = ("namespace", "repository", "job", "composition", "conflicts", "upload", "blob")
    codes = {f"{thing}_unknown" for thing in hidden}
    if answer.status_code == 403 and answer.json()["code"] in ("never_deleted", "settings_of_namespace"):
        return False  # allowed to nobody
    return answer.status_code in (401, 403) or (answer.status_code == 404 and answer.json()["code"] in codes)


def _expected(method: str, path: str, caller: str, namespace: str) -> int | str:
    """The expected status, or that the caller is admitted."""
    whom = STATED[method, path]
    if whom in FOR_ALL:
        return FOR_ALL[whom]
    if caller in ("revoked", "expired"):
        return 401
    wanted = whom.removeprefix("inside: ").removesuffix(WITH_TOKEN)
    if wanted == "user":
        return 401 if caller == "nobody" else "allowed"
    if wanted == EVERYBODY:
        return "allowed"
    if wanted.endswith(" somewhere") or wanted == "operator":
        return _of_no_namespace(method, path, wanted, caller)
    held = Role.ADMIN if caller == "operator" else ROLES.get(caller)
    if held and any(at_least(held, Role(role)) for role in wanted.split(" or ")):
        return "allowed"
    readable = held is not None or namespace == PUBLIC
    if not readable:
        return 404
    if wanted == Role.READER and not (whom.endswith(WITH_TOKEN) and caller == "nobody"):
        return "allowed"
    return 401 if caller == "nobody" else 403


def _of_no_namespace(method: str, path: str, wanted: str, caller: str) -> int | str:
    if caller == "nobody":
        return 401
    if wanted == "operator":
        return "allowed" if caller == "operator" else 403
    if (method, path) == ("POST", "/v1/tokens") and caller == "narrowed":
        return 403  # it could widen itself
    own = {"stranger": Role.ADMIN, "operator": Role.ADMIN, "narrowed": Role.READER, **ROLES}[caller]
    return "allowed" if at_least(own, Role(wanted.partition(" ")[0])) else 403


def _filled(method: str, path: str, things: Things) -> str:
    values = {
        "{namespace}": things.namespace, "{version}": "1.0.0", "{channel}": "prod",
        "{name}": next((name for kind, (name, _) in NAMED.items() if path.startswith(f"/v1/{kind}s")), "sql"),
        "{path:path}": "weights.safetensors",
        "{alias:path}": "Acme/Nothing",
        "{base:path}": "tiny", "{suite:path}": "exact", "{metric}": "none",
        "{sha256}": things.sha256, "{job_id}": str(things.job_id),
        "{composition_id}": str(things.composition_id), "{check_id}": str(things.check_id),
        "{upload_id}": things.upload_id, "{number}": "1",
        "{token_id}": "aaaaaaaaaaaa", "{publisher_id}": "aaaaaaaaaaaa", "{key}": "aaaaaaaaaaaa",
        "{webhook_id}": "aaaaaaaaaaaa", "{delivery_id}": "1",
        "{promotion_id}": "4000", "{change_id}": "4000",
        "{user}": "nobody-at-all", "{group}": "prod", "{node}": "gpu-1",
        "{upload}": "0" * 32, "{xorb}": things.sha256,
        "{revision}": "prod", "{revision:path}": "main", "{directory:path}": "weights",
    }  # fmt: skip
    for name, value in values.items():
        path = path.replace(name, value)
    assert "{" not in path, f"say here what {path} is filled with"
    if path == "/v1/resolve":
        path += f"?ref={things.namespace}/sql:1.0.0"
    if path.startswith("/v1/fleet/") and method == "DELETE":
        path += f"?namespace={things.namespace}"
    if path == "/v1/follow":
        path += f"?channels={things.namespace}/sql@prod,{PUBLIC}/sql@prod"
    if path.endswith("/judgement"):
        path += "?version=1.0.0"
    if path.startswith("/v1/blobs/") and method == "PUT":
        path = f"{path.replace(things.sha256, things.announced)}?upload={things.upload_id}"
    return path


def _body(method: str, path: str, things: Things) -> dict[str, Any]:
    """The body that the route needs for its decision; a rule decided by the path precedes the body."""
    if (method, path) == ("POST", "/v1/uploads"):
        file = {"path": "a.safetensors", "size_bytes": 1, "sha256": "1" * 64}
        return {"json": {"namespace": things.namespace, "files": [file]}}
    if (method, path) == ("POST", "/v1/compositions"):
        recipe = {
            "base": "tiny",
            "inputs": [{"adapter": f"{things.namespace}/sql:1.0.0"}],
            "method": "stack",
            "adapter": f"{things.namespace}/sum:1.0.0",
        }
        return {"json": {"recipe": recipe, "plan": False}}
    if (method, path) == ("POST", "/v1/conflicts"):
        return {
            "json": {"inputs": [{"adapter": f"{things.namespace}/sql:{version}"} for version in ("1.0.0", "1.1.0")]}
        }
    if (method, path) == ("POST", "/v1/evaluations"):
        return {"json": {"releases": [f"{things.namespace}/sql:1.0.0"], "suites": ["exact"]}}
    followed = {"channel": f"{things.namespace}/sql@prod", "state": "following", "since": "2026-01-01T00:00:00Z"}
    bodies: dict[tuple[str, str], dict[str, Any]] = {
        ("POST", "/v1/uploads/{upload_id}/parts/{number}"): {"sha256": things.announced},
        ("POST", "/v1/jobs/{job_id}/priority"): {"priority": "low"},
        ("PUT", "/v1/fleet/{group}/{node}"): {"agent": "adaptory", "channels": [followed]},
    }
    if (method, path) in bodies:
        return {"json": bodies[method, path]}
    if path.startswith(("/api/repos/", "/api/models/{namespace}/{name}/tag")):
        name = "new" if path.endswith("/create") else "sql"
        moved = {"fromRepo": f"{things.namespace}/{name}", "toRepo": f"{things.namespace}/other"}
        return {"json": {"name": name, "organization": things.namespace, "tag": "9.0.0", **moved}}
    if path.endswith("/commit/{revision:path}"):
        return {"content": b""}
    if method == "PUT" and path.startswith("/v1/blobs/"):
        return {"content": b"x", "headers": {"Content-Length": "1"}}
    return {"json": {}} if method in ("PUT", "POST") else {}


def _without_ids(text: str, things: Things) -> str:
    """Nor does a suggestion: it has names near the requested one, among those that the caller may read."""
    text = re.sub(r"Did you mean [^?]*\? ", "", text)
    for value in (things.sha256, things.announced, things.upload_id, things.namespace):
        text = text.replace(value, "<id>")
    return re.sub(rf"\b({things.job_id}|{things.composition_id}|{things.check_id})\b", "<n>", text)


def test_each_path_has_a_part_that_its_router_is_loaded_by() -> None:
    """Within a command routers are loaded by the first request that may be meant for them."""
    for entry, router in zip(ROUTERS, routers(), strict=True):
        for route in router.routes:
            assert isinstance(route, Route)
            assert set(route.path.split("/")) & set(entry.parts), (entry.module, route.path)
