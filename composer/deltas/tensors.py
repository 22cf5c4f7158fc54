"""Dtypes and bytes of tensors, devices, and torch's threads."""

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch

from composer.errors import NotSupported
from composer.formats.untrusted import printable

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
CPU = torch.device("cpu")
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


_ASKING = threading.Lock()
_asked: list[int] = []  # thread counts of open `torch_threads` blocks, after the initial count


def torch_dtype(name: str, subject: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype. Raises NotSupported, naming `subject`, for one without arithmetic."""
    if name not in TORCH_DTYPES:
        raise NotSupported(
            "dtype",
            f"{subject} has dtype {name}, which does not support arithmetic.",
            subject=subject,
            next_step="Save it as float32, bfloat16 or float16.",
        )
    return TORCH_DTYPES[name]


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


def most_threads() -> int:
    """The number of threads of an operator outside of `torch_threads`: the cores, or fewer by OMP_NUM_THREADS."""
    with _ASKING:
        return _asked[0] if _asked else torch.get_num_threads()


def execution_device(model: torch.nn.Module) -> torch.device:
    """The device of a model's input: that of its first parameter in memory, not left on disk."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))


def torch_device(name: str) -> torch.device:
    """The device for `auto` (CUDA if available), `cpu`, `cuda` or `cuda:N`, or another one that torch was extended
    with. From then on, float32 products on it are computed in float32, not TF32. Raises NotSupported if it is missing.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise NotSupported("no_cuda", "This machine has no CUDA device.", subject=name)
    kind, _, number = name.partition(":")
    known = {"cpu": 0, "cuda": torch.cuda.device_count(), torch._C._get_privateuse1_backend_name(): 1}
    if kind not in known or number not in ("", *map(str, range(known[kind]))):
        message = f"This machine has no device {printable(name)}."
        raise NotSupported("device", message, subject=name)
    # TF32 keeps 10 bits of a factor's 23. NVIDIA's containers turn it on by an environment variable.
    torch.set_float32_matmul_precision("highest")
    return torch.device(name)


def wait_for(device: torch.device) -> None:
    """Waits until this thread's work on the device is done, so that threads with streams of their own may use it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def workers_on(device: torch.device) -> int:
    """The threads that keep a device busy: one for each core, but at least two, since they read files too. An
    accelerator does one thread's work at a time, and some of its libraries may not be started by two at once."""
    return max(2, os.cpu_count() or 1) if device.type == "cpu" else 1
