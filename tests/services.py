"""The real services that tests use where they are found: PostgreSQL and an S3 server, started once for a whole run.

For a developer they run until they are stopped:

    eval "$(python -m tests.services start .services)"    # exports what `adaptory migrate` and `adaptory serve` read
    python -m tests.services stop .services
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.util import LRUCache

from registry.database.engine import Database
from registry.database.migrate import ensure_schema, migrate
from registry.environment.settings import Settings
from registry.transfer.resources import open_resources
from registry.transfer.store_facts import probe_if_unknown
from tests import s3_server
from tests.command_environment import environment
from tests.ports import free_ports
from tests.s3_server import S3Server, locked

REQUIRED = os.environ.get("ADAPTORY_REQUIRE_SERVICES") == "1"
DIRECTORY = "ADAPTORY_TEST_SERVICES"
"""The environment variable that brings the directory of this run's services to every test process."""
DATABASES = ("SQLite", "PostgreSQL")
PAIRINGS = ("SQLite and a directory", "PostgreSQL and S3")
ONE_PAIRING = (PAIRINGS[0], pytest.param(PAIRINGS[1], marks=pytest.mark.long))
"""For tests that hardly depend on the database and the store: `make test-long` runs the other pairing."""
STRICTER_PAIRING = (pytest.param(PAIRINGS[0], marks=pytest.mark.long), PAIRINGS[1])
"""The same for tests with odd values: PostgreSQL refuses more of them."""
NOT_RUNNING = 3
"""The exit code of `pg_ctl status` for a cluster without a server."""
_MIGRATED = "migrated"
_MEMORY = Path("/dev/shm")  # noqa: S108 - directories in it are made by mkdtemp
_MEMORY_BYTES = 4 << 30
"""The space that must be free there: Docker provides 64 MB. A run needs 1.6 GB at its peak."""
_missing: dict[str, str] = {}
_made: list[str] = []
"""The URLs of the databases that this process made and has not dropped yet."""


def missing() -> dict[str, str]:
    """Missing services: name -> how to get it."""
    return dict(_missing)


def add_missing(names: dict[str, str]) -> None:
    _missing.update(names)


def unavailable(name: str, hint: str) -> None:
    """Skips the test that needs the service, or fails it where every service must be there."""
    _missing[name] = hint
    if REQUIRED:
        pytest.fail(f"{name} is required here: {hint}")
    pytest.skip(f"{name} not found: {hint}")


def free_port() -> int:
    return free_ports(1)[0]


@contextmanager
def without_pytest() -> Generator[Path]:
    """A directory for what these modules write, where a benchmark uses them."""
    directory = new_directory()
    os.environ[DIRECTORY] = str(directory)
    try:
        yield directory
    finally:
        del os.environ[DIRECTORY]
        remove(directory)


def shared_directory() -> Path:
    return Path(os.environ[DIRECTORY])


def new_directory() -> Path:
    """A directory for the files of a run: its services and the tests' own files, which are removed with it. In memory
    if possible: a disk would take an eighth of the time."""
    memory = _memory()
    directory = Path(mkdtemp(prefix=_RUN, dir=memory))
    if memory:
        _lives(directory)
    return directory


def remove(directory: Path) -> None:
    """Stops the services of a run that is over, and removes its directory."""
    stop_all(directory)
    shutil.rmtree(directory)


_RUN = "adaptory-run-"
_kept_open: list[int] = []


def _memory() -> Path | None:
    """The file system in memory, if there is one with enough space that supports extended attributes, as Swift
    requires."""
    if not _MEMORY.is_dir() or not os.access(_MEMORY, os.W_OK):
        return None
    _remove_what_dead_runs_left()
    with TemporaryDirectory(dir=_MEMORY) as tried, suppress(OSError):
        os.setxattr(tried, "user.adaptory", b"1")
        if shutil.disk_usage(tried).free >= _MEMORY_BYTES:
            return _MEMORY
    return None


def _lives(directory: Path) -> bool:
    """Whether a run uses the directory: it locks it as long as it lives. If none does, this one does from now on."""
    handle = os.open(directory / "run", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return True
    _kept_open.append(handle)
    return False


def _remove_what_dead_runs_left() -> None:
    """A directory younger than a minute may be about to be locked."""
    for directory in _MEMORY.glob(f"{_RUN}*"):
        made = directory.stat()
        if made.st_uid == os.geteuid() and made.st_mtime < time.time() - 60 and not _lives(directory):
            remove(directory)


def shared_postgres() -> str:
    """The URL of the first database of the run's one cluster."""
    if postgres_binaries() is None:
        unavailable("PostgreSQL", "apt-get install postgresql")
    return start_postgres(shared_directory() / "postgres")


def pairing(name: str, *, kept: bool = False) -> dict[str, str]:
    """The environment of an empty registry's database and store, migrated; where none is named both are in its home.

    What is kept stays to the end of the run, past its `dropped_databases`.
    """
    if name == PAIRINGS[0]:
        return {}
    return copied_pairing({"ADAPTORY_DATABASE_URL": _probed_database()}, kept=kept)


def copied_pairing(of: Mapping[str, str], *, kept: bool = False, blobs: bool = False) -> dict[str, str]:
    """A pairing with a copy of that database, to which nobody may be connected, and an empty store unless the blobs are
    copied too."""
    if not of:
        return {}
    prefix = f"{uuid.uuid4().hex}/"
    store = shared_s3().environment(prefix)
    if blobs:
        _copy_objects(of["ADAPTORY_STORAGE__PREFIX"], prefix)
    return {**store, "ADAPTORY_DATABASE_URL": copied_database(of["ADAPTORY_DATABASE_URL"], kept=kept)}


def _copy_objects(prefix: str, to: str) -> None:
    s3 = shared_s3().client()
    for row in s3.list_objects_v2(Bucket=s3_server.BUCKET, Prefix=prefix).get("Contents", ()):
        key = to + row["Key"].removeprefix(prefix)
        s3.copy_object(Bucket=s3_server.BUCKET, Key=key, CopySource={"Bucket": s3_server.BUCKET, "Key": row["Key"]})


def _probed_database() -> str:
    """A migrated database with the probe of the run's store: without it each first start takes a second longer."""
    with locked(shared_directory() / "probed.lock"):
        kept = shared_directory() / "probed.url"
        if not kept.exists():
            url = new_database(migrated=True, kept=True)
            with environment({**shared_s3().environment(), "ADAPTORY_DATABASE_URL": url}, []):
                resources = open_resources(Settings())
                probe_if_unknown(resources.store)
                resources.close()
            kept.write_text(url)
        return kept.read_text()


def share_statements(patch: Callable[[object, str, object], None]) -> None:
    """Keeps compiled statements by dialect for all databases: those of two SQLite databases are as good as one."""
    statements = LRUCache[Any, Any](5000)
    patch(DefaultDialect, "__eq__", lambda one, other: type(one) is type(other))
    patch(DefaultDialect, "__hash__", lambda dialect: hash(type(dialect)))
    patch(Engine, "_compiled_cache", property(lambda _: statements, lambda *_: None))


def new_database_of(kind: str, directory: Path, *, migrated: bool = False) -> str:
    """The URL of a database of one's own; SQLite's is a file in the directory."""
    if kind == "PostgreSQL":
        return new_database(migrated=migrated)
    path = directory / "registry.db"
    if migrated:
        copy_migrated_sqlite(shared_directory(), path)
    return f"sqlite:///{path}"


def copy_migrated_sqlite(shared: Path, path: Path) -> None:
    """Makes a database with our tables unless the file has content. Its migrations take 0.25 s, a copy a millisecond.
    Commands make the file first, empty and with their mode."""
    with locked(shared / "sqlite.lock"):
        template = shared / f"{_MIGRATED}.db"
        if not template.exists():
            database = Database(f"sqlite:///{template}")
            migrate(database)
            database.close()
        if not _has_content(path):
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            shutil.copyfile(template, part)
            part.chmod(0o600)
            part.replace(path)


def ensure_schema_by_copy(shared: Path, database: Database, *, create: bool, newer: bool = False) -> None:
    """An `ensure_schema` that creates the tables of an embedded database by copying a file."""
    if create and database.url.database and not _has_content(Path(database.url.database)):
        copy_migrated_sqlite(shared, Path(database.url.database))
    ensure_schema(database, create=create, newer=newer)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def new_database(*, migrated: bool = False, kept: bool = False) -> str:
    """The URL of a database of one's own in the run's cluster; one with our tables is a copy of one made earlier."""
    with locked(shared_directory() / "databases.lock"):
        url = shared_postgres()
        if migrated and not _exists(url, _MIGRATED):
            database = Database(_create_database(url, _MIGRATED))
            migrate(database)
            database.close()
        return _own_database(url, _MIGRATED if migrated else "template1", kept)


def copied_database(url: str, *, kept: bool = False) -> str:
    """A separate copy of this database, to which nobody may be connected."""
    with locked(shared_directory() / "databases.lock"):
        return _own_database(url, url.rpartition("/")[2], kept)


@contextmanager
def dropped_databases() -> Generator[None]:
    """Drops at its end the databases that this process makes in it: 9 MB each, and a run makes a thousand."""
    first = len(_made)
    yield
    for url in _made[first:]:
        with _administration(f"{url.rpartition('/')[0]}/postgres") as connection:
            dropped = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
            connection.execute(dropped.format(sql.Identifier(url.rpartition("/")[2])))
    del _made[first:]


def _own_database(url: str, template: str, kept: bool) -> str:
    made = _create_database(url, f"t{uuid.uuid4().hex}", template)
    if not kept:
        _made.append(made)
    return made


def _create_database(url: str, name: str, template: str = "template1") -> str:
    with _administration(url) as connection:
        created = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
        connection.execute(created.format(sql.Identifier(name), sql.Identifier(template)))
    return f"{url.rpartition('/')[0]}/{name}"


def _exists(url: str, name: str) -> bool:
    with _administration(url) as connection:
        return connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone() is not None


def _administration(url: str) -> psycopg.Connection:
    return psycopg.connect(url, autocommit=True)


def shared_s3() -> S3Server:
    """The run's one server: others use it too, so keep to a prefix and leave it running."""
    if "S3 server" in _missing:
        unavailable("S3 server", _missing["S3 server"])
    try:
        return s3_server.started(shared_directory() / "s3")
    except (OSError, RuntimeError) as error:
        unavailable("S3 server", f"{str(error)[-500:]} (it is installed with pip and needs python3-venv)")
        raise


def stop_all(directory: Path) -> None:
    stop_postgres(directory / "postgres")
    s3_server.load(directory / "s3").stop()


def postgres_binaries() -> Path | None:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if installed:
        return installed[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


@contextmanager
def postgres(directory: Path, max_connections: int = 400) -> Generator[str]:
    """A separate cluster below `directory`; yields the URL of its first database."""
    try:
        yield start_postgres(directory, max_connections)
    finally:
        stop_postgres(directory)


def start_postgres(directory: Path, max_connections: int = 400) -> str:
    """Starts a cluster on a free port, unless it is running; returns the URL of its first database."""
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()  # the server's user may not follow a link of ours
    with locked(directory / "lock"):
        pid_file = directory / "pg" / "cluster" / "postmaster.pid"
        if not pid_file.exists():
            _start_postgres(directory / "pg", max_connections)
        port = pid_file.read_text().splitlines()[3]
        return f"postgresql://adaptory@127.0.0.1:{port}/postgres"


def stop_postgres(directory: Path) -> None:
    """Stops the cluster, which a test may have stopped or killed before."""
    cluster = directory.resolve() / "pg" / "cluster"
    if (cluster / "postmaster.pid").exists():
        _as_postgres("pg_ctl", "-D", cluster, "-w", "-m", "immediate", "stop", may_fail=True)
    if cluster.exists() and _as_postgres("pg_ctl", "-D", cluster, "status", may_fail=True) != NOT_RUNNING:
        raise RuntimeError(f"The cluster in {cluster} does not stop: see {directory / 'pg' / 'log'}")


def _start_postgres(data: Path, max_connections: int) -> None:
    cluster = data / "cluster"
    if not cluster.exists():
        data.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:  # the server refuses to run as root
            shutil.chown(data, "postgres")
            for parent in data.resolve().parents:
                if parent.owner() == "root" and parent != Path("/"):
                    parent.chmod(parent.stat().st_mode | 0o011)
        _as_postgres("initdb", "-D", cluster, "-U", "adaptory", "--auth=trust", "-N")
    remembered = data / "port"  # clients find a cluster again that was stopped
    port = free_ports(1, first=int(remembered.read_text()) if remembered.exists() else 0)[0]
    remembered.write_text(str(port))
    options = (
        f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_connections={max_connections}"
    )
    # No machine crashes here, and a run makes a thousand databases: nothing is synced or vacuumed.
    options += " -c fsync=off -c full_page_writes=off -c autovacuum=off -c max_wal_size=1GB"
    _as_postgres("pg_ctl", "-D", cluster, "-w", "-o", options, "-l", data / "log", "start")


def _as_postgres(program: str, *arguments: object, may_fail: bool = False) -> int:
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    command = [*user, f"{postgres_binaries()}/{program}", *map(str, arguments)]
    # Not through a pipe: the server would inherit it and keep it open.
    run = subprocess.run(command, check=not may_fail, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return run.returncode


def _exports(directory: Path) -> Mapping[str, str]:
    values = s3_server.started(directory / "s3").environment()
    if postgres_binaries() is not None:
        values["ADAPTORY_DATABASE_URL"] = start_postgres(directory / "postgres")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "stop"))
    parser.add_argument("directory", type=Path)
    chosen = parser.parse_args()
    directory: Path = chosen.directory.resolve()
    if chosen.what == "stop":
        stop_all(directory)
        return
    for name, value in _exports(directory).items():
        sys.stdout.write(f"export {name}='{value}'\n")


if __name__ == "__main__":
    main()
