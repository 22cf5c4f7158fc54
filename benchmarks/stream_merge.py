"""A merge that streams from S3 to S3, against one on this machine's disk: peak disk and memory, seconds and requests.

Three ways to the same blobs, each in a fresh process: the base is on the disk, merged there and uploaded; the base is
in a bucket only, downloaded first and then the same; or streamed, with nothing of it on the disk. Every way verifies
the base's digest. Beside them, the same bytes are read and written without a merge: the limit that the store sets. The
S3 server (Swift) shares cores and disk with the merge; its own data is not counted.

Two adapters of rank 16: on all linear modules, which rewrites nearly every byte, and on the query projections alone,
where the store copies most of the file itself.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import harness
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.hashing import hash_checkpoint
from tests.s3_server import BUCKET, S3Server

LOCAL, DOWNLOADED, STREAMED = "base on the disk, merged, uploaded", "downloaded, merged, uploaded", "streamed"
STORE = "the store alone: read and written"
HOW = {LOCAL: "local", DOWNLOADED: "downloaded", STREAMED: "streamed", STORE: "store"}
LAYERS, RANK = 22, 16
BASE = "base"
_SAMPLE_S = 0.02
_MAKE_QUERIES = """
import sys, pathlib; from benchmarks.models import Size, make_adapter
make_adapter(pathlib.Path(sys.argv[1]), Size(int(sys.argv[2])), int(sys.argv[3]), 1, ("self_attn.q_proj",))
"""
"""In a process of its own: the kernel counts the memory of this one as that of those it starts."""
_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    peak_disk: int
    peak_memory: int
    requests: int
    server_copied: int
    files: Mapping[str, str]


class Disk:
    """The largest size that a directory had while the block ran, sampled."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._done, self.peak_bytes = directory, threading.Event(), 0
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Disk":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, _size_of(self._directory))


def _size_of(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_blocks * _BLOCK_BYTES  # noqa: PTH116, PTH118
            except FileNotFoundError:
                continue
    return total


def main() -> None:
    chosen = harness.options(__doc__, rounds=3)
    harness.announce("stream_merge", "torch", "boto3")
    layers = 2 if chosen.quick else LAYERS
    with TemporaryDirectory(dir=chosen.base.parent, prefix="bench-stream-") as name:
        directory = Path(name)
        subprocess.run(
            [sys.executable, "-m", "benchmarks.models", directory / "made", str(layers), str(RANK)], check=True
        )
        base = directory / "made" / "base"
        queries = directory / "queries"
        subprocess.run([sys.executable, "-c", _MAKE_QUERIES, queries, str(layers), str(RANK)], check=True)
        s3 = S3Server(directory / "s3")
        s3.start()
        try:
            os.environ.update(s3.credentials)
            bench = Bench(s3, base, directory)
            bench.compare("all linear modules", directory / "made" / "one", chosen.rounds)
            bench.compare("query projections", queries, chosen.rounds)
        finally:
            s3.stop()


class Bench:
    """A base on the disk and in a bucket."""

    def __init__(self, s3: S3Server, base: Path, directory: Path) -> None:
        self.s3, self.base, self.directory = s3, base, directory
        self.prefix = uuid.uuid4().hex
        self.client: Any = s3.client()
        self.digest = hash_checkpoint(open_checkpoint(base)).weights_digest
        self.size_bytes = sum(path.stat().st_size for path in base.iterdir())
        for path in base.iterdir():
            self.client.upload_file(str(path), BUCKET, f"{self.prefix}/{BASE}/{path.name}")

    def compare(self, title: str, adapter: Path, rounds: int) -> None:
        runs: dict[str, list[Run]] = {way: [] for way in HOW}
        ways = list(HOW)
        for number in range(rounds):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                runs[way].append(self.run(way, adapter))
        files = [run.files for way, several in runs.items() for run in several if way != STORE]
        assert all(file == files[0] for file in files), "the ways give different bytes"
        copied = runs[STREAMED][0].server_copied / harness.MB
        print(
            f"\n{self.size_bytes / harness.MB:.0f} MB in {len(files[0])} shards; load average {os.getloadavg()[0]:.1f};"
        )
        print(f"all ways gave the same bytes; the store copied {copied:.0f} MB of the streamed files itself")
        harness.table(f"An adapter on {title} ({rounds} rounds)", [_HEADING, *(_row(way, runs) for way in ways)])

    def run(self, way: str, adapter: Path) -> Run:
        work = self.directory / "work"
        work.mkdir()
        words = [HOW[way], self.s3.endpoint, self.prefix, work, self.base, adapter, self.digest]
        os.sync()
        with Disk(work) as disk:
            said, memory = _process([sys.executable, "-m", "benchmarks.stream_merge_once", *map(str, words)], work)
        shutil.rmtree(work)
        self._forget_blobs()
        return Run(said["seconds"], disk.peak_bytes, memory, said["requests"], said["server_copied"], said["files"])

    def _forget_blobs(self) -> None:
        """So that the next way does not find its files in the store."""
        for row in self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.prefix}/blobs/").get("Contents", []):
            self.client.delete_object(Bucket=BUCKET, Key=row["Key"])


def _process(command: Sequence[str], work: Path) -> tuple[dict[str, Any], int]:
    """Its last printed line, and its peak memory in bytes."""
    child = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(work)}, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.stdout.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command[3]} ended with {child.returncode}")
    return json.loads(output.splitlines()[-1]), usage.ru_maxrss * 1024


_HEADING = ["way", "s (min..max)", "times the first", "peak disk, MB", "peak RSS, MB", "requests"]


def _row(way: str, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    own, first = runs[way], runs[LOCAL]
    pick: Callable[[Callable[[Run], float]], str] = lambda value: harness.spread([value(run) for run in own])  # noqa: E731
    ratios = [one.seconds / other.seconds for one, other in zip(own, first, strict=True)]
    return [
        way,
        pick(lambda run: run.seconds),
        harness.spread(ratios),
        pick(lambda run: run.peak_disk / harness.MB),
        pick(lambda run: run.peak_memory / harness.MB),
        f"{own[-1].requests:.0f}",
    ]


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"\n{time.monotonic() - started:.0f} s in all")
