"""safetensors' bytes as torch tensors without copying them, and how many threads work on tensors."""

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


_ALIGNED = 64  # bytes; what vector instructions like
_ASKING = threading.Lock()
_asked: list[int] = []  # by the blocks of `torch_threads` that have not ended, after what there was before them
_OWN = threading.local()
_KEPT_BYTES = 2 << 20
_GAPS = 4  # times a row: so much may lie between two that are read together
_NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
_MAPPING = threading.Lock()
_FILES: WeakValueDictionary[tuple[int, ...], mmap.mmap] = WeakValueDictionary()  # by what tells a file from others
_PLACING = threading.RLock()  # a mapping may end while its thread has it
_PLACES: "list[_Place]" = []  # by their addresses, which do not overlap


class _Open:
    """A file that stays open, under a number of its own, for as long as this object."""

    def __init__(self, file: int) -> None:
        self.number = os.dup(file)
        finalize(self, os.close, self.number)


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where a mapping is in memory, and from which byte on it is of which open file."""

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
            f"{subject} has the dtype {name}, which cannot be computed with.",
            subject=subject,
            next_step="Save it as float32, bfloat16 or float16.",
        )
    return TORCH_DTYPES[name]


def map_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """The tensor at `entry`, mapped: it takes memory only where it is touched. Nobody may write to the file meanwhile,
    nor to the tensor: all that are made of one file share its mapping. Raises InvalidFile for a file that is too short.
    """
    dtype = torch_dtype(entry.dtype, entry.name)
    if entry.size_bytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    mapping = _mapping_of(path)
    if len(mapping) < entry.end:
        raise became_shorter(path.name)
    if entry.begin % dtype.itemsize:  # a writer that did not align its header
        part = bytearray(memoryview(mapping)[entry.begin : entry.end])
        return torch.frombuffer(part, dtype=dtype).reshape(entry.shape)
    return _mapped(mapping, entry.begin, entry.size_bytes, dtype).reshape(entry.shape)


def _mapping_of(path: Path) -> mmap.mmap:
    """One a file, not one a tensor: a process may have 65,530, and each costs memory and a walk to the kernel."""
    with _MAPPING, path.open("rb") as file:
        found = os.fstat(file.fileno())
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        mapping = _FILES.get(key)
        if mapping is None:
            if not found.st_size:
                raise became_shorter(path.name)
            # Private and copy on write: torch wants a writable buffer, and nothing ever reaches the file. No memory is
            # set aside for copies that nobody makes: a file may be larger than all there is.
            flags = mmap.MAP_PRIVATE | _NO_RESERVE
            try:
                fresh = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            except OSError as error:
                raise OSError(error.errno, f"cannot be mapped: {error.strerror}", str(path)) from error
            mapping = _FILES[key] = _known(fresh, _Open(file.fileno()), 0, path.name)
        return mapping


def _known(mapping: mmap.mmap, file: _Open, offset: int, subject: str) -> mmap.mmap:
    address = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
    place = _Place(ref(mapping), address, len(mapping), file, offset, subject)
    with _PLACING:
        insort(_PLACES, place, key=_address)
    finalize(mapping, _forget, place)
    return mapping


def _forget(place: _Place) -> None:
    with _PLACING:
        _PLACES.remove(place)


def _address(place: _Place) -> int:
    return place.address


def _mapped(mapping: mmap.mmap, begin: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(mapping, dtype=dtype, count=size // dtype.itemsize, offset=begin)


def drop_pages(tensor: torch.Tensor) -> None:
    """Drop the memory of the file that a mapped tensor is in (`map_tensor`, `SpillFile`); what is used again is read
    again. Nothing happens to any other tensor.

    Of the whole file, since the kernel maps as much around a page that is looked at as it has in one piece, megabytes
    even: whoever looks at a neighbour brings the tensor back.
    """
    place = _place_of(tensor)
    if place and (mapping := place.mapping()) is not None:
        mapping.madvise(mmap.MADV_DONTNEED)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Does it lie in a file (`map_tensor`, `SpillFile`), and not in memory of its own?"""
    return _place_of(tensor) is not None


def _place_of(tensor: torch.Tensor) -> _Place | None:
    address = tensor.data_ptr()
    with _PLACING:
        number = bisect_right(_PLACES, address, key=_address) - 1
        place = _PLACES[number] if number >= 0 else None
    return place if place and address < place.address + place.size else None


def read_into(out: torch.Tensor, tensor: torch.Tensor) -> None:
    """`out` gets the values of a matrix, in its own dtype. Those of a mapped one are read from its file, which takes no
    memory but `out` and as much again: what is looked at in a mapping stays in memory until `drop_pages`.

    Raises InvalidFile for a file that has become shorter.
    """
    place = _place_of(tensor) if tensor.numel() else None
    if place is None:
        out.copy_(tensor)
    elif tensor.stride(1) == 1:
        _read_rows(out, tensor, place)
    elif tensor.stride(0) == 1:
        _read_rows(out.T, tensor.T, place)
    else:
        out.copy_(tensor)
        drop_pages(tensor)


def _read_rows(out: torch.Tensor, tensor: torch.Tensor, place: _Place) -> None:
    """All in one piece, with what lies between the rows, or a row at a time where that is more than they are."""
    (rows, columns), between = tensor.shape, tensor.stride(0)
    begin = place.offset + tensor.data_ptr() - place.address
    if out.dtype is tensor.dtype and out.is_contiguous() and tensor.is_contiguous():
        read_all(place.file.number, tensor_bytes(out), begin, place.subject)
        return
    step = rows if between <= _GAPS * columns else 1
    for row in range(0, rows, step):
        flat = _scratch((step - 1) * between + columns, tensor.dtype)
        read_all(place.file.number, tensor_bytes(flat), begin + row * between * tensor.itemsize, place.subject)
        out[row : row + step].copy_(flat.as_strided((step, columns), (between, 1)))


def _scratch(count: int, dtype: torch.dtype) -> torch.Tensor:
    """This thread's, kept from read to read unless it is large: a fresh one costs a page fault for every 4 kB."""
    size = count * dtype.itemsize
    if size > _KEPT_BYTES:
        return torch.empty(count, dtype=dtype)
    if not hasattr(_OWN, "scratch"):
        _OWN.scratch = torch.empty(_KEPT_BYTES, dtype=torch.uint8)  # of which only what is used takes memory
    return _OWN.scratch[:size].view(dtype)


def read_all(file: int, buffer: memoryview, offset: int, subject: str) -> None:
    """Fill the buffer from `offset`. Raises InvalidFile when the file ends before."""
    while buffer.nbytes:
        count = os.preadv(file, [buffer], offset)
        if count == 0:
            raise became_shorter(subject)
        buffer = buffer[count:]
        offset += count


class SpillFile:
    """Tensors that wait on the disk: mapped, they take memory only where they are looked at, until `drop_pages`.

    The file has no name and goes with the last of them.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile(prefix="adaptory-")  # noqa: SIM115 - as long as this object
        self._open = _Open(self._file.fileno())  # one for all that is put into it
        self._end = 0

    def put(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same values, mapped together; not for several threads at once. Raises RefusedOutput for a full disk."""
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
    """A NaN or infinity makes the sum one too: 15 times faster than looking at each value, in bfloat16 on a CPU.

    Large finite values may overflow the sum, so only a finite sum is an answer."""
    if not tensor.dtype.is_floating_point:
        return True
    total = tensor.sum(dtype=torch.float64 if tensor.dtype is torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Operators use `count` threads inside the block, in every Python thread; of blocks that overlap, in any order, the
    last one that has not ended decides.

    Threads of one operator wait for each other at a barrier, busily: where the cores are shared with other processes, a
    pool of one-threaded jobs is several times faster than one job of many threads, and nowhere slower.
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
            _asked.pop(max(place for place, asked in enumerate(_asked) if asked == count))
            torch.set_num_threads(_asked[-1])
            if len(_asked) == 1:
                _asked.clear()


def execution_device(model: torch.nn.Module) -> torch.device:
    """Where a model takes its input: the device of the first parameter that is in memory, and not left on the disk."""
    return next((one.device for one in model.parameters() if not one.is_meta), torch.device("cpu"))


def torch_device(name: str) -> torch.device:
    """`auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`. Raises NotSupported for what is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise NotSupported("no_cuda", "There is no CUDA device here.", subject=name, next_step="Use --device cpu.")
    cards = range(torch.cuda.device_count())
    if name not in ("cpu", "cuda", *(f"cuda:{card}" for card in cards)):
        message = f"There is no device {printable(name)} here."
        raise NotSupported("device", message, subject=name, next_step="Use auto, cpu, cuda or cuda:N.")
    return torch.device(name)
