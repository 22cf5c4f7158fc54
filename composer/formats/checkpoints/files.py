"""Files of weights, read by range: on this machine, or wherever the caller of `open_checkpoint` keeps them."""

import os
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from composer.errors import NotSupported, became_shorter


class StoredFile(Protocol):
    """A file of weights. Several threads may read it at once; equal objects are the same file."""

    @property
    def name(self) -> str:
        """The file's name in the checkpoint."""
        ...

    @property
    def size_bytes(self) -> int: ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer from `offset`. Raises InvalidFile if the file ends first, and RefusedOutput if a remote file
        has changed since it was opened."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine, opened at its first use and closed with the last reference to this object."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    @cached_property
    def descriptor(self) -> int:
        opened = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, opened)
        return opened

    def read_into(self, buffer: memoryview, offset: int) -> None:
        read_all(self.descriptor, buffer, offset, self.name)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that the caller has opened and will close."""

    descriptor: int
    name: str

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        read_all(self.descriptor, buffer, offset, self.name)


def read_all(file: int, buffer: memoryview, offset: int, subject: str) -> None:
    """Fills the buffer from `offset`. Raises InvalidFile if the file ends first."""
    while buffer.nbytes:
        count = os.preadv(file, [buffer], offset)
        if count == 0:
            raise became_shorter(subject)
        buffer = buffer[count:]
        offset += count


def read_range(file: StoredFile, begin: int, end: int) -> bytearray:
    """Bytes [begin, end) of the file. Raises what `read_into` raises."""
    content = bytearray(end - begin)
    file.read_into(memoryview(content), begin)
    return content


def local_file(file: StoredFile) -> LocalFile:
    """The file, for what maps it or lets the kernel copy it. Raises NotSupported for a file elsewhere."""
    if not isinstance(file, LocalFile):
        raise NotSupported(
            "remote_base",
            f"{file.name} is not on this machine, and this operation needs local files.",
            subject=file.name,
        )
    return file
