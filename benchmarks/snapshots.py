"""Clients of a hub at once, in processes with `huggingface_hub` alone: with a parent's torch, 64 would not fit.

Run as a program: reads addresses from stdin, and answers each with what every client took in seconds, or its error.
"""

import json
import multiprocessing
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars


def _download_when_asked(end: Connection, repository: str, token: str, cache: Path) -> None:
    while True:
        url, started = end.recv(), time.perf_counter()
        try:
            snapshot_download(repository, endpoint=url, token=token, cache_dir=cache)
            end.send(time.perf_counter() - started)
        except Exception as error:  # the benchmark reports it
            end.send(repr(error))


def main() -> None:
    count, repository, token, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    disable_progress_bars()
    fork, ends = multiprocessing.get_context("fork"), list[Connection]()
    for number in range(count):
        ours, theirs = fork.Pipe()
        target = partial(_download_when_asked, theirs, repository, token, directory / str(number))
        fork.Process(target=target, daemon=True).start()
        ends.append(ours)
    for line in sys.stdin:
        for end in ends:
            end.send(line.strip())
        sys.stdout.write(json.dumps([end.recv() for end in ends]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
