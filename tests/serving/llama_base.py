"""The tests' small Llama as the GGUF file that llama.cpp serves, written by the `gguf` package."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_llama(
    base: Path, out: Path, kind: type[np.floating] = np.float32, quantized: gguf.GGMLQuantizationType | None = None
) -> Path:
    """Writes the checkpoint with matrices of that type, or with quantized ones where a row has full blocks; norms stay
    in float32, as llama.cpp wants them."""
    config = json.loads((base / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind is np.float16 else gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, base)
    for shard in sorted(base.glob("*.safetensors")):
        for key, tensor in load_file(shard).items():
            name, weight = key.removesuffix(".weight"), tensor.float().numpy()
            if name not in ENDS:
                _, _, layer, name = name.split(".", 3)
                if count := heads.get(NAMES[name]):
                    weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
                name = f"blk.{layer}.{NAMES[name]}"
            values = np.ascontiguousarray(weight.astype(np.float32 if weight.ndim == 1 else kind))
            blocks = quantized if values.ndim == 2 and values.shape[1] % 32 == 0 and name not in ENDS else None
            values = values if blocks is None else gguf.quantize(values, blocks)
            writer.add_tensor(f"{ENDS.get(name, name)}.weight", values, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add_tokenizer(writer: gguf.GGUFWriter, base: Path) -> None:
    """The tokenizer of single characters, as byte-pair encoding with a merge that never applies."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    special, letters = set(tokenizer.all_special_tokens), bytes_to_unicode()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token if token in special else letters[ord(token)] for token in tokens])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    writer.add_token_merges(["A A"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
