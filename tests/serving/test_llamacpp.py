"""llama.cpp's own server: what it answers with adapters that `convert --to gguf` wrote."""

from collections.abc import Mapping
from pathlib import Path

import httpx2
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from composer.export.gguf import GGUF_FILE
from tests.scenarios.world import Cli, World
from tests.serving.llama_base import write_llama
from tests.serving.llama_server import llama_server

PROMPT, TOKENS = [7, 12, 5, 30, 3, 21], 24
CLOSE = 0.02
"""In nats: llama.cpp keeps keys and values in float16."""


@pytest.fixture(scope="session")
def llama(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's base as a GGUF file."""
    return write_llama(world.base, tmp_path_factory.mktemp("llama") / "base.gguf")


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
