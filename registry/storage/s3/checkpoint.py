"""Checkpoints in a bucket: opened in the bucket, or downloaded."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from composer.errors import InvalidFile, RefusedOutput
from composer.formats.checkpoints.checkpoint import INDEX_FILE, MAX_JSON_BYTES, SINGLE_FILE, Checkpoint, open_checkpoint
from composer.formats.checkpoints.files import read_range
from composer.formats.checkpoints.side_files import is_side_file
from composer.formats.checkpoints.staging import staged_directory
from registry.environment.settings import S3Storage, Storage
from registry.errors import Invalid
from registry.formats.addresses import S3Address
from registry.storage.base_cache import BaseCache, remove_unused
from registry.storage.s3.bucket import Bucket, open_bucket
from registry.storage.s3.objects import S3File, list_files, open_file

_TEXTS = ("config.json", INDEX_FILE)
_TEXTS_BYTES = 256 << 20
"""The maximum size of the files fetched besides weights."""
_WEIGHTS = ".safetensors"
_BLOCK_BYTES = 8 << 20
_PARALLEL = 8
_OTHERS = ("busy", "exists")
"""Refusals of a directory that another process is writing, or has written meanwhile."""
_POLL_S = 1.0
_HEADER_SHARE, _HEADER_BYTES = 1.1, 100 << 20
"""The overhead allowed for files beyond their tensors, besides texts."""


def location_bucket(storage: Storage, address: S3Address) -> Bucket:
    """The bucket at the address, in the service of the configured store and with its credentials; with a store in a
    directory, in the service that boto3's own settings name."""
    known = storage if isinstance(storage, S3Storage) else S3Storage(bucket=address.bucket)
    return open_bucket(known.model_copy(update={"bucket": address.bucket, "prefix": f"{address.prefix}/"}))


def open_remote_checkpoint(storage: Storage, address: S3Address, directory: Path) -> Checkpoint:
    """Opens the checkpoint at the address. Its small files are fetched into the directory; of its weights only the
    headers are read.

    Raises what `open_checkpoint` raises, Invalid for too many or too large files, and Unavailable.
    """
    files = _files_at(location_bucket(storage, address))
    texts = [file for file in files.values() if not file.name.endswith(_WEIGHTS)]
    if sum(file.size_bytes for file in texts) > _TEXTS_BYTES:
        raise InvalidFile(
            "too_large",
            f"{address} has more than {_TEXTS_BYTES:,} bytes besides its weights.",
            subject=str(address),
            next_step="Name the prefix of a checkpoint: its other files are small.",
        )
    directory.mkdir(parents=True, exist_ok=True)
    for file in texts:
        _fetch(directory, file)
    return open_checkpoint(directory, weights={name: file for name, file in files.items() if name.endswith(_WEIGHTS)})


def download_checkpoint(
    storage: Storage, address: S3Address, cache: BaseCache, at_most_bytes: int, check: Callable[[], None]
) -> Path:
    """The checkpoint at the address in the cache, complete and in use. One that is there is downloaded again only
    after a change, and one that another process is downloading is waited for. `check` is called often.

    `at_most_bytes` is the size of its tensors: raises Invalid before a download of more than that, Unavailable, and
    what `check` raises.
    """
    files = _files_at(location_bucket(storage, address))
    total = sum(file.size_bytes for file in files.values())
    if total > at_most_bytes * _HEADER_SHARE + _HEADER_BYTES + _TEXTS_BYTES:
        raise Invalid(
            "too_large",
            f"{address} has {total:,} bytes, and the base's tensors have {at_most_bytes:,}.",
            subject=str(address),
            next_step="The location holds another base: correct it.",
        )
    home = cache.directory / _digest(str(address))
    directory = home / _digest(*(f"{name} {file.size_bytes} {file.etag}" for name, file in sorted(files.items())))
    if not cache.use(directory):
        home.mkdir(parents=True, exist_ok=True)
        cache.make_room(total)
    while not cache.use(directory):
        check()
        try:
            _download(files, directory, total, check)
        except RefusedOutput as error:
            if error.code not in _OTHERS:
                raise
            time.sleep(_POLL_S)
    return directory


def _download(files: Mapping[str, S3File], directory: Path, total: int, check: Callable[[], None]) -> None:
    key = _digest(directory.name)[:12]
    with staged_directory(directory, total, key) as staging, ThreadPoolExecutor(_PARALLEL, "download") as pool:
        list(pool.map(partial(_fetch, staging, check=check), files.values()))
    for other in directory.parent.iterdir():  # an earlier state of the address
        if other != directory:
            remove_unused(other)


def _files_at(bucket: Bucket) -> Mapping[str, S3File]:
    """The files of a checkpoint: its weights, and what accompanies them."""
    names = {
        name
        for name, size in list_files(bucket).items()
        if (name in _TEXTS or is_side_file(name, size) or (name.endswith(_WEIGHTS) and not name.startswith(".")))
    }
    index = open_file(bucket, INDEX_FILE) if INDEX_FILE in names else None
    if index is not None and (shards := _shards(index)) is not None:
        names = {name for name in names if not name.endswith(_WEIGHTS) or name in shards}
    with ThreadPoolExecutor(_PARALLEL, "open") as pool:
        opened = pool.map(partial(open_file, bucket), sorted(names))
        return {name: file for name, file in zip(sorted(names), opened, strict=True) if file is not None}


def _shards(index: S3File) -> set[str] | None:
    """The weight files that an index names; others are copies for other programs. Includes the single file, which
    `open_checkpoint` refuses beside shards. None for an index that it refuses too."""
    if index.size_bytes > MAX_JSON_BYTES:
        return None
    try:
        stated = json.loads(read_range(index, 0, index.size_bytes))["weight_map"].values()
        return {SINGLE_FILE, *map(str, stated)}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _fetch(directory: Path, file: S3File, check: Callable[[], None] = lambda: None) -> None:
    with (directory / file.name).open("wb") as copy:
        for begin in range(0, file.size_bytes, _BLOCK_BYTES):
            check()
            copy.write(read_range(file, begin, min(file.size_bytes, begin + _BLOCK_BYTES)))


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]
