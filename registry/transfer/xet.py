"""Uploads by clients with `hf_xet`: xorbs first, which contain chunks of files, then shards, which assemble files from
them.

Each push has an address of its own and shares nothing with others. Its xorbs are blobs of the namespace, so any server
process may receive any of them, and a collection removes them like every file that was sent and never used. An
assembled file is a blob like one that came by LFS.
"""

import hashlib
import hmac
import re
import secrets
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import func, select, update
from sqlalchemy.orm import InstrumentedAttribute

from registry.database.engine import insert_if_absent
from registry.database.tables import XetUpload, XetXorb
from registry.domain.access import quotas
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, may
from registry.errors import Invalid, TooLarge, TooMany, Unauthenticated
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName
from registry.formats.xet import (
    HEADER_BYTES,
    Chunks,
    ChunkScanner,
    Segment,
    ShardFile,
    decompress,
    read_shard,
    require_lz4,
)
from registry.storage.blobs import Reader
from registry.storage.local import write_hashed
from registry.transfer import uploads
from registry.transfer.resources import Resources

PERMIT_S = 3600
"""How long a token is valid. The client asks for another one then, and stays at the address of the first."""
MAX_XORB_BYTES, MAX_SHARD_BYTES = 65 << 20, 64 << 20
MAX_FILES = 10_000
"""Maximum size of one shard."""
_LARGEST_FILES = 4
"""One push may send, and assemble, this many times the maximum file size."""
_LEAST_CHUNK_BYTES, _SMALL_CHUNKS = 1 << 10, 16
"""Clients make chunks of at least 8 KiB, except the last one of a file."""
_REMEMBERED = 32
_TOKEN = re.compile(r"xet_([0-9a-f]{32})_([0-9a-f]{64})")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class XetPermit:
    """A token for sending to the address `upload_id`, until `expires` (Unix time)."""

    upload_id: str
    token: str
    expires: int


@dataclass(frozen=True, slots=True)
class XetPush:
    """One push, and the user who pushes."""

    upload_id: str
    namespace: str
    actor: Actor


def begin(resources: Resources, actor: Actor, name: RepositoryName) -> XetPermit:
    """Begins a push. Its token is valid for every push of this user to this repository that is under way. Raises
    TooMany if the user has begun as many as uploads may be open, and Unavailable without lz4."""
    require_lz4()
    secret, upload_id = secrets.token_hex(32), uuid.uuid4().hex
    mine = (XetUpload.created_by == actor.name) & (XetUpload.expires_at >= actor.at)
    with resources.write() as session:
        count, first_end = session.execute(select(func.count(), func.min(XetUpload.expires_at)).where(mine)).one()
        if count >= resources.settings.max_open_uploads:
            raise TooMany(
                "too_many_uploads",
                f"{actor.name} has begun {count:,} pushes within a day.",
                next_step="Wait for the time in Retry-After, or raise ADAPTORY_MAX_OPEN_UPLOADS on the registry.",
            ).again_in((first_end - actor.at).total_seconds())
        row = XetUpload(
            id=upload_id,
            secret_sha256=_hash(secret),
            namespace=name.namespace,
            repository=name.name,
            created_at=actor.at,
            created_by=actor.name,
            expires_at=actor.at + timedelta(seconds=resources.settings.upload_expires_s),
            token_id=actor.token_id,
        )
        session.add(row)
    return XetPermit(upload_id, f"xet_{upload_id}_{secret}", int(actor.at.timestamp()) + PERMIT_S)


def authenticate(resources: Resources, upload_id: str, token: str) -> XetPush:
    """The push at an address. Raises Unauthenticated unless the token belongs to its user and repository, and the
    user's own token, with which it was begun, may still publish there."""
    now, match = resources.clock(), _TOKEN.fullmatch(token)
    with resources.read() as session:
        permit = session.get(XetUpload, match[1]) if match else None
        row = session.get(XetUpload, upload_id) if _TOKEN.fullmatch(f"xet_{upload_id}_{'0' * 64}") else None
        actor = (
            uploads.sender_now(session, permit.created_by, permit.namespace, permit.token_id, now) if permit else None
        )
    known = match is not None and permit is not None and hmac.compare_digest(permit.secret_sha256, _hash(match[2]))
    if not known or permit is None or actor is None or permit.created_at + timedelta(seconds=PERMIT_S) < now:
        raise _unauthenticated("The token of this upload is invalid or has expired.")
    if row is None or row.expires_at < now or _owner(row) != _owner(permit):
        raise _unauthenticated("The address of this upload is invalid or has expired.")
    if not may(actor, Role.PUBLISHER, f"{row.namespace}/{row.repository}"):
        raise _unauthenticated(f"{row.created_by} may no longer publish in {row.namespace}/{row.repository}.")
    return XetPush(upload_id, row.namespace, actor)


def receive_xorb(resources: Resources, push: XetPush, xorb: str, chunks: Iterable[bytes]) -> bool:
    """Stores a xorb and returns whether it is new. Raises Invalid for one that cannot be read, and TooLarge."""
    if not _HASH.fullmatch(xorb):
        raise Invalid("bad_xorb", "The address does not end in the hash of a xorb.", next_step="Push again.")
    with TemporaryDirectory(dir=resources.work_directory, prefix="upload-") as directory:
        path, scanner = Path(directory) / "xorb", ChunkScanner()
        body = scanner.watch(_within(chunks, path, MAX_XORB_BYTES))
        sha256, size_bytes = write_hashed(path, body, "The upload", path.name)
        headers = scanner.finish()
        plain = Chunks.of(headers)
        _count(resources, push, XetUpload.sent_bytes, max(size_bytes, plain.plain_bytes(0, len(plain))))
        uploads.store_file(resources, push.actor, push.namespace, sha256, path, move=True)
    with resources.write() as session:
        return insert_if_absent(session, XetXorb, upload_id=push.upload_id, hash=xorb, sha256=sha256, headers=headers)


def receive_shard(resources: Resources, push: XetPush, chunks: Iterable[bytes]) -> None:
    """Assembles the files of a shard and stores them. May be repeated. Raises Invalid for a shard that does not
    agree with the xorbs, before anything is written, and TooLarge."""
    with TemporaryDirectory(dir=resources.work_directory, prefix="upload-") as directory:
        path, assembly = Path(directory) / "shard", _Assembly(resources, push)
        write_hashed(path, _within(chunks, path, MAX_SHARD_BYTES), "The upload", path.name)
        _count(resources, push, XetUpload.made_bytes, _check(resources, path, assembly))
        with path.open("rb") as source:
            for file in read_shard(source):
                if not _is_held(resources, push, file):
                    _make(resources, push, file, assembly, path.with_name("file"))


def _check(resources: Resources, path: Path, assembly: "_Assembly") -> int:
    """The size of all files of a shard in bytes. Raises Invalid, and TooLarge."""
    total = 0
    with path.open("rb") as source:
        for count, file in enumerate(read_shard(source), start=1):
            if count > MAX_FILES:
                raise TooLarge(
                    "too_many_files",
                    f"A shard has more than {MAX_FILES:,} files.",
                    next_step="Push fewer files at a time.",
                )
            uploads.check_size(resources, f"file {file.name[:12]}", file.size_bytes)
            assembly.check(file)
            total += file.size_bytes
    return total


def _is_held(resources: Resources, push: XetPush, file: ShardFile) -> bool:
    """Whether the namespace holds a file already, and keeps it for the commit."""
    if file.sha256 is None:
        return False
    stated = ManifestFile(file.sha256, file.size_bytes, Digest(file.sha256))
    held = uploads.holds_bytes(resources, push.namespace, stated)
    if held:
        uploads.keep(resources, push.actor, push.namespace, [stated])
    return held


def _make(resources: Resources, push: XetPush, file: ShardFile, assembly: "_Assembly", target: Path) -> None:
    sha256 = assembly.write(file, target)
    if file.sha256 not in (None, sha256):
        raise Invalid(
            "digest_differs",
            f"The chunks do not make the file {file.sha256}, but {sha256}.",
            subject=str(file.sha256),
            next_step="Push again.",
        )
    uploads.store_file(resources, push.actor, push.namespace, sha256, target, move=True)


@dataclass(frozen=True, slots=True)
class _Xorb:
    sha256: Digest
    chunks: Chunks


class _Assembly:
    """Reads chunks of a push's xorbs. Caches the last chunks that were read alone: files of zeros repeat one chunk."""

    def __init__(self, resources: Resources, push: XetPush) -> None:
        self._resources, self._push = resources, push
        self._find = lru_cache(_REMEMBERED)(self._load)
        self._one = lru_cache(_REMEMBERED)(self._read_one)

    def check(self, file: ShardFile) -> None:
        """Raises Invalid for a file that its xorbs do not contain, or that has more chunks than a client makes."""
        count = 0
        for segment in file.segments:
            chunks = self._find(segment.xorb).chunks
            if segment.end > len(chunks):
                raise _bad(f"xorb {segment.xorb[:12]} has {len(chunks):,} chunks, not {segment.end:,}")
            plain_bytes = chunks.plain_bytes(segment.first, segment.end)
            if plain_bytes != segment.size_bytes:
                raise _bad(f"a segment has {plain_bytes:,} bytes, not {segment.size_bytes:,}")
            count += segment.end - segment.first
        if count > _SMALL_CHUNKS + file.size_bytes // _LEAST_CHUNK_BYTES:
            raise _bad(f"a file of {file.size_bytes:,} bytes has {count:,} chunks")

    def write(self, file: ShardFile, target: Path) -> Digest:
        """Writes a checked file, and returns its sha256."""
        content = (plain for segment in file.segments for plain in self._plain(segment))
        return write_hashed(target, content, "The file", file.name)[0]

    def _plain(self, segment: Segment) -> Iterator[bytes]:
        if segment.end - segment.first == 1:
            yield self._one(segment.xorb, segment.first)
        else:
            yield from self._read(segment.xorb, segment.first, segment.end)

    def _read_one(self, name: str, number: int) -> bytes:
        return next(self._read(name, number, number + 1))

    def _read(self, name: str, first: int, end: int) -> Iterator[bytes]:
        xorb = self._find(name)
        with self._resources.store.open(xorb.sha256, *xorb.chunks.span(first, end)) as source:
            for number in range(first, end):
                stored = _exactly(source, xorb.chunks.stored_bytes(number))
                yield decompress(xorb.chunks.scheme(number), stored, xorb.chunks.plain_bytes(number, number + 1))

    def _load(self, name: str) -> _Xorb:
        with self._resources.read() as session:
            row = session.get(XetXorb, (self._push.upload_id, name))
        if row is None:
            raise _bad(f"xorb {name[:12]} was not sent")
        return _Xorb(Digest(row.sha256), Chunks.of(row.headers))


def _exactly(source: Reader, stored_bytes: int) -> bytes:
    """The bytes of a chunk, after its header."""
    data = b""
    while len(data) < HEADER_BYTES + stored_bytes and (more := source.read(HEADER_BYTES + stored_bytes - len(data))):
        data += more
    return data[HEADER_BYTES:]


def _within(chunks: Iterable[bytes], path: Path, limit_bytes: int) -> Iterator[bytes]:
    """The chunks of a body that goes into the file. Raises TooLarge."""
    too_large = TooLarge(
        "body_too_large",
        f"A {path.name} has at most {limit_bytes:,} bytes.",
        next_step="Push with HF_HUB_DISABLE_XET=1.",
    )
    return uploads.within(chunks, limit_bytes, too_large)


def _count(resources: Resources, push: XetPush, column: InstrumentedAttribute[int], size_bytes: int) -> None:
    """Counts bytes of a push. Raises TooLarge beyond the limit, and Refused beyond the namespace's quota: sent data
    counts with its unpacked size until a shard makes a file of it."""
    limit = _LARGEST_FILES * resources.settings.max_file_bytes
    fits = (XetUpload.id == push.upload_id) & (column + size_bytes <= limit)
    with resources.write() as session:
        if column is XetUpload.sent_bytes:
            quotas.refuse_bytes(session, push.namespace, size_bytes, push.actor.at)
        counted = session.execute(
            update(XetUpload).where(fits).values({column: column + size_bytes}).returning(XetUpload.id)
        )
        if counted.first() is None:
            raise TooLarge(
                "push_too_large",
                f"One push has at most {limit:,} bytes.",
                next_step="Push fewer files at a time; the limit is four times ADAPTORY_MAX_FILE_BYTES.",
            )


def _hash(secret: str) -> str:
    """A secret has 256 random bits, so a plain SHA-256 protects it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _owner(row: XetUpload) -> tuple[str, str, str]:
    return row.namespace, row.repository, row.created_by


def _unauthenticated(why: str) -> Unauthenticated:
    return Unauthenticated("upload_token_invalid", why, next_step="Push again: the client asks for a new one.")


def _bad(why: str) -> Invalid:
    return Invalid(
        "bad_shard", f"The shard does not agree with what was sent: {why}.", next_step="Push the files again."
    )
