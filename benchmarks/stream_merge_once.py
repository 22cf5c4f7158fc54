"""One merge of a base into blobs of an S3 store, in its own process:
`python -m benchmarks.stream_merge_once HOW ENDPOINT PREFIX WORK BASE ADAPTER`.

Prints JSON: seconds without imports, requests to the store, bytes that the store copied itself, and the sha256 of each
file of weights.
"""

import hashlib
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from composer.deltas.tensors import torch_device
from composer.formats.checkpoints.checkpoint import Checkpoint, open_checkpoint
from composer.formats.checkpoints.files import StoredFile, read_range
from composer.formats.checkpoints.hashing import hash_file, verify_checkpoint, weights_digest
from composer.merge.chunks import Rewriter
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from composer.merge.stream import READ_BYTES, Origin, stream_shard
from registry.environment.settings import S3Storage
from registry.formats.addresses import S3Address
from registry.formats.references import Digest
from registry.storage.base_cache import BaseCache
from registry.storage.s3 import checkpoint as remote
from registry.storage.s3.store import S3Store
from registry.worker.engine.stores import HashingWriter
from tests.s3_server import BUCKET

Result = dict[str, object]
READERS = 8
BASE = "base"
"""The prefix of the base below that of the store."""


class Sink:
    def __init__(self, writer: HashingWriter) -> None:
        self.writer = writer

    def write(self, block: memoryview, origin: Origin | None) -> None:
        source: StoredFile | None = origin.file if origin else None
        self.writer.write(block, source, origin.offset if origin else 0)

    def finish(self) -> str:
        return self.writer.finish()


def merged(base: Checkpoint, adapter: Path, store: S3Store, work: Path, digest: str) -> Result:
    """On the disk, then uploaded, as a composition does with a base that is on this machine."""
    verify_checkpoint(base, digest)
    plan = plan_merge(base, [(adapter, 1.0)])
    run_merge(plan, work / "merged")
    digests: dict[str, str] = {}
    for path in sorted((work / "merged").glob("*.safetensors")):
        digests[path.name] = hash_file(path)
        store.put(Digest(digests[path.name]), path)
    return {"files": digests, "server_copied": 0}


def streamed(address: S3Address, storage: S3Storage, adapter: Path, store: S3Store, work: Path, digest: str) -> Result:
    base = remote.open_remote_checkpoint(storage, address, work / "texts")
    plan = plan_merge(base, [(adapter, 1.0)])
    rewriter = Rewriter(torch_device("auto"), plan.rounding)
    digests: dict[str, str] = {}
    hashes: dict[str, str] = {}
    copied = 0
    for shard in plan.shards:
        writer = HashingWriter(store.begin_write(shard.size_bytes))
        made = stream_shard(plan, shard, Sink(writer), rewriter)
        digests[shard.file], copied = made.sha256, copied + writer.copied_bytes
        hashes |= made.tensor_hashes
    tensors = base.architecture.tensors.items()
    assert weights_digest((name, spec.dtype, spec.shape, hashes[name]) for name, spec in tensors) == digest
    return {"files": digests, "server_copied": copied}


def passed_on(address: S3Address, storage: S3Storage, store: S3Store, work: Path, *, copies: bool) -> Result:
    """Reads every byte of the base and writes it again, without a merge or a hash: what the store itself takes. With
    `copies`, it may copy all of them itself."""
    base = remote.open_remote_checkpoint(storage, address, work / "texts")
    with ThreadPoolExecutor(READERS, "read") as pool:
        for file in base.files.values():
            writer = store.begin_write(file.size_bytes)
            offsets, ahead = iter(range(0, file.size_bytes, READ_BYTES)), deque[tuple[int, Future[bytearray]]]()
            while True:
                for offset in islice(offsets, READERS - len(ahead)):
                    end = min(file.size_bytes, offset + READ_BYTES)
                    ahead.append((offset, pool.submit(read_range, file, offset, end)))
                if not ahead:
                    break
                offset, block = ahead.popleft()
                writer.write(memoryview(block.result()), file if copies else None, offset)
            writer.finish(Digest(hashlib.sha256(file.name.encode()).hexdigest()))
    return {"files": {}, "server_copied": 0}


def main() -> None:
    how, endpoint, prefix, work, base, adapter, digest = sys.argv[1:]
    storage = S3Storage(kind="s3", bucket=BUCKET, prefix=f"{prefix}/", endpoint_url=endpoint)
    address = S3Address(BUCKET, f"{prefix}/{BASE}")
    requests: Counter[str] = Counter()
    open_bucket = remote.open_bucket

    def counted(settings: S3Storage) -> object:
        bucket = open_bucket(settings)
        _count(bucket.client, requests)
        return bucket

    remote.open_bucket = counted  # pyright: ignore[reportAttributeAccessIssue]
    store = S3Store(storage)
    _count(store._client, requests)
    started, given = time.perf_counter(), Path(work)
    if how == "store":
        result = passed_on(address, storage, store, given, copies=Path(adapter).name == "queries")
    elif how == "streamed":
        result = streamed(address, storage, Path(adapter), store, given, digest)
    else:
        directory = Path(base)
        if how == "downloaded":
            cache = BaseCache(given / "cache", None)
            directory = remote.download_checkpoint(storage, address, cache, 1 << 40, lambda: None)
        result = merged(open_checkpoint(directory), Path(adapter), store, given, digest)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "requests": requests.total(), "by": requests, **result}))


def _count(client: object, requests: Counter[str]) -> None:
    def note(model: object, **_: object) -> None:
        requests[getattr(model, "name", "")] += 1

    events: Mapping[str, object] = {"before-call.s3": note}
    for name, handler in events.items():
        client.meta.events.register(name, handler)  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    main()
