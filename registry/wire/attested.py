"""Documents of workers' keys and attestations."""

from datetime import datetime
from typing import Literal

from registry.wire.document import Wire


class WorkerKeyOut(Wire):
    """A worker's key: `id` is the sha256 of the public key in DER. What a key with `revoked_at` signed counts as
    stated."""

    id: str
    worker: str
    public_key: str
    created_at: datetime
    revoked_at: datetime | None
    revoked_by: str | None


class AttestationOut(Wire):
    """`envelope` is a DSSE envelope, as JSON, around an in-toto statement that the key signed."""

    kind: Literal["scores", "composition", "evidence", "other"]
    predicate_type: str
    key: WorkerKeyOut
    envelope: str
    created_at: datetime


class AttestationsOut(Wire):
    """Oldest first."""

    attestations: list[AttestationOut]
