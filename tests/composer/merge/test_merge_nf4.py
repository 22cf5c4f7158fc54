"""4-bit bases: merged as the values that they represent, and adapters trained on one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.conflicts.report import conflicts
from composer.deltas.variants.load import load_deltas
from composer.errors import NotSupported
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.quantized import nf4
from composer.merge.run import run_merge
from tests.composer.tiny import MakeAdapter, MakeModel, assert_close, load_model, tensors_in
from tests.device import DEVICE


def pack(base: Path) -> dict[str, torch.Tensor]:
    """Packs a checkpoint's linear layers in 4 bits, as bitsandbytes does; returns the values that they represent."""
    values: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    levels = torch.tensor(nf4.LEVELS)
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = values[name] = weight
            continue
        blocks = weight.float().reshape(-1, 64)
        scale = blocks.abs().amax(dim=1)
        codes = ((blocks / scale[:, None])[..., None] - levels).abs().argmin(-1).reshape(-1, 2).to(torch.uint8)
        values[name] = (levels[codes.reshape(-1, 64).long()] * scale[:, None]).reshape(weight.shape)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors[name] = (codes[:, 0] << 4 | codes[:, 1]).reshape(-1, 1)
        tensors |= {f"{name}.absmax": scale, f"{name}.quant_map": levels.clone()}
        packed_state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = packed_state
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": quantization}
    (base / "config.json").write_text(json.dumps(config))
    return values


@pytest.fixture
def pair(make_model: MakeModel, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    base = make_model(dtype=torch.bfloat16, shard="1GB")
    return base, make_adapter(base)


@pytest.mark.parametrize("dtype", ["fp32", None])
def test_a_4_bit_checkpoint_is_merged_as_the_values_it_stands_for(
    dtype: str | None, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = pair
    values = pack(base)
    run_merge(
        plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)], dtype=dtype), tmp_path / "out", DEVICE
    )
    merged, factors = tensors_in(tmp_path / "out"), load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == values.keys()
    for name, value in values.items():
        key = f"base_model.model.{name.removesuffix('weight')}"
        if f"{key}lora_B.weight" in factors:
            value = value + 2 * factors[f"{key}lora_B.weight"] @ factors[f"{key}lora_A.weight"]
        if dtype is None:
            assert torch.equal(merged[name], value.bfloat16())
        else:
            assert_close(merged[name], value, name)
    load_model(tmp_path / "out")


def test_a_4_bit_checkpoint_is_refused_without_the_option_which_the_error_names(pair: tuple[Path, Path]) -> None:
    pack(pair[0])
    with pytest.raises(NotSupported, match="--dequantize"):
        open_checkpoint(pair[0])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_conflict_report_measures_only_what_a_4_bit_base_has_in_full(
    storage: torch.dtype, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(dtype=torch.bfloat16, shard="1GB")
    adapter = make_adapter(base, target_modules=["q_proj", "lm_head"])
    pack(base)
    tensors = load_file(base / "model.safetensors")
    stored = {name: tensor.flatten().view(storage) for name, tensor in tensors.items() if name.endswith("proj.weight")}
    save_file({**tensors, **stored}, base / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(base, dequantize=True)
    report = conflicts([load_deltas(adapter, checkpoint.architecture)], [1.0], base=checkpoint)
    assert [module for module, one in report.modules.items() if one.lost_share is not None] == ["lm_head"]


def test_an_adapter_that_was_trained_on_a_4_bit_base_says_how_far_the_full_one_is_away(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    assert not [
        finding for finding in plan_merge(open_checkpoint(base), [(adapter, 1.0)]).findings if "4_bits" in finding.code
    ]
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "unsloth/llama-3-8b-bnb-4bit"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (finding,) = [
        finding for finding in plan_merge(open_checkpoint(base), [(adapter, 1.0)]).findings if "4_bits" in finding.code
    ]
    assert finding.measure is not None
    assert 0.05 < finding.measure < 0.12
    assert "evaluate" in finding.message


PEFTS_OWN = """---
library_name: peft
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_8bit: False
- load_in_4bit: {}
- bnb_4bit_quant_type: nf4
### Framework versions

- PEFT 0.6.0
"""
AXOLOTLS = """---
library_name: peft
base_model: acme/base
---
<details><summary>See axolotl config</summary>

```yaml
base_model: acme/base
{}load_in_4bit: true  # to fit
adapter: qlora
```
</details>
"""
TAGGED = "---\nbase_model: acme/base\n{}\n---\n# A card\n"


@pytest.mark.parametrize(
    ("card", "evidence"),
    [
        (PEFTS_OWN.format("True"), "README.md states load_in_4bit"),
        (AXOLOTLS.format(""), "README.md states load_in_4bit"),
        (TAGGED.format("tags: [lora, QLoRA]"), "README.md has the tag qlora"),
        ("---\nbase_model: [acme/base-bnb-4bit]\n---\n", "README.md names acme/base-bnb-4bit"),
        (PEFTS_OWN.format("False"), ""),
        (AXOLOTLS.format("# "), ""),
        (TAGGED.format("tags: [lora]\nbase_model_relation: quantized"), ""),
        ("Load it with `load_in_4bit=True`, or in full.\n", ""),
        ("---\ntags: [qlora\n---\n", ""),
        ("---\n" + "x" * 70_000, ""),
    ],
)
def test_a_model_card_says_that_the_base_was_in_4_bits(card: str, evidence: str, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    (adapter / "README.md").write_text(card)
    findings = [
        finding for finding in plan_merge(open_checkpoint(base), [(adapter, 1.0)]).findings if "4_bits" in finding.code
    ]
    assert [evidence in finding.message for finding in findings] == ([True] if evidence else [])


def test_a_card_that_leads_out_of_the_adapter_is_not_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (tmp_path / "elsewhere").write_text(PEFTS_OWN.format("True"))
    (adapter / "README.md").unlink(missing_ok=True)
    (adapter / "README.md").symlink_to(tmp_path / "elsewhere")
    assert not [
        finding for finding in plan_merge(open_checkpoint(base), [(adapter, 1.0)]).findings if "4_bits" in finding.code
    ]
