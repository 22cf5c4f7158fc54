"""A comparison of adapters is computed once, by a worker, and shown to all who may read the adapters."""

from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from registry.api.app import create_app
from registry.client.api import Api
from registry.client.inprocess import InProcessTransport
from registry.domain.access import namespaces, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.namespaces import NamespaceChange
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.access.tokens import NewToken
from registry.errors import Conflict, NotFound, Refused, RegistryError
from registry.transfer.collect import sweep
from registry.transfer.resources import Resources
from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.test_roles_of_a_composition import asking
from tests.scenarios.world import Cli, World, environment

PAIR = ("acme/sql:1.0.0", "den/support:1.0.0")
ROLES = {
    "rex": {"acme": Role.READER, "den": Role.READER},
    "ray": {"acme": Role.READER, "den": Role.READER},
    "sue": {"acme": Role.PUBLISHER},
}


@dataclass(frozen=True)
class Office:
    """rex and ray read both adapters; sue publishes in acme, and may not read den."""

    cli: Cli
    resources: Resources
    apis: dict[str, Api]

    def work(self) -> bool:
        with environment(self.cli.environment, ["adaptory"]):
            return run_one(self.resources, KINDS, "worker")

    def jobs(self, who: str) -> list[int]:
        return [row["id"] for row in self.apis[who].pages("/v1/jobs")]


@pytest.fixture
def office(sql_and_support: Cli, world: World) -> Generator[Office]:
    cli = sql_and_support
    cli.ok("push", world.adapters["support"], PAIR[1], "--base", "tiny")
    cli.ok("promote", PAIR[0], "--to", "prod")
    with ExitStack() as stack:
        resources = stack.enter_context(resources_of({**cli.environment, "ADAPTORY_ACCESS_CACHE_S": "0"}))
        apis: dict[str, Api] = {}
        for user, roles in ROLES.items():
            with resources.write() as session:
                for namespace, role in roles.items():
                    namespaces.set_member(session, host(resources), namespace, user, role)
                _, secret = tokens.create(session, host(resources), NewToken(user, "", {EVERYWHERE: Role.ADMIN}, None))
            apis[user] = stack.enter_context(asking(resources, secret))
        yield Office(cli, resources, apis)


def host(resources: Resources) -> Actor:
    return Actor("host", resources.clock(), {EVERYWHERE: Role.ADMIN}, mints=True)


def wanted(*adapters: str, **others: Any) -> dict[str, Any]:
    return {"inputs": [{"adapter": adapter} for adapter in adapters or PAIR], **others}


def test_a_reader_gets_the_report_that_the_command_computes_and_a_repeated_request_computes_nothing(
    office: Office,
) -> None:
    rex, ray = office.apis["rex"], office.apis["ray"]
    begun = rex.post("/v1/conflicts", wanted())
    assert (begun["state"], begun["report"]) == ("queued", None)
    assert [(source["repository"], source["version"], source["weight"]) for source in begun["inputs"]] == [
        ("acme/sql", "1.0.0", 1.0),
        ("den/support", "1.0.0", 1.0),
    ]
    assert ray.post("/v1/conflicts", wanted())["id"] == begun["id"], "while it waits, too"
    assert office.work()
    done = ray.post("/v1/conflicts", wanted("acme/sql@prod", PAIR[1]))
    assert (done["id"], done["state"], done["error"]) == (begun["id"], "done", None), "the release counts, not its name"
    assert rex.get(f"/v1/conflicts/{begun['id']}") == done
    assert not office.work(), "nothing is left to compute"
    report = done["report"]
    assert (report["verdict"], report["pairs"][0]["evidence"]) == ("unmeasured", "weights")
    assert report["whole"]["advice"] == report["pairs"][0]["advice"]
    printed = office.cli.json("conflicts", *PAIR)
    for pair in (report["pairs"][0], printed["pairs"][0]):
        assert pair["modules"]
    assert report["pairs"][0]["modules"] == printed["pairs"][0]["modules"]
    assert not [path for path in office.resources.work_directory.iterdir() if path.name.startswith("conflicts-")]


@pytest.mark.long
def test_other_weights_settings_or_an_other_order_are_another_check(office: Office) -> None:
    rex = office.apis["rex"]
    requests = [
        wanted(),
        wanted(*reversed(PAIR)),
        {"inputs": [{"adapter": PAIR[0], "weight": 0.5}, {"adapter": PAIR[1]}]},
        {"inputs": [{"adapter": PAIR[0], "rules": [{"layers": "0", "weight": 0.5}]}, {"adapter": PAIR[1]}]},
        wanted(method="ties", settings={"density": 0.5}),
        wanted(method="ties", settings={"density": 0.4}),
    ]
    ids = [rex.post("/v1/conflicts", request)["id"] for request in requests]
    assert len(set(ids)) == len(ids)
    assert [rex.post("/v1/conflicts", request)["id"] for request in requests] == ids
    while office.work():
        pass
    done = [rex.get(f"/v1/conflicts/{number}") for number in ids]
    assert {check["state"] for check in done} == {"done"}
    assert done[2]["report"]["adapters"][0]["weight"] == 0.5
    assert done[1]["report"]["adapters"][0]["name"] == PAIR[1]


@pytest.mark.on("PostgreSQL")
def test_what_one_may_not_read_is_neither_computed_nor_shown(office: Office) -> None:
    sue, rex = office.apis["sue"], office.apis["rex"]
    with pytest.raises(NotFound, match="amespace den does not exist"):
        sue.post("/v1/conflicts", wanted())
    check = rex.post("/v1/conflicts", wanted())
    office.work()
    for path in (f"/v1/conflicts/{check['id']}", f"/v1/jobs/{check['job']}"):
        with pytest.raises(NotFound):
            sue.get(path)
    assert office.jobs("sue") == []
    assert rex.get(f"/v1/jobs/{check['job']}")["kind"] == "conflicts"
    assert [row["id"] for row in office.cli.json("jobs")["items"]] == [check["job"]]
    with pytest.raises(NotFound):
        office.apis["ray"].get(f"/v1/jobs/{check['job']}")
    with office.resources.write() as session:
        namespaces.set_member(session, host(office.resources), "den", "rex", None)
    with pytest.raises(NotFound):
        rex.get(f"/v1/conflicts/{check['id']}")


def test_without_a_token_one_sees_what_is_kept_and_starts_no_work(office: Office) -> None:
    with office.resources.write() as session:
        for namespace in ("acme", "den"):
            namespaces.change(session, host(office.resources), namespace, NamespaceChange(public=True))
    transport = InProcessTransport(create_app(office.resources, tokens=True))
    with httpx2.Client(base_url="http://registry", transport=transport) as http:
        refused = http.post("/v1/conflicts", json=wanted())
        assert (refused.status_code, refused.json()["code"]) == (401, "token_missing")
        check = office.apis["rex"].post("/v1/conflicts", wanted())
        assert http.post("/v1/conflicts", json=wanted()).status_code == 202
        office.work()
        kept = http.post("/v1/conflicts", json=wanted())
        assert (kept.status_code, kept.json()["id"]) == (200, check["id"])
        assert http.get(f"/v1/conflicts/{check['id']}").json() == kept.json()


def test_a_check_that_was_cancelled_is_computed_when_it_is_asked_for_again(office: Office) -> None:
    rex = office.apis["rex"]
    first = rex.post("/v1/conflicts", wanted())
    assert rex.post(f"/v1/jobs/{first['job']}/cancel")["state"] == "cancelled"
    assert rex.get(f"/v1/conflicts/{first['id']}")["state"] == "cancelled"
    again = rex.post("/v1/conflicts", wanted())
    assert (again["id"], again["state"]) == (first["id"], "queued")
    assert again["job"] != first["job"]
    assert office.work()
    assert rex.get(f"/v1/conflicts/{first['id']}")["report"]["verdict"] == "unmeasured"
    with pytest.raises(Conflict):
        rex.post(f"/v1/jobs/{again['job']}/cancel")


@pytest.mark.long
def test_a_report_is_kept_for_thirty_days(office: Office) -> None:
    rex = office.apis["rex"]
    check = rex.post("/v1/conflicts", wanted())
    office.work()
    now = office.resources.clock()
    sweep(office.resources, now + timedelta(days=29))
    assert rex.post("/v1/conflicts", wanted())["id"] == check["id"]
    sweep(office.resources, now + timedelta(days=31))
    with pytest.raises(NotFound):
        rex.get(f"/v1/conflicts/{check['id']}")
    assert rex.post("/v1/conflicts", wanted())["state"] == "queued"
    assert check["job"] not in [row["id"] for row in office.cli.json("jobs")["items"]]


def test_what_cannot_be_combined_is_refused_at_once(office: Office) -> None:
    weighted = {"inputs": [{"adapter": PAIR[0], "weight": 1e300}, {"adapter": PAIR[1]}]}
    bodies: list[tuple[dict[str, Any], str]] = [
        (wanted(PAIR[0], PAIR[0]), "input_twice"),
        (wanted(PAIR[0], "acme/sql:9.9.9"), "release_unknown"),
        (wanted(method="magic"), "bad_recipe"),
        (wanted(method="ties", settings={"density": 7}), "bad_recipe"),
        (weighted, "bad_recipe"),
        (wanted(PAIR[0]), "bad_request"),
        (wanted(*[PAIR[0]] * 17), "bad_request"),
        ({**wanted(), "probe": 8}, "bad_request"),
    ]
    for body, code in bodies:
        with pytest.raises(RegistryError) as caught:
            office.apis["rex"].post("/v1/conflicts", body)
        assert (caught.value.code, body) == (code, body)
    office.cli.ok("yank", PAIR[0], "--reason", "leaks")
    with pytest.raises(Refused, match="yanked"):
        office.apis["rex"].post("/v1/conflicts", wanted())
    assert not office.work()
