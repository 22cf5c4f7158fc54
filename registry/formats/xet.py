"""The formats in which clients with `hf_xet` send files: xorbs, which contain chunks, and shards, which assemble files
from them. Both are untrusted. Their stated sizes are checked before anything is decompressed or written: a small upload
could otherwise become a huge file.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from registry.errors import Invalid, Unavailable

HEADER_BYTES = 8
"""The header of a chunk: version 0, stored length (3 bytes), scheme, plain length (3 bytes); little endian."""
MAX_CHUNK_BYTES, MAX_CHUNKS = 256 << 10, 8192
"""Clients make chunks of at most 128 KiB, and at most 8,192 for a xorb."""
MAX_SEGMENTS = 100_000
"""Limit for one file. A file of 64 GiB has about a thousand."""
_PLAIN, _LZ4, _GROUPED_LZ4 = range(3)
_GROUPS = 4
_TAG, _VERSION = b"HFRepoMetaData\0", 2
_RECORD_BYTES = 48
_END = b"\xff" * 32
_HAS_CHECKS, _HAS_SHA256 = 1 << 31, 1 << 30
_SEGMENT = np.dtype([("xorb", "<u8", 4), ("flags", "<u4"), ("size", "<u4"), ("first", "<u4"), ("end", "<u4")])
_CHUNK = np.dtype([("version", "u1"), ("stored", "u1", 3), ("scheme", "u1"), ("plain", "u1", 3)])


def hex_of(raw: bytes) -> str:
    """A hash in the form that clients use in addresses: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


class ChunkScanner:
    """Collects the headers of a xorb's chunks while it arrives, in pieces of any size. Ignores bytes after the
    chunks."""

    def __init__(self) -> None:
        self._headers, self._partial, self._skip, self._ended = bytearray(), b"", 0, False

    def feed(self, data: bytes) -> None:
        """Reads the next bytes. Raises Invalid for an impossible chunk."""
        start = 0
        while start < len(data) and not self._ended:
            passed = min(self._skip, len(data) - start)
            self._skip, start = self._skip - passed, start + passed
            taken = data[start : start + HEADER_BYTES - len(self._partial)]
            self._partial, start = self._partial + taken, start + len(taken)
            if self._partial and self._partial[0] != 0:
                self._ended = True
            elif len(self._partial) == HEADER_BYTES:
                self._skip = _check_chunk(self._partial)
                self._headers += self._partial
                self._partial = b""
                if len(self._headers) > MAX_CHUNKS * HEADER_BYTES:
                    raise _bad_xorb(f"it has more than {MAX_CHUNKS:,} chunks")

    def watch(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yields the pieces, and feeds each of them first. Raises Invalid for an impossible chunk."""
        for piece in pieces:
            self.feed(piece)
            yield piece

    def finish(self) -> bytes:
        """The concatenated headers. Raises Invalid if the xorb ends within a chunk, or has none."""
        if self._skip or (self._partial and not self._ended):
            raise _bad_xorb("it ends within a chunk")
        if not self._headers:
            raise _bad_xorb("it has no chunk")
        return bytes(self._headers)


def _check_chunk(header: bytes) -> int:
    """The stored length of a chunk. Raises Invalid for an impossible one."""
    stored, scheme, plain = int.from_bytes(header[1:4], "little"), header[4], int.from_bytes(header[5:8], "little")
    if scheme not in (_PLAIN, _LZ4, _GROUPED_LZ4):
        raise _bad_xorb(f"a chunk has the unknown compression {scheme}")
    if not 0 < plain <= MAX_CHUNK_BYTES or not 0 < stored <= MAX_CHUNK_BYTES:
        raise _bad_xorb(f"a chunk of {stored:,} bytes with {plain:,} plain ones; the limit is {MAX_CHUNK_BYTES:,}")
    if scheme == _PLAIN and stored != plain:
        raise _bad_xorb("an uncompressed chunk has two lengths")
    return stored


def _bad_xorb(why: str) -> Invalid:
    return Invalid("bad_xorb", f"The xorb cannot be read: {why}.")


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of a xorb. `starts` has the start of each, and finally the end of all; `plain_starts` the same for
    their plain bytes."""

    starts: npt.NDArray[np.int64]
    plain_starts: npt.NDArray[np.int64]
    schemes: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, headers: bytes) -> "Chunks":
        """Makes it from the headers that a `ChunkScanner` has collected."""
        table: npt.NDArray[Any] = np.frombuffer(headers, _CHUNK)
        weights = np.array([1, 1 << 8, 1 << 16], np.int64)
        stored, plain = table["stored"] @ weights, table["plain"] @ weights
        return cls(_starts(stored + HEADER_BYTES), _starts(plain), table["scheme"])

    def __len__(self) -> int:
        return len(self.schemes)

    def plain_bytes(self, first: int, end: int) -> int:
        return int(self.plain_starts[end] - self.plain_starts[first])

    def scheme(self, number: int) -> int:
        return int(self.schemes[number])

    def stored_bytes(self, number: int) -> int:
        return int(self.starts[number + 1] - self.starts[number]) - HEADER_BYTES

    def span(self, first: int, end: int) -> tuple[int, int]:
        """Start and length of these chunks within the xorb."""
        return int(self.starts[first]), int(self.starts[end] - self.starts[first])


def _starts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))


def decompress(scheme: int, stored: bytes, plain_bytes: int) -> bytes:
    """The plain bytes of a chunk. Produces exactly `plain_bytes` bytes; raises Invalid otherwise."""
    if scheme == _PLAIN:
        return stored
    data = _decompress_frame(stored, plain_bytes)
    return data if scheme == _LZ4 else _ungroup(data)


def _decompress_frame(stored: bytes, plain_bytes: int) -> bytes:
    frame = require_lz4()
    decoder = frame.LZ4FrameDecompressor()
    try:
        data: bytes = decoder.decompress(stored, max_length=plain_bytes + 1)
    except RuntimeError as error:
        raise _bad_xorb(f"a chunk is not an LZ4 frame ({error})") from error
    if len(data) != plain_bytes or not decoder.eof or decoder.unused_data:
        raise _bad_xorb(f"a chunk does not have the {plain_bytes:,} plain bytes of its header")
    return data


def has_lz4() -> bool:
    """Whether this server can read uploads of clients with `hf_xet`."""
    return find_spec("lz4") is not None


def require_lz4() -> Any:
    """The module that reads LZ4 frames. Raises Unavailable on a server without it."""
    try:
        from lz4 import frame  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise Unavailable(
            "extra_missing",
            "Clients with hf_xet compress uploads with LZ4, and this server lacks the package lz4.",
            next_step="Install lz4 on the server, or push with HF_HUB_DISABLE_XET=1.",
        ) from error
    return frame


def _ungroup(data: bytes) -> bytes:
    """Undoes the grouping of float bytes: first all bytes at positions 0 mod 4, then 1, 2 and 3."""
    grouped, plain = np.frombuffer(data, np.uint8), np.empty(len(data), np.uint8)
    start = 0
    for group in range(_GROUPS):
        count = len(plain[group::_GROUPS])
        plain[group::_GROUPS] = grouped[start : start + count]
        start += count
    return plain.tobytes()


@dataclass(frozen=True, slots=True)
class Segment:
    """The chunks `first` to `end` (exclusive) of a xorb; `size_bytes` is their plain length."""

    xorb: str
    first: int
    end: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """The segments of a file. `sha256` is None if the shard does not state it."""

    name: str
    sha256: str | None
    _segments: npt.NDArray[Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def size_bytes(self) -> int:
        return int(self._segments["size"].sum(dtype=np.int64))

    @property
    def segments(self) -> Iterator[Segment]:
        for row in self._segments:
            yield Segment(hex_of(row["xorb"].tobytes()), int(row["first"]), int(row["end"]), int(row["size"]))


def read_shard(source: BinaryIO) -> Iterator[ShardFile]:
    """Yields the files of a shard. Data after them is not read. Raises Invalid."""
    header = source.read(_RECORD_BYTES)
    if len(header) < _RECORD_BYTES or not header.startswith(_TAG):
        raise _bad_shard("it does not begin like a shard")
    if (version := int.from_bytes(header[32:40], "little")) != _VERSION:
        raise _bad_shard(f"its version is {version}, not {_VERSION}")
    while True:
        record = _read(source, _RECORD_BYTES)
        if record.startswith(_END):
            return
        flags, count = struct.unpack_from("<2I", record, 32)
        if count > MAX_SEGMENTS:
            raise _bad_shard(f"a file has {count:,} segments; the limit is {MAX_SEGMENTS:,}")
        segments: npt.NDArray[Any] = np.frombuffer(_read(source, count * _RECORD_BYTES), _SEGMENT)
        if not (segments["size"] > 0).all() or not (segments["first"] < segments["end"]).all():
            raise _bad_shard("a segment is empty")
        if flags & _HAS_CHECKS:
            _read(source, count * _RECORD_BYTES)
        stated = hex_of(_read(source, _RECORD_BYTES)[:32]) if flags & _HAS_SHA256 else None
        yield ShardFile(hex_of(record[:32]), stated, segments)


def _read(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise _bad_shard("it ends too early")
    return data


def _bad_shard(why: str) -> Invalid:
    return Invalid("bad_shard", f"The shard cannot be read: {why}.")
