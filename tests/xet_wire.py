"""Xorbs and shards as clients with `hf_xet` write them, and as they do not."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from lz4 import frame

PLAIN, LZ4, GROUPED = range(3)


@dataclass(frozen=True)
class Segment:
    xorb: str
    first: int
    end: int
    size: int


def group(data: bytes) -> bytes:
    """All bytes at positions 0 mod 4, then 1, 2 and 3."""
    values = np.frombuffer(data, np.uint8)
    return b"".join(values[start::4].tobytes() for start in range(4))


def chunk(plain: bytes, scheme: int = LZ4, *, claimed: int | None = None) -> bytes:
    """A chunk with its header, which claims `claimed` plain bytes."""
    stored = {PLAIN: plain, LZ4: frame.compress(plain), GROUPED: frame.compress(group(plain))}[scheme]
    return header(len(stored), scheme, len(plain) if claimed is None else claimed) + stored


def header(stored: int, scheme: int, plain: int) -> bytes:
    return b"\0" + stored.to_bytes(3, "little") + bytes([scheme]) + plain.to_bytes(3, "little")


def name_of(content: bytes) -> str:
    """Any hash will do: the client's own is not checked."""
    return hashlib.sha256(content).hexdigest()


def shard(*files: tuple[Sequence[Segment], str | None], checks: bool = True) -> bytes:
    """Files as segments and sha256, followed by other data, as in a real shard."""
    records = [b"HFRepoMetaData".ljust(32, b"\0") + struct.pack("<2Q", 2, 0)]
    for segments, sha256 in files:
        flags = (1 << 31) * checks | (1 << 30) * (sha256 is not None)
        records.append(bytes(32) + struct.pack("<2IQ", flags, len(segments), 0))
        records += [
            _raw(segment.xorb) + struct.pack("<4I", 0, segment.size, segment.first, segment.end) for segment in segments
        ]
        records += [bytes(48)] * (len(segments) * checks)
        records += [_raw(sha256) + bytes(16)] if sha256 is not None else []
    return b"".join([*records, b"\xff" * 32 + bytes(16), b"the rest"])


def _raw(hexadecimal: str) -> bytes:
    return struct.pack("<4Q", *(int(hexadecimal[start : start + 16], 16) for start in range(0, 64, 16)))
