"""Keeps the facts from probing a store in the database, by endpoint, bucket and version of the probe."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime

from registry.database.engine import Database
from registry.database.locks import exclusive_probe
from registry.database.tables import StoreFactsRow
from registry.environment.settings import S3Storage
from registry.errors import Unavailable
from registry.storage.blobs import BlobStore
from registry.storage.s3.probe import VERSION, StoreFacts, StoreProbe
from registry.storage.s3.store import S3Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DatabaseRecord:
    """The `FactsRecord` of one store."""

    database: Database
    storage: S3Storage
    clock: Callable[[], datetime]

    def load(self) -> StoreFacts | None:
        with self.database.read() as session:
            row = session.get(StoreFactsRow, self._key)
            return StoreFacts(**row.facts) if row is not None else None

    def save(self, facts: StoreFacts) -> None:
        endpoint, bucket, version = self._key
        with self.database.write() as session:
            session.merge(
                StoreFactsRow(
                    endpoint=endpoint, bucket=bucket, version=version, facts=asdict(facts), probed_at=self.clock()
                )
            )

    def lock(self) -> AbstractContextManager[None]:
        return exclusive_probe(self.database)

    @property
    def _key(self) -> tuple[str, str, int]:
        return self.storage.endpoint_url or "", self.storage.bucket, VERSION


def probe_of(store: BlobStore) -> StoreProbe | None:
    """The probe of a store; None for a directory, whose files the registry writes itself."""
    return store.arrivals.probe if isinstance(store, S3Store) else None


def probe_if_unknown(store: BlobStore) -> None:
    """Probes the store unless it was probed before, so that the first push need not. If the store does not answer now,
    the first push probes it."""
    probe = probe_of(store)
    try:
        if probe is not None:
            probe.facts()
    except Unavailable as error:
        log.warning("The blob store could not be probed: %s", error)
