"""The smallest base and adapters that a registry accepts, each adapter with bytes of its own."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from registry.client.push import PushedFile, collect
from registry.client.selection import select_files

MODULE = "model.layers.0.self_attn.q_proj"
SIZE, RANK = 16, 4


def write_base(directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_file({f"{MODULE}.weight": np.ones((SIZE, SIZE), np.float32)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return directory


def adapter_files(directory: Path, seed: int, rank: int = RANK) -> list[PushedFile]:
    """The files of an adapter that was just written, hashed, as a push sends them."""
    return collect(select_files(write_adapter(directory, seed, rank)))


def write_adapter(directory: Path, seed: int, rank: int = RANK) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    prefix = f"base_model.model.{MODULE}"
    tensors = {
        f"{prefix}.lora_A.weight": random.normal(size=(rank, SIZE)).astype(np.float32),
        f"{prefix}.lora_B.weight": random.normal(size=(SIZE, rank)).astype(np.float32),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
