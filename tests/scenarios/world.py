"""A small company: one base, a few adapters trained on it, suites; and a registry used through its command line."""

import io
import json
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import yaml
from transformers import LlamaForCausalLM

from registry.cli import start as command_line
from tests import services
from tests.command_environment import environment
from tests.composer.small_model import save_adapter, save_llama, save_tokenizer
from tests.forked import start_command

SMALL_PARTS = {"ADAPTORY_STORAGE__MULTIPART_BYTES": str(11 << 20), "ADAPTORY_STORAGE__PART_BYTES": str(5 << 20)}
"""For a registry with its blobs in S3, where 11 MiB are large."""


def nothing(_count: int) -> None:
    """Ignores progress."""


@dataclass(frozen=True)
class World:
    """Directories that a team would have, independent of a registry."""

    base: Path
    adapters: Mapping[str, Path]
    suites: Mapping[str, Path]


def build_world(directory: Path) -> World:
    """A sharded llama of 60 kB with a tokenizer, three adapters for it, a target suite for each and a guard suite."""
    unsharded = save_llama(directory / "whole", seed=3)
    model = LlamaForCausalLM.from_pretrained(unsharded)
    base = directory / "base"
    model.save_pretrained(base, max_shard_size="20KB")
    save_tokenizer(base)
    kinds: dict[str, dict[str, Any]] = {
        "sql": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "terraform": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"], "use_rslora": True},
        "support": {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["v_proj"],
            "rank_pattern": {"layers.0.self_attn.v_proj": 2},
        },
        "other-sql": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    }
    adapters: dict[str, Path] = {}
    for seed, (name, config) in enumerate(kinds.items()):
        adapters[name] = directory / name
        save_adapter(LlamaForCausalLM.from_pretrained(unsharded), adapters[name], seed, **config)
    suites = {name: _suite(directory, name, "target") for name in ("sql", "terraform", "support")}
    return World(base, adapters, {**suites, "guard": _suite(directory, "guard", "guard")})


def _suite(directory: Path, name: str, kind: str) -> Path:
    path = directory / f"{name}-suite.yaml"
    examples = [{"prompt": f"{name} {number}", "completion": f"{number} {name}"} for number in range(6)]
    document = {"name": f"{name}-exact", "kind": kind, "description": name, "chat": True, "examples": examples}
    path.write_text(yaml.safe_dump(document))
    return path


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Cli:
    """`adaptory …` with an environment of its own; the command line's own entry point, called in this process.

    `served_with` is the environment of the server it talks to, for tests that look at that server's store.
    """

    environment: dict[str, str]
    served_with: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def registry_environment(self) -> Mapping[str, str]:
        """The registry's own environment, in this process or in its server's."""
        return self.served_with if "ADAPTORY_URL" in self.environment else self.environment

    def __call__(self, *arguments: object) -> Ran:
        words = [str(argument) for argument in arguments]
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with environment(self.environment, ["adaptory", *words]), redirect_stdout(out), redirect_stderr(err):
            try:
                command_line.run()
            except SystemExit as exit_:
                code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
        return Ran(code, out.getvalue(), err.getvalue())

    def ok(self, *arguments: object) -> Ran:
        ran = self(*arguments)
        assert ran.code == 0, f"adaptory {' '.join(map(str, arguments))} -> {ran.code}\n{ran.out}{ran.err}"
        return ran

    def json(self, *arguments: object) -> Any:
        return self.ok(*arguments, "--json").json


def own_environment(cli: Cli) -> dict[str, str]:
    """The environment for processes that run its commands."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")} | cli.environment


@contextmanager
def server(home: Path, **environment: str) -> Generator[tuple[str, BaseProcess]]:
    """A real `adaptory serve` in its own process; yields its URL once it answers. Without tokens it is open to all
    users of this machine, unless the environment sets another value."""
    port = services.free_port()
    values = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}
    values |= {"ADAPTORY_HOME": str(home), "ADAPTORY_LOOPBACK_OPEN": "true", **environment}
    log = home.with_name(f"{home.name}.log")
    process = start_command(["serve", "--port", str(port)], values, log)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log)
        yield url, process
    finally:
        process.terminate()
        process.join(20)
        ended = process.exitcode is not None
        process.kill()
        assert ended, f"{url} does not end"


def _wait_until_ready(url: str, process: BaseProcess, log: Path) -> None:
    deadline = time.monotonic() + 60
    with httpx2.Client(verify=False) as client:  # loading a machine's certificates takes 20 ms
        while time.monotonic() < deadline:
            assert process.is_alive(), log.read_text()
            try:
                if client.get(f"{url}/readyz").status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.02)
    raise AssertionError(f"{url} did not answer: {log.read_text()}")
