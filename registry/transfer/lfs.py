"""Uploads by LFS clients of the Hugging Face Hub. They send bytes without a token, and without headers of our choice.

So every address carries its permission. If clients send to the store directly, the bytes go to a location that nothing
else uses, and are always hashed there before they become a blob. Otherwise they pass through the API; the permission
lasts an hour.
"""

import hmac
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum

from sqlalchemy import select, update

from registry.database.tables import Upload
from registry.domain.access.audit import Actor
from registry.domain.access.roles import permit_uploads
from registry.errors import NotFound
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.storage.blobs import IncomingUpload
from registry.transfer import uploads
from registry.transfer.resources import Resources

PERMIT_S = 3600
"""How long bytes may be sent through the API; the client asks for another address then."""


class PermittedAct(StrEnum):
    """The act that an address permits: sending the bytes to the API, or reporting that the store has them."""

    SEND = "send"
    FINISH = "finish"


@dataclass(frozen=True, slots=True, kw_only=True)
class LfsPermit:
    """The permission in an address. The key of its signature is the upload's own, which no answer contains. It is valid
    as long as the token of its requester, `token_id`."""

    act: PermittedAct
    namespace: str
    sha256: Digest
    expires: int
    multipart_id: str = ""
    token_id: str = ""
    signature: str = ""


@dataclass(frozen=True, slots=True)
class Permitted:
    """An announced upload, and the user who announced it."""

    row: Upload
    actor: Actor


@dataclass(frozen=True, slots=True)
class Sending:
    """The way to send a file: in one request to the address `put`, in parts of `part_bytes` to their addresses, or with
    `send` through the API. `finish` is called when the store has the bytes."""

    file: ManifestFile
    put: str | None = None
    parts: Sequence[str] = ()
    part_bytes: int = 0
    send: LfsPermit | None = None
    finish: LfsPermit | None = None


def plan(
    resources: Resources, actor: Actor, namespace: str, files: Sequence[ManifestFile], *, in_parts: bool
) -> dict[Digest, Sending | None]:
    """Plans the request for each file; None if the namespace holds it. `in_parts`: the client can send parts."""
    for file in files:
        uploads.check_size(resources, file.path, file.size_bytes)
    rows = uploads.keep(resources, actor, namespace, files)
    with resources.read() as session:
        held = set(uploads.held_by(session, namespace, {file.sha256 for file in files}))
    stored = {file.sha256 for file in files if file.sha256 in held and uploads.has_bytes(resources, file)}
    lost = [file for file in files if file.sha256 not in stored and file.sha256 not in rows]
    rows = {**rows, **uploads.announce(resources, actor, namespace, lost)}
    return {
        file.sha256: None
        if file.sha256 in stored
        else _sending(resources, actor, file, _with_key(resources, rows[file.sha256][0]), in_parts=in_parts)
        for file in files
    }


def receive(resources: Resources, permitted: Permitted, chunks: Iterable[bytes], size_bytes: int) -> None:
    """Receives the bytes of a file. Repetition is harmless: only the announced bytes are kept."""
    uploads.receive_file(resources, permitted.actor, permitted.row, chunks, size_bytes)


def finish(resources: Resources, permit: LfsPermit) -> None:
    """Checks what arrived in the store and makes a blob of it. May be repeated. Raises Conflict if bytes are missing,
    Invalid if they are not those announced, and NotFound if the permit is not valid."""
    upload = permitted(resources, permit)
    arrival = _arrival(upload.row, permit.multipart_id or None)
    uploads.finish_arrival(resources, upload.actor, upload.row, arrival, "Send the file again.")


def _sending(resources: Resources, actor: Actor, file: ManifestFile, row: Upload, *, in_parts: bool) -> Sending:
    arrivals = resources.store.arrivals
    if arrivals is None:
        return Sending(file, send=_signed(actor, row, PermittedAct.SEND, int(actor.at.timestamp()) + PERMIT_S))
    expires_s = resources.settings.upload_expires_s
    expires = int((actor.at + timedelta(seconds=expires_s)).timestamp())
    if row.part_bytes is None or not in_parts:
        put = arrivals.sign_object(_arrival(row, None), expires_s, sent_before=False, known=True)
        return Sending(file, put=put.url if put else None, finish=_signed(actor, row, PermittedAct.FINISH, expires))
    arrival = _arrival(row, arrivals.begin(_arrival(row, None)))
    numbers = range(1, len(arrival.part_sizes) + 1)
    parts = [arrivals.sign_part(arrival, number, file.sha256, expires_s).url for number in numbers]
    finish_permit = _signed(actor, row, PermittedAct.FINISH, expires, arrival.multipart_id or "")
    return Sending(file, parts=parts, part_bytes=row.part_bytes, finish=finish_permit)


def _arrival(row: Upload, multipart_id: str | None) -> IncomingUpload:
    """The bytes at the location that only LFS clients use."""
    part_bytes = row.part_bytes if multipart_id else None
    return IncomingUpload(row.id, Digest(row.sha256), row.size_bytes, multipart_id, part_bytes, unchecked=True)


def _signed(actor: Actor, row: Upload, act: PermittedAct, expires: int, multipart_id: str = "") -> LfsPermit:
    permit = LfsPermit(
        act=act,
        namespace=row.namespace,
        sha256=Digest(row.sha256),
        expires=expires,
        multipart_id=multipart_id,
        token_id=actor.token_id or "",
    )
    return replace(permit, signature=_signature(row, permit))


def _signature(row: Upload, permit: LfsPermit) -> str:
    fields = (permit.act, permit.namespace, permit.sha256, str(permit.expires), permit.multipart_id, permit.token_id)
    return hmac.new((row.permit_key or secrets.token_hex()).encode(), "\n".join(fields).encode(), "sha256").hexdigest()


def _with_key(resources: Resources, row: Upload) -> Upload:
    """The upload with a key; servers before migration 0022 announced uploads without one."""
    if row.permit_key is not None:
        return row
    with resources.write() as session:
        bare = (Upload.id == row.id) & Upload.permit_key.is_(None)
        session.execute(update(Upload).where(bare).values(permit_key=secrets.token_hex(32)))
        return session.get_one(Upload, row.id, populate_existing=True)


def permitted(resources: Resources, permit: LfsPermit) -> Permitted:
    """The act that the permit allows. Raises NotFound if it is not valid."""
    now = resources.clock()
    with resources.read() as session:
        query = select(Upload).where(Upload.namespace == permit.namespace, Upload.sha256 == permit.sha256)
        row = session.scalar(query)
        actor = row and uploads.sender_now(session, row.created_by, row.namespace, permit.token_id or None, now)
    late = row is None or row.expires_at < now or permit.expires < now.timestamp()
    if (
        row is None
        or actor is None
        or late
        or not hmac.compare_digest(_signature(row, permit).encode(), permit.signature.encode())
    ):
        raise NotFound(
            "upload_address_invalid",
            "The address of this upload is invalid or has expired.",
            subject=permit.sha256,
            next_step="Push again: the client asks for a new address.",
        )
    permit_uploads(actor, row.namespace)
    return Permitted(row, actor)
