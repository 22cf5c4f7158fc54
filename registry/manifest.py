"""Files -> canonical manifest -> commit id."""

import hashlib
import json
import pickletools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

from registry.errors import Invalid
from registry.names import Digest

MAX_FILES = 2_000
MAX_PATH_CHARACTERS = 400
MAX_PART_BYTES = 240
"""File systems take 255, of which the name of an unfinished copy needs some."""
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of what is not shown, or shows the rest in another order or on another line."""
ENDS_BYTES = 64 << 10
"""How much of a file's beginning and of its end is looked at."""
_PICKLE_NAME = re.compile(
    r"\.(?:bin|ckpt|cloudpickle|dill|distcp|joblib|mar|nemo|pckl|pickle|pkl|pt|pt2|pth|ptl)"
    r"(?:\.(?:tar|tgz|zip|gz|bz2|xz|lzma|zst|lz4|z))*\Z",
    re.IGNORECASE,
)
"""What loaders that unpickle are given by name: alone, packed or compressed. Not .npy and .npz: numpy reads objects out
of these only when it is told to, and most hold numbers."""
_OPCODES = "".join(opcode.code for opcode in pickletools.opcodes).encode("latin-1")
_PICKLE = re.compile(rb"\x80[\x02-\x05][" + re.escape(_OPCODES) + rb"]")
"""The protocol, from 2 on, and any other opcode; protocols 0 and 1 have no such sign."""
_IMPORTS = frozenset({"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"})
_CALLS = frozenset({"BUILD", "INST", "NEWOBJ", "NEWOBJ_EX", "OBJ", "REDUCE"})
_IMPORTED = re.compile(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*", re.ASCII)
"""A module and a name in it, as GLOBAL and INST give them: two lines of a text mostly are neither."""
_TORCH_ENTRY = b"data.pkl"
"""What torch.save writes first into its zip."""
_LISTED_TORCH_ENTRY = re.compile(rb"PK\x01\x02.{42}[^\x00-\x1f]{0,400}data\.pkl", re.DOTALL)
"""The same in the list at a zip's end."""
_NUMPY_OBJECTS = re.compile(rb"\x93NUMPY.{4,6}\{[^}]*'\|O", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ManifestFile:
    path: str
    size_bytes: int
    sha256: Digest


def check_path(path: str) -> str:
    """A relative POSIX path in its normal form, which no client could turn into a place outside its directory."""
    parts = PurePosixPath(path).parts
    bad = (
        not parts
        or len(path) > MAX_PATH_CHARACTERS
        or path != "/".join(parts)
        or path.startswith("/")
        or "\\" in path
        or any(part in {".", ".."} or part.endswith((".", " ")) or ":" in part for part in parts)
        or any(unicodedata.category(character) in _UNSEEN for character in path)
        or any(len(part.encode()) > MAX_PART_BYTES for part in parts)
    )
    if bad:
        raise Invalid(
            "bad_path",
            f"{path[:120]!r} cannot be a file of a release.",
            subject=path[:120],
            next_step="Use relative paths below the pushed directory, in plain characters and short names.",
        )
    return path


def refuse_pickle(path: str) -> None:
    """Raises Invalid by the name alone, before a byte is sent."""
    if _PICKLE_NAME.search(path):
        why = "is refused by its name: such files mostly are pickles, which run code when they are opened"
        raise _pickle(path, why, " Rename it if it is none.")


def is_zip(first: bytes) -> bool:
    return first.startswith(b"PK\x03\x04")


def refuse_pickled(path: str, first: bytes, last: bytes = b"") -> None:
    """Raises Invalid by the bytes at a file's two ends, whatever its name; of what is no zip the first ones suffice."""
    if (
        _PICKLE.match(first)
        or _is_old_pickle(first)
        or _NUMPY_OBJECTS.match(first)
        or (is_zip(first) and _is_of_torch(first, last))
    ):
        raise _pickle(path, "is a pickle, which runs code when it is opened")


def _is_old_pickle(first: bytes) -> bool:
    """Whether bytes without the sign of a protocol import and call something as a pickle, or are one from end to end.

    Texts begin with letters that are opcodes, too; but none goes on so that each finds on the stack what it takes.
    """
    depths = [0]  # of the stack, and above each mark
    imported = False
    try:
        for opcode, argument, position in pickletools.genops(first):
            if not _takes(depths, opcode) or (isinstance(argument, str) and not _could_be(opcode.name, argument)):
                return False
            imported = imported or opcode.name in _IMPORTS
            if imported and opcode.name in _CALLS:
                return True
            if opcode.name == "STOP":
                return depths == [0] and position == len(first) - 1
    except ValueError:  # no opcode, or one that is cut off
        pass
    return False


def _could_be(opcode: str, argument: str) -> bool:
    return opcode not in _IMPORTS or _IMPORTED.fullmatch(argument) is not None


def _takes(depths: list[int], opcode: pickletools.OpcodeInfo) -> bool:
    """Does to the stack what the opcode does; False where that lacks what it takes."""
    taken = opcode.stack_before
    if opcode.name == "POP" and depths[-1] == 0:
        taken = [pickletools.markobject]  # it takes a mark, too
    if pickletools.markobject in taken:
        below = taken.index(pickletools.markobject)
        above = len(taken) - below - 1 - (pickletools.stackslice in taken)
        if len(depths) == 1 or depths.pop() < above:
            return False
    else:
        below = len(taken)
    if depths[-1] < below:
        return False
    depths[-1] -= below
    if pickletools.markobject in opcode.stack_after:
        depths.append(0)
    else:
        depths[-1] += len(opcode.stack_after)
    return True


def _is_of_torch(first: bytes, last: bytes) -> bool:
    first_entry = first[30 : 30 + int.from_bytes(first[26:28], "little")]
    return first_entry.endswith(_TORCH_ENTRY) or _LISTED_TORCH_ENTRY.search(last) is not None


def _pickle(path: str, why: str, otherwise: str = "") -> Invalid:
    return Invalid(
        "pickle",
        f"{path} {why}.",
        subject=path,
        next_step=f"Save safetensors (PEFT's save_pretrained does) and leave the pickle out.{otherwise}",
    )


def canonical_manifest(files: Iterable[ManifestFile]) -> bytes:
    """One line of JSON, files sorted by path: the same set of files always has the same bytes."""
    rows = sorted(files, key=lambda file: file.path)
    paths = [check_path(file.path) for file in rows]
    if not rows or len(rows) > MAX_FILES:
        raise Invalid(
            "bad_manifest",
            f"A release holds 1 to {MAX_FILES:,} files, not {len(rows):,}.",
            next_step="Pack many small files into one.",
        )
    _refuse_one_place(paths)
    document = [{"path": file.path, "sha256": file.sha256, "size_bytes": file.size_bytes} for file in rows]
    return json.dumps({"files": document}, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _refuse_one_place(paths: Iterable[str]) -> None:
    """Raises Invalid when some file system would put two files, or a file and a directory, in one place."""
    places = sorted((_place(path), path) for path in paths)
    for (place, path), (next_place, next_path) in pairwise(places):  # what lies below a path follows it at once
        if next_place[: len(place)] == place:
            raise Invalid(
                "bad_manifest",
                f"{path} and {next_path} cannot both be: one is a directory of the other, or they differ only by upper "
                "and lower case, by how an accent is written, or not at all.",
                subject=next_path,
                next_step="Rename one of them.",
            )


def _place(path: str) -> list[str]:
    """Alike for paths that a file system may take for one: Unicode's canonical caseless matching."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold()).split("/")


def parse_manifest(manifest: str) -> list[ManifestFile]:
    """The files of a canonical manifest, sorted by path."""
    return [
        ManifestFile(file["path"], file["size_bytes"], Digest(file["sha256"])) for file in json.loads(manifest)["files"]
    ]


def commit_id(manifest: bytes) -> str:
    """The first 40 hexadecimal digits of the sha256 of the canonical manifest."""
    return hashlib.sha256(manifest).hexdigest()[:40]
