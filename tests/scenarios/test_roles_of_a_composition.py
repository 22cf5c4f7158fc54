"""A composition is published with its requester's roles at the time of publication."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.api.app import create_app
from registry.client.api import Api
from registry.client.inprocess import InProcessTransport
from registry.domain.access import namespaces, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.namespaces import NamespaceChange
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.access.tokens import NewToken
from registry.errors import NotAllowed
from registry.transfer.resources import Resources
from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.scenarios.test_crashes import resources_of, write_recipe
from tests.scenarios.traces import traces
from tests.scenarios.world import Cli, World

RECIPE: dict[str, Any] = {
    "inputs": ["acme/sql:1.0.0", "acme/support:1.0.0"], "method": "stack", "probe": 0,
    "adapter": "lab/both:1.0.0", "model": "lab/merged:1.0.0",
}  # fmt: skip
MADE = {"lab/both:1.0.0", "lab/merged:1.0.0"}


@dataclass(frozen=True)
class Office:
    """A registry for many users: pia reads acme and publishes in lab. Only workers started by a test run."""

    cli: Cli
    resources: Resources
    token_id: str
    api: Api

    @property
    def host(self) -> Actor:
        return Actor("host", self.resources.clock(), {EVERYWHERE: Role.ADMIN}, mints=True)

    def give(self, namespace: str, role: Role | None) -> None:
        with self.resources.write() as session:
            namespaces.set_member(session, self.host, namespace, "pia", role)

    def publish_acme(self) -> None:
        with self.resources.write() as session:
            namespaces.change(session, self.host, "acme", NamespaceChange(public=True))

    def revoke(self) -> None:
        with self.resources.write() as session:
            tokens.revoke(session, self.host, self.token_id)

    def compose(self, **changes: Any) -> int:
        return self.api.post("/v1/compositions", {"recipe": RECIPE | changes})["id"]

    @property
    def job(self) -> Mapping[str, Any]:
        return self.cli.json("jobs", 1)


@pytest.fixture
def office(sql_and_support: Cli, world: World) -> Generator[Office]:
    cli = sql_and_support
    with resources_of(cli.environment) as resources:
        host = Actor("host", resources.clock(), {EVERYWHERE: Role.ADMIN}, mints=True)
        with resources.write() as session:
            namespaces.set_member(session, host, "acme", "pia", Role.READER)
            namespaces.set_member(session, host, "lab", "pia", Role.PUBLISHER)
            row, secret = tokens.create(session, host, NewToken("pia", "", {EVERYWHERE: Role.ADMIN}, None))
        with asking(resources, secret) as api:
            yield Office(cli, resources, row.id, api)


@contextmanager
def asking(resources: Resources, secret: str) -> Generator[Api]:
    transport = InProcessTransport(create_app(resources, tokens=True))
    api = Api("http://registry", transport, secret)
    yield api
    api.close()
    transport.close()


LOSSES: dict[str, Callable[[Office], None]] = {
    "the publisher in lab": lambda office: office.give("lab", Role.READER),
    "all of lab": lambda office: office.give("lab", None),
    "the reader of an input": lambda office: office.give("acme", None),
    "the token": Office.revoke,
}


@pytest.mark.parametrize("lost", list(LOSSES))
def test_what_was_taken_away_since_a_composition_was_asked_for_stops_it(office: Office, lost: str) -> None:
    office.compose()
    before = traces(office.cli)
    LOSSES[lost](office)
    assert run_one(office.resources, KINDS, "worker")
    job = office.job
    assert (job["state"], job["error"]["code"], job["error"]["exit_code"]) == ("failed", "role_lost", 5)
    assert "pia" in job["error"]["detail"]
    assert job["steps"][-1]["state"] == "failed"
    assert traces(office.cli) == before, "neither release nor blob nor file is left"


def test_a_role_that_is_taken_away_while_the_bytes_are_sent_stops_the_releases(office: Office) -> None:
    class Slow:
        """The real store, whose first write takes long enough."""

        def __getattr__(self, name: str) -> Any:
            return getattr(office.resources.store, name)

        def begin_write(self, size_bytes: int) -> Any:
            sent.append(size_bytes)
            office.give("lab", Role.READER)
            return office.resources.store.begin_write(size_bytes)

    sent: list[int] = []
    office.compose()
    assert run_one(replace(office.resources, store=Slow()), KINDS, "worker")  # type: ignore[arg-type]
    assert sent, "the bytes went first"
    assert (office.job["state"], office.job["error"]["code"]) == ("failed", "role_lost")
    assert not MADE & set(traces(office.cli).releases)


def test_what_the_creator_may_still_do_is_done_in_the_creators_name(office: Office) -> None:
    office.compose()
    office.publish_acme()
    office.give("acme", None)
    assert run_one(office.resources, KINDS, "worker")
    assert office.job["state"] == "done", "everybody reads a public namespace"
    assert set(traces(office.cli).releases) >= MADE
    for name in MADE:
        assert office.cli.json("show", name)["created_by"] == "pia"
        (row,) = office.cli.json("audit", "--act", "release:publish", "--subject", name)["items"]
        assert (row["actor"], row["token"]) == ("pia", office.token_id)


@pytest.mark.on("PostgreSQL")
def test_an_output_in_a_namespace_that_the_asker_cannot_make_is_refused_at_once(office: Office) -> None:
    office.give(EVERYWHERE, Role.PUBLISHER)
    with pytest.raises(NotAllowed, match="admin"):
        office.compose(adapter="new/both:1.0.0", model=None)
    assert office.cli.json("jobs")["items"] == []


def test_the_single_user_of_a_registry_composes_into_a_namespace_that_is_new(
    sql_and_support: Cli, tmp_path: Path
) -> None:
    cli, recipe = sql_and_support, write_recipe(tmp_path)
    recipe.write_text(yaml.safe_dump(RECIPE | {"adapter": "new/both:1.0.0", "model": None}))
    assert cli.json("compose", recipe)["result"]["repository"] == "new/both"
