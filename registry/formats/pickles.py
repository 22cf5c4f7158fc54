"""Refuses pickles, by name and by content, since loading one runs code."""

import pickletools
import re

from registry.errors import Invalid

ENDS_BYTES = 64 << 10
"""The number of bytes read at a file's beginning and end."""

_PICKLE_NAME = re.compile(
    r"\.(?:bin|ckpt|cloudpickle|dill|distcp|joblib|mar|nemo|pckl|pickle|pkl|pt|pt2|pth|ptl)"
    r"(?:\.(?:tar|tgz|zip|gz|bz2|xz|lzma|zst|lz4|z))*\Z",
    re.IGNORECASE,
)
"""Names of files for loaders that unpickle: plain, packed or compressed. Not .npy and .npz: numpy reads objects from
these only on request, and most hold numbers."""

_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}

_PICKLE = re.compile(rb"\x80[\x02-\x05][" + re.escape(bytes(_OPCODES)) + rb"]")
"""The protocol, from 2 on, and any other opcode; protocols 0 and 1 have no such mark."""

_IMPORTS = frozenset({"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"})

_CALLS = frozenset({"BUILD", "INST", "NEWOBJ", "NEWOBJ_EX", "OBJ", "REDUCE"})

_NAME = rb"[A-Za-z_][\w.]*\n"  # rarely two lines of a text

_INTEGER = rb"(?:[ \t\v\f\r]*[+-]?[0-9]\w*[ \t\v\f\r]*|[^\n\0]*\0[^\n]*)\n"  # in any base, and C reads up to a NUL

_FLOAT = rb"(?:[ \t\v\f\r]*[+-]?(?:nan|inf(?:inity)?|[0-9._]+(?:e[+-]?[0-9_]+)?)[ \t\v\f\r]*|[^\n\0]*\0[^\n]*)\n"

_LINES = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "INT": _INTEGER,
        "LONG": _INTEGER,
        "GET": _INTEGER,
        "PUT": _INTEGER,
        "FLOAT": _FLOAT,
        "STRING": rb"""(["'])[^\n]*\1\n""",
        "UNICODE": rb"[^\n]*\n",
        "PERSID": rb"[\0-\x09\x0b-\x7f]*\n",
        "GLOBAL": _NAME * 2,
        "INST": _NAME * 2,
    }.items()
}
"""Patterns of the arguments that loaders accept for line-based opcodes; `pickletools` accepts fewer."""

_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}

_TORCH_ENTRY = b"data.pkl"
"""The name of the first file in torch.save's zip."""

_LISTED_TORCH_ENTRY = re.compile(rb"PK\x01\x02.{42}[^\x00-\x1f]{0,400}data\.pkl", re.DOTALL)
"""The same in the list at a zip's end."""

_NUMPY_OBJECTS = re.compile(rb"\x93NUMPY.{4,6}\{[^}]*'\|O", re.DOTALL)


def refuse_pickle_name(path: str) -> None:
    """Raises Invalid for the name of a pickle, before any byte is sent."""
    if _PICKLE_NAME.search(path):
        why = "is refused by its name: such files are usually pickles, which run code when loaded"
        raise _pickle(path, why, " Rename it if it is not a pickle.")


def is_zip(first: bytes) -> bool:
    return first.startswith(b"PK\x03\x04")


def refuse_pickle_content(path: str, first: bytes, last: bytes = b"") -> None:
    """Raises Invalid if the bytes at a file's two ends are those of a pickle, regardless of its name. For a file that
    is not a zip, the first bytes suffice."""
    if (
        _PICKLE.match(first)
        or _is_old_pickle(first)
        or _NUMPY_OBJECTS.match(first)
        or (is_zip(first) and _is_of_torch(first, last))
    ):
        raise _pickle(path, "is a pickle, which runs code when loaded")


def _is_old_pickle(first: bytes) -> bool:
    """Whether bytes without a protocol mark import and call something when read as a pickle, or consist of pickles
    only.

    Texts begin with letters that are opcodes too, but do not continue so that each opcode finds its operands on the
    stack. One pickle may follow another, as in old files of torch.save.
    """
    depths = [0]  # sizes of the stack, and above each mark
    imported, alone, at = False, True, 0
    while at < len(first):
        opcode = _OPCODES.get(first[at])
        end = None if opcode is None else _end_of(opcode, first, at + 1)
        if opcode is None or end is None or not _takes(depths, opcode):
            return False
        imported = imported or opcode.name in _IMPORTS
        if imported and opcode.name in _CALLS:
            return True
        at = end
        if opcode.name == "STOP":
            alone, depths = alone and depths == [0], [0]
            if at == len(first):
                return alone
    return False


def _end_of(opcode: pickletools.OpcodeInfo, content: bytes, start: int) -> int | None:
    """The end of the argument that begins at `start`; None if it is not an argument of this opcode, or is cut off."""
    if opcode.name in _LINES:
        match = _LINES[opcode.name].match(content, start)
        return match.end() if match else None
    size = opcode.arg.n if opcode.arg else 0
    if size < 0:
        counted = _LENGTH_BYTES[size]
        size = counted + int.from_bytes(content[start : start + counted], "little")
    return start + size if start + size <= len(content) else None


def _takes(depths: list[int], opcode: pickletools.OpcodeInfo) -> bool:
    """Applies the opcode to the stack; False if the stack lacks its operands."""
    taken = opcode.stack_before
    if opcode.name == "POP" and depths[-1] == 0:
        taken = [pickletools.markobject]  # it consumes a mark too
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
