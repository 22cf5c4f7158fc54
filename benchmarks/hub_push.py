"""Push of a model of 1 GB by `hf upload` with Xet and with LFS, and by `adaptory push`, to a server with a directory.

Each is a whole command, from its start to its end, with bytes that the server has not seen. The weights are bfloat16,
which Xet compresses. Client and server share the cores. `hf` is that of .venv-hub-2.4.0, which `make test` sets up.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import harness
from benchmarks.harness import Sample
from benchmarks.transfer import rss_bytes, serve
from tests.scenarios.world import Cli, build_world

HF = Path(".venv-hub-2.4.0/bin/hf")
XET, LFS, OURS = "hf upload, Xet", "hf upload, LFS", "adaptory push"
_PIECE = 32 << 20


def write_weights(path: Path, size_bytes: int) -> None:
    """Normal weights in bfloat16: the upper halves of float32."""
    chance = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, size_bytes, _PIECE):
            count = min(_PIECE, size_bytes - start) // 2
            weights = chance.standard_normal(count, np.float32) * np.float32(0.02)
            file.write((weights.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def pusher(weights: Path, *command: str | Path, **environment: str) -> Callable[[], Sample]:
    """Runs the command with bytes that are new: a client of Xet then still has to send all of them."""

    def push() -> Sample:
        with weights.open("r+b") as file:
            file.write(os.urandom(16))
        os.sync()
        command_line = ["env", *(f"{name}={value}" for name, value in environment.items()), *command]
        return Sample(harness.process(command_line).seconds)  # its memory would be that of this process, which forks it

    return push


def main() -> None:
    chosen = harness.options(__doc__, rounds=3)
    harness.announce("hub_push")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="adaptory-hub-push-")))
        url, process_id = serve(directory / "server", stack, {})
        model = build_world(directory / "world").base
        cli = Cli({"ADAPTORY_HOME": str(directory / "home"), "ADAPTORY_URL": url})
        cli.ok("base", "add", model, "--name", "tiny")
        write_weights(model / "weights.dat", (100 if chosen.quick else 1000) * 1_000_000)
        hub = {"HF_ENDPOINT": url, "HF_TOKEN": "adp_any", "HF_HOME": str(directory / "cache")}
        upload = (HF, "upload", "--quiet", "acme/hub", model, ".")
        ours = (harness.ADAPTORY, "push", model, "acme/ours", "--base", "tiny", "--kind", "model", "--bump", "patch")
        before, _ = rss_bytes(process_id)
        cases = {
            LFS: pusher(model / "weights.dat", *upload, **hub, HF_HUB_DISABLE_XET="1"),
            XET: pusher(model / "weights.dat", *upload, **hub),
            OURS: pusher(model / "weights.dat", *ours, ADAPTORY_URL=url, ADAPTORY_HOME=str(directory / "home")),
        }
        harness.report("Push, 1 GB in one file", harness.interleave(cases, chosen.rounds), LFS)
        harness.memory(before, *rss_bytes(process_id))


if __name__ == "__main__":
    main()
