"""Results appear complete or not at all: written aside, synced, renamed."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer.errors import RefusedOutput
from composer.formats.checkpoint import INDEX_FILE, contained

NOTE_FILE = "adaptory.json"
_SYNC_THREADS = 8
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_SIDE_FILE_BYTES = 64 << 20  # the largest tokenizers have about 35 MB
_WEIGHT_SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".h5",
    ".msgpack", ".onnx", ".npz", ".npy",
})  # fmt: skip


@contextmanager
def writing_aside(out_dir: Path, size_bytes: int) -> Iterator[Path]:
    """A directory beside `out_dir` to write about `size_bytes` into, flat; synced and renamed when the block ends well.

    Raises RefusedOutput when `out_dir` exists, its parent does not, or the disk is full, before or while writing.
    Whatever the block raises, the directory aside is removed.
    """
    if out_dir.exists() or out_dir.is_symlink():
        raise RefusedOutput(
            "exists", f"{out_dir} exists.", subject=str(out_dir), next_step="Choose another output directory."
        )
    parent = out_dir.absolute().parent
    if not parent.is_dir():
        raise RefusedOutput(
            "no_parent", f"{parent} is not a directory.", subject=str(parent), next_step="Create it first."
        )
    if shutil.disk_usage(parent).free < size_bytes:
        raise _disk_full(out_dir, size_bytes)
    aside = parent / f"{out_dir.name}.partial-{secrets.token_hex(4)}"
    try:
        aside.mkdir()
        yield aside
        # Together, since the journal commits them together: one after the other cost 4 ms a file.
        with ThreadPoolExecutor(_SYNC_THREADS, "sync") as pool:
            list(pool.map(sync, list(aside.iterdir())))
        sync(aside)
        aside.rename(out_dir)
        sync(parent)
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(out_dir, size_bytes) from error
        raise
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def sync(path: Path) -> None:
    """Have a file or directory on the disk, not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy what a checkpoint has besides weights: tokenizer, generation config, licence, …; the config and index are
    the caller's.

    Only regular files at the top of the directory, of at most 64 MiB; no weights in any format, no hidden files.
    """
    copied: list[str] = []
    for file in sorted(source.iterdir()):
        skipped = file.name in ("config.json", INDEX_FILE, NOTE_FILE) or file.name.startswith(".")
        if skipped or file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json") or not file.is_file():
            continue
        if file.stat().st_size <= _SIDE_FILE_BYTES:
            shutil.copyfile(contained(source, file.name), target / file.name)
            copied.append(file.name)
    return copied


def _disk_full(out_dir: Path, size_bytes: int) -> RefusedOutput:
    message = f"The disk is full: {out_dir} needs about {size_bytes / 1e6:.0f} MB."
    return RefusedOutput(
        "disk_full", message, subject=str(out_dir), next_step="Free some space or choose another disk."
    )
