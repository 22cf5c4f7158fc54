"""A server for many users: people with roles, a private and a public namespace, and each one's rights."""

import json
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.scenarios.world import Cli, World, server


@dataclass
class Company:
    """`host` is the shell on the server's machine; the others are people elsewhere, with a token each."""

    host: Cli
    url: str
    home: Path

    def person(self, user: str, *scope: str) -> Cli:
        arguments = [word for entry in scope for word in ("--scope", entry)]
        token = self.host.ok("token", "create", "--user", user, *arguments).out.strip()
        return Cli({"ADAPTORY_HOME": str(self.home / user), "ADAPTORY_URL": self.url, "ADAPTORY_TOKEN": token})

    @property
    def passer_by(self) -> Cli:
        return Cli({"ADAPTORY_HOME": str(self.home / "nobody"), "ADAPTORY_URL": self.url})


@pytest.fixture
def company(pairing: dict[str, str], tmp_path: Path) -> Generator[Company]:
    environment = {"ADAPTORY_ACCESS": "tokens", "ADAPTORY_ACCESS_CACHE_S": "0", "ADAPTORY_USER": "host", **pairing}
    host = Cli({"ADAPTORY_HOME": str(tmp_path / "server"), **environment})
    host.ok("namespace", "grant", "*", "olga", "admin")
    host.ok("token", "create", "--user", "olga")
    with server(tmp_path / "server", **environment) as (url, _):
        yield Company(host, url, tmp_path)


def test_each_sees_and_does_what_the_role_allows_and_the_audit_says_who_it_was(
    company: Company, world: World, tmp_path: Path
) -> None:
    olga = company.person("olga")
    olga.ok("namespace", "set", "acme")
    for user, role in {"pia": "publisher", "rolf": "releaser", "rita": "reader", "ada": "admin"}.items():
        olga.ok("namespace", "grant", "acme", user, role)
    pia, rolf, rita, ada = (company.person(user) for user in ("pia", "rolf", "rita", "ada"))
    olga.ok("namespace", "grant", "elsewhere", "sven", "admin")
    stranger, nobody = company.person("sven"), company.passer_by

    pia.ok("base", "add", world.base, "--name", "tiny")
    pushed = pia.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert pushed["release"]["created_by"] == "pia"
    refused = rita("push", world.adapters["sql"], "acme/sql:1.1.0", "--base", "tiny")
    assert (refused.code, "publisher" in refused.err) == (5, True)
    assert pia("promote", "acme/sql:1.0.0", "--to", "prod").code == 5
    rolf.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "first")
    assert rolf("gate", "acme/sql@prod", "--rule", "sql-exact.accuracy>=0.5").code == 5
    rita.ok("pull", "acme/sql@prod", "-o", tmp_path / "pulled")

    for outsider in (stranger, nobody):
        assert outsider.json("list")["items"] == []
        assert outsider.json("search")["items"] == []
        for command in (("show", "acme/sql"), ("log", "acme/sql"), ("pull", "acme/sql@prod", "-o", tmp_path / "no")):
            seen, absent = outsider(*command), outsider(*[str(word).replace("acme", "acne") for word in command])
            assert (seen.code, absent.code) == (3, 3)
            assert seen.err.replace("acme", "acne") == absent.err
        assert not (tmp_path / "no").exists()

    ada.ok("namespace", "set", "acme", "--public")
    nobody.ok("pull", "acme/sql@prod", "-o", tmp_path / "taken")
    assert (tmp_path / "taken/adapter_model.safetensors").read_bytes() == (
        tmp_path / "pulled/adapter_model.safetensors"
    ).read_bytes()
    assert nobody("yank", "acme/sql:1.0.0", "--reason", "mine").code == 5

    rows = [json.loads(line) for line in ada.ok("audit", "--jsonl", "--namespace", "acme").out.splitlines()]
    first = ada.ok("audit", "--jsonl", "--namespace", "acme", "--limit", "2").out.splitlines()
    assert [json.loads(line) for line in first] == rows[:2]
    did = {(row["act"], row["actor"]) for row in rows}
    assert {("release:publish", "pia"), ("channel:promote", "rolf"), ("namespace:set", "ada")} <= did
    assert all(
        row["source"].startswith("127.0.0.1 adaptory/") and row["token"] for row in rows if row["actor"] == "pia"
    )
    assert stranger.ok("audit", "--jsonl").out.count("\n") == len(
        [row for row in olga.json("audit")["items"] if row["namespace"] == "elsewhere"]
    )
    refused = rita("audit")
    assert (refused.code, "rita does not have the role admin in any namespace" in refused.err) == (5, True)
    assert "ask an admin" in refused.err


@pytest.mark.long
def test_a_base_has_the_names_and_places_that_its_maker_and_admins_give_it_and_no_others(
    company: Company, world: World, tmp_path: Path
) -> None:
    olga = company.person("olga")
    for user, namespace in (("pia", "acme"), ("bob", "elsewhere")):
        olga.ok("namespace", "grant", namespace, user, "publisher")
    pia, bob = company.person("pia"), company.person("bob")
    noted = pia.ok("base", "add", world.base, "--name", "tiny", "--alias", "Acme/Tiny").err
    assert "was not added to its locations" in noted, "jobs read directories with the rights of the workers"
    added = pia.json("base", "show", "tiny")
    assert (added["name"], added["aliases"], added["locations"]) == ("tiny", ["Acme/Tiny"], [])

    again = bob.ok("base", "add", world.base, "--name", "tiny", "--alias", "Acme/Tiny")
    assert "was not added to its locations" in again.err
    olga.ok("base", "add", world.base, "--name", "tiny")
    added = pia.json("base", "show", "tiny")
    again = bob.ok("base", "add", world.base, "--name", "tiny", "--alias", "Acme/Tiny")
    assert "note:" not in again.err, "all that it states is there"
    elsewhere = shutil.copytree(world.base, tmp_path / "elsewhere")
    noted = bob.ok("base", "add", elsewhere, "--name", "tiny").err
    assert "base tiny belongs to pia" in noted
    assert "was not added to its locations" in noted
    for words in (("tiny", "--alias", "Acme/Other"), ("other",)):
        refused = bob("base", "add", world.base, "--name", *words)
        assert (refused.code, "Ask pia or an admin" in refused.err, "by the name tiny" in refused.err) == (
            5,
            True,
            True,
        )
    assert bob("base", "unalias", "Acme/Tiny").code == 5
    assert pia.json("base", "show", "tiny") == added

    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "Acme/Other"}))
    unknown = pia("push", adapter, "acme/sql:1.0.0")
    assert (unknown.code, "'Acme/Other'" in unknown.err) == (3, True)
    olga.ok("base", "add", elsewhere, "--name", "tiny", "--alias", "Acme/Other")
    assert pia.json("push", adapter, "acme/sql:1.0.0")["release"]["base"]["name"] == "tiny"
    pia.ok("base", "unalias", "Acme/Other")
    assert pia("push", adapter, "acme/sql:1.0.1").code == 3
    (row,) = [row for row in olga.json("audit", "--act", "base:update")["items"] if row["before"]]
    assert (row["actor"], row["before"], row["subject"]) == ("pia", {"alias": "Acme/Other"}, added["digest"])


def test_a_rollback_is_explained_by_its_audit_row_alone(company: Company, world: World) -> None:
    olga = company.person("olga")
    olga.ok("base", "add", world.base, "--name", "tiny")
    for name, version in (("sql", "1.0.0"), ("other-sql", "1.1.0")):
        olga.ok("push", world.adapters[name], f"acme/sql:{version}", "--base", "tiny", "--channel", "prod")
    olga.ok("rollback", "acme/sql@prod", "--reason", "answers are empty")
    (row,) = olga.json("audit", "--act", "channel:rollback")["items"]
    commits = {item["version"]: item["commit"] for item in olga.json("log", "acme/sql")["items"]}
    assert (row["actor"], row["subject"], row["reason"]) == ("olga", "acme/sql@prod", "answers are empty")
    assert row["before"] == {"move": 2, "version": "1.1.0", "commit": commits["1.1.0"]}
    assert row["after"] == {"move": 3, "version": "1.0.0", "commit": commits["1.0.0"]}
    assert row["detail"]["returns_to_move"] == 1
    unknown = olga("audit", "--act", "channel:rolback")
    assert (unknown.code, "'channel:rollback'" in unknown.err) == (6, True), unknown.err
    shown = " ".join(olga.ok("audit", "--act", "channel:rollback").out.split())
    assert "version 1.1.0 -> 1.0.0" in shown
    assert "answers are empty" in shown


def test_a_token_for_one_namespace_works_in_that_one_alone(company: Company, world: World) -> None:
    olga = company.person("olga")
    olga.ok("base", "add", world.base, "--name", "tiny")
    for namespace in ("acme", "beta"):
        olga.ok("push", world.adapters["sql"], f"{namespace}/sql:1.0.0", "--base", "tiny")
    narrow = company.person("olga", "acme=reader")
    assert [row["repository"] for row in narrow.json("list")["items"]] == ["acme/sql"]
    assert [row["repository"] for row in olga.json("list", "beta")["items"]] == ["beta/sql"]
    assert [caller("list", name).code for caller, name in ((narrow, "beta"), (olga, "gamma"))] == [3, 3]
    assert narrow("show", "beta/sql").code == 3
    assert narrow("yank", "acme/sql:1.0.0", "--reason", "x").code == 5
    assert narrow.json("whoami")["grants"] == {"acme": "reader"}
    listed = olga.ok("token", "list").out
    assert ("unlimited" in listed, "acme=reader" in listed, "*=admin" in listed) == (True, True, False)


def test_knowing_the_digest_of_a_private_file_opens_nothing(company: Company, world: World) -> None:
    olga = company.person("olga")
    olga.ok("base", "add", world.base, "--name", "tiny")
    release = olga.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")["release"]
    olga.ok("namespace", "grant", "elsewhere", "sven", "admin")
    sven = company.person("sven")
    from registry.client.api import Api
    from registry.errors import NotFound

    api = Api(company.url, token=sven.environment["ADAPTORY_TOKEN"])
    rows = release["files"]
    plan = api.post("/v1/uploads", {"namespace": "elsewhere", "files": rows})
    assert not any(row["present"] for row in plan["files"])
    with pytest.raises(NotFound, match="were not uploaded"):
        api.post("/v1/adapters/elsewhere/mine/releases", {"version": "1.0.0", "base": "tiny", "files": rows})
    with pytest.raises(NotFound):
        api.get(f"/v1/blobs/{rows[0]['sha256']}")
    api.close()


def test_a_server_for_many_wants_tokens_and_one_without_stays_on_loopback(embedded: Cli) -> None:
    refused = embedded("serve", "--host", "0.0.0.0")  # noqa: S104  (it must not be listened on)
    assert refused.code == 5
    assert "ADAPTORY_ACCESS=tokens" in refused.err
    many = Cli(embedded.environment | {"ADAPTORY_ACCESS": "tokens"})
    refused = many("serve", "--host", "0.0.0.0")  # noqa: S104
    assert refused.code == 5
    assert "token create" in refused.err


def test_what_needs_a_second_admin_waits_for_one(company: Company, world: World) -> None:
    company.host.ok("base", "add", world.base, "--name", "tiny")
    company.host.ok("push", world.adapters["sql"], "alpha/sql:1.0.0", "--base", "tiny")
    for user in ("ann", "bob"):
        company.host.ok("namespace", "grant", "alpha", user, "admin")
    ann, bob = company.person("ann"), company.person("bob")
    ann.ok("namespace", "set", "alpha", "--changes", "two")
    policy = company.home / "policy.yaml"
    policy.write_text("version: 1\napproval: {}\n")
    requested = [
        ann.ok("policy", "set", "alpha/*@prod", policy),
        ann.ok("namespace", "grant", "alpha", "carol", "releaser"),
        ann.ok("takedown", "alpha/sql:1.0.0", "--reason", "leak"),
    ]
    assert all("waits for a second admin" in answer.err for answer in requested)
    listed = ann.json("change", "list", "alpha")["items"]
    assert [row["summary"] for row in listed] == [
        "takedown of alpha/sql:1.0.0: leak", "carol: releaser in alpha", "policy of alpha/*@prod",
    ]  # fmt: skip
    ann.ok("pull", "alpha/sql:1.0.0", "-o", company.home / "pulled")
    taken, role, demand = (str(row["id"]) for row in listed)
    own = ann("change", "approve", "alpha", role)
    assert (own.code, "requested this change" in own.err) == (5, True)
    ann.ok("change", "cancel", "alpha", role)
    late = bob("change", "approve", "alpha", role)
    assert (late.code, "already cancelled" in late.err) == (4, True)
    for change in (demand, taken):
        assert "applied" in bob.ok("change", "approve", "alpha", change).out
    assert "+   approval:" in bob.ok("change", "show", "alpha", demand).out
    gone = ann("pull", "alpha/sql:1.0.0", "-o", company.home / "again")
    assert (gone.code, "taken down" in gone.err) == (3, True)
    rows = company.host.json("audit", "--namespace", "alpha", "--act", "policy:set")["items"]
    assert [(row["actor"], row["detail"]["seconded_by"]) for row in rows] == [("ann", "bob")]
