"""The resources of a process: database, store, settings, clock."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.orm import Session

from registry.database.engine import Database, DatabaseTimeouts
from registry.database.migrate import SchemaWatch, ensure_schema
from registry.domain.access import tokens
from registry.domain.access.namespaces import NEW_NAMESPACE_BYTES
from registry.environment.home import close_directory, close_file
from registry.environment.settings import DATABASE_FILE, LocalStorage, S3Storage, Settings
from registry.errors import NotAllowed
from registry.storage.blobs import BlobStore, RecentStats
from registry.storage.local import LocalStore


def utc_now() -> datetime:
    return datetime.now(UTC)


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

    def read(self) -> AbstractContextManager[Session]:
        return self.database.read()

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
    resources = Resources(settings, database, open_store(settings, database), work)
    if serving == "serve" and settings.access == "tokens":
        _refuse_without_tokens(resources)
    return resources


def _refuse_without_tokens(resources: Resources) -> None:
    with resources.read() as session:
        if tokens.exist(session):
            return
    resources.close()
    raise NotAllowed("no_tokens", "No token exists, so nobody could use this server.")


def open_store(settings: Settings, database: Database | None) -> BlobStore:
    """Opens the store of the settings. The database keeps the facts about it; a node has no database."""
    match settings.storage:
        case LocalStorage():
            return LocalStore(settings.store_directory)
        case S3Storage() as storage:
            from registry.storage.s3.store import S3Store  # boto3 is loaded where it is used
            from registry.transfer.store_facts import DatabaseRecord

            return S3Store(storage, DatabaseRecord(database, storage, utc_now) if database else None)
