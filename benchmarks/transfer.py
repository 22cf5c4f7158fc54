"""Push and pull of 1 GB in 8 files between our client and a real S3 server, against boto3 moving the same files.

boto3 is measured twice: the way our client works (8 files at a time, each whole, though a download also needs ranges),
and by its defaults (one file after another, each in parts by 10 threads). Ours hashes every byte on the way and syncs
what it wrote; boto3 hashes what it sends over plain HTTP and nothing that it receives. Client, API and S3 server share
the cores. Clients write blobs under their final keys; with `DIRECT=false` each is copied once within the store, as for
a store that is less trusted. The resident memory of the API process, started by itself as on a server, is measured
before and after.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from boto3.s3.transfer import TransferConfig

from benchmarks import harness, load
from benchmarks.harness import Sample
from composer.formats.checkpoints.hashing import hash_file
from registry.client.api import Api
from registry.client.cache import BlobCache
from registry.client.pull import pull
from registry.client.push import PushedFile, ReleaseRequest, collect, push, send
from registry.client.selection import select_files
from registry.formats.references import parse_repository
from registry.wire.catalog import FileRow, ReleaseOut
from tests import s3_server
from tests.s3_server import BUCKET, S3Server
from tests.scenarios.world import Cli, build_world, nothing

FILES, PARALLEL = 8, 8
ONE_REQUEST = TransferConfig(multipart_threshold=256 << 20, use_threads=False)
RAW, RAW_HASHED, RAW_PARTS = "boto3, 8 files at a time", "the same, hashed and synced", "boto3, its defaults"


class Bench:
    """Files to move, and both ways of moving them."""

    def __init__(self, s3: S3Server, api: Api, adapter: Path, directory: Path, file_bytes: int) -> None:
        self.client: Any = s3.client()
        self.api, self.directory = api, directory
        self.pushed = directory / "pushed"
        shutil.copytree(adapter, self.pushed)
        self.files = [self.pushed / f"data-{number}" for number in range(FILES)]
        for path in self.files:
            path.write_bytes(os.urandom(file_bytes))
        self.release = self._publish()

    def _publish(self) -> ReleaseOut:
        request: ReleaseRequest = {
            "version": "1.0.0",
            "bump": None,
            "base": "tiny",
            "notes": "",
            "allow_breaking": None,
            "provenance": None,
        }
        name = parse_repository("acme/bench")
        files = collect(select_files(self.pushed, "model"))
        return push(self.api, files, name, "adapter", request, nothing)[0].release

    def push_ours(self, api: Api) -> Sample:
        self._change()
        return self._timed(lambda: send(api, "acme", self._collect(), nothing))

    def push_raw(self, config: TransferConfig, parallel: int) -> Sample:
        self._change()

        def one(path: Path) -> None:
            self.client.upload_file(str(path), BUCKET, f"raw/{path.name}", Config=config)

        return self._timed(lambda: _each(parallel, one, self.files))

    def pull_ours(self, cache: BlobCache | None = None) -> Sample:
        target = self.directory / "pulled"
        sample = self._timed(lambda: pull(self.api, self.release, target, nothing, cache))
        shutil.rmtree(target)
        return sample

    def pull_raw(self, config: TransferConfig, parallel: int, *, hashed: bool = False) -> Sample:
        target = self.directory / "raw"
        target.mkdir()
        rows = [row for row in self.release.files if row.path.startswith("data-")]

        def one(row: FileRow) -> None:
            key = f"bench/blobs/sha256/{row.sha256[:2]}/{row.sha256}"
            self.client.download_file(BUCKET, key, str(target / row.path), Config=config)
            if hashed:
                check_and_sync(target / row.path, row.sha256)

        sample = self._timed(lambda: _each(parallel, one, rows))
        shutil.rmtree(target)
        return sample

    def forget_pushed(self) -> None:
        """Changes the files, so that every round sends new bytes; the disk should not have them cached."""
        kept = {row.sha256 for row in self.release.files}
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for row in page.get("Contents", ()):
                if row["Key"].rpartition("/")[2] not in kept:
                    self.client.delete_object(Bucket=BUCKET, Key=row["Key"])

    def _collect(self) -> list[PushedFile]:
        return [file for file in collect(select_files(self.pushed, "model")) if file.manifest.path.startswith("data-")]

    def _change(self) -> None:
        self.forget_pushed()
        for path in self.files:
            with path.open("r+b") as file:
                file.write(os.urandom(16))
        os.sync()

    def _timed(self, move: Callable[[], object]) -> Sample:
        os.sync()
        started = time.perf_counter()
        move()
        return Sample(time.perf_counter() - started)


def _each(parallel: int, function: Callable[[Any], None], items: Sequence[Any]) -> None:
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(function, items))


def check_and_sync(path: Path, sha256: str) -> None:
    """Hashes and syncs a file, as the client does: the floor of a pull that can be relied on."""
    if hash_file(path) != sha256:
        raise RuntimeError(f"{path} is damaged")
    with path.open("rb") as file:
        os.fsync(file.fileno())


def serve(home: Path, stack: ExitStack, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and process id of an API without a worker."""
    port = load.free_port()
    command = [str(harness.ADAPTORY), "serve", "--port", str(port), "--no-worker"]
    process_id = stack.enter_context(
        load.process(port, command, ADAPTORY_HOME=str(home), **environment, ADAPTORY_LOOPBACK_OPEN="true")
    )
    return f"http://127.0.0.1:{port}", process_id


def rss_bytes(process_id: int) -> tuple[int, int]:
    """Resident memory in bytes: now, and at its peak."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process_id}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024


def main() -> None:
    chosen = harness.options(__doc__, rounds=7)
    harness.announce("transfer", "boto3", "httpx2")
    file_bytes = (16 if chosen.quick else 125) * 1_000_000
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="adaptory-transfer-")))
        s3 = s3_server.started(directory / "s3")
        stack.callback(s3.stop)
        url, process_id = serve(directory / "server", stack, s3.environment("bench/"))
        world = build_world(directory / "world")
        cli = Cli({"ADAPTORY_HOME": str(directory / "home"), "ADAPTORY_URL": url})
        cli.ok("base", "add", world.base, "--name", "tiny")
        copying = s3.environment("copied/") | {"ADAPTORY_STORAGE__DIRECT": "false"}
        copying_url, _ = serve(directory / "copying", stack, copying)
        api, copying = Api(url), Api(copying_url)
        for client in (api, copying):
            stack.callback(client.close)
        bench = Bench(s3, api, world.adapters["sql"], directory, file_bytes)
        before, _ = rss_bytes(process_id)
        pushes = {
            RAW: lambda: bench.push_raw(ONE_REQUEST, PARALLEL),
            RAW_PARTS: lambda: bench.push_raw(TransferConfig(), 1),
            "adaptory": lambda: bench.push_ours(api),
            "adaptory, copied within the store": lambda: bench.push_ours(copying),
        }
        harness.report("Push, 1 GB in 8 files", harness.interleave(pushes, chosen.rounds), RAW)
        bench.forget_pushed()
        cache = BlobCache(directory / "cache")
        pulls = {
            RAW: lambda: bench.pull_raw(ONE_REQUEST, PARALLEL),
            RAW_HASHED: lambda: bench.pull_raw(ONE_REQUEST, PARALLEL, hashed=True),
            RAW_PARTS: lambda: bench.pull_raw(TransferConfig(), 1),
            "adaptory": bench.pull_ours,
            "adaptory, from its cache": lambda: bench.pull_ours(cache),
        }
        harness.report("Pull, 1 GB in 8 files", harness.interleave(pulls, chosen.rounds), RAW)
        harness.memory(before, *rss_bytes(process_id))


if __name__ == "__main__":
    main()
