"""LoKr of LyCORIS becomes PEFT's: in the shapes that PEFT makes of one config, against the dense product; and LoHa
of a rank that is too high to become a LoRA."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from composer.errors import ComposerError, NotSupported
from composer.export.convert import convert
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.adapted import merge
from tests.composer.tiny import MakeModel, assert_close, load_model, tensors_in

Tensors = dict[str, torch.Tensor]


def lokr_file(directory: Path, **modules: dict[str, torch.Tensor]) -> Path:
    tensors = {
        f"lora_te_model_layers_0_{module}.{name}": tensor.clone()
        for module, own in modules.items()
        for name, tensor in own.items()
    }
    save_file(tensors, directory / "lokr.safetensors")
    return directory / "lokr.safetensors"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


FULL_W1 = {"lokr_w1": random(4, 4)}
PAIR_W1 = {"lokr_w1_a": random(4, 1), "lokr_w1_b": random(1, 4)}
FULL_W2 = {"lokr_w2": random(4, 4)}
PAIR_W2 = {"lokr_w2_a": random(4, 1), "lokr_w2_b": random(1, 4)}
WIDE = {"lokr_w1": random(4, 4), "lokr_w2_a": random(8, 3), "lokr_w2_b": random(3, 4)}  # of 32 x 16
# The shapes of q_proj (16 x 16) and up_proj (32 x 16).
KRONECKERS: dict[str, tuple[Tensors, Tensors]] = {
    "both whole": (FULL_W1 | FULL_W2, {}),
    "a second that is a pair": (FULL_W1 | PAIR_W2, {}),
    "both pairs": (PAIR_W1 | PAIR_W2, {}),
    "a first that is a pair": (PAIR_W1 | FULL_W2, {}),
    "a rank that PEFT would not decompose": (FULL_W1 | {"lokr_w2_a": random(4, 3), "lokr_w2_b": random(3, 4)}, {}),
    "two ranks": (FULL_W1 | PAIR_W2, WIDE),
    "pairs beside whole ones": (PAIR_W1 | PAIR_W2, WIDE),
    "another factor": ({"lokr_w1": random(2, 2), "lokr_w2_a": random(8, 3), "lokr_w2_b": random(3, 8)}, {}),
}


@pytest.mark.parametrize("case", KRONECKERS)
def test_a_kronecker_product_is_a_lokr_of_pefts(case: str, tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    own, wide = KRONECKERS[case]
    alpha = {"alpha": torch.tensor(3.0)}
    modules = {"self_attn_q_proj": own | alpha, **({"mlp_up_proj": wide | alpha} if wide else {})}
    report = convert(lokr_file(tmp_path, **modules), tmp_path / "out", open_checkpoint(base).architecture)
    assert report.modules == len(modules)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        model = PeftModel.from_pretrained(load_model(base), tmp_path / "out")
    layer = model.base_model.model.model.layers[0]
    merge(base, tmp_path / "out", tmp_path / "merged")
    before, after = tensors_in(base), tensors_in(tmp_path / "merged")
    for parts, module, name in (
        (own, layer.self_attn.q_proj, "self_attn.q_proj"),
        (wide, layer.mlp.up_proj, "mlp.up_proj"),
    ):
        if parts:
            delta = dense_kronecker(parts, 3.0)
            assert_close(module.get_delta_weight("default"), delta, name)
            weight = f"model.layers.0.{name}.weight"
            assert_close(after[weight], before[weight] + delta, weight)


def dense_kronecker(parts: Tensors, alpha: float) -> torch.Tensor:
    """The product as in LyCORIS: alpha / rank, and 1 if both sides are full matrices."""
    ranks = [tensor.shape[0] for name, tensor in parts.items() if name.endswith("_b")]
    sides = [
        parts[side] if side in parts else parts[f"{side}_a"] @ parts[f"{side}_b"] for side in ("lokr_w1", "lokr_w2")
    ]
    return (alpha / ranks[0] if ranks else 1.0) * torch.kron(*sides)


BAD_KRONECKERS: dict[str, tuple[dict[str, Tensors], str]] = {
    "a side that is missing": ({"self_attn_q_proj": FULL_W1}, "no lokr_w2"),
    "half a pair": ({"self_attn_q_proj": FULL_W1 | {"lokr_w2_a": random(4, 1)}}, "no lokr_w2_b"),
    "two ranks in one module": (
        {"self_attn_q_proj": PAIR_W1 | {"lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 4)}},
        "the ranks 1, 2",
    ),
    "another size": ({"self_attn_q_proj": FULL_W1 | {"lokr_w2": random(2, 4)}}, "made for 8 x 16"),
    "a vector": ({"self_attn_q_proj": FULL_W1 | {"lokr_w2": random(4)}}, r"shape \[4\]"),
    "no common factor": (
        {
            "self_attn_q_proj": FULL_W1 | FULL_W2,
            "self_attn_o_proj": {"lokr_w1": random(2, 2), "lokr_w2": random(8, 8)},
        },
        "different factors",
    ),
    "a plain pair beside it": (
        {
            "self_attn_q_proj": FULL_W1 | FULL_W2,
            "self_attn_o_proj": {"lora_down.weight": random(2, 16), "lora_up.weight": random(16, 2)},
        },
        "PEFT allows one type",
    ),
}


@pytest.mark.parametrize("case", BAD_KRONECKERS)
def test_a_kronecker_product_that_peft_cannot_hold_is_refused(case: str, tmp_path: Path, make_model: MakeModel) -> None:
    modules, says = BAD_KRONECKERS[case]
    with pytest.raises(ComposerError, match=says) as caught:
        convert(lokr_file(tmp_path, **modules), tmp_path / "out", open_checkpoint(make_model()).architecture)
    assert caught.value.next_step
    assert not (tmp_path / "out").exists()


def test_a_hadamard_product_that_no_lora_is_smaller_for_is_refused(tmp_path: Path, make_model: MakeModel) -> None:
    flat = "lora_te_model_layers_0_self_attn_q_proj"
    shapes = {"hada_w1_a": (16, 5), "hada_w1_b": (5, 16), "hada_w2_a": (16, 5), "hada_w2_b": (5, 16)}
    save_file({f"{flat}.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "loha.safetensors")
    with pytest.raises(NotSupported, match=r"layers\.0\.self_attn\.q_proj is a LoHa of rank 5: .* rank 25 .*Merge it"):
        convert(tmp_path / "loha.safetensors", tmp_path / "out", open_checkpoint(make_model()).architecture)
