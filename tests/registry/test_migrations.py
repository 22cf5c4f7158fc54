"""The schema that the migrations make is the one that the tables describe, on both databases."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

import registry.models  # noqa: F401  (fills the metadata)
from registry.db import Database, Row, ensure_schema, head_revision, migrate, schema_revision
from registry.errors import Unavailable
from registry.resources import open_resources
from registry.settings import Settings
from tests import services
from tests.scenarios.world import Cli


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "SQLite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    return services.new_database()


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


def test_processes_that_migrate_at_once_do_not_disturb_each_other(url: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}
    environment |= {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url}
    command = [sys.executable, "-m", "registry.cli.main", "migrate", "--json"]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)
    ]
    ended = [(process.communicate(timeout=60)[1].decode(), process.returncode) for process in running]
    assert [code for _, code in ended] == [0, 0, 0], ended
    opened = Database(url)
    assert schema_revision(opened) == head_revision()
    opened.close()


def test_a_database_of_a_newer_adaptory_is_refused_and_says_what_to_do(
    database: Database, url: str, tmp_path: Path
) -> None:
    migrate(database)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for create in (True, False):
        with pytest.raises(Unavailable) as raised:
            ensure_schema(database, create=create)
        assert raised.value.code == "schema_new"
    ran = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url})("list")
    assert ran.code == 7
    assert "9999" in ran.err
    assert "Install a newer adaptory" in ran.err


def test_an_empty_database_that_is_not_embedded_asks_for_adaptory_migrate(url: str, tmp_path: Path) -> None:
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url})
    refused = cli("list")
    assert refused.code == 7
    assert "adaptory migrate" in refused.err
    told = cli.json("migrate")
    assert (told["from"], told["to"]) == (None, head_revision())
    assert cli.json("list") == {"items": [], "next": None}
    again = cli.json("migrate")
    assert (again["from"], again["to"]) == (head_revision(), head_revision())


def test_an_older_database_asks_for_adaptory_migrate(database: Database, url: str, tmp_path: Path) -> None:
    migrate(database)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    refused = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_DATABASE_URL": url})("list")
    assert refused.code == 7
    assert "0000" in refused.err
    assert "adaptory migrate" in refused.err


def test_the_embedded_database_is_made_ready_without_being_asked(tmp_path: Path) -> None:
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


def test_migrations_are_one_line(tmp_path: Path) -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    from registry.db import migrations_directory

    config = Config()
    config.set_main_option("script_location", str(migrations_directory()))
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [head_revision()]
    assert len(script.get_bases()) == 1
