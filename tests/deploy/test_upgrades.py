"""The next version takes over while this one serves, and clients of the previous version keep working. The next version
is this one with another migration. The previous version is the last commit with another schema, from the history of the
checkout."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import Column, MetaData, UniqueConstraint, text

from registry.database.engine import Database
from registry.database.migrate import LOOK_S, head_revision, migrate, migrations_directory
from registry.environment.settings import Settings
from registry.errors import Unavailable
from registry.transfer.resources import open_resources
from tests import services
from tests.deploy.stack import Stack, wait_until_ready
from tests.deploy.test_restarts import LINE, Load, go_on, ok
from tests.durability.small import write_adapter, write_base
from tests.eventually import eventually
from tests.ports import free_ports
from tests.scenarios.world import Cli

CHECKOUT = Path(__file__).parents[2]
FILE = {"path": "a", "sha256": "0" * 64, "size_bytes": 9}
SUITE = {"kind": "target", "chat": False, "examples": [{"prompt": "a", "completion": "b"}]}
NEXT = f"{int(head_revision()) + 1:04}"
MIGRATION = f'''"""something new"""

import sqlalchemy as sa
from alembic import op

revision = "{NEXT}"
down_revision = "{head_revision()}"
oldest_code = "{{oldest}}"


def upgrade() -> None:
    op.add_column("releases", sa.Column("mood", sa.String(10), nullable=False, server_default="calm"))
    op.create_table("moods", sa.Column("name", sa.String(10), primary_key=True))
'''


@dataclass(frozen=True)
class Version:
    """The sources of a version, run with this environment's packages."""

    directory: Path

    def command(self, *words: object) -> list[str]:
        start = f"import sys; sys.path.insert(0, {str(self.directory)!r}); from registry.cli.start import main; main()"
        return [sys.executable, "-P", "-c", start, *map(str, words)]

    def run(self, environment: Mapping[str, str], *words: object) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}
        return subprocess.run(
            self.command(*words), env={**kept, **environment}, capture_output=True, text=True, timeout=120
        )

    def json(self, environment: Mapping[str, str], *words: object) -> Any:
        ran = self.run(environment, *words, "--json")
        assert ran.returncode == 0, f"{words}: {ran.stdout}{ran.stderr}"
        return json.loads(ran.stdout)


def next_version(directory: Path, oldest: str) -> Version:
    """This version with a migration that declares itself compatible with the code of schema `oldest`."""
    for name in ("registry", "composer", "migrations"):
        shutil.copytree(CHECKOUT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "migrations" / "versions" / f"{NEXT}_moods.py").write_text(MIGRATION.format(oldest=oldest))
    return Version(directory)


@pytest.fixture
def environ(pairing: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a registry with a base and six releases."""
    variables = {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": "mia", **pairing}
    cli = Cli(variables)
    cli.ok("base", "add", write_base(tmp_path / "base"), "--name", "tiny")
    return variables


@pytest.mark.long
def test_the_next_version_takes_over_from_this_one_without_a_failed_request(
    environ: dict[str, str], tmp_path: Path
) -> None:
    cli, ports = Cli(environ), free_ports(2)
    for number in range(6):
        adapter = write_adapter(tmp_path / str(number), number)
        cli.ok("push", adapter, f"acme/sql:1.{number}.0", "--base", "tiny")
    version = next_version(tmp_path / "next", head_revision())
    settings = environ | {"ADAPTORY_DRAIN_S": "3"}
    with Stack(tmp_path, settings) as stack:
        servers, worker = [stack.server(port) for port in ports], stack.worker()
        proxy = stack.proxy(*ports, ADAPTORY_TRY_FOR="0s")
        with Load(proxy.url, stack.trust, tmp_path / "pushed") as load:
            go_on(load)
            assert version.json(settings, "migrate")["to"] == NEXT
            go_on(load)
            assert httpx2.get(f"{servers[0].url}/readyz", timeout=30).status_code == 200
            refused = cli("gc")
            assert (refused.code, "newer than" in refused.err) == (7, True), "it does not know all that names a blob"
            for server, port in zip(servers, ports, strict=True):
                server.ask_to_stop()
                assert server.stopped() == 0
                newer = stack.start("next", version.command("serve", "--no-worker", "--port", port))
                newer.url = server.url
                wait_until_ready(newer)
                go_on(load)
            worker.ask_to_stop()
            assert worker.stopped() == 0
            stack.start("next-worker", version.command("worker"))
            go_on(load)
        assert load.failures == []
    assert version.json(settings, "fsck")["clean"]


@pytest.mark.long
def test_after_a_migration_that_it_does_not_work_with_this_version_reads_on_and_changes_nothing(
    environ: dict[str, str], tmp_path: Path
) -> None:
    for number in range(2):
        adapter = write_adapter(tmp_path / str(number), number)
        Cli(environ).ok("push", adapter, f"acme/sql:1.{number}.0", "--base", "tiny")
    version, wanted = next_version(tmp_path / "next", NEXT), [{"adapter": f"acme/sql:1.{n}.0"} for n in range(2)]
    with Stack(tmp_path, environ) as stack, httpx2.Client(timeout=60) as client:
        server, worker, port = stack.server(services.free_port()), stack.worker(), services.free_port()
        migrated = version.run(environ, "migrate")
        assert f"-> {NEXT}" in migrated.stdout
        if "ADAPTORY_DATABASE_URL" in environ:
            assert "stop these processes" in migrated.stderr
            for one, name in ((server, "serve"), (worker, "worker")):
                assert f"adaptory {name} {socket.gethostname()[:40]} {one.process.pid}" in migrated.stderr
        newer = stack.start("next", version.command("serve", "--no-worker", "--port", port))
        newer.url = f"http://127.0.0.1:{port}"
        wait_until_ready(newer)
        time.sleep(LOOK_S)
        job = ok(client.post(f"{newer.url}/v1/conflicts", json={"inputs": wanted})).json()["id"]
        was = Cli({**environ, "ADAPTORY_URL": newer.url}).json("audit")
        browser = {"Origin": server.url, "Accept": "text/html"}
        (token,) = re.findall(r'name="form_token" value="(\w+)"', client.get(f"{server.url}/acme/sql/1.0.0/yank").text)
        changes: tuple[tuple[str, str, dict[str, Any]], ...] = (
            ("POST", "/v1/suites", {"json": {**SUITE, "name": "other"}}),
            ("PUT", f"{LINE}/channels/prod", {"json": {"version": "1.0.0"}}),
            ("POST", f"{LINE}/releases/1.0.0/yank", {"json": {"reason": "bad"}}),
            ("POST", "/v1/uploads", {"json": {"namespace": "acme", "files": [FILE]}}),
            ("POST", "/api/repos/create", {"json": {"organization": "acme", "name": "new"}}),
            ("POST", "/acme/sql/1.0.0/yank", {"data": {"reason": "bad", "form_token": token}, "headers": browser}),
        )
        for method, path, body in changes:
            refused = client.request(method, f"{server.url}{path}", **body)
            assert refused.status_code == 503, (path, refused.text)
            assert "newer than" in refused.text, path
        assert refused.headers["content-type"].startswith("text/html")
        for path in ("/v1/resolve?ref=acme/sql:1.0.0", f"{LINE}/releases/1.0.0", "/api/models/acme/sql", "/acme/sql"):
            assert client.get(f"{server.url}{path}").status_code == 200, path
        assert client.get(f"{server.url}/readyz").json()["code"] == "schema_new"
        assert Cli({**environ, "ADAPTORY_URL": newer.url}).json("audit") == was
        eventually(lambda: "takes no jobs for now" in worker.said())
        assert client.get(f"{newer.url}/v1/conflicts/{job}").json()["state"] == "queued"
        stack.start("next-worker", version.command("worker"))
        eventually(lambda: client.get(f"{newer.url}/v1/conflicts/{job}").json()["state"] == "done")


def test_this_version_serves_a_later_schema_that_it_works_with_and_changes_nothing_else_there(
    environ: dict[str, str], tmp_path: Path
) -> None:
    settings = Settings.model_validate(
        {"home": tmp_path / "home", "database_url": environ.get("ADAPTORY_DATABASE_URL")}
    )
    known = open_resources(settings)
    _say(known.database, NEXT, head_revision())
    open_resources(settings, serving="serve").close()
    with pytest.raises(Unavailable, match="newer than"):
        open_resources(settings)
    for words in (("gc",), ("fsck",), ("migrate",), ("backup", tmp_path / "saved")):
        assert Cli({**environ, "ADAPTORY_STORAGE__KIND": "local"})(*words).code == 7, words
    _say(known.database, NEXT, NEXT)
    with pytest.raises(Unavailable, match="newer than"):
        open_resources(settings, serving="serve")
    known.close()


def _say(database: Database, revision: str, oldest: str) -> None:
    with database.write() as session:
        said = text("UPDATE alembic_version SET version_num = :revision, oldest_code = :oldest")
        session.execute(said, {"revision": revision, "oldest": oldest})


def breaks(old: MetaData, new: MetaData) -> list[str]:
    """Changes in the new schema that break statements written for the old one."""
    said: list[str] = []
    for name, table in old.tables.items():
        if name not in new.tables:
            said.append(f"{name} is gone")
            continue
        now = new.tables[name]
        for column in table.columns:
            if column.name not in now.c:
                said.append(f"{name}.{column.name} is gone")
            elif str(now.c[column.name].type) != str(column.type):
                said.append(f"{name}.{column.name} has another type")
            elif column.nullable and not now.c[column.name].nullable:
                said.append(f"{name}.{column.name} must have a value now")
        said += [
            f"{name}.{column.name} has no default"
            for column in now.columns
            if column.name not in table.c and _bare(column)
        ]
        said += [f"{name} has a new rule {rule}" for rule in sorted(_rules(now) - _rules(table))]
    return said


def _bare(column: Column[Any]) -> bool:
    return not column.nullable and column.server_default is None


def _rules(table: Any) -> set[str]:
    """Names of the constraints and triggers that can fail a write."""
    unique = {str(constraint.name) for constraint in table.constraints if isinstance(constraint, UniqueConstraint)}
    return unique | {str(index.name) for index in table.indexes if index.unique}


def schema_of(kind: str, directory: Path, revision: str) -> MetaData:
    directory.mkdir(exist_ok=True)
    database, schema = Database(services.new_database_of(kind, directory)), MetaData()
    migrate(database, revision)
    schema.reflect(database.engine)
    database.close()
    return schema


REVISIONS = sorted(path.name[:4] for path in (migrations_directory() / "versions").glob("0*.py"))
FREE = "0018"
"""Up to here, servers were stopped for a migration."""


@pytest.mark.parametrize("kind", services.DATABASES)
def test_a_migration_leaves_to_the_code_before_it_what_that_code_uses(kind: str, tmp_path: Path) -> None:
    """A migration that cannot declares this in its `oldest_code`, and its changelog states that servers must stop."""
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(migrations_directory()))
    for script in ScriptDirectory.from_config(config).walk_revisions():
        if script.revision <= FREE:
            continue
        oldest = getattr(script.module, "oldest_code", None)
        assert oldest is not None, f"{script.revision} does not say which code it works with (docs/contributing.md)"
        if oldest < script.revision:
            old, new = (schema_of(kind, tmp_path / revision, revision) for revision in (oldest, script.revision))
            assert breaks(old, new) == [], script.revision


@pytest.mark.long
def test_what_the_code_before_trips_over_is_seen(tmp_path: Path) -> None:
    old, new = (schema_of("SQLite", tmp_path / revision, revision) for revision in ("0021", "0022"))
    assert breaks(old, new) == [], "it only added"
    assert breaks(new, old) != [], "the way back takes things away"
    first, second = (schema_of("SQLite", tmp_path / revision, revision) for revision in ("0004", "0005"))
    second.tables["releases"].c["notes"].nullable = False
    first.tables["releases"].c["notes"].nullable = True
    second.tables["releases"].append_column(Column("mood", second.tables["releases"].c["notes"].type, nullable=False))
    second.tables["releases"].append_constraint(UniqueConstraint("notes", name="uq_notes"))
    assert breaks(first, second) == [
        "releases.notes must have a value now",
        "releases.mood has no default",
        "releases has a new rule uq_notes",
    ]


def _history(*words: str) -> bytes | None:
    """The output of git; None without a history."""
    git = shutil.which("git")
    ran = subprocess.run([git, "-C", CHECKOUT, *words], capture_output=True) if git else None
    return ran.stdout if ran is not None and ran.returncode == 0 else None


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The last tag or, before the first, the last commit with another schema than today's."""
    commit = (_history("describe", "--tags", "--abbrev=0") or b"").decode().strip()
    if not commit:
        newest = next((migrations_directory() / "versions").glob(f"{head_revision()}_*.py")).relative_to(CHECKOUT)
        added = (_history("log", "--diff-filter=A", "--format=%H", "-1", "--", str(newest)) or b"").decode().strip()
        commit = f"{added}^" if added else ""
    archive = _history("archive", commit, "registry", "composer", "migrations") if commit else None
    if archive is None:
        pytest.skip("this checkout has no history with the version before")
    directory = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(directory, filter="data")
    return Version(directory)


@pytest.mark.long
@pytest.mark.parametrize("newer", ["server", "client"])
def test_a_client_and_a_server_of_two_versions_release_together(before: Version, tmp_path: Path, newer: str) -> None:
    now = Version(CHECKOUT)
    serving, client = (now, before) if newer == "server" else (before, now)
    port, adapters = services.free_port(), [write_adapter(tmp_path / str(number), number) for number in range(2)]
    with Stack(tmp_path, {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": "mia"}) as stack:
        server = stack.start("server", serving.command("serve", "--port", port))
        server.url = f"http://127.0.0.1:{port}"
        wait_until_ready(server)
        user = {"ADAPTORY_URL": server.url, "ADAPTORY_HOME": str(tmp_path / "client")}
        client.json(user, "base", "add", write_base(tmp_path / "base"), "--name", "tiny")
        for number, adapter in enumerate(adapters):
            client.json(user, "push", adapter, f"acme/sql:1.{number}.0", "--base", "tiny")
            client.json(user, "promote", f"acme/sql:1.{number}.0", "--to", "prod", "--reason", "why not")
        client.json(user, "rollback", "acme/sql@prod", "--reason", "that is why")
        client.json(user, "yank", "acme/sql:1.1.0", "--reason", "worse")
        pulled = tmp_path / "pulled"
        assert client.run(user, "pull", "acme/sql@prod", "-o", pulled).returncode == 0
        weights = "adapter_model.safetensors"
        assert (pulled / weights).read_bytes() == (adapters[0] / weights).read_bytes()
        for words in (("search", "--base", "tiny"), ("log", "acme/sql"), ("history", "acme/sql@prod"), ("jobs",)):
            assert client.json(user, *words)["items"] is not None
        assert client.json(user, "show", "acme/sql@prod")["version"] == "1.0.0"
        assert client.json(user, "conflicts", "acme/sql:1.0.0", "acme/sql:1.1.0")["pairs"]


@pytest.mark.long
@pytest.mark.parametrize("newer", ["server", "worker"])
def test_a_worker_and_a_server_of_two_versions_share_the_jobs(before: Version, tmp_path: Path, newer: str) -> None:
    """A job of an older server has no needs until a newer worker declares them; an older worker ignores needs."""
    now = Version(CHECKOUT)
    serving, working = (now, before) if newer == "server" else (before, now)
    home = {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": "mia"}
    base, adapter, port = write_base(tmp_path / "base"), write_adapter(tmp_path / "0", 0), services.free_port()
    now.json(home, "migrate")
    recipe = tmp_path / "recipe.json"
    content = {"inputs": ["acme/sql:1.0.0"], "method": "stack", "adapter": "acme/copy:1.0.0", "probe": 0}
    recipe.write_text(json.dumps({**content, "model": "acme/merged:1.0.0"}))
    with Stack(tmp_path, home) as stack:
        server = stack.start("server", serving.command("serve", "--no-worker", "--port", port))
        server.url = f"http://127.0.0.1:{port}"
        wait_until_ready(server)
        user = {"ADAPTORY_URL": server.url, "ADAPTORY_HOME": str(tmp_path / "client")}
        serving.json(user, "base", "add", base, "--name", "tiny")
        serving.json(user, "push", adapter, "acme/sql:1.0.0", "--base", "tiny")
        worker = stack.start("worker", working.command("worker"))
        assert serving.json(user, "compose", recipe, "--follow")["state"] == "done"
        worker.ask_to_stop()
        assert worker.stopped() == 0
    job = now.json(home, "jobs", 1)
    assert job["state"] == "done"
    assert [need[:5] for need in job["needs"]] == ["base:"]
