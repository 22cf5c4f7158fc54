"""Keys of workers, and what they attested."""

from datetime import datetime

from sqlalchemy import ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.database.engine import Row, UtcDateTime
from registry.database.tables.catalog import Id


class WorkerKey(Row):
    """The public half of a worker's key; `id` is the sha256 of its DER. What a revoked key signed counts as stated, not
    as measured."""

    __tablename__ = "worker_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    worker: Mapped[str] = mapped_column(String(64))
    public_key: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_by: Mapped[str | None] = mapped_column(String(128))


class Attestation(Row):
    """A verified attestation about a release, or about a base alone; `suite_id` is the suite that was measured. The
    envelope of evidence has the token ids of examples."""

    __tablename__ = "attestations"
    __table_args__ = (Index("ix_attestations_release", "release_id", "predicate_type", "id"),)

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("worker_keys.id"), index=True)
    predicate_type: Mapped[str] = mapped_column(String(100))
    release_id: Mapped[int | None] = mapped_column(ForeignKey("releases.id"))
    base_digest: Mapped[str | None] = mapped_column(ForeignKey("bases.digest"))
    suite_id: Mapped[int | None] = mapped_column(ForeignKey("suites.id"))
    envelope: Mapped[str] = mapped_column(Text, deferred=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    key: Mapped[WorkerKey] = relationship(lazy="joined", innerjoin=True)
