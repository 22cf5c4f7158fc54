"""The migrations result in the schema that the tables describe, on both databases."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Integer, MetaData, func, insert, select, text
from sqlalchemy.exc import ProgrammingError

import registry.transfer.resources
from composer.formats.adapters.facts import WEIGHTS_FILE
from registry.database import tables
from registry.database.engine import Database, Row
from registry.database.migrate import (
    ensure_schema,
    head_revision,
    migrate,
    migrations_directory,
    schema_revision,
    works_with,
)
from registry.domain.channels.serving import CHANGES, unspent_approvals
from registry.environment.settings import Settings
from registry.errors import Unavailable
from registry.transfer.resources import open_resources
from tests import services
from tests.durability.small import write_adapter, write_base
from tests.scenarios.traces import api_of, opened
from tests.scenarios.world import Cli


@pytest.fixture(params=services.DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    return services.new_database_of(request.param, tmp_path)


@pytest.fixture
def database(url: str) -> Generator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


def test_the_migrated_schema_has_no_difference_from_the_models(database: Database) -> None:
    migrate(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Row.metadata) == []
    assert schema_revision(database) == head_revision()


def test_migrating_twice_changes_nothing(database: Database) -> None:
    migrate(database)
    with database.write() as session:
        session.execute(
            text("INSERT INTO blobs (sha256, size_bytes, created_at) VALUES ('aa', 1, '2026-01-01 00:00:00')")
        )
    migrate(database)
    with database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM blobs")) == 1
    assert schema_revision(database) == head_revision()


@pytest.mark.long
def test_processes_that_migrate_at_once_do_not_disturb_each_other(url: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}
    environment |= {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url}
    command = [sys.executable, "-m", "registry.cli.start", "migrate", "--json"]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)
    ]
    ended = [(process.communicate(timeout=60)[1].decode(), process.returncode) for process in running]
    assert [code for _, code in ended] == [0, 0, 0], ended
    opened = Database(url)
    assert schema_revision(opened) == head_revision()
    opened.close()


def test_migrations_that_cannot_all_be_done_leave_the_database_as_it_was(database: Database) -> None:
    """They are one transaction, so that no other process sees the database between two of them."""
    migrate(database, "0001")
    with database.write() as session:
        session.execute(text("ALTER TABLE releases ADD COLUMN stamp INTEGER"))
    with pytest.raises((Unavailable, ProgrammingError)):
        migrate(database)
    assert schema_revision(database) == "0001"


def test_a_database_of_a_newer_adaptory_is_refused_and_says_what_to_do(
    database: Database, url: str, tmp_path: Path
) -> None:
    migrate(database)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999', oldest_code = '9999'"))
    for create in (True, False):
        with pytest.raises(Unavailable) as raised:
            ensure_schema(database, create=create)
        assert raised.value.code == "schema_new"
    for command in ("list", "migrate"):
        ran = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url})(command)
        assert ran.code == 7
        assert "9999" in ran.err
        assert "Install a newer adaptory" in ran.err


def test_an_empty_database_that_is_not_embedded_asks_for_adaptory_migrate(url: str, tmp_path: Path) -> None:
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url})
    refused = cli("list")
    assert refused.code == 7
    assert "adaptory migrate" in refused.err
    report = cli.json("migrate")
    assert (report["from"], report["to"]) == (None, head_revision())
    assert cli.json("list") == {"items": [], "next": None}
    again = cli.json("migrate")
    assert (again["from"], again["to"]) == (head_revision(), head_revision())


def test_a_migration_names_the_clients_that_are_still_connected_where_the_database_knows(
    url: str, tmp_path: Path
) -> None:
    before = sorted(path.name[:4] for path in (migrations_directory() / "versions").glob("0*.py"))[-2]
    serving = Database(url, role="serve")
    migrate(serving, before)
    ran = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url})("migrate", "--json")
    assert (ran.code, ran.json["from"], ran.json["to"]) == (0, before, head_revision())
    if serving.is_sqlite:
        assert (ran.json["connected"], ran.err) == (None, "")
    else:
        assert [line.partition(" from ")[0] for line in ran.json["connected"]] == [
            f"adaptory serve {socket.gethostname()[:40]} {os.getpid()}"
        ]
        expected = "still connected" if works_with(serving, before) else "stop these processes"
        assert expected in ran.err
        assert ran.json["connected"][0] in ran.err
    serving.close()


def test_an_older_database_asks_for_adaptory_migrate(database: Database, url: str, tmp_path: Path) -> None:
    migrate(database)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    refused = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url})("list")
    assert refused.code == 7
    assert "0000" in refused.err
    assert "adaptory migrate" in refused.err


def test_the_embedded_database_is_made_ready_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.transfer.resources, "ensure_schema", ensure_schema)  # elsewhere tests copy one
    resources = open_resources(Settings(home=tmp_path / "home"))
    assert schema_revision(resources.database) == head_revision()
    with resources.database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    resources.close()


def test_a_password_is_never_printed(tmp_path: Path) -> None:
    cli = Cli({
        "ADAPTORY_HOME": str(tmp_path),
        "ADAPTORY_DATABASE_URL": "postgresql://adaptory:hush-hush@127.0.0.1:1/nowhere",
    })  # fmt: skip
    for command in ("list", "migrate"):
        ran = cli(command)
        assert ran.code == 7
        assert "hush-hush" not in ran.out + ran.err


def _script() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(migrations_directory()))
    return ScriptDirectory.from_config(config)


def test_migrations_are_one_line() -> None:
    assert _script().get_heads() == [head_revision()]
    assert len(_script().get_bases()) == 1


FIRST, *FURTHER = sorted(
    walk_revision.revision for walk_revision in _script().walk_revisions() if walk_revision.revision != head_revision()
)
LINE = "/v1/adapters/acme/sql"
POLICIES: dict[str, dict[str, Any]] = {
    "edge": {"version": 1, "approval": {}},
    "next": {"version": 1, "approval": {"count": 2}, "force": "admin"},
}
"""Set without rules, by channel."""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A registry of today with a row in every table of the first schema. Its rows are copied into `database`, which is
    of either kind."""
    directory = tmp_path_factory.mktemp("filled")
    cli = Cli({"ADAPTORY_HOME": str(directory / "today"), "ADAPTORY_USER": "mia"})
    cli.ok("base", "add", write_base(directory / "base"), "--name", "tiny", "--alias", "Acme/Tiny")
    for seed, version in enumerate(("1.0.0", "1.1.0", "1.2.0", "2.0.0-rc.1")):
        adapter = write_adapter(directory / version, seed)
        cli.ok("push", adapter, f"acme/sql:{version}", "--base", "tiny", "--notes", f"Trained on tickets {seed}")
    with api_of(cli) as api:
        examples = [{"prompt": "a", "completion": "b"}]
        suite = api.post("/v1/suites", {"name": "exact", "kind": "target", "chat": False, "examples": examples})
        score = {"suite_digest": suite["digest"], "metric": "nll", "n": 1, "higher_is_better": False}
        for number, of in enumerate((f"{LINE}/releases/1.0.0", f"{LINE}/releases/1.1.0", "/v1/bases/tiny")):
            api.post(f"{of}/scores", {"scores": [{**score, "value": 0.5 - number / 10}]})
        api.put(f"{LINE}/gates", {"channel": "prod", "rules": ["exact.nll <= 9"]})
        for version in ("1.0.0", "1.1.0"):
            api.put(f"{LINE}/channels/prod", {"version": version, "reason": "better"})
        api.post(f"{LINE}/channels/prod/rollback", {"reason": "worse"})
        for channel, version in (("canary", "1.1.0"), ("canary", "1.2.0"), ("edge", "1.2.0")):
            api.put(f"{LINE}/channels/{channel}", {"version": version, "reason": "to be tried"})
        for step, why in (("yank", "by mistake"), ("unyank", "it was right"), ("yank", "wrong data")):
            api.post(f"{LINE}/releases/1.2.0/{step}", {"reason": why})
        recipe = {"inputs": ["acme/sql:1.0.0"], "method": "stack", "adapter": "acme/sum:1.0.0"}
        made = api.post("/v1/compositions", {"recipe": recipe})
        api.post(f"/v1/compositions/{made['id']}/cancel")
    resources = opened(cli)
    with resources.write() as session:
        session.add(tables.ReleaseInput(release_id=2, input_id=1, composition_id=made["id"], weight=0.5))
        repository = session.scalars(select(tables.Repository.id).where(tables.Repository.name == "sql")).one()
        for channel, policy in POLICIES.items():
            session.add(tables.Gate(repository_id=repository, channel=channel, rules=[], policy=policy))
        for user, at in (("early", datetime(2026, 1, 1, tzinfo=UTC)), ("late", datetime.now(UTC))):
            given = {"token_id": None, "reason": "", "at": at}
            session.add(tables.Approval(release_id=2, channel="prod", user=user, **given))
    resources.close()
    return cli


@pytest.fixture(
    params=[FIRST, *(pytest.param(revision, marks=pytest.mark.long) for revision in FURTHER[:-1]), FURTHER[-1]]
)
def revision(request: pytest.FixtureRequest) -> str:
    """The revision of each earlier schema."""
    return request.param


@pytest.fixture
def earlier(filled: Cli, revision: str, database: Database, url: str, tmp_path: Path) -> Cli:
    """The same registry as it was when the schema was that one."""
    migrate(database, revision)
    earlier = MetaData()
    earlier.reflect(database.engine)
    source = opened(filled)
    with source.read() as today, database.write() as then:
        for table in earlier.sorted_tables:
            if table.name == "alembic_version":
                continue
            now = Row.metadata.tables[table.name]
            query = select(*(now.c[column.name] for column in table.columns))
            rows = [dict(row) for row in today.execute(query).mappings()]
            assert rows or revision != FIRST, f"{table.name} is empty"
            if rows := [old for row in rows if (old := _as_it_was(table.name, row, today, revision))]:
                then.execute(insert(table), rows)
            if not database.is_sqlite and "id" in table.c and isinstance(table.c["id"].type, Integer):
                set_sequence = text("SELECT setval(pg_get_serial_sequence(:name, 'id'), :last)")
                then.execute(set_sequence, {"name": table.name, "last": then.scalar(select(func.max(table.c.id)))})
    source.close()
    home = tmp_path / "then"
    shutil.copytree(Path(filled.environment["ADAPTORY_HOME"]) / "store", home / "store")
    return Cli({"ADAPTORY_HOME": str(home), "ADAPTORY_USER": "mia", "ADAPTORY_DATABASE_URL": url})


def _as_it_was(table: str, row: dict[str, Any], today: Any, revision: str) -> dict[str, Any] | None:
    """The earlier value; None for a row that did not exist."""
    if table == "release_words" and revision < "0004" and row["word"].startswith("/"):
        return None
    if revision != FIRST:
        return row
    if table == "releases":
        return {**row, "facts": {name: value for name, value in row["facts"].items() if name != "spectrum"}}
    if table == "audit":
        return {**row, "detail": _first_detail(today.get(tables.AuditRow, row["id"]))}
    return row


def _first_detail(row: tables.AuditRow) -> dict[str, Any]:
    """The detail that the first schema's `audit.record` received: it had no separate columns."""
    before, after = row.before or {}, row.after or {}
    if row.act in ("channel:promote", "channel:rollback"):
        forced = {"forced": row.detail["forced"]} if row.act == "channel:promote" else {}
        return {"move": after["move"], "to": after["version"], "reason": row.reason or "", **forced}
    if row.act == "release:yank":
        return {"reason": row.reason}
    if row.act == "release:unyank":
        return {"was": before["yank_reason"]}
    if row.act == "gate:set":
        return {"before": before["rules"], "after": after["rules"]}
    if row.act == "score:record":
        return {**row.detail, "before": before.get("value"), "after": after["value"]}
    return {name: value for name, value in after.items() if name != "signed_by"}


@pytest.mark.on("PostgreSQL")
def test_nothing_starts_on_an_earlier_schema_and_each_command_says_what_to_run(earlier: Cli, revision: str) -> None:
    for command in (("serve", "--port", 0), ("worker",), ("fsck",), ("gc",), ("list",)):
        refused = earlier(*command)
        assert refused.code == 7, command
        assert f"The database is at schema {revision}" in refused.err
        assert "adaptory migrate" in refused.err


@pytest.mark.on("PostgreSQL")
def test_a_registry_of_an_earlier_schema_is_served_as_before_once_it_is_migrated(
    earlier: Cli, revision: str, filled: Cli
) -> None:
    report = earlier.json("migrate")
    assert (report["from"], report["to"]) == (revision, head_revision())
    checked = earlier.json("fsck", "--full")
    assert (checked["clean"], checked["findings"]) == (True, [])
    for command in (
        ("list",),
        ("log", "acme/sql"),
        ("show", "acme/sql:1.1.0"),
        ("show", "acme/sql"),
        ("history", "acme/sql@prod"),
        ("jobs",),
        ("search", "--base", "Acme/Tiny", "--max-rank", 4, "--targets-within", "q_proj"),
        ("search", "TICKETS", "1"),
        ("search", "--score", "exact.nll <= 0.45"),
        ("search", "--base", "tiny", "--sort", "exact.nll"),
        ("search", "--namespace", "acme"),
        ("search", "--namespace", "acme", "--sort", "version"),
        *(("search", "--channel", channel) for channel in ("prod", "canary", "edge")),
    ):
        assert _shared_fields(earlier.json(*command)) == _shared_fields(filled.json(*command)), command
    assert [row["version"] for row in earlier.json("search", "TICKETS", "1")["items"]] == ["1.1.0"]
    assert len(earlier.json("search", "--namespace", "acme")["items"]) == 3
    for channel, served in {"prod": ["1.0.0"], "canary": ["1.1.0"], "edge": []}.items():  # 1.2.0 is yanked
        assert [row["version"] for row in earlier.json("search", "--channel", channel)["items"]] == served
    with api_of(earlier) as api:
        assert [row["namespace"] for row in api.pages("/v1/namespaces")] == ["acme"]
        acts = [row["act"] for row in api.pages("/v1/audit", namespace="acme")]
        assert {"release:publish", "channel:promote", "channel:rollback", "release:yank"} <= set(acts)
        assert api.get(f"{LINE}/gates") == {"gates": {"prod": ["exact.nll <= 9"], "edge": [], "next": []}}


def test_policies_and_approvals_mean_after_a_migration_what_they_meant(earlier: Cli, revision: str) -> None:
    """An approval counts if it came after the last move to its release, a policy that requires one states who may force
    it, and rules are pinned to their current suites."""
    earlier.ok("migrate")
    with api_of(earlier) as api:
        digest = api.get("/v1/suites/exact")["digest"]
    resources = opened(earlier)
    with resources.read() as session:
        gates = {row.channel: row for row in session.scalars(select(tables.Gate))}
        assert gates["prod"].pins == {"exact": {"digest": digest, "higher_is_better": {"nll": False}}}
        if "0011" <= revision < "0021":  # 0011 brought policies, 0021 states who may force
            assert gates["edge"].policy == {**POLICIES["edge"], "force": "releaser"}
            assert gates["next"].policy == POLICIES["next"]
            release = session.get_one(tables.Release, 2)
            assert [unspent_approval.user for unspent_approval in unspent_approvals(session, release, "prod")] == [
                "late"
            ]
    resources.close()


@pytest.mark.on("PostgreSQL")
def test_what_was_done_before_a_migration_is_shown_with_its_reason_and_its_change(
    earlier: Cli, revision: str, filled: Cli
) -> None:
    earlier.ok("migrate")
    was, now = (_acts(cli) for cli in (filled, earlier))
    if revision != FIRST:
        assert now == was
        return
    assert [row["act"] for row in now] == [row["act"] for row in was]
    for old, new in zip(was, now, strict=True):
        if old["act"] in CHANGES.values():
            continue  # the first schema's versions wrote none
        lost = {"n", "signed_by", *(("commit",) if old["act"].startswith("channel:") else ())}  # by the first schema
        assert new["after"] == _without(old["after"], lost), old
        if old["act"] in ("gate:set", "release:yank", "release:unyank"):
            assert new["before"] == old["before"], old
        assert new["reason"] == (old["reason"] if old["act"] != "release:unyank" else None), old
    records = " ".join(earlier.ok("audit", "--namespace", "acme").out.split())
    for text_shown in ("better", "worse", "wrong data", "version 1.1.0", "yanked False -> True yank_reason wrong data"):
        assert text_shown in records, records


def test_more_old_audit_rows_than_one_batch_has_are_shown_with_their_reasons(database: Database) -> None:
    migrate(database, FIRST)
    earlier = MetaData()
    earlier.reflect(database.engine)
    old = {"at": datetime.now(UTC), "actor": "mia", "act": "release:yank", "subject": "acme/sql:1.0.0"}
    details = [{"reason": f"wrong {number}"} if number % 3 else {} for number in range(2_500)]
    with database.write() as session:
        session.execute(insert(earlier.tables["audit"]), [{**old, "detail": detail} for detail in details])
    migrate(database)
    with database.read() as session:
        rows = session.scalars(select(tables.AuditRow).order_by(tables.AuditRow.id)).all()
        assert [row.reason for row in rows] == [detail.get("reason") for detail in details]
        assert [row.detail for row in rows] == details
        assert {row.after is None for row in rows if row.reason is None} == {True}


def _acts(cli: Cli) -> list[dict[str, Any]]:
    with api_of(cli) as api:
        return list(api.pages("/v1/audit"))


def _without(change: dict[str, Any] | None, lost: set[str]) -> dict[str, Any] | None:
    return None if change is None else {name: value for name, value in change.items() if name not in lost}


def _shared_fields(document: dict[str, Any]) -> dict[str, Any]:
    """The fields that the first schema had too."""
    later = ("spectrum", "servers", "loading", "namespace", "memory_bytes", "needs")
    kept: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            kept[name] = _shared_fields(value)
        elif isinstance(value, list):
            kept[name] = [_shared_fields(item) if isinstance(item, dict) else item for item in value]
        elif name not in later:
            kept[name] = value
    return {name: value for name, value in kept.items() if name not in later}


def test_a_migrated_registry_goes_on(earlier: Cli, filled: Cli, tmp_path: Path) -> None:
    earlier.ok("migrate")
    earlier.ok("pull", "acme/sql@prod", "-o", tmp_path / "pulled")
    pulled = (tmp_path / "pulled" / "adapter_model.safetensors").read_bytes()
    assert pulled == (Path(filled.environment["ADAPTORY_HOME"]).parent / "1.0.0" / WEIGHTS_FILE).read_bytes()
    with api_of(earlier) as api:
        row = api.get(f"{LINE}/releases/1.0.0")["files"][0]
        assert api.post("/v1/uploads", {"namespace": "acme", "files": [row]})["files"][0]["present"]
        assert not api.post("/v1/uploads", {"namespace": "other", "files": [row]})["files"][0]["present"]
    earlier.ok("push", write_adapter(tmp_path / "new", 9), "acme/sql", "--base", "tiny", "--bump", "minor")
    earlier.ok("promote", "acme/sql:1.1.0", "--to", "prod")
    earlier.ok("rollback", "acme/sql@prod", "--reason", "still worse")
    assert [move["to_version"] for move in earlier.json("history", "acme/sql@prod")["items"]] == [
        "1.0.0",
        "1.1.0",
        "1.0.0",
        "1.1.0",
        "1.0.0",
    ]
    earlier.ok("gc", "--grace-hours", 0)
    assert earlier.json("fsck", "--full")["clean"]
