"""A GGUF adapter, read by the `gguf` package, holds PEFT's deltas in the order of llama.cpp's rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel

from composer.errors import InvalidFile, NotSupported, RefusedOutput
from composer.export.gguf import GGUF_FILE, convert_to_gguf
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.gguf import open_gguf_base
from tests.composer.small_model import save_llama
from tests.composer.tiny import MakeAdapter, MakeModel, load_model
from tests.serving.llama_base import write_llama

NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "down_proj": "ffn_down"}


def test_each_module_of_the_file_has_pefts_delta(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
    adapter = make_adapter(base, target_modules=list(NAMES), use_rslora=True, **patterns)
    checkpoint = open_checkpoint(base)
    report = convert_to_gguf(adapter, tmp_path / "out", open_gguf_base(base))
    reader = GGUFReader(tmp_path / "out" / GGUF_FILE)
    stated = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert stated == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0,
    }  # fmt: skip
    written = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    model = PeftModel.from_pretrained(load_model(base), adapter)
    heads = checkpoint.config["num_attention_heads"], checkpoint.config["num_key_value_heads"]
    seen = 0
    for path, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        layer, name = path.split(".layers.")[1].split(".")[0], NAMES[path.split(".")[-1]]
        weight = f"blk.{layer}.{name}.weight"
        expected = module.get_delta_weight("default").detach()
        if name in ("attn_q", "attn_k"):
            own = heads[name == "attn_k"]
            half = len(expected) // own // 2
            order = [h * 2 * half + side * half + i for h in range(own) for i in range(half) for side in (0, 1)]
            expected = expected[order]
        actual = written.pop(f"{weight}.lora_b") @ written.pop(f"{weight}.lora_a")
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        seen += 1
    assert not written
    assert report.modules == seen > 0
    with pytest.raises(RefusedOutput, match="exists"):
        convert_to_gguf(adapter, tmp_path / "out", open_gguf_base(base))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "q_proj"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
def test_what_gguf_does_not_hold_is_refused_by_name(
    settings: dict[str, object], named: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    with pytest.raises(NotSupported, match=named) as refused:
        convert_to_gguf(make_adapter(base, **settings), tmp_path / "out", open_gguf_base(base))
    assert refused.value.code == "gguf_module"
    assert not (tmp_path / "out").exists()


def test_a_base_is_the_same_from_its_gguf_file_as_from_its_checkpoint(
    tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    directory = save_llama(tmp_path / "llama")
    written = write_llama(directory, tmp_path / "base.gguf", np.float16)
    stated, read = open_gguf_base(directory), open_gguf_base(written)
    assert (read.heads, read.kv_heads, read.quantized) == (stated.heads, stated.kv_heads, False)
    assert read.architecture.tied == stated.architecture.tied
    shapes = [{name: spec.shape for name, spec in base.architecture.tensors.items()} for base in (stated, read)]
    assert shapes[0] == shapes[1]
    adapter, files = make_adapter(directory, target_modules=list(NAMES)), list[bytes]()
    for name, base in (("one", stated), ("two", read)):
        convert_to_gguf(adapter, tmp_path / name, base)
        files.append((tmp_path / name / GGUF_FILE).read_bytes())
    assert files[0] == files[1]
    content = written.read_bytes()
    for damaged in (b"", b"GGUF", content[:200], b"GGML" + content[4:], content[:24] + b"\xff" * 8 + content[32:]):
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with pytest.raises(InvalidFile, match="as the GGUF file of a base"):
            open_gguf_base(tmp_path / "damaged.gguf")
