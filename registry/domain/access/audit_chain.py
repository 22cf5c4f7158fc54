"""Seals the audit log into a hash chain (`registry.formats.audit_chain`), and checks it.

Rows are sealed after their commit, so that no change waits for the chain. Rows of one channel, and of anything else
that is changed under a lock, have their ids in the order of the changes, and are sealed in the order of their ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Select, Table, exists, func, insert, select
from sqlalchemy.orm import Session

from composer.findings import Finding, Severity
from registry.database.locks import lock_sealing
from registry.database.tables import AuditRow, AuditSeal
from registry.domain.access.audit import Act
from registry.formats.audit_chain import START as EMPTY
from registry.formats.audit_chain import AuditContent, ChainCheck, Checkpoint, Seal, next_seal

BATCH = 500
"""Rows sealed in one transaction: SQLite has one writer, and a move waits for it about 5 ms."""
_NAMED = 20
"""Damaged rows that are named; further ones are counted."""
_audit = cast(Table, AuditRow.__table__).c
_COLUMNS = (
    *(_audit.id, _audit.at, _audit.actor, _audit.token_id.label("token"), _audit.source, _audit.act, _audit.subject),
    *(_audit.namespace, _audit.reason, _audit.before, _audit.after, _audit.detail),
)
_seals = cast(Table, AuditSeal.__table__).c
_SEAL = (_seals.number, _seals.audit_id, _seals.content, _seals.removal, _seals.digest)
_IS_SEALED = exists().where(AuditSeal.audit_id == _audit.id)
_UNSEALED = (_audit.act != Act.RELEASE_DOWNLOAD, ~_IS_SEALED)


def next_seals(session: Session, after: int) -> tuple[Seal | None, list[Seal]]:
    """The last seal, and seals for up to BATCH committed rows with ids above `after` that have none. Writes nothing."""
    previous = last(session)
    rows = (
        select(*_COLUMNS)
        .where(_audit.id > after, _audit.act != Act.RELEASE_DOWNLOAD, ~_IS_SEALED)
        .order_by(_audit.id)
        .limit(BATCH)
    )
    return previous, list(_chain(session, rows, previous))


def add(session: Session, previous: Seal | None, seals: list[Seal]) -> bool:
    """Adds the seals behind `previous`; returns False if another one is the last by now."""
    lock_sealing(session)
    if last(session) != previous:
        return False
    session.execute(insert(AuditSeal), [asdict(seal) for seal in seals])
    return True


def sealed_among(session: Session, audit_ids: Iterable[int]) -> list[int]:
    """Which of these rows have a seal. Nothing is sealed until the transaction ends."""
    lock_sealing(session)
    wanted, sealed = sorted(audit_ids), list[int]()
    for start in range(0, len(wanted), BATCH):
        some = select(AuditSeal.audit_id).where(AuditSeal.audit_id.in_(wanted[start : start + BATCH])).distinct()
        sealed += session.scalars(some)
    return sorted(sealed)


def seal_rewritten(session: Session, audit_ids: Sequence[int], removal: int) -> None:
    """Seals the removal of a user, and again the sealed rows that it rewrote. A process that is sealing them as they
    were notices that the last seal is another one."""
    seals = list(_chain(session, select(*_COLUMNS).where(_audit.id == removal), last(session)))
    for start in range(0, len(audit_ids), BATCH):
        rows = select(*_COLUMNS).where(_audit.id.in_(audit_ids[start : start + BATCH])).order_by(_audit.id)
        seals += _chain(session, rows, seals[-1], removal)
    session.execute(insert(AuditSeal), [asdict(seal) for seal in seals])


def _chain(
    session: Session, rows: Select[*tuple[Any, ...]], previous: Seal | None, removal: int | None = None
) -> Iterator[Seal]:
    for row in session.execute(rows).mappings():
        previous = next_seal(previous, cast("AuditContent", row), removal)
        yield previous


def last(session: Session) -> Seal | None:
    """The seal with the highest number."""
    row = session.execute(select(*_SEAL).order_by(AuditSeal.number.desc()).limit(1)).first()
    return Seal(*row) if row is not None else None


def checkpoint(session: Session, at: str) -> Checkpoint:
    """The digest of all rows that are sealed. `at` is the time."""
    seal = last(session)
    return Checkpoint(seal.number, seal.digest, at) if seal else Checkpoint(0, EMPTY, at)


def sealed_rows(session: Session, *, after: int, limit: int) -> list[tuple[Seal, AuditContent | None]]:
    """Seals in their order, each with its row as it is now, None if it was deleted. `after` is the number of
    the last seal seen."""
    query = select(*_SEAL, *_COLUMNS).outerjoin(AuditRow, _audit.id == AuditSeal.audit_id)
    query = query.where(AuditSeal.number > after).order_by(AuditSeal.number).limit(limit)
    ends = len(_SEAL)
    names = AuditContent.__annotations__
    return [
        (Seal(*row[:ends]), cast("AuditContent", dict(zip(names, row[ends:], strict=True))) if row[ends] else None)
        for row in session.execute(query)
    ]


def check(session: Session) -> Iterator[Finding]:
    """Finds rows that were changed or deleted after they were sealed, and seals that are missing."""
    chain = ChainCheck()
    while rows := sealed_rows(session, after=chain.number, limit=BATCH):
        for seal, row in rows:
            chain.add(seal, row)
    damage = chain.damage
    for row in damage[:_NAMED]:
        message = f"Row {row.audit_id} of the audit log {row.message}."
        yield Finding(f"audit_{row.kind}", Severity.ERROR, f"audit row {row.audit_id}", message)
    if len(damage) > _NAMED:
        message = f"{len(damage) - _NAMED:,} further rows of the audit log were changed or deleted."
        yield Finding("audit_changed", Severity.ERROR, "audit", message)


def count_unsealed(session: Session, before: datetime) -> int:
    """Rows from before a time that are not in the chain yet: a change of these shows nowhere."""
    return session.scalar(select(func.count()).select_from(AuditRow).where(_audit.at < before, *_UNSEALED)) or 0
