"""Matrices in files: mapped without copying, read a few rows at a time, and spilled to a temporary file.

A mapped matrix takes memory only where it is touched, and its pages stay resident until they are dropped. Reading rows
into a buffer (`StoredFactor.read_into`) touches none of them.
"""

import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO, Any

import torch

from composer.deltas.tensors import tensor_bytes, torch_dtype
from composer.errors import RefusedOutput, became_shorter
from composer.formats.checkpoints.files import LocalFile, StoredFile, read_all
from composer.formats.checkpoints.header import TensorEntry
from composer.formats.checkpoints.staging import DISK_FULL_ERRNOS

_ALIGNED = 64  # bytes, for vector instructions
_GAPS = 4  # rows of gap that may lie between two rows read together
_KEPT_BYTES = 2 << 20
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
_BUFFERS = threading.local()


class MappedFile:
    """A file, or a part of one, mapped once for all of its tensors: a process may have 65,530 mappings, and each costs
    memory and a system call. Do not write to the file or to its tensors."""

    def __init__(self, file: IO[bytes], subject: str, begin: int = 0, size_bytes: int = 0) -> None:
        """Maps `size_bytes` from `begin`, by default all of the file, and keeps it open."""
        # Private and copy on write: torch wants a writable buffer, and nothing reaches the file. No memory is reserved
        # for copies, which are never made: a file may be larger than memory and swap.
        flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        self._pages = mmap.mmap(file.fileno(), size_bytes, flags=flags, prot=access, offset=begin)
        self._bytes = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._file, self._subject, self._begin = file, subject, begin

    @classmethod
    def open(cls, path: Path) -> "MappedFile":
        """Raises InvalidFile for an empty file."""
        file = path.open("rb", buffering=0)
        if not os.fstat(file.fileno()).st_size:
            raise became_shorter(path.name)
        try:
            return cls(file, path.name)
        except OSError as error:
            raise OSError(error.errno, f"cannot be mapped: {error.strerror}", str(path)) from error

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor at `entry`; a copy if it is not aligned. Raises InvalidFile if the file is too short."""
        dtype = torch_dtype(entry.dtype, entry.name)
        if min(len(self._bytes), os.fstat(self._file.fileno()).st_size) < entry.end:
            raise became_shorter(self._subject)
        return self.at(entry.begin, entry.size_bytes, dtype).reshape(entry.shape)

    def factor(self, entry: TensorEntry) -> "Factor":
        """The tensor at `entry` as a matrix, its first dimension as rows. Raises what `tensor` raises."""
        matrix = self.tensor(entry).flatten(1)
        return matrix if entry.begin % matrix.itemsize else StoredFactor(self, matrix)

    def at(self, begin: int, size_bytes: int, dtype: torch.dtype) -> torch.Tensor:
        """`size_bytes` bytes from `begin` as a flat tensor; copied only if they are not aligned for the dtype."""
        part = self._bytes[begin : begin + size_bytes]
        return (part.clone() if begin % dtype.itemsize else part).view(dtype)

    def read_rows(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """Copies the values of `rows`, a view of this mapping with adjacent columns, to `out`. Reads the rows from the
        file in one piece, with the gaps between them, or row by row if the gaps are larger."""
        (count, columns), between = rows.shape, rows.stride(0)
        begin = self._begin + int(rows.storage_offset()) * rows.itemsize
        if out.dtype is rows.dtype and out.is_contiguous() and rows.is_contiguous():
            self._read(out, begin)
            return
        step = count if between <= _GAPS * columns else 1
        for row in range(0, count, step):
            flat = _buffer((step - 1) * between + columns, rows.dtype)
            self._read(flat, begin + row * between * rows.itemsize)
            out[row : row + step].copy_(flat.as_strided((step, columns), (between, 1)))

    def _read(self, out: torch.Tensor, offset: int) -> None:
        read_all(self._file.fileno(), tensor_bytes(out), offset, self._subject)

    def drop_pages(self) -> None:
        """Drops the resident memory of the mapping; later uses read the file again.

        Drops all of it, because on access the kernel maps everything contiguous around a page, even megabytes: reading
        a neighbour brings a tensor back.
        """
        self._pages.madvise(mmap.MADV_DONTNEED)


def map_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a file, mapped. Raises InvalidFile if the file is too short."""
    return MappedFile.open(path).tensor(entry)


def stored_tensor(file: StoredFile, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a file: mapped if it is on this machine, otherwise read into memory. Raises InvalidFile if the file
    is too short."""
    if isinstance(file, LocalFile):
        return map_tensor(file.path, entry)
    tensor = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype, entry.name))
    file.read_into(tensor_bytes(tensor), entry.begin)
    return tensor


def _buffer(count: int, dtype: torch.dtype) -> torch.Tensor:
    """This thread's buffer, kept between reads unless it is large: a fresh one costs a page fault per 4 kB."""
    size = count * dtype.itemsize
    if size > _KEPT_BYTES:
        return torch.empty(count, dtype=dtype)
    if not hasattr(_BUFFERS, "kept"):
        _BUFFERS.kept = torch.empty(_KEPT_BYTES, dtype=torch.uint8)  # only the used part takes memory
    return _BUFFERS.kept[:size].view(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class StoredFactor:
    """A matrix in a mapped file. `tensor` is a view of the mapping; rows, columns and `T` are stored factors too."""

    file: MappedFile
    tensor: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def T(self) -> "StoredFactor":  # noqa: N802 - as in torch
        return StoredFactor(self.file, self.tensor.T)

    def __getitem__(self, index: Any) -> "StoredFactor":
        return StoredFactor(self.file, self.tensor[index])

    def read_into(self, out: torch.Tensor) -> None:
        """Copies the values to `out`, in its dtype, from the file: needs no memory but `out` and as much again.

        Raises InvalidFile if the file has become shorter.
        """
        if not self.tensor.numel():
            return
        if self.tensor.stride(1) == 1:
            self.file.read_rows(out, self.tensor)
        elif self.tensor.stride(0) == 1:
            self.file.read_rows(out.T, self.tensor.T)
        else:
            out.copy_(self.tensor)
            self.drop()

    def drop(self) -> None:
        """Drops the resident pages of the file behind the factor."""
        self.file.drop_pages()


Factor = torch.Tensor | StoredFactor
"""A factor of a low-rank delta, in memory or in a file."""


def tensor_of(factor: Factor) -> torch.Tensor:
    """The factor as a tensor; mapped if it is stored."""
    return factor.tensor if isinstance(factor, StoredFactor) else factor


def factor_on(device: torch.device, factor: Factor) -> torch.Tensor:
    """The factor on a device. A stored one is read, not mapped: touching a mapping of a file that
    has become shorter kills the process. Raises InvalidFile for such a file."""
    if isinstance(factor, StoredFactor):
        read = torch.empty(factor.shape, dtype=factor.tensor.dtype)
        factor.read_into(read)
        return read.to(device)
    return factor.to(device)


def read_into(out: torch.Tensor, factor: Factor) -> None:
    """Copies the values of the factor to `out`, in its dtype. Raises InvalidFile if its file has become shorter."""
    if isinstance(factor, StoredFactor):
        factor.read_into(out)
    else:
        out.copy_(factor)


class SpillFile:
    """Tensors spilled to disk, in a file without a name that is freed with the last of them."""

    def __init__(self) -> None:
        self._end = 0

    @cached_property
    def _file(self) -> IO[bytes]:
        return TemporaryFile(prefix="adaptory-")

    def put(self, tensors: Sequence[torch.Tensor]) -> list[StoredFactor]:
        """Writes the tensors and returns them mapped. Not thread-safe. Raises RefusedOutput if the disk is full."""
        if not tensors:
            return []
        begins = [0, *accumulate(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors)]
        size = begins[-1] or _ALIGNED
        try:
            for begin, tensor in zip(begins, tensors, strict=False):
                self._file.seek(self._end + begin)
                self._file.write(tensor_bytes(tensor.cpu()))
            self._file.truncate(self._end + size)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            message = f"{DISK_FULL_ERRNOS[error.errno]}: {gettempdir()} has no room for the combined factors."
            next_step = "Free some space, or name another directory (TMPDIR)."
            raise RefusedOutput("disk_full", message, subject=gettempdir(), next_step=next_step) from error
        mapping = MappedFile(self._file, gettempdir(), self._end, size)
        self._end += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return [
            StoredFactor(mapping, mapping.at(begin, tensor.nbytes, tensor.dtype).reshape(tensor.shape))
            for begin, tensor in zip(begins, tensors, strict=False)
        ]
