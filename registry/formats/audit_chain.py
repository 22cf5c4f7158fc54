"""The hash chain of the audit log.

A sealed row has a number, counted from 1 in the order in which rows were sealed, and

    content(n) = sha256(the canonical JSON of row n)
    digest(n) = sha256(digest(n - 1), content(n), both in hex, and the removal if there is one)    digest(0) = 64 zeros

so that a digest stands for its row and for all rows before it. A digest that is kept elsewhere, as a checkpoint, shows
later that none of them was changed, deleted or put between others.

Removing a user rewrites the rows that name the user. Each gets a second seal, whose `removal` is the id of the row that
records the removal: the chain shows which rows were rewritten and for whom, but no longer what they contained.
"""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypedDict

from registry.errors import Invalid
from registry.formats.attestations import Statement, attest, open_attestation, unverified

START = "0" * 64
RESEALED = "resealed"
"""The detail of a removal: how many rows are sealed again after it."""
CHECKPOINT = "https://adaptory/audit-checkpoint/v1"
_SUBJECT = "audit"


class AuditContent(TypedDict):
    """A row of the audit log. `at` has its time zone."""

    id: int
    at: datetime
    actor: str
    token: str | None
    source: str | None
    act: str
    subject: str
    namespace: str | None
    reason: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    detail: dict[str, Any]


def _content(row: AuditContent) -> str:
    """The digest of a row alone."""
    canonical = {**row, "at": row["at"].astimezone(UTC).isoformat(timespec="microseconds")}
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Seal:
    """A link of the chain: the row `audit_id`, sealed as `number`."""

    number: int
    audit_id: int
    content: str
    removal: int | None
    digest: str


def next_seal(previous: Seal | None, row: AuditContent, removal: int | None = None) -> Seal:
    """Seals a row after `previous`, None for the first one."""
    number, digest = (previous.number, previous.digest) if previous else (0, START)
    content = _content(row)
    return Seal(number + 1, row["id"], content, removal, _chained(digest, content, removal))


def _chained(previous: str, content: str, removal: int | None) -> str:
    return hashlib.sha256(f"{previous}{content}{removal or ''}".encode()).hexdigest()


def _resealed(row: AuditContent | None) -> int:
    """The number of rows that are sealed again after this one; 0 after anything but the removal of a user."""
    if row is None or row["act"] != "user:remove":
        return 0
    count = row["detail"].get(RESEALED)
    return count if isinstance(count, int) else 0


@dataclass(frozen=True, slots=True)
class Damage:
    """A row of the audit log that was `changed` or `deleted`. `message` completes "Row 12 of the audit log"."""

    kind: Literal["changed", "deleted"]
    audit_id: int
    message: str


@dataclass(slots=True)
class ChainCheck:
    """Follows the chain seal by seal, and keeps what is wrong. `rewritten` has, by the id of the row that records the
    removal of a user, how many rows that rewrote."""

    number: int = 0
    digest: str = START
    rewritten: dict[int, int] = field(default_factory=dict[int, int])
    _damage: dict[int, Damage] = field(default_factory=dict[int, Damage])
    _removal: int | None = None
    _remaining: int = 0
    """The removal whose rewritten rows are sealed right after it, and how many of them are left: no later seal may name
    it."""

    def add(self, seal: Seal, row: AuditContent | None) -> None:
        """Follows one seal. `row` is what the database contains now, None if it was deleted."""
        subject, removal = seal.audit_id, seal.removal
        if seal.number != self.number + 1:
            self._note("deleted", subject, f"has seal {seal.number}, which follows {self.number}: seals are missing")
        elif _chained(self.digest, seal.content, removal) != seal.digest:
            self._note("changed", subject, "has a changed seal")
        self.number, self.digest = seal.number, seal.digest
        if row is None:
            self._note("deleted", subject, "was deleted after it was sealed")
        elif removal is not None and (removal != self._removal or not self._remaining):
            self._note("changed", subject, f"was sealed again for row {removal}, which removed no user just before")
        elif _content(row) != seal.content:
            self._note("changed", subject, f"({row['act']} of {row['subject']} by {row['actor']}) was changed")
        elif removal is not None:
            self._damage.pop(subject, None)
            self.rewritten[removal] = self.rewritten.get(removal, 0) + 1
        if removal is None:
            self._removal, self._remaining = subject, _resealed(row)
        else:
            self._remaining -= 1

    def _note(self, kind: Literal["changed", "deleted"], audit_id: int, message: str) -> None:
        self._damage.setdefault(audit_id, Damage(kind, audit_id, message))

    @property
    def damage(self) -> list[Damage]:
        """All damage, by row."""
        return sorted(self._damage.values(), key=lambda damage: damage.audit_id)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The digest of the audit log up to the row `number`, at a time."""

    number: int
    digest: str
    at: str

    def to_text(self, private_key: bytes | None = None) -> str:
        """JSON or, with an Ed25519 key in PEM, the same in a signed DSSE envelope."""
        document = {"number": self.number, "at": self.at}
        if private_key is not None:
            return attest(private_key, Statement(CHECKPOINT, {_SUBJECT: self.digest}, document))
        return json.dumps({**document, "digest": self.digest})


def read_checkpoint(text: str, subject: str, public_key: str | None = None) -> Checkpoint:
    """Reads a checkpoint, signed or not. With a key, only one that it signed is accepted: raises Refused for another
    one. Raises Invalid for anything but a checkpoint."""
    try:
        document: Any = json.loads(text)
        if public_key is not None or "payload" in document:
            statement = unverified(text) if public_key is None else open_attestation(text, public_key)
            if statement.predicate_type != CHECKPOINT:
                raise _bad(subject)
            document = {**statement.predicate, "digest": statement.subjects[_SUBJECT]}
        number, digest, at = document["number"], document["digest"], document["at"]
        if (
            not isinstance(number, int)
            or isinstance(number, bool)
            or number < 0
            or len(bytes.fromhex(digest)) != hashlib.sha256().digest_size
        ):
            raise _bad(subject)
        return Checkpoint(number, digest, str(at))
    except (Invalid, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad(subject) from error


def _bad(subject: str) -> Invalid:
    return Invalid("bad_checkpoint", f"{subject} is not a checkpoint of the audit log.", subject=subject)
