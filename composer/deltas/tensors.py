"""Maps safetensors bytes as torch tensors without copying, spills tensors to disk, and sets torch's threads."""

import mmap
import os
import threading
from bisect import bisect_right, insort
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from weakref import ReferenceType, WeakValueDictionary, finalize, ref

import torch

from composer.errors import NotSupported, RefusedOutput, became_shorter
from composer.formats.checkpoints.header import TensorEntry
from composer.formats.checkpoints.staging import DISK_FULL_ERRNOS
from composer.formats.untrusted import printable

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


_ALIGNED = 64  # bytes, for vector instructions
_ASKING = threading.Lock()
_asked: list[int] = []  # thread counts of open `torch_threads` blocks, after the initial count
_OWN = threading.local()
_KEPT_BYTES = 2 << 20
_GAPS = 4  # rows of gap that may lie between two rows read together
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
_MAPPING = threading.Lock()
_FILES: WeakValueDictionary[tuple[int, ...], mmap.mmap] = WeakValueDictionary()  # by file identity
_REGISTERING = threading.RLock()  # reentrant: a mapping may be finalized while its thread holds the lock
_REGIONS: "list[_Region]" = []  # sorted by address; they do not overlap


class _Open:
    """Keeps a file open under its own descriptor for as long as this object lives."""

    def __init__(self, file: int) -> None:
        self.number = os.dup(file)
        finalize(self, os.close, self.number)


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    """The address range of a mapping, with its open file and the offset in it."""

    mapping: "ReferenceType[mmap.mmap]"
    address: int
    size: int
    file: _Open
    offset: int
    subject: str


def torch_dtype(name: str, subject: str) -> torch.dtype:
    if name not in TORCH_DTYPES:
        raise NotSupported(
            "dtype",
            f"{subject} has dtype {name}, which does not support arithmetic.",
            subject=subject,
            next_step="Save it as float32, bfloat16 or float16.",
        )
    return TORCH_DTYPES[name]


def map_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """The tensor at `entry`, mapped: it takes memory only where it is touched. Do not write to the file or the tensor:
    all tensors of a file share one mapping. Raises InvalidFile if the file is too short."""
    dtype = torch_dtype(entry.dtype, entry.name)
    if entry.size_bytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    mapping = _mapping_of(path)
    if len(mapping) < entry.end:
        raise became_shorter(path.name)
    if entry.begin % dtype.itemsize:  # the writer did not align its header
        part = bytearray(memoryview(mapping)[entry.begin : entry.end])
        return torch.frombuffer(part, dtype=dtype).reshape(entry.shape)
    return _mapped(mapping, entry.begin, entry.size_bytes, dtype).reshape(entry.shape)


def _mapping_of(path: Path) -> mmap.mmap:
    """One mapping per file, not per tensor: a process may have 65,530, and each costs memory and a system call."""
    with _MAPPING, path.open("rb") as file:
        stat = os.fstat(file.fileno())
        key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        mapping = _FILES.get(key)
        if mapping is None:
            if not stat.st_size:
                raise became_shorter(path.name)
            # Private and copy on write: torch wants a writable buffer, and nothing reaches the file. No memory is
            # reserved for copies, which are never made: a file may be larger than memory and swap.
            flags = mmap.MAP_PRIVATE | _NO_RESERVE
            try:
                fresh = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            except OSError as error:
                raise OSError(error.errno, f"cannot be mapped: {error.strerror}", str(path)) from error
            mapping = _FILES[key] = _known(fresh, _Open(file.fileno()), 0, path.name)
        return mapping


def _known(mapping: mmap.mmap, file: _Open, offset: int, subject: str) -> mmap.mmap:
    address = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
    region = _Region(ref(mapping), address, len(mapping), file, offset, subject)
    with _REGISTERING:
        insort(_REGIONS, region, key=_address)
    finalize(mapping, _forget, region)
    return mapping


def _forget(region: _Region) -> None:
    with _REGISTERING:
        _REGIONS.remove(region)


def _address(region: _Region) -> int:
    return region.address


def _mapped(mapping: mmap.mmap, begin: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(mapping, dtype=dtype, count=size // dtype.itemsize, offset=begin)


def drop_pages(tensor: torch.Tensor) -> None:
    """Drops the resident memory of the file behind a mapped tensor (`map_tensor`, `SpillFile`); later uses read it
    again. Other tensors are unaffected.

    Drops the entire file, because on access the kernel maps everything contiguous around a page, even megabytes:
    reading a neighbour brings the tensor back.
    """
    region = _region_of(tensor)
    if region and (mapping := region.mapping()) is not None:
        mapping.madvise(mmap.MADV_DONTNEED)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor lies in a file (`map_tensor`, `SpillFile`) rather than in its own memory."""
    return _region_of(tensor) is not None


def _region_of(tensor: torch.Tensor) -> _Region | None:
    address = tensor.data_ptr()
    with _REGISTERING:
        number = bisect_right(_REGIONS, address, key=_address) - 1
        region = _REGIONS[number] if number >= 0 else None
    return region if region and address < region.address + region.size else None


def read_into(out: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copies the values of a matrix to `out`, in the dtype of `out`. A mapped matrix is read from its file, which takes
    no memory but `out` and as much again; pages read through a mapping stay resident until `drop_pages`.

    Raises InvalidFile if the file has become shorter.
    """
    region = _region_of(tensor) if tensor.numel() else None
    if region is None:
        out.copy_(tensor)
    elif tensor.stride(1) == 1:
        _read_rows(out, tensor, region)
    elif tensor.stride(0) == 1:
        _read_rows(out.T, tensor.T, region)
    else:
        out.copy_(tensor)
        drop_pages(tensor)


def _read_rows(out: torch.Tensor, tensor: torch.Tensor, region: _Region) -> None:
    """Reads the rows in one piece, with the gaps between them, or row by row if the gaps are larger."""
    (rows, columns), between = tensor.shape, tensor.stride(0)
    begin = region.offset + tensor.data_ptr() - region.address
    if out.dtype is tensor.dtype and out.is_contiguous() and tensor.is_contiguous():
        read_all(region.file.number, tensor_bytes(out), begin, region.subject)
        return
    step = rows if between <= _GAPS * columns else 1
    for row in range(0, rows, step):
        flat = _scratch((step - 1) * between + columns, tensor.dtype)
        read_all(region.file.number, tensor_bytes(flat), begin + row * between * tensor.itemsize, region.subject)
        out[row : row + step].copy_(flat.as_strided((step, columns), (between, 1)))


def _scratch(count: int, dtype: torch.dtype) -> torch.Tensor:
    """This thread's buffer, kept between reads unless it is large: a fresh one costs a page fault per 4 kB."""
    size = count * dtype.itemsize
    if size > _KEPT_BYTES:
        return torch.empty(count, dtype=dtype)
    if not hasattr(_OWN, "scratch"):
        _OWN.scratch = torch.empty(_KEPT_BYTES, dtype=torch.uint8)  # only the used part takes memory
    return _OWN.scratch[:size].view(dtype)


def read_all(file: int, buffer: memoryview, offset: int, subject: str) -> None:
    """Fills the buffer from `offset`. Raises InvalidFile if the file ends first."""
    while buffer.nbytes:
        count = os.preadv(file, [buffer], offset)
        if count == 0:
            raise became_shorter(subject)
        buffer = buffer[count:]
        offset += count


class SpillFile:
    """Tensors spilled to disk. They are mapped and take memory only where they are read, until `drop_pages`.

    The file has no name and is freed with the last tensor.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile(prefix="adaptory-")  # noqa: SIM115 - as long as this object
        self._open = _Open(self._file.fileno())  # one for everything in it
        self._end = 0

    def put(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Writes the tensors and returns them mapped. Not thread-safe. Raises RefusedOutput if the disk is full."""
        begins = [0, *accumulate(-(-one.nbytes // _ALIGNED) * _ALIGNED for one in tensors)]
        if not begins[-1]:
            return list(tensors)
        try:
            for begin, tensor in zip(begins, tensors, strict=False):
                self._file.seek(self._end + begin)
                self._file.write(tensor_bytes(tensor))
            self._file.truncate(self._end + begins[-1])
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            message = f"{DISK_FULL_ERRNOS[error.errno]}: {gettempdir()} has no room for the combined factors."
            next_step = "Free some space, or name another directory (TMPDIR)."
            raise RefusedOutput("disk_full", message, subject=gettempdir(), next_step=next_step) from error
        with _MAPPING:
            fresh = mmap.mmap(self._file.fileno(), begins[-1], access=mmap.ACCESS_COPY, offset=self._end)
            mapping = _known(fresh, self._open, self._end, gettempdir())
        self._end += -(-begins[-1] // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return [
            _mapped(mapping, begin, one.nbytes, one.dtype).reshape(one.shape) if one.numel() else one
            for begin, one in zip(begins, tensors, strict=False)
        ]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a CPU tensor, little endian, row major."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. A NaN or infinity shows in the sum, which is 15 times faster than checking each
    value in bfloat16 on a CPU.

    Large finite values may overflow the sum, so only a finite sum is conclusive."""
    if not tensor.dtype.is_floating_point:
        return True
    total = tensor.sum(dtype=torch.float64 if tensor.dtype is torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Makes operators use `count` threads inside the block, in every Python thread. If blocks overlap, the last one
    opened and not yet ended decides.

    Threads of one operator busy-wait for each other at a barrier. If the cores are shared with other processes, a pool
    of single-threaded jobs is several times faster than one multi-threaded job; it is never slower.
    """
    with _ASKING:
        if not _asked:
            _asked.append(torch.get_num_threads())
        _asked.append(count)
        torch.set_num_threads(count)
    try:
        yield
    finally:
        with _ASKING:
            _asked.pop(max(index for index, asked in enumerate(_asked) if asked == count))
            torch.set_num_threads(_asked[-1])
            if len(_asked) == 1:
                _asked.clear()


def execution_device(model: torch.nn.Module) -> torch.device:
    """The device of a model's input: that of its first parameter in memory, not left on disk."""
    return next((one.device for one in model.parameters() if not one.is_meta), torch.device("cpu"))


def torch_device(name: str) -> torch.device:
    """The device for `auto` (CUDA if available), `cpu`, `cuda` or `cuda:N`. Raises NotSupported if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise NotSupported("no_cuda", "There is no CUDA device here.", subject=name, next_step="Use --device cpu.")
    cards = range(torch.cuda.device_count())
    if name not in ("cpu", "cuda", *(f"cuda:{card}" for card in cards)):
        message = f"There is no device {printable(name)} here."
        raise NotSupported("device", message, subject=name, next_step="Use auto, cpu, cuda or cuda:N.")
    return torch.device(name)
