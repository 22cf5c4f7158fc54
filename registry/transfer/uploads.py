"""Uploads: authorization, instructions for sending, and verification. A namespace holds a blob only after it has sent
the bytes: knowing a digest grants no access."""

import logging
import secrets
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.locks import lock_blobs_shared
from registry.database.tables import Blob, BlobHolder, Release, Repository, RevisionFile, Upload
from registry.domain.access import namespaces, quotas, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, holds, may_read, permit_uploads
from registry.errors import Conflict, Invalid, NotFound, RegistryError, TooLarge, TooMany, Unavailable, Usage
from registry.formats.manifest import ManifestFile, check_path, refuse_hidden, refuse_unportable
from registry.formats.pickles import refuse_pickle_name
from registry.formats.references import Digest
from registry.storage.blobs import BlobStat, DirectUploads, IncomingUpload, Part, Put
from registry.storage.local import write_hashed
from registry.transfer.resources import Resources

log = logging.getLogger(__name__)

_PARALLEL = 8
ARRIVED = exists().where(BlobHolder.sha256 == Upload.sha256, BlobHolder.namespace == Upload.namespace)
"""The namespace of the upload holds its blob."""


@dataclass(frozen=True, slots=True)
class PlannedUpload:
    """A file of an upload plan. `upload_id` is None if the namespace already holds its bytes. Otherwise it is sent in
    one request by `put`, or in `parts` (planned by `part`), or `through_the_api` if the store has no address. With none
    of these, all bytes have arrived and wait to be completed."""

    file: ManifestFile
    upload_id: str | None = None
    put: Put | None = None
    parts: Sequence[Part] = ()
    through_the_api: bool = False


def plan(resources: Resources, actor: Actor, namespace: str, files: Sequence[ManifestFile]) -> list[PlannedUpload]:
    """Plans the upload of each file: held by the namespace, or how to send it. Paths and sizes are checked first. A
    repeated plan continues announced uploads: it does not ask for parts that arrived. Raises TooMany if the actor has
    announced more than it sends."""
    for file in files:
        check_path(file.path)
        refuse_hidden(file.path)
        refuse_unportable(file.path)
        check_size(resources, file.path, file.size_bytes)
        refuse_pickle_name(file.path)
    wanted = {file.sha256: file for file in files}
    kept = _kept_for_good(resources, namespace, wanted)
    # Announced before it is checked: from here on no collection removes a blob that no release names yet.
    rows = announce(resources, actor, namespace, [file for file in wanted.values() if file.sha256 not in kept])
    with resources.read() as session:
        held = held_by(session, namespace, wanted)
        known = set(session.scalars(select(Blob.sha256).where(Blob.sha256.in_(wanted))))

    def is_stored(sha256: Digest) -> bool:
        return has_bytes(resources, wanted[sha256])

    with ThreadPoolExecutor(_PARALLEL, "plan") as pool:
        stored = {sha256 for sha256, there in zip(held, pool.map(is_stored, held), strict=True) if there}
        lost = [wanted[sha256] for sha256 in held if sha256 not in stored]
        rows = {**rows, **announce(resources, actor, namespace, lost)}
        absent = [file for sha256, file in wanted.items() if sha256 not in stored]
        known -= {file.sha256 for file in lost}

        def way(file: ManifestFile) -> PlannedUpload:
            return _upload_instructions(resources, file, rows[file.sha256], known=file.sha256 in known)

        ways = {planned.file.sha256: planned for planned in pool.map(way, absent)}
    return [replace(ways[file.sha256], file=file) if file.sha256 in ways else PlannedUpload(file) for file in files]


def sign_part(resources: Resources, actor: Actor, upload_id: str, number: int, sha256: Digest) -> Put:
    """Plans the request for one part of a file in parts. The store checks the part's digest if it can, which
    catches a wrong part early; the file is hashed all the same."""
    row = _find(resources, actor, upload_id)
    arrivals, arrival = resources.store.arrivals, _arrival(row)
    if arrivals is None or arrival.multipart_id is None or number > len(arrival.part_sizes):
        raise NotFound("part_unknown", f"Upload {upload_id} has no part {number:,}.", subject=upload_id)
    left_s = max(1, int((row.expires_at - actor.at).total_seconds()))
    return arrivals.sign_part(arrival, number, sha256, left_s)


def complete(resources: Resources, actor: Actor, upload_id: str) -> ManifestFile:
    """Checks the received bytes and makes a blob of them that the namespace holds. May be repeated. Raises Conflict if
    bytes
    are still missing, and Invalid if they are not those announced; nothing is kept then."""
    row = _find(resources, actor, upload_id)
    how_to_send = f"PUT them to /v1/blobs/{row.sha256}?upload={upload_id}."
    return finish_arrival(resources, actor, row, _arrival(row), how_to_send)


def finish_arrival(
    resources: Resources, actor: Actor, row: Upload, arrival: IncomingUpload, how_to_send: str
) -> ManifestFile:
    """Makes a blob of the bytes received for an upload, as `complete` does. `how_to_send` is the next step if none
    were."""
    file = ManifestFile("", row.size_bytes, Digest(row.sha256))
    arrivals = resources.store.arrivals
    if holds_bytes(resources, row.namespace, file):
        if arrivals is not None:  # another client completed it while this one was still sending
            arrivals.discard(arrival)
        return file
    if arrivals is None:
        raise Conflict(
            "upload_incomplete", f"No bytes have arrived for {file.sha256}.", subject=file.sha256, next_step=how_to_send
        )
    stat = arrivals.finish(arrival)
    register_blob(resources, actor, row.namespace, stat)
    arrivals.discard(arrival)
    return file


def receive_body(
    resources: Resources, actor: Actor, upload_id: str, sha256: Digest, chunks: Iterable[bytes], size_bytes: int
) -> None:
    """Receives the bytes of one blob. Nothing appears under its digest unless digest and size are right."""
    row = _find(resources, actor, upload_id)
    if row.sha256 != sha256:
        raise _unknown(upload_id)
    if resources.store.arrivals is not None:
        raise Usage("sent_directly", "This registry does not receive bytes: send them to its store.", subject=sha256)
    receive_file(resources, actor, row, chunks, size_bytes)


def keep(
    resources: Resources, actor: Actor, namespace: str, files: Sequence[ManifestFile]
) -> Mapping[str, tuple[Upload, bool]]:
    """Announces files, stored or not, so that no collection removes their bytes before a commit or a release names
    them. Leaves out those that a release names already."""
    kept = _kept_for_good(resources, namespace, {file.sha256 for file in files})
    return announce(resources, actor, namespace, [file for file in files if file.sha256 not in kept])


def receive_file(resources: Resources, actor: Actor, row: Upload, chunks: Iterable[bytes], size_bytes: int) -> None:
    """Receives the bytes of an announced upload into a file, checks them, and stores them. They may take hours: raises
    NotFound or NotAllowed if the sender has lost the token or the role meanwhile."""
    sha256 = Digest(row.sha256)
    if size_bytes != row.size_bytes:
        raise Invalid("size_differs", f"{row.size_bytes:,} bytes were announced, not {size_bytes:,}.", subject=sha256)
    differs = Invalid("digest_differs", f"The bytes received are not those of {sha256}.", subject=sha256)
    with TemporaryDirectory(dir=resources.work_directory, prefix="upload-") as directory:
        path = Path(directory) / "blob"
        received = write_hashed(path, within(chunks, size_bytes, differs), "The upload", sha256)
        if received != (sha256, size_bytes):
            raise differs
        with resources.read() as session:
            sender = sender_now(session, actor.name, row.namespace, actor.token_id, actor.at)
        permit_uploads(sender, row.namespace, hidden=_unknown(row.id))
        store_file(resources, actor, row.namespace, sha256, path, move=True)


def sender_now(session: Session, user: str, namespace: str, token_id: str | None, now: datetime) -> Actor:
    """The sender behind an address issued for a user's push, with the current rights of the user's token. Without a
    token, it is the user of a registry without access control, or the push began before an upgrade."""
    grants = tokens.grants_of(session, token_id) if token_id else {namespace: Role.PUBLISHER.value}
    return Actor(user, now, grants, token_id=token_id)


def within(chunks: Iterable[bytes], limit_bytes: int, error: RegistryError) -> Iterator[bytes]:
    """The chunks of a body. Raises the error once they have more bytes than the limit."""
    taken = 0
    for chunk in chunks:
        taken += len(chunk)
        if taken > limit_bytes:
            raise error
        yield chunk


def store_file(resources: Resources, actor: Actor, namespace: str, sha256: Digest, path: Path, *, move: bool) -> None:
    """Puts a verified file into the store, then writes its rows: a crash in between leaves only an orphan. It is
    announced first, so that no collection removes the bytes in between."""
    announce(resources, actor, namespace, [ManifestFile(path.name, path.stat().st_size, sha256)])
    register_blob(resources, actor, namespace, resources.store.put(sha256, path, move=move))


def register_stored(resources: Resources, actor: Actor, namespace: str, files: Sequence[ManifestFile]) -> None:
    """Writes the rows of blobs that are already in the store, hashed by their writer. Raises NotFound for a blob that
    is missing or incomplete."""
    announce(resources, actor, namespace, files)
    for file in files:
        stat = resources.store.stat(file.sha256)
        if stat is None or stat.size_bytes != file.size_bytes:
            raise NotFound(
                "blob_missing",
                f"The store has no blob {file.sha256}.",
                subject=file.path,
                next_step="Try again: missing blobs are made again.",
            )
        register_blob(resources, actor, namespace, stat)


class _Abortable(Protocol):
    def abort(self) -> None: ...


@contextmanager
def aborted_on_error(writer: _Abortable) -> Generator[None]:
    """Removes the written bytes if the block raises. If the store cannot be reached then, `sweep` removes them
    later."""
    try:
        yield
    except BaseException:
        try:
            writer.abort()
        except RegistryError:
            log.warning("An unfinished file is left in the store", exc_info=True)
        raise


def readable(resources: Resources, actor: Actor, sha256: Digest) -> BlobStat:
    """The blob, if the actor may read one of the namespaces that hold it; where commits are drafts, only publishers see
    unreleased files. Raises NotFound otherwise."""
    with resources.read() as session:
        holders = session.scalars(select(BlobHolder.namespace).where(BlobHolder.sha256 == sha256)).all()
        shown = any(
            may_read(actor, namespace) and _is_shown(session, actor, namespace, sha256) for namespace in holders
        )
        size_bytes = size_of(session, sha256)
    stat = resources.store.stat(sha256) if shown else None
    if stat is None:
        raise NotFound("blob_unknown", f"Blob {sha256} does not exist, or you have no access to it.", subject=sha256)
    refuse_damaged(stat, size_bytes, f"blob {sha256}")
    return stat


def _is_shown(session: Session, actor: Actor, namespace: str, sha256: Digest) -> bool:
    if holds(actor, Role.PUBLISHER, namespace) or not namespaces.has_drafts(session, namespace):
        return True
    query = select(Release.id).join(RevisionFile, RevisionFile.revision_id == Release.revision_id)
    query = query.join(Repository, Repository.id == Release.repository_id)
    query = query.where(Repository.namespace == namespace, RevisionFile.sha256 == sha256)
    return session.scalar(query.limit(1)) is not None


def size_of(session: Session, sha256: str) -> int:
    """The recorded size of a blob in bytes; 0 for an unknown one."""
    return session.scalar(select(Blob.size_bytes).where(Blob.sha256 == sha256)) or 0


def refuse_damaged(stat: BlobStat, size_bytes: int, named: str) -> None:
    """Raises Unavailable for a blob of another size than recorded; a client detects other bytes of the same size."""
    if stat.size_bytes != size_bytes:
        raise Unavailable(
            "blob_corrupt",
            f"{named} is damaged: it should have {size_bytes:,} bytes, but has {stat.size_bytes:,} in the store.",
            subject=stat.sha256,
            next_step="Inform the registry's operators: `adaptory fsck` lists what is damaged.",
        )


def held_by(session: Session, namespace: str, digests: Iterable[str]) -> list[Digest]:
    """The digests among these whose bytes the namespace has sent."""
    query = select(BlobHolder.sha256).where(BlobHolder.namespace == namespace, BlobHolder.sha256.in_(list(digests)))
    return [Digest(sha256) for sha256 in session.scalars(query)]


def _kept_for_good(resources: Resources, namespace: str, digests: Iterable[str]) -> set[str]:
    """The digests that the namespace holds and a release names. Unlike commits, releases are never deleted."""
    with resources.read() as session:
        held = held_by(session, namespace, digests)
        released = select(RevisionFile.sha256).join(Release, Release.revision_id == RevisionFile.revision_id)
        return set(session.scalars(released.where(RevisionFile.sha256.in_(held))))


def register_blob(resources: Resources, actor: Actor, namespace: str, stat: BlobStat) -> None:
    """Makes a blob of bytes in the store, held by the namespace."""
    with resources.write() as session:
        lock_blobs_shared(session)
        _refuse_leaving(session, [stat.sha256])
        insert_if_absent(session, Blob, sha256=stat.sha256, size_bytes=stat.size_bytes, created_at=actor.at)
        insert_if_absent(session, BlobHolder, sha256=stat.sha256, namespace=namespace)


def _refuse_leaving(session: Session, digests: Sequence[str]) -> None:
    """Raises Unavailable for blobs that a collection is removing: they must be gone before they can be sent again."""
    leaving = select(Blob.sha256).where(Blob.sha256.in_(digests), Blob.removing_at.is_not(None)).limit(1)
    if (blob := session.scalar(leaving)) is not None:
        raise Unavailable("blob_leaving", f"The unused blob {blob} is being removed.", subject=blob)


def has_bytes(resources: Resources, file: ManifestFile) -> bool:
    """Whether the store actually has the bytes: it may have lost some that have rows."""
    stat = resources.store.stat(file.sha256)
    return stat is not None and stat.size_bytes == file.size_bytes


def holds_bytes(resources: Resources, namespace: str, file: ManifestFile) -> bool:
    """Whether the namespace holds the file, and the store really has its bytes."""
    with resources.read() as session:
        held = bool(held_by(session, namespace, [file.sha256]))
    return held and has_bytes(resources, file)


def announce(
    resources: Resources, actor: Actor, namespace: str, files: Sequence[ManifestFile]
) -> Mapping[str, tuple[Upload, bool]]:
    """Maps each sha256 to its upload, new or announced before, and whether it existed before."""
    if not files:
        return {}
    arrivals = resources.store.arrivals
    expires_at = actor.at + timedelta(seconds=resources.settings.upload_expires_s)
    mine = select(Upload).where(Upload.namespace == namespace, Upload.sha256.in_([file.sha256 for file in files]))
    with resources.write() as session:
        lock_blobs_shared(session)
        _refuse_leaving(session, [file.sha256 for file in files])
        held = mine.order_by(Upload.sha256).with_for_update()  # a collection deletes uploads that have expired
        before = {row.sha256: row.expires_at for row in session.scalars(held)}
        open_still = {sha256 for sha256, expires_at in before.items() if expires_at >= actor.at}
        more = {file.sha256 for file in files} - open_still
        more.difference_update(held_by(session, namespace, more))
        _refuse_too_many(session, actor, len(more), resources.settings.max_open_uploads)
        more_bytes = sum({file.sha256: file.size_bytes for file in files if file.sha256 in more}.values())
        quotas.refuse_bytes(session, namespace, more_bytes, actor.at)
        for file in files:
            if file.sha256 not in before:
                insert_if_absent(
                    session,
                    Upload,
                    id=uuid.uuid4().hex,
                    namespace=namespace,
                    sha256=file.sha256,
                    size_bytes=file.size_bytes,
                    part_bytes=arrivals.part_bytes(file.size_bytes) if arrivals else None,
                    created_at=actor.at,
                    created_by=actor.name,
                    expires_at=expires_at,
                    permit_key=secrets.token_hex(32),
                )
        rows = {row.sha256: row for row in session.scalars(mine)}
        for file in files:
            if file.sha256 in before.keys() - open_still:  # the upload no longer belongs to the user who let it expire
                rows[file.sha256].created_by = actor.name
            rows[file.sha256].expires_at = expires_at
            if rows[file.sha256].size_bytes != file.size_bytes:
                raise Invalid(
                    "size_differs",
                    f"{file.path} was announced with {rows[file.sha256].size_bytes:,} bytes before, "
                    f"now with {file.size_bytes:,}.",
                    subject=file.path,
                    next_step="Check the file: its digest belongs to a blob of another size.",
                )
    return {sha256: (row, sha256 in before) for sha256, row in rows.items()}


def _refuse_too_many(session: Session, actor: Actor, more: int, limit: int) -> None:
    """Limits open uploads. Expired ones do not count, swept or not: they cannot be sent any more. Raises TooLarge for
    files that can never be announced together, and TooMany for those that can be later."""
    if more > limit:
        raise TooLarge(
            "too_many_files",
            f"{more:,} files were announced at once, but at most {limit:,} uploads may be open.",
            subject=actor.name,
            next_step="Raise ADAPTORY_MAX_OPEN_UPLOADS on the registry, or announce and send them in parts (REST).",
        )
    mine = (Upload.created_by == actor.name) & (Upload.expires_at >= actor.at) & ~ARRIVED
    count, first_end = session.execute(select(func.count(), func.min(Upload.expires_at)).where(mine)).one()
    if more > 0 and count + more > limit:
        wait = first_end - actor.at if first_end else timedelta()
        raise TooMany(
            "too_many_uploads",
            f"{actor.name} has {count:,} announced files that were not sent; with these {more:,}, there would be more "
            f"than {limit:,}.",
            subject=actor.name,
            next_step="Send them, announce fewer, or wait for the time in Retry-After, when the first of them expires.",
        ).again_in(wait.total_seconds())


def _upload_instructions(
    resources: Resources, file: ManifestFile, announced: tuple[Upload, bool], *, known: bool
) -> PlannedUpload:
    row, sent_before = announced
    arrivals = resources.store.arrivals
    if arrivals is None:
        return PlannedUpload(file, row.id, through_the_api=True)
    expires_s = resources.settings.upload_expires_s
    if row.part_bytes is None:
        put = arrivals.sign_object(_arrival(row), expires_s, sent_before=sent_before, known=known)
        return PlannedUpload(file, row.id, put)
    parts = arrivals.parts(_arrival(row)) if row.multipart_id else None
    if parts is None:
        row = _begin_parts(resources, arrivals, row)
        parts = arrivals.parts(_arrival(row))
    return PlannedUpload(file, row.id, parts=parts or ())


def _begin_parts(resources: Resources, arrivals: DirectUploads, row: Upload) -> Upload:
    """Begins an upload. Of two requests that begin the same one at once, the later continues the other's."""
    multipart_id = arrivals.begin(_arrival(row))
    with resources.write() as session:
        unchanged = Upload.multipart_id.is_not_distinct_from(row.multipart_id)
        session.execute(update(Upload).where(Upload.id == row.id, unchanged).values(multipart_id=multipart_id))
        now = session.get(Upload, row.id)
        if now is None:
            raise _unknown(row.id)
    if now.multipart_id != multipart_id:
        arrivals.abandon(replace(_arrival(row), multipart_id=multipart_id))
    return now


def _arrival(row: Upload) -> IncomingUpload:
    return IncomingUpload(row.id, Digest(row.sha256), row.size_bytes, row.multipart_id, row.part_bytes)


def _find(resources: Resources, actor: Actor, upload_id: str) -> Upload:
    with resources.read() as session:
        row = session.get(Upload, upload_id)
    if row is None or row.expires_at < actor.at:
        raise _unknown(upload_id)
    permit_uploads(actor, row.namespace, hidden=_unknown(upload_id))
    return row


def _unknown(upload_id: str) -> NotFound:
    return NotFound("upload_unknown", f"Upload {upload_id[:64]} does not exist.", subject=upload_id[:64])


def check_size(resources: Resources, subject: str, size_bytes: int) -> None:
    """Raises TooLarge for a file above the limit."""
    limit = resources.settings.max_file_bytes
    if not 0 <= size_bytes <= limit:
        raise TooLarge(
            "file_too_large", f"{subject} has {size_bytes:,} bytes; the limit is {limit:,}.", subject=subject
        )
