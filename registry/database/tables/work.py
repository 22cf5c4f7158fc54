"""The event log, jobs, compositions and lineage."""

from datetime import datetime
from typing import Any, NotRequired, TypedDict

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, SmallInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from composer.formats.recipes.lock import LockDocument
from registry.database.engine import Row, UtcDateTime
from registry.database.tables.catalog import Id


class AuditRow(Row):
    """A recorded act, written in the transaction that performed it: actor, token, address, reason and changes. Admins
    of `namespace` may read the row; None belongs to the registry."""

    __tablename__ = "audit"
    __table_args__ = (
        Index("ix_audit_subject", "subject", "id"),
        Index("ix_audit_namespace", "namespace", "id"),
        Index("ix_audit_actor", "actor", "id"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    actor: Mapped[str] = mapped_column(String(128))
    act: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(300))
    namespace: Mapped[str | None] = mapped_column(String(64))
    token_id: Mapped[str | None] = mapped_column(String(16))
    source: Mapped[str | None] = mapped_column(String(200))
    reason: Mapped[str | None]
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)


class AuditSeal(Row):
    """A link of the hash chain of `registry.formats.audit_chain`. `audit_id` is not a foreign key, so the
    seal of a deleted row remains."""

    __tablename__ = "audit_seals"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    audit_id: Mapped[int] = mapped_column(BigInteger, index=True)
    content: Mapped[str] = mapped_column(String(64))
    removal: Mapped[int | None] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))


class Job(Row):
    """Work for one namespace that outlives a request. `steps` are [{name, state, progress}]; a fresh heartbeat means
    that a worker has it. `memory_bytes` of a device and the rows of `JobNeed` are what its worker must have; None for
    a job of a version before 0019, whose needs a worker declares."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_state", "state", "id"),)

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    namespace: Mapped[str | None] = mapped_column(String(64), index=True)
    state: Mapped[str] = mapped_column(String(16))
    steps: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    worker: Mapped[str | None] = mapped_column(String(64))
    heartbeat_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    attempts: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    priority: Mapped[int] = mapped_column(SmallInteger, default=0, server_default="0")
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)


class JobNeed(Row):
    """The capability that a job's worker must have: `base:DIGEST`, `scorer:NAME`, `harness` or `evolution`."""

    __tablename__ = "job_needs"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    need: Mapped[str] = mapped_column(String(80), primary_key=True)


class WorkerRow(Row):
    """A worker process and its last announcement: the kinds of jobs that it runs, the needs of unfinished jobs that it
    meets, and the memory of its device."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime)
    kinds: Mapped[list[str]] = mapped_column(JSON)
    offers: Mapped[list[str]] = mapped_column(JSON)
    memory_bytes: Mapped[int] = mapped_column(BigInteger)


class Composition(Row):
    """A recipe on its way to a release: the lock, the conflict report, the scores and what was published."""

    __tablename__ = "compositions"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), unique=True)
    plan_only: Mapped[bool]
    recipe: Mapped[dict[str, Any]] = mapped_column(JSON)
    lock: Mapped[LockDocument] = mapped_column(JSON)
    conflicts: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    candidate_scores: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON)
    gates: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON)
    merge: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    results: Mapped[list[dict[str, Any]]] = mapped_column(JSON)


class ConflictCheck(Row):
    """A conflict report from weights alone, `key` is a sha256 of everything that it depends on. `lock` has the
    inputs, `report` is null until the job is done."""

    __tablename__ = "conflict_checks"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"), unique=True)
    lock: Mapped[LockDocument] = mapped_column(JSON)
    report: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), deferred=True)


class StoredPair(TypedDict):
    """The subject of a measurement: a release by its id, or None for the base alone; the digest of the base to measure
    on; and a suite's digest."""

    release: int | None
    base: str
    suite: str


class StoredScore(TypedDict):
    """A score as `SuiteScore` of the composer writes it."""

    suite: str
    suite_digest: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool


class StoredResult(StoredPair):
    """The scores of a pair, or why it has none; `failure` is the error's row."""

    scores: list[StoredScore]
    error: str | None
    results_sha256: NotRequired[str | None]
    failure: NotRequired[dict[str, Any]]


class StoredFit(TypedDict):
    """A release by its id, and whether it fits the new base."""

    release: int
    fits: bool
    why: str


class StoredUpgrade(TypedDict):
    """An upgrade from one base to another, by their digests."""

    old: str
    new: str
    adapters: list[StoredFit]


class Evaluation(Row):
    """Releases and bases that a job measures. `results` has those that are done. `upgrade` is set for an upgrade of a
    base."""

    __tablename__ = "evaluations"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True, autoincrement=False)
    token_id: Mapped[str | None] = mapped_column(String(16))
    source: Mapped[str | None] = mapped_column(String(200))
    wanted: Mapped[list[StoredPair]] = mapped_column(JSON)
    results: Mapped[list[StoredResult]] = mapped_column(JSON)
    upgrade: Mapped[StoredUpgrade | None] = mapped_column(JSON)


class ReleaseInput(Row):
    """Lineage: a release that a composition made, and one release that went into it."""

    __tablename__ = "release_inputs"

    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), primary_key=True)
    input_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), primary_key=True, index=True)
    composition_id: Mapped[int | None] = mapped_column(ForeignKey("compositions.id"))
    weight: Mapped[float] = mapped_column(Float)


class StoreFactsRow(Row):
    """The facts found by probing a store, by the version of the probe."""

    __tablename__ = "store_facts"

    endpoint: Mapped[str] = mapped_column(String(300), primary_key=True)
    bucket: Mapped[str] = mapped_column(String(255), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    facts: Mapped[dict[str, Any]] = mapped_column(JSON)
    probed_at: Mapped[datetime] = mapped_column(UtcDateTime)
