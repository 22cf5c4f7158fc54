"""Users who may not read a composition's inputs do not learn their names: from its outputs, its job or its lists."""

import json
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from registry.client.api import Api
from registry.client.lineage import fetch_note, of_release
from registry.client.push import collect, push
from registry.client.selection import select_files
from registry.domain.access import namespaces, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.access.tokens import NewToken
from registry.errors import NotFound
from registry.formats.lineage import NOTE_FILE, of_note
from registry.formats.references import parse_repository
from registry.transfer.resources import Resources
from registry.wire.catalog import ReleaseOut
from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.test_licences_and_upgrades import with_card
from tests.scenarios.test_roles_of_a_composition import asking
from tests.scenarios.world import Cli, World, nothing

RULES = [{"layers": "0", "weight": 0.25}]
RECIPE = {
    "inputs": [{"adapter": "acme/sql:1.0.0", "weight": 0.5, "rules": RULES}, {"adapter": "acme/support:1.0.0"}],
    "method": "ties", "settings": {"density": 0.5, "rank": 4}, "probe": 0,
    "adapter": "lab/both:1.0.0", "model": "den/merged:1.0.0",
}  # fmt: skip
ROLES = {
    "pia": {"acme": Role.READER, "lab": Role.PUBLISHER, "den": Role.PUBLISHER},
    "bob": {"lab": Role.PUBLISHER},
    "rex": {"lab": Role.READER},
    "dan": {"den": Role.READER},
}


@dataclass(frozen=True)
class House:
    """pia composes acme's adapters for lab and den; bob publishes in lab, rex reads it, dan reads den."""

    cli: Cli
    resources: Resources
    apis: dict[str, Api]

    def compose(self, who: str, **changes: object) -> int:
        return self.apis[who].post("/v1/compositions", {"recipe": RECIPE | changes})["id"]

    def work(self) -> None:
        assert run_one(self.resources, KINDS, "worker")

    def jobs(self, who: str, limit: int = 50) -> list[int]:
        return [row["id"] for row in self.apis[who].pages("/v1/jobs", limit=limit)]


@pytest.fixture
def house(sql_and_support: Cli) -> Generator[House]:
    cli = sql_and_support
    with ExitStack() as stack:
        resources = stack.enter_context(resources_of(cli.environment))
        host = Actor("host", resources.clock(), {EVERYWHERE: Role.ADMIN}, mints=True)
        apis: dict[str, Api] = {}
        for user, roles in ROLES.items():
            with resources.write() as session:
                for namespace, role in roles.items():
                    namespaces.set_member(session, host, namespace, user, role)
                _, secret = tokens.create(session, host, NewToken(user, "", {EVERYWHERE: Role.ADMIN}, None))
            apis[user] = stack.enter_context(asking(resources, secret))
        yield House(cli, resources, apis)


def texts(api: Api, line: str) -> Iterator[tuple[str, bytes]]:
    for row in api.get(f"/v1/{line}/releases/1.0.0")["files"]:
        with api.stream(f"/v1/{line}/releases/1.0.0/files/{row['path']}") as stream:
            yield row["path"], b"".join(stream.chunks)


def test_no_file_of_an_output_names_what_went_into_it_or_the_other_output(house: House) -> None:
    house.compose("pia")
    house.work()
    notes = {
        **{f"lab/{name}": content for name, content in texts(house.apis["rex"], "adapters/lab/both")},
        **{f"den/{name}": content for name, content in texts(house.apis["dan"], "models/den/merged")},
    }
    assert {f"lab/{NOTE_FILE}", f"den/{NOTE_FILE}"} <= set(notes)
    names = (b"acme", b"sql", b"support", b"lab/", b"den/")
    assert [(file, name) for file, content in notes.items() for name in names if name in content] == []


def test_an_output_still_tells_what_it_was_made_of_and_names_it_to_who_may_read_that(house: House) -> None:
    house.compose("pia")
    house.work()
    made = {}
    for user in ("pia", "rex"):
        release = house.apis[user].get("/v1/adapters/lab/both/releases/1.0.0", ReleaseOut)
        note = fetch_note(house.apis[user], release)
        made[user] = of_release(release, note)
        assert json.loads(note)["note"]["recipe"]["settings"] == RECIPE["settings"]
        alone = of_note(note)
        assert alone is not None
        assert [member.name for member in alone.members] == [row.commit[:12] for row in release.inputs]
    assert made["pia"]
    assert made["rex"]
    assert [str(member).split(" x ")[1].split(":")[0] for member in made["pia"].members] == ["acme/sql", "acme/support"]
    assert [member.name for member in made["rex"].members] == ["a release without access"] * 2
    assert made["pia"].how == made["rex"].how == "ties: rank 4, density 0.5, scope tensor, vote plain, divide count"
    assert [member.weight for member in made["pia"].members] == [member.weight for member in made["rex"].members]
    assert house.cli.json("verify", "den/merged:1.0.0", "--rebuild")["rebuild"]["verdict"] == "same"


def test_what_an_adapter_went_into_is_listed_without_what_the_reader_may_not_see(house: House) -> None:
    house.compose("pia")
    house.work()
    below = "/v1/adapters/acme/sql/releases/1.0.0/descendants"
    made = [(row["repository"], row["kind"], row["version"], row["weight"]) for row in house.apis["pia"].pages(below)]
    assert made == [("den/merged", "model", "1.0.0", 0.5), ("lab/both", "adapter", "1.0.0", 0.5)]
    assert list(house.apis["pia"].pages(below, limit=1)) == list(house.apis["pia"].pages(below))
    with house.resources.write() as session:
        host = Actor("host", house.resources.clock(), {EVERYWHERE: Role.ADMIN})
        namespaces.set_member(session, host, "acme", "rex", Role.READER)
    assert [row["repository"] for row in house.apis["rex"].pages(below)] == ["lab/both"]
    assert list(house.apis["rex"].pages(below, limit=1)) == list(house.apis["rex"].pages(below))
    with pytest.raises(NotFound):
        house.apis["bob"].get(below)


def test_a_job_is_shown_and_cancelled_by_the_rule_of_its_composition(house: House) -> None:
    hidden = house.compose("pia")
    pia, bob = house.apis["pia"], house.apis["bob"]
    job = pia.get(f"/v1/compositions/{hidden}")["job"]
    assert house.jobs("pia") == [job]
    assert house.jobs("bob") == []
    for ask in (
        lambda: bob.get(f"/v1/compositions/{hidden}"),
        lambda: bob.get(f"/v1/jobs/{job}"),
        lambda: bob.post(f"/v1/jobs/{job}/cancel"),
        lambda: bob.post(f"/v1/compositions/{hidden}/cancel"),
    ):
        with pytest.raises(NotFound):
            ask()
    assert pia.get(f"/v1/jobs/{job}")["state"] == "queued"
    assert pia.post(f"/v1/jobs/{job}/cancel")["state"] == "cancelled"


def test_pages_of_jobs_are_full_although_some_are_hidden(house: House, world: World) -> None:
    house.cli.ok("push", world.adapters["sql"], "lab/own:1.0.0", "--base", "tiny")
    own: list[int] = []
    for number in range(3):
        house.compose("pia", adapter=f"lab/hidden{number}:1.0.0", model=None)
        house.compose("pia", adapter=f"lab/hidden{number}:2.0.0", model=None)
        made = house.compose("bob", inputs=["lab/own:1.0.0"], adapter=f"lab/shown{number}:1.0.0", model=None)
        own.append(house.apis["bob"].get(f"/v1/compositions/{made}")["job"])
    first = house.apis["bob"].get("/v1/jobs", limit=2)
    assert [row["id"] for row in first["items"]] == own[:0:-1]
    assert house.jobs("bob", limit=2) == own[::-1]
    assert len(house.jobs("pia", limit=2)) == 9


def test_nothing_is_inherited_from_what_the_pusher_may_not_read_and_no_hidden_input_is_named(
    house: House, tmp_path: Path
) -> None:
    """bob publishes in lab and may not read acme, the source of lab/both; eve publishes in `far` alone."""
    house.compose("pia")
    house.work()
    made = house.apis["bob"].get("/v1/adapters/lab/both/releases/1.0.0")
    directory = tmp_path / "pulled"
    house.cli.ok("pull", "lab/both:1.0.0", "-o", directory)
    (directory / "README.md").write_text("Another card")
    files = collect(select_files(directory, "adapter"))
    with ExitStack() as stack:
        apis: dict[str, Api] = {"bob": house.apis["bob"]}
        with house.resources.write() as session:
            host = Actor("host", house.resources.clock(), {EVERYWHERE: Role.ADMIN}, mints=True)
            for user in ("bob", "eve"):
                namespaces.set_member(session, host, "far", user, Role.PUBLISHER)
            _, eve = tokens.create(session, host, NewToken("eve", "", {EVERYWHERE: Role.ADMIN}, None))
            _, narrow = tokens.create(session, host, NewToken("bob", "", {"far": Role.PUBLISHER}, None))
        for name, secret in (("eve", eve), ("narrow", narrow)):
            apis[name] = stack.enter_context(asking(house.resources, secret))
        for who, target in (("bob", "lab/again"), ("eve", "far/eve"), ("narrow", "far/narrow")):
            wanted = {"base": "tiny", "version": "1.0.0", "notes": ""}
            published, _ = push(apis[who], files, parse_repository(target), "adapter", wanted, nothing)
            pushed = published.document
            inherited = pushed["release"]["inputs"]
            expected = [] if who == "eve" else made["inputs"]
            assert [source["commit"] for source in inherited] == [source["commit"] for source in expected]
            assert {(source["repository"], source["version"]) for source in inherited} <= {(None, None)}
            assert "acme" not in json.dumps(pushed)
            assert ("lab/both" in json.dumps(pushed["warnings"])) == (who == "bob")


def test_a_refused_promotion_shows_no_licence_of_an_input_that_its_readers_may_not_read(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    secret = with_card(tmp_path / "secret", world.adapters["sql"], license="secret-terms", base_license="secret-base")
    cli.ok("push", secret, "acme/sql:1.0.0", "--base", "tiny")
    recipe = {"inputs": ["acme/sql:1.0.0"], "method": "stack", "adapter": "lab/both:1.0.0", "gates": [], "probe": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.ok("compose", tmp_path / "recipe.yaml")
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"version": 1, "licenses": {"allow": ["MIT"]}}))
    cli.ok("policy", "set", "lab/both@prod", tmp_path / "policy.yaml")
    refused = cli("promote", "lab/both:1.0.0", "--to", "prod", "--json")
    assert "adapter of an input in a private namespace" in refused.out
    cli.ok("promote", "lab/both:1.0.0", "--to", "prod", "--force", "--reason", "for the test")
    shown = [refused.out, cli.ok("history", "lab/both@prod", "--json").out, cli.ok("audit", "--json").out]
    assert not [text for text in shown if "secret-" in text]
    cli.ok("namespace", "set", "acme", "--public")
    cli.ok("policy", "set", "lab/both@other", tmp_path / "policy.yaml")
    assert "adapter secret-terms" in cli("promote", "lab/both:1.0.0", "--to", "other", "--new-channel", "--json").out
