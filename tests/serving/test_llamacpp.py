"""llama.cpp's own server: what it answers with adapters that `convert --to gguf` wrote."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import httpx2
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from composer.export.gguf import GGUF_FILE
from registry.agent.directory import MirrorDirectory
from registry.agent.servers import llamacpp
from registry.agent.servers.llamacpp import LlamaServer
from registry.agent.switching import KeptServer
from registry.agent.versions import ServedVersion
from registry.errors import Refused, Usage
from registry.formats.evidence import USUAL, EvidenceExample, Tolerance
from tests import services
from tests.eventually import eventually
from tests.scenarios.world import Cli, World
from tests.serving.conftest import Site, converted, llama_processes, mirrored
from tests.serving.double import answers
from tests.serving.llama_base import write_llama
from tests.serving.llama_server import command, llama_server, port_range
from tests.serving.test_mirror import NEW, OLD, Users, front

PROMPT, TOKENS = [7, 12, 5, 30, 3, 21], 24
CLOSE = 0.02
"""In nats: llama.cpp keeps keys and values in float16."""


def test_a_converted_adapter_gives_the_tokens_that_peft_gives(llama: Path, world: World, tmp_path: Path) -> None:
    """All adapters are in one server, and each request names all of them, as the front's requests do. They have plain
    scales, rsLoRA and a pattern of ranks, on the projections whose rows llama.cpp reorders and on others."""
    names = ("sql", "terraform", "support", "other-sql")
    cli = Cli({})
    for name in names:
        cli.ok("convert", world.adapters[name], "--base", world.base, "--to", "gguf", "-o", tmp_path / name)
    with llama_server(llama, *(tmp_path / name / GGUF_FILE for name in names)) as url:
        answered = {
            chosen: greedy(url, {number: float(name == chosen) for number, name in enumerate(names)})
            for chosen in (*names, "")
        }
    assert len({tuple(tokens) for tokens, _ in answered.values()}) == len(answered), "each adapter answers otherwise"
    for name, (tokens, log_probabilities) in answered.items():
        model = LlamaForCausalLM.from_pretrained(world.base).eval()
        model = PeftModel.from_pretrained(model, world.adapters[name]).eval() if name else model
        with torch.no_grad():
            said = torch.log_softmax(model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1], -1)
        own = said.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        said[:, model.config.eos_token_id] = float("-inf")
        assert said.argmax(-1).tolist() == tokens, name or "the base"
        torch.testing.assert_close(own, torch.tensor(log_probabilities), rtol=0, atol=CLOSE)


def greedy(url: str, scales: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """The most probable tokens but the end's, with their log-probabilities, with each adapter at its scale."""
    body = {
        "prompt": PROMPT, "n_predict": TOKENS, "temperature": 0, "n_probs": 1, "ignore_eos": True,
        "lora": [{"id": number, "scale": scale} for number, scale in scales.items()],
    }  # fmt: skip
    rows = httpx2.post(f"{url}/completion", json=body, timeout=60).raise_for_status().json()["completion_probabilities"]
    return [row["id"] for row in rows], [row["logprob"] for row in rows]


def text_of(world: World, adapter: str) -> str:
    """What PEFT answers to `abc`; the base for an empty name."""
    model = LlamaForCausalLM.from_pretrained(world.base).eval()
    model = PeftModel.from_pretrained(model, world.adapters[adapter]).eval() if adapter else model
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    ids = tokenizer("abc", return_tensors="pt").input_ids
    with torch.no_grad():
        made = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=2)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def ask(url: str, model: str, **more: Any) -> str:
    body = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, **more}
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
    return answer.json()["choices"][0]["text"]


def test_a_promotion_starts_a_second_process_whose_version_users_get(site: Site, world: World, llama: Path) -> None:
    old, new, base = (text_of(world, name) for name in ("sql", "other-sql", ""))
    assert len({old, new, base}) == 3
    port, text, channel = services.free_port(), command(llama, port_range()), "acme/sql@prod"
    kept_in = MirrorDirectory(site.directory / "served")
    words = ("--server", f"llamacpp={text}", "--front", f"http://127.0.0.1:{port}")
    with llama_processes(text, kept_in) as processes, mirrored(site, *words) as agent, front(agent, port) as url:
        agent.wait_for(OLD, within_s=120)
        assert ask(url, channel) == old
        assert ask(url, channel, lora=[{"id": 0, "scale": 0.0}]) == old, "a client does not choose adapters"
        assert ask(url, "base") == base
        with Users(
            url, channel, {OLD: old, NEW: new}, asked={"max_tokens": 8, "temperature": 0, "prompt": "abc"}
        ) as users:
            site.promote("1.1.0")
            agent.wait_for(NEW, within_s=120)
            users.wait_for(NEW)
            eventually(lambda: set(processes.loaded()) == {NEW}, within_s=60)
        assert users.wrong == []

        [made] = (kept_in.root / "gguf" / NEW).glob("*/adapter.gguf")
        site.cli.ok("convert", "acme/sql:1.1.0", "--base", world.base, "--to", "gguf", "-o", site.directory / "by-hand")
        assert (site.directory / "by-hand" / GGUF_FILE).read_bytes() == made.read_bytes()

        agent.kill()
        before = [note.read_text() for note in sorted(kept_in.root.glob("llamacpp/*.pid"))]
        assert ask(url, channel) == new, "the processes go on without the agent"
        agent.start()
        eventually(lambda: answers(f"http://127.0.0.1:{agent.listen}/healthz") and agent.health["report"], within_s=60)
        assert [note.read_text() for note in sorted(kept_in.root.glob("llamacpp/*.pid"))] == before

        port_of_new = int(processes.endpoint(NEW).url.rpartition(":")[2])
        os.kill(int((kept_in.root / "llamacpp" / f"{port_of_new}.pid").read_text()), signal.SIGKILL)
        eventually(lambda: set(processes.loaded()) == {NEW}, within_s=60)
        eventually(lambda: status(url, channel) == 200, within_s=60)
        assert ask(url, channel) == new


def status(url: str, model: str) -> int:
    return httpx2.post(f"{url}/v1/completions", json={"model": model, "prompt": "abc", "max_tokens": 1}).status_code


def test_the_check_proves_the_release_and_refuses_another(llama: Path, world: World, tmp_path: Path) -> None:
    directory, version = MirrorDirectory(tmp_path / "served"), ServedVersion("acme/sql", "1.0.0", "ab" * 20)
    shutil.copytree(world.adapters["sql"], directory.path(version.commit))
    converted(directory, version, llama)
    with llama_processes(command(llama, port_range()), directory) as server:
        server.load(version, directory.path(version.commit))
        proved = server.check(version.name, evidence(world, "sql"))
        assert proved.verdict == "proved"
        assert proved.served is not None
        assert proved.served.worst < CLOSE
        for other in ("other-sql", "terraform"):
            refused = server.check(version.name, evidence(world, other))
            assert (refused.verdict, "does not apply acme/sql@1.0.0: share" in refused.why) == ("failed", True)
        assert server.check(version.name).verdict == "unproved", "without evidence"
        server.close()


def test_a_process_that_does_not_answer_keeps_its_route_and_is_reported(
    llama: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "HANGS_S", 0.5)
    directory, version = MirrorDirectory(tmp_path / "served"), ServedVersion("acme/sql", "1.0.0", "ab" * 20)
    shutil.copytree(world.adapters["sql"], directory.path(version.commit))
    converted(directory, version, llama)
    with llama_processes(command(llama, port_range()), directory) as server:
        server.load(version, directory.path(version.commit))
        [note] = (directory.root / "llamacpp").glob("*.pid")
        process = psutil.Process(int(note.read_text()))
        process.suspend()
        kept = KeptServer(server, directory, None, grace_s=60)
        kept.look()
        eventually(lambda: kept.look() or "has not answered for" in kept.error, within_s=30)
        assert set(kept.loaded) == {version.name}
        assert f"({version.name})" in kept.error
        process.resume()
        eventually(lambda: kept.look() or not kept.error, within_s=30)
        server.close()


@pytest.mark.parametrize(
    ("kind", "tolerance", "verdict"),
    [
        ("Q8_0", None, "proved"),
        ("Q5_0", None, "unproved"),
        ("Q5_0", 0.6, "proved"),
        pytest.param("Q4_0", 1.0, "failed", marks=pytest.mark.long),
    ],
)
def test_a_quantized_base_proves_only_what_is_near_enough(
    kind: str, tolerance: float | None, verdict: str, world: World, tmp_path: Path
) -> None:
    base = write_llama(world.base, tmp_path / "base.gguf", quantized=gguf.GGMLQuantizationType[kind])
    directory, version = MirrorDirectory(tmp_path / "served"), ServedVersion("acme/sql", "1.0.0", "ab" * 20)
    shutil.copytree(world.adapters["sql"], directory.path(version.commit))
    converted(directory, version, base)
    limits = USUAL if tolerance is None else Tolerance.within(tolerance)
    with llama_processes(command(base, port_range()), directory, limits) as server:
        server.load(version, directory.path(version.commit))
        result = server.check(version.name, evidence(world, "sql"))
        assert (result.verdict, result.served and result.served.limits) == (verdict, limits), result
        assert (verdict == "proved") == ("worst token" not in result.why)
        for other in ("other-sql", "terraform", "support"):
            assert server.check(version.name, evidence(world, other)).verdict == "failed", other
        server.close()


def test_a_port_that_another_process_has_is_not_used_and_a_number_that_is_anothers_is_no_server(
    llama: Path, world: World, tmp_path: Path
) -> None:
    directory, version = MirrorDirectory(tmp_path / "served"), ServedVersion("acme/sql", "1.0.0", "ab" * 20)
    shutil.copytree(world.adapters["sql"], directory.path(version.commit))
    converted(directory, version, llama)
    ports = port_range()
    first = int(ports.partition("-")[0])
    file, sleep = (
        directory.root / "gguf" / version.name / version.commit / "adapter.gguf",
        "import time; time.sleep(60)",
    )
    commands = (("-o", file.parent), ("--port", first + 1, "--lora", file), ("--port", first, "--lora", "/other.gguf"))
    with ExitStack() as stack, llama_processes(command(llama, ports), directory) as server:
        (directory.root / "llamacpp").mkdir()
        for words in commands:
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", sleep, *map(str, words)]))
            stack.callback(other.kill)
            (directory.root / "llamacpp" / f"{first}.pid").write_text(str(other.pid))
            eventually(lambda: sleep in psutil.Process(other.pid).cmdline())  # noqa: B023
            assert server.loaded() == {}
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", first)))]
        server.load(version, directory.path(version.commit))
        assert server.endpoint(version.name).url.endswith(f":{first + 1}")
        server.unload(version.name)
        assert not (directory.root / "llamacpp" / f"{first + 1}.pid").exists(), "its number may become another's"
        assert other.poll() is None
        taken += [stack.enter_context(socket.create_server(("127.0.0.1", first + more))) for more in (1, 2, 3)]
        with pytest.raises(Refused, match="needs a port, and all of"):
            server.load(version, directory.path(version.commit))
        server.close()


@pytest.mark.long
def test_an_adapter_is_converted_anew_for_another_base(llama: Path, world: World, tmp_path: Path) -> None:
    directory, version = MirrorDirectory(tmp_path / "served"), ServedVersion("acme/sql", "1.0.0", "ab" * 20)
    shutil.copytree(world.adapters["sql"], directory.path(version.commit))
    file = directory.root / "gguf" / version.name / version.commit / "adapter.gguf"
    base = Path(shutil.copy(llama, tmp_path / "base.gguf"))
    numbers = list[int]()
    for changed_s in (0, 0, 10):
        os.utime(base, (llama.stat().st_mtime + changed_s,) * 2)
        with llama_processes(command(base, port_range()), directory) as server:
            server.load(version, directory.path(version.commit))
            numbers.append(file.stat().st_mtime_ns)
            server.close()
    assert numbers[0] == numbers[1] < numbers[2]


def evidence(world: World, adapter: str) -> list[EvidenceExample]:
    """What a worker would record of two examples."""
    base = LlamaForCausalLM.from_pretrained(world.base).eval()
    rows: list[tuple[list[int], list[list[float]]]] = [([*PROMPT, 9, 4, 17, 33], []), ([*PROMPT[:4], 20, 6, 6], [])]
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world.base), world.adapters[adapter]).eval()
    for ids, values in rows:
        for model in (adapted, base):
            with torch.no_grad():
                said = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            values.append([float(said[place - 1, ids[place]]) for place in range(4, len(ids))])
    return [EvidenceExample(tuple(ids), 4, tuple(release), tuple(own)) for ids, (release, own) in rows]


@pytest.mark.parametrize(
    ("command_line", "names"),
    [
        ("llama-server -m base.gguf --port 8100", "a range of at least two ports"),
        ("llama-server -m base.gguf --port 8100-8101 --lora mine.gguf", "which the agent adds itself"),
        ("llama-server --port 8100-8101", "the base's GGUF file"),
        ("llama-server -m base.gguf --port 1-65535", "more than 100 ports"),
        ("llama-server -m base.gguf --port 8100-8101 --reuse-port", "another server could answer"),
    ],
)
def test_a_command_that_cannot_be_used_is_explained(command_line: str, names: str, tmp_path: Path) -> None:
    with pytest.raises(Usage, match=names):
        LlamaServer(command_line, MirrorDirectory(tmp_path))
