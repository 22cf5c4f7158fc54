"""A real vLLM on the CPU, and a registry with the releases of `examples/` that it serves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
from safetensors.torch import load_file, save_file

from registry.client.api import Api
from registry.client.attestations import checked_evidence
from registry.domain.access.audit import operator_actor
from registry.domain.catalog import releases, suites
from registry.domain.catalog.attestations import About
from registry.formats.attestations import EVIDENCE, unverified
from registry.formats.evidence import EvidenceExample
from registry.formats.references import parse_reference, parse_repository, parse_version
from registry.worker.attesting import attested
from tests import services
from tests.eventually import eventually
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli
from tests.serving.conftest import Site
from tests.serving.double import WEIGHTS, answers

VERSION = "0.32.0"
ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "examples" / "adapters"
QUESTION = "Queries on products filter by status and are slow."
NAMES = ("acme/sql@1.0.0", "acme/sql@1.1.0")
WRAPPED = "acme/sql@1.2.0"
"""The weights of 1.1.0 under names that a wrapper gave them: vLLM loads it and serves the base."""
OWN = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def interpreter() -> Path:
    """The Python that has vLLM. Skips the test without one."""
    made = ROOT / f".venv-vllm-server-{VERSION}" / "bin" / "python"
    python = Path(os.environ.get("ADAPTORY_TEST_VLLM", made))
    if not python.exists():
        hint = f"`make {made.parents[1].name}/.ready` (3.4 GB), or ADAPTORY_TEST_VLLM=PYTHON with vLLM {VERSION}"
        services.unavailable("a vLLM that serves", hint)
    return python


@contextmanager
def vllm(base: Path, log: Path, *words: str, **environment: str) -> Generator[str]:
    """A server of the base under the name `base`, with two slots for adapters; yields its address."""
    port = services.free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        interpreter(),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        base,
        "--served-model-name",
        "base",
    ]
    command += ["--host", "127.0.0.1", "--port", port, "--enable-lora", "--max-lora-rank", 16, "--max-loras", 2]
    command += ["--enforce-eager", "--dtype", "bfloat16", "--max-model-len", 512, "--max-num-seqs", 16, *words]
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("ADAPTORY_", "HF_", "VLLM_"))}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, command)], env=inherited | OWN | environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        eventually(lambda: process.poll() is not None or answers(f"{url}/health"), within_s=600, every_s=0.5)
        assert process.poll() is None, log.read_text()[-3000:]
        yield url
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # it has processes of its own
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)


def base_in(directory: Path) -> Path:
    """The base of `examples/`: that of `make demo` in this checkout, or a new one in the directory."""
    if (ROOT / ".demo" / "base" / "config.json").exists():
        return ROOT / ".demo" / "base"
    command = [sys.executable, ROOT / "examples" / "make_base.py", directory / "base"]
    subprocess.run(command, check=True, capture_output=True)
    return directory / "base"


def question(base: Path, length: int = 6) -> dict[str, Any]:
    """The body of a request, but for the model, to which the releases give different answers."""
    from transformers import AutoTokenizer

    asked = [{"role": "user", "content": QUESTION}]
    prompt = AutoTokenizer.from_pretrained(base).apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return {"prompt": prompt, "max_tokens": length, "temperature": 0}


def answer(url: str, model: str, asked: Mapping[str, Any]) -> str:
    answered = httpx2.post(f"{url}/v1/completions", json={"model": model, **asked}, timeout=120)
    assert answered.status_code == 200, answered.text
    return answered.json()["choices"][0]["text"]


def load(url: str, name: str, directory: Path) -> None:
    body = {"lora_name": name, "lora_path": str(directory)}
    httpx2.post(f"{url}/v1/load_lora_adapter", json=body, timeout=120).raise_for_status()


def unload(url: str, name: str) -> None:
    httpx2.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=60).raise_for_status()


def texts(url: str, asked: Mapping[str, Any]) -> dict[str, str]:
    """The answers of both releases, which differ. Leaves neither of them loaded."""
    made = dict[str, str]()
    for name, adapter in zip(NAMES, ("sql-migration", "sql-migration-1.1"), strict=True):
        load(url, name, ADAPTERS / adapter)
        made[name] = answer(url, name, asked)
        unload(url, name)
    assert len({*made.values(), answer(url, "base", asked)}) == 3, made
    return made


def wrong_things(directory: Path) -> dict[str, Path | None]:
    """What a server may have under the name of 1.1.0, the release itself first; None is the base under its own name."""
    return {
        "the release": ADAPTERS / "sql-migration-1.1",
        "unapplied names": wrapped(directory / "unapplied"),
        "the previous version": ADAPTERS / "sql-migration",
        "another adapter": ADAPTERS / "terraform-review",
        "a damaged copy": ADAPTERS / "sql-migration-bad",
        "the base": None,
    }


def wrapped(directory: Path) -> Path:
    """The adapter of sql-migration-1.1 with the names of a wrapper."""
    shutil.copytree(ADAPTERS / "sql-migration-1.1", directory)
    tensors = load_file(directory / WEIGHTS)
    save_file(
        {name.replace("model.layers", "model.language_model.layers"): t for name, t in tensors.items()},
        directory / WEIGHTS,
    )
    return directory


def stocked(directory: Path, base: Path) -> Site:
    """A registry, not started, whose acme/sql@prod serves 1.0.0. Workers measure 1.0.0 and 1.1.0, and refuse 1.2.0, for
    which one attests here what its weights answer under their own names."""
    home = directory / "registry"
    embedded = Cli({"ADAPTORY_HOME": str(home), "ADAPTORY_USER": "mia"})
    embedded.ok("base", "add", base, "--name", "smollm2")
    rows = (ROOT / "examples" / "suites" / "sql-exact.jsonl").read_text().splitlines()[:8]
    embedded.ok("suite", "add", write_suite(directory, "sql", evidence=True, examples=list(map(json.loads, rows))))
    for version, adapter in (("1.0.0", ADAPTERS / "sql-migration"), ("1.1.0", ADAPTERS / "sql-migration-1.1")):
        embedded.ok("push", adapter, f"acme/sql:{version}", "--base", "smollm2")
        embedded.ok("evidence", f"acme/sql:{version}", "--suite", "sql")
    embedded.ok("push", wrapped(directory / "wrapped"), "acme/sql:1.2.0", "--base", "smollm2")
    made = unverified(embedded.json("evidence", "acme/sql:1.1.0")["envelope"]).predicate
    with closing(opened(embedded)) as resources, resources.write() as session:
        release = releases.find(session, parse_repository("acme/sql"), parse_version("1.2.0"))
        actor = operator_actor("mia", datetime.now(UTC))
        assert attested(
            session, resources.settings, actor, About(release, suites.find(session, "sql")), (EVIDENCE, made)
        )
    embedded.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    url = f"http://127.0.0.1:{services.free_port()}"
    client = Cli({"ADAPTORY_HOME": str(directory / "client"), "ADAPTORY_URL": url})
    return Site(client, url, home, directory, {})


def evidence_of(site: Site, version: str) -> tuple[EvidenceExample, ...]:
    with closing(Api(site.url)) as api:
        return checked_evidence(api, api.resolve(parse_reference(f"acme/sql:{version}")).release)
