"""The header of a safetensors file: from bytes and limits to a header, or one precise `InvalidFile`.

A file is 8 bytes N (little endian), N bytes of JSON, then the tensors' bytes without a gap. Accepted adapters are
opened by safetensors' own reader too (adapters/facts.py). This reader does what that one does not: it bounds untrusted
input before allocating anything, checks a header that comes without its file (byte ranges of a store), and gives the
byte offsets of tensors, so that a merge lets the kernel copy them.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from traceback import clear_frames
from typing import Any, cast

from composer.errors import InvalidFile
from composer.formats.checkpoints.files import LocalFile, StoredFile, read_range
from composer.formats.untrusted import DuplicateKey, refuse_endless, reject_duplicate_keys

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
CONVERT = "Convert it to safetensors: load it where it was made and call save_pretrained(..., safe_serialization=True)."
_LENGTH_BYTES = 8
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # would break the lines that the weights digest is made of
# One comma or bracket and what stands before it, whole strings included: brackets within kohya's metadata are text. All
# its repeats are possessive, so nothing is tried twice and nothing is kept: 0.5 s at worst for 16 MB, in no memory.
_STRUCTURE = rb'(?:[^",\[{]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^",\[{]*+)*+[,\[{])'
_LARGE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's dtype and shape. `dtype` is safetensors' name for it ("BF16")."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.elements * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of one file; `begin` and `end` are offsets in that file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file. `tensors` are in the order of their bytes; `size_bytes` is the size of the file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_begin: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """Limits on a header. An honest one needs 8 times its bytes in memory when parsed, so the default stays below
    safetensors' own 100 MB; 90 000 tensors need 12 MB.

    One of empty lists took 35 times its bytes, and four seconds, most of them in the garbage collector. So `structure`
    bounds its commas and opening brackets. A matrix has eight of these, and 125 000 matrices with PEFT's names fill the
    16 MB.
    """

    header_bytes: int = 16_000_000
    structure: int = 1_000_000
    tensors: int = 1_000_000
    dimensions: int = 16
    name_chars: int = 1024


DEFAULT_LIMITS = HeaderLimits()


def header_length(first: bytes | bytearray, file_size: int, limits: HeaderLimits, subject: str) -> int:
    """Length of the JSON in bytes, bounded by the limits and the file. `first` has at least the file's first 8
    bytes.
    """
    if len(first) < _LENGTH_BYTES:
        raise _bad(subject, f"it has {file_size} bytes, too few for a safetensors file")
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    within = length <= limits.header_bytes and length + _LENGTH_BYTES <= file_size
    # A good length may begin with the same bytes (0x80 is a header of 128 bytes), so the magic only explains a bad one.
    if not within and first.startswith((b"PK", b"\x80")):
        raise _pickle(subject)
    if length > limits.header_bytes:
        raise _bad(subject, f"its header claims {length} bytes, more than the {limits.header_bytes} allowed")
    if not within:
        raise _bad(subject, f"its header claims {length} bytes, but the file has {file_size}: it is cut off")
    return length


def parse_header(head: bytes, file_size: int, limits: HeaderLimits = DEFAULT_LIMITS, subject: str = "file") -> Header:
    """Header of a file of `file_size` bytes that starts with `head` (at least the 8 bytes and the JSON).

    Raises InvalidFile, and nothing else, whatever the bytes are: bad JSON, duplicate names, unknown dtypes, sizes
    that differ from dtype x shape, overlaps, holes, a file that is longer or shorter than its tensors.
    """
    data_begin = _LENGTH_BYTES + header_length(head, file_size, limits, subject)
    return _in_turn(data_begin, lambda: _parse(head[_LENGTH_BYTES:data_begin], data_begin, file_size, limits, subject))


def read_header(path: Path, limits: HeaderLimits = DEFAULT_LIMITS) -> Header:
    """Header of the safetensors file at `path`. Raises InvalidFile (also for pickles and a missing file)."""
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle(path.name)
    try:
        refuse_endless(path)
        return stored_header(LocalFile(path), limits)
    except OSError as error:
        raise InvalidFile("unreadable", f"{path} cannot be read: {error.strerror}.", subject=path.name) from error


def stored_header(file: StoredFile, limits: HeaderLimits = DEFAULT_LIMITS) -> Header:
    """Header of a file that is read by range: first 8 bytes, and the rest only once its length is bounded. Raises
    InvalidFile, and what the file raises."""
    first = read_range(file, 0, min(_LENGTH_BYTES, file.size_bytes))
    length = header_length(first, file.size_bytes, limits, file.name)
    begin = _LENGTH_BYTES + length
    # Read within the turn, so that waiting threads hold no bytes.
    return _in_turn(
        length, lambda: _parse(read_range(file, _LENGTH_BYTES, begin), begin, file.size_bytes, limits, file.name)
    )


def encode_header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """First bytes of a file with these tensors: in the given order, the widest dtype first so that each is aligned.
    Their length is a multiple of 8; `parse_header` of them returns the position of each tensor."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, spec in sorted(tensors.items(), key=lambda item: -DTYPE_BITS[item[1].dtype]):
        end = position + spec.size_bytes
        table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _pickle(subject: str) -> InvalidFile:
    message = f"{subject} is a pickle, which runs code when opened."
    return InvalidFile("pickle", message, subject=subject, next_step=CONVERT)


def _bad(subject: str, why: str) -> InvalidFile:
    return InvalidFile("bad_safetensors", f"{subject} is not a valid safetensors file: {why}.", subject=subject)


@cache
def _large_parser(process_id: int) -> ThreadPoolExecutor:  # per process, since a fork does not copy threads
    return ThreadPoolExecutor(1, "large-header")


def _in_turn(length: int, parse: Callable[[], Header]) -> Header:
    """Returns what `parse` returns. Large headers are parsed one at a time, in one thread.

    One of 940 000 metadata entries takes 0.3 GB while it is parsed: eight take no more than that in turn, 1.9 GB at
    once. A lock instead of the thread would not do: malloc keeps 35 to 80 MB for each thread that ever parsed one.
    This costs no time, since Python's own lock lets one parse at a time anyway.
    """
    if length <= _LARGE_BYTES:
        return parse()
    return _large_parser(os.getpid()).submit(_parse_alone, parse).result()


def _parse_alone(parse: Callable[[], Header]) -> Header:
    try:
        return parse()
    except InvalidFile as error:
        # An error keeps its frames, and these the table, which would outlive its turn by a request.
        clear_frames(error.__traceback__)
        raise


def _parse(text: bytes | bytearray, data_begin: int, file_size: int, limits: HeaderLimits, subject: str) -> Header:
    if _LENGTH_BYTES + len(text) < data_begin:
        raise _bad(subject, "its header is cut off")
    _bound_structure(text, limits, subject)
    table = _parse_json(text, subject)
    metadata = _parse_metadata(table.pop("__metadata__", {}), subject)
    if len(table) > limits.tensors:
        raise _bad(subject, f"it lists {len(table)} tensors, more than the {limits.tensors} allowed")
    entries = [_parse_entry(name, value, data_begin, limits, subject) for name, value in table.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = data_begin
    for entry in entries:
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise _bad(subject, f"tensor {entry.name!r} {what}")
        position = entry.end
    if position != file_size:
        raise _bad(subject, f"its tensors end at byte {position}, but the file has {file_size}")
    return Header({entry.name: entry for entry in entries}, metadata, data_begin, file_size)


def _bound_structure(text: bytes | bytearray, limits: HeaderLimits, subject: str) -> None:
    """Raises InvalidFile if JSON would build more from `text` than the limits allow."""
    at_most = text.count(b",") + text.count(b"[") + text.count(b"{")  # also within strings, but 20 times as fast
    if at_most > limits.structure and re.match(b"%b{%d}+" % (_STRUCTURE, limits.structure + 1), text, re.DOTALL):
        raise _bad(subject, f"its header has more than the {limits.structure} commas and opening brackets allowed")


def _parse_json(text: bytes | bytearray, subject: str) -> dict[str, Any]:
    why = "its header is not a JSON object"
    try:
        table: object = json.loads(text.decode("utf-8"), object_pairs_hook=reject_duplicate_keys, parse_int=_integer)
    except DuplicateKey as error:
        table, why = None, f"its header {error}"
    except (ValueError, RecursionError):
        table, why = None, "its header is not JSON"  # raised below, not from here: a JSONDecodeError keeps the text
    if not isinstance(table, dict):
        raise _bad(subject, why)
    return cast(dict[str, Any], table)


def _integer(text: str) -> int:
    """Parses an integer of JSON. safetensors refuses -0, which Python reads as 0, so it becomes a value that is not a
    count."""
    return -1 if text == "-0" else int(text)


def _parse_metadata(value: object, subject: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _bad(subject, "its metadata is not an object")
    metadata = cast(dict[str, object], value)
    for key, text in metadata.items():
        if not isinstance(text, str):
            raise _bad(subject, f"its metadata {key!r} is not a string")
    return cast(dict[str, str], metadata)


def _parse_entry(name: str, value: object, data_begin: int, limits: HeaderLimits, subject: str) -> TensorEntry:
    if not name or len(name) > limits.name_chars or _UNSAFE_NAME.search(name):
        raise _bad(subject, f"tensor name {name[:80]!r} is empty, too long or has control characters")
    fields = cast(dict[str, object], value) if isinstance(value, dict) else {}
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _bad(subject, f"tensor {name!r} must have dtype, shape and data_offsets, and nothing else")
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad(subject, f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    shape = _parse_counts(fields["shape"], limits.dimensions)
    offsets = _parse_counts(fields["data_offsets"], 2)
    if shape is None or offsets is None or len(offsets) != 2:
        raise _bad(subject, f"tensor {name!r} has a malformed shape or data_offsets")
    begin, end = offsets
    if (end - begin) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        raise _bad(subject, f"tensor {name!r} has {end - begin} bytes, which is not {dtype} x {list(shape)}")
    return TensorEntry(name, dtype, shape, data_begin + begin, data_begin + end)


def _parse_counts(value: object, most: int) -> tuple[int, ...] | None:
    """A list of at most `most` integers in [0, 2^63), or None. `True` does not count as an integer."""
    counts = cast(list[object], value) if isinstance(value, list) else None
    if counts is None or len(counts) > most:
        return None
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        return None
    return tuple(cast(list[int], counts))
