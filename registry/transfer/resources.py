"""The resources of a process: database, store, settings, clock."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy.orm import Session

from registry.database.clock import DatabaseClock, utc_now
from registry.database.engine import Database, DatabaseTimeouts
from registry.database.migrate import (
    SchemaWatch,
    connected,
    ensure_schema,
    head_revision,
    migrate,
    schema_revision,
    works_with,
)
from registry.domain.access import tokens
from registry.domain.access.namespaces import NEW_NAMESPACE_BYTES
from registry.environment.home import close_directory, close_file
from registry.environment.settings import DATABASE_FILE, LocalStorage, S3Storage, Settings
from registry.errors import NotAllowed, Usage
from registry.formats.addresses import S3_SCHEME
from registry.storage.archive import Archive, LocalArchive
from registry.storage.blobs import BlobStore, RecentStats
from registry.storage.local import LocalStore


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of a procedure: settings, database, blob store, work directory and clock. `recent` is for downloads
    that the store itself serves."""

    settings: Settings
    database: Database
    store: BlobStore
    work_directory: Path
    clock: Callable[[], datetime] = utc_now
    recent: RecentStats = field(default_factory=RecentStats)
    schema: SchemaWatch = field(default_factory=SchemaWatch)

    @contextmanager
    def read(self) -> Generator[Session]:
        with self.database.read() as session:
            if isinstance(self.clock, DatabaseClock):
                self.clock.compare(session)
            yield session

    def snapshot(self) -> AbstractContextManager[Session]:
        return self.database.snapshot()

    @contextmanager
    def write(self) -> Generator[Session]:
        """`Database.write`. Raises Unavailable, before anything is changed, after a migration that this code does not
        work with."""
        self.schema.ensure_writable(self.database)
        with self.database.write() as session:
            session.info[NEW_NAMESPACE_BYTES] = self.settings.namespace_bytes or None
            yield session

    def close(self) -> None:
        self.database.close()


def open_resources(settings: Settings, *, serving: str = "") -> Resources:
    """Opens the database and the store. An empty embedded database gets its tables; any other must have the current
    schema. `serving` names a process that keeps running during an upgrade, `serve` or `worker`: it also
    accepts a later schema that this version works with. Raises NotAllowed for a server with tokens that has none."""
    for directory in (
        settings.home_directory,
        settings.home_directory / "cache",
    ):  # before another process creates it with a wider mode
        close_directory(directory)
    if settings.database_url is None:
        close_file(settings.home_directory / DATABASE_FILE)
    patience = DatabaseTimeouts(settings.database_connect_timeout_s, settings.database_timeout_s)
    database = Database(settings.effective_database_url, patience, settings.database_pool_size, serving)
    ensure_schema(database, create=settings.database_url is None, newer=bool(serving))
    work = settings.work_directory
    close_directory(work)
    clock = utc_now if database.is_sqlite else DatabaseClock()
    resources = Resources(settings, database, open_store(settings, database), work, clock)
    if serving == "serve" and settings.access == "tokens":
        with resources.read() as session:
            usable = tokens.exist(session)
        if not usable:
            resources.close()
            raise NotAllowed("no_tokens", "No token exists, so nobody could use this server.")
    return resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """A database and its schema before and after a migration. `connected` are its other clients, None on SQLite, and
    `works_before` tells whether the code of the schema before works with the one after."""

    database: str
    before: str | None
    after: str
    connected: list[str] | None
    works_before: bool


def migrate_database(settings: Settings) -> Migrated:
    """Migrates the database to this version's schema. An embedded one is created."""
    if settings.database_url is None:
        close_directory(settings.home_directory)
        close_file(settings.home_directory / DATABASE_FILE)
    with closing(Database(settings.effective_database_url, DatabaseTimeouts(statement_s=None))) as database:
        before = schema_revision(database)
        migrate(database)
        return Migrated(
            database=database.shown_url,
            before=before,
            after=head_revision(),
            connected=connected(database),
            works_before=before is not None and works_with(database, before),
        )


@contextmanager
def open_for_restore(settings: Settings) -> Generator[tuple[Database, BlobStore]]:
    """Opens the database and the store for a restore, which makes the tables."""
    close_directory(settings.home_directory)
    close_directory(settings.work_directory)
    with closing(Database(settings.effective_database_url, DatabaseTimeouts(statement_s=None))) as database:
        yield database, open_store(settings, database)


def open_store(settings: Settings, database: Database | None) -> BlobStore:
    """Opens the store of the settings. The database keeps the facts about it; a node has no database."""
    match settings.storage:
        case LocalStorage():
            return LocalStore(settings.store_directory)
        case S3Storage() as storage:
            from registry.storage.s3.store import S3Store  # boto3 is loaded where it is used
            from registry.transfer.store_facts import DatabaseRecord

            return S3Store(storage, DatabaseRecord(database, storage, utc_now) if database else None)


def open_archive(settings: Settings, target: str, endpoint_url: str | None) -> Archive:
    """Opens the directory, or the s3://BUCKET/PREFIX, of backups. Raises Usage for the registry's own store."""
    if target.startswith(S3_SCHEME):
        from registry.storage.s3.store import S3Archive

        storage, own = _bucket(settings, target, endpoint_url), settings.storage
        if not isinstance(own, S3Storage) or _where(own) != _where(storage):
            return S3Archive(storage, settings.work_directory)
    elif endpoint_url is not None:
        raise Usage(
            "idle_option",
            "--endpoint-url has no effect on a directory.",
            subject="--endpoint-url",
            next_step="Leave it out, or name the target as s3://BUCKET/PREFIX.",
        )
    elif (directory := Path(target).expanduser().resolve()) != settings.store_directory:
        return LocalArchive(directory)
    raise Usage(
        "bad_backup_target",
        f"{target} is the registry's own store.",
        subject=target,
        next_step="Name another directory or prefix, better on other disks.",
    )


def _bucket(settings: Settings, target: str, endpoint_url: str | None) -> S3Storage:
    bucket, _, prefix = target.removeprefix(S3_SCHEME).partition("/")
    values = settings.storage.model_dump() if isinstance(settings.storage, S3Storage) else {}
    values |= {"bucket": bucket or None, "prefix": f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""}
    if endpoint_url is not None:
        values["endpoint_url"] = endpoint_url
    try:
        return S3Storage.model_validate(values)
    except ValidationError as error:
        next_step = "Write a directory, or s3://BUCKET/PREFIX; --endpoint-url is an address such as https://s3.example."
        message = f"Invalid location of backups: {target}."
        raise Usage("bad_backup_target", message, subject=target, next_step=next_step) from error


def _where(storage: S3Storage) -> tuple[str | None, str, str]:
    return storage.endpoint_url, storage.bucket, storage.prefix.rstrip("/")
