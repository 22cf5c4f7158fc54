"""Adapters in other layouts, written as their trainers do, become PEFT adapters that do the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from composer.errors import ComposerError, InvalidFile, NotSupported
from composer.export.convert import convert
from composer.formats.adapters.config.config import parse_config
from composer.formats.adapters.inspection import inspect_foreign
from composer.formats.adapters.layouts import recognise
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.adapted import logits, merge, peft_logits, relative
from tests.composer.deltas.test_variants_experts import mixtral, save_base
from tests.composer.tiny import MakeAdapter, MakeModel, assert_close, load_model, tensors_in

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."


def factors_of(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """module -> (A, B) of a PEFT adapter."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = {key.removeprefix(PREFIX).split(".lora_")[0] for key in tensors}
    return {m: (tensors[f"{PREFIX}{m}.lora_A.weight"], tensors[f"{PREFIX}{m}.lora_B.weight"]) for m in sorted(modules)}


def as_kohya(adapter: Path, out: Path) -> Path:
    tensors: Tensors = {}
    for module, (A, B) in factors_of(adapter).items():
        flat = "lora_te_" + module.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(8.0)}
    save_file(tensors, out / "kohya.safetensors", metadata={"ss_network_dim": "4"})
    return out / "kohya.safetensors"


def as_diffusers(adapter: Path, out: Path) -> Path:
    tensors: Tensors = {}
    for module, (A, B) in factors_of(adapter).items():
        tensors |= {f"transformer.{module}.lora_A.weight": A, f"transformer.{module}.lora_B.weight": B}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    save_file(tensors, out / "pytorch_lora_weights.safetensors", metadata=metadata)
    return out / "pytorch_lora_weights.safetensors"


def as_mlx(adapter: Path, out: Path) -> Path:
    tensors: Tensors = {}
    for module, (A, B) in factors_of(adapter).items():
        tensors |= {f"{module}.lora_a": A.T.contiguous(), f"{module}.lora_b": B.T.contiguous()}
    directory = out / "mlx"
    directory.mkdir()
    save_file(tensors, directory / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {"kohya": as_kohya, "diffusers": as_diffusers, "mlx": as_mlx}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_of_another_layout_does_the_same_in_pefts(
    layout: str, kind: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(kind)
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    original = make_adapter(base, target_modules=targets)  # rank 4, alpha 8
    source = LAYOUTS[layout](original, tmp_path)
    assert recognise(source).layout == layout
    report = convert(source, tmp_path / "out", open_checkpoint(base).architecture)
    assert (report.layout, report.rank_max) == (layout, 4)
    deltas = [
        {
            name: module.get_delta_weight("default").detach()
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        for model in (PeftModel.from_pretrained(load_model(base), path) for path in (original, tmp_path / "out"))
    ]
    assert deltas[0].keys() == deltas[1].keys()
    for name, delta in deltas[0].items():
        assert_close(deltas[1][name], delta, name)


def diffusers(path: Path, metadata: str, components: dict[str, str]) -> Tensors:
    """Module -> B A of a file with one module for each component."""
    generator = torch.Generator().manual_seed(2)
    tensors: Tensors = {}
    products: Tensors = {}
    for component, module in components.items():
        A, B = torch.randn(4, 16, generator=generator), torch.randn(16, 4, generator=generator)
        tensors |= {f"{component}.{module}.lora_A.weight": A, f"{component}.{module}.lora_B.weight": B}
        products[module] = B @ A
    save_file(tensors, path, metadata={"lora_adapter_metadata": metadata})
    return products


Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
METADATA = {
    "rsLoRA": ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0, 4.0),
    "an alpha of one module": (
        {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"q_proj": 2}},
        0.5,
        2.0,
    ),
    "no component": ({"r": 4, "lora_alpha": 6}, 1.5, 1.5),
}


@pytest.mark.parametrize("name", METADATA)
def test_diffusers_metadata_are_read_as_the_config_that_they_are(
    name: str, tmp_path: Path, make_model: MakeModel
) -> None:
    stated, *scales = METADATA[name]
    file, architecture = tmp_path / "lora.safetensors", open_checkpoint(make_model()).architecture
    products = diffusers(file, json.dumps(stated), {"transformer": Q})
    products |= {K: products[Q]}
    tensors = load_file(file)
    tensors |= {key.replace("q_proj", "o_proj"): tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(stated)})
    convert(file, tmp_path / "out", architecture)
    _assert_scaled(tmp_path / "out", products, dict(zip((Q, K), scales, strict=True)))


def _assert_scaled(adapter: Path, products: Tensors, scales: dict[str, float]) -> None:
    for module, (A, B) in factors_of(adapter).items():
        assert_close(
            B @ A * parse_config((adapter / "adapter_config.json").read_bytes()).scale_for(module),
            products[module] * scales[module],
            module,
        )


def test_each_component_of_a_diffusers_file_has_its_own_alpha(tmp_path: Path, make_model: MakeModel) -> None:
    file, architecture = tmp_path / "lora.safetensors", open_checkpoint(make_model()).architecture
    stated = {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 2}
    products = diffusers(file, json.dumps(stated), {"transformer": Q, "text_encoder": K})
    convert(file, tmp_path / "out", architecture)
    _assert_scaled(tmp_path / "out", products, {Q: 2.0, K: 0.5})
    seen = inspect_foreign(file, None)[0]
    assert sorted(seen.alphas.values()) == [2.0, 8.0]


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ('{"transformer.use_dora": true}', "diffusers_variant"),
        ('{"transformer.r": 8, "transformer.lora_alpha": 8}', "rank_mismatch"),
        ('{"unet.lora_alpha": 8, "text_encoder.lora_alpha": 8}', "bad_config"),
        ('{"unet.lora_alpha": 8}', "bad_config"),
        ('{"transformer.lora_alpha": "8"}', "bad_config"),
        ("[8", "bad_config"),
    ],
)
def test_diffusers_metadata_that_leave_the_scale_open_are_refused(
    metadata: str, code: str, tmp_path: Path, make_model: MakeModel
) -> None:
    file = tmp_path / "lora.safetensors"
    diffusers(file, metadata, {"transformer": Q})
    with pytest.raises(ComposerError) as raised:
        convert(file, tmp_path / "out", open_checkpoint(make_model()).architecture)
    assert raised.value.code == code
    assert not (tmp_path / "out").exists()


def test_a_hadamard_product_becomes_a_lora_of_the_squared_rank(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    generator = torch.Generator().manual_seed(2)
    a, b, c, d = (torch.randn(*shape, generator=generator) for shape in ((16, 3), (3, 16), (16, 3), (3, 16)))
    flat = "lora_te_model_layers_0_self_attn_q_proj"
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(6.0)}
    save_file({f"{flat}.{name}": tensor for name, tensor in parts.items()}, tmp_path / "loha.safetensors")
    report = convert(tmp_path / "loha.safetensors", tmp_path / "out", open_checkpoint(base).architecture)
    assert report.rank_max == 9
    model = PeftModel.from_pretrained(load_model(base), tmp_path / "out")
    delta = model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    assert_close(delta, 2.0 * (a @ b) * (c @ d), "q_proj")


def test_experts_that_mlx_stacks_get_a_pair_each(tmp_path: Path, make_moe: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    A, B = torch.randn(4, 2, 16, generator=generator), torch.randn(4, 8, 2, generator=generator)
    directory = tmp_path / "mlx"
    directory.mkdir()
    name = "model.layers.0.mlp.switch_mlp.gate_proj"
    save_file({f"{name}.lora_a": A, f"{name}.lora_b": B}, directory / "adapters.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"scale": 3.0}}))
    convert(directory, tmp_path / "out", open_checkpoint(make_moe).architecture)
    for expert, (module, (ours_A, ours_B)) in enumerate(factors_of(tmp_path / "out").items()):
        assert module == f"model.layers.0.mlp.experts.{expert}.gate_proj"
        assert_close(ours_B @ ours_A, 3.0 * B[expert] @ A[expert], module)


@pytest.mark.parametrize(("ours", "theirs"), [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")])
def test_mixtrals_own_names_of_an_experts_tensors_are_known(ours: str, theirs: str, tmp_path: Path) -> None:
    base = save_base(mixtral(), tmp_path / "base")
    outputs, inputs = (16, 24) if ours == "w2" else (24, 16)
    generator = torch.Generator().manual_seed(2)
    A, B = torch.randn(4, 2, inputs, generator=generator), torch.randn(4, outputs, 2, generator=generator)
    name = f"model.layers.1.block_sparse_moe.switch_mlp.{theirs}"
    source = mlx(tmp_path, {f"{name}.lora_a": A, f"{name}.lora_b": B}, scale=3.0)
    convert(source, tmp_path / "out", open_checkpoint(base).architecture)
    before, plan = tensors_in(base), merge(base, tmp_path / "out", tmp_path / "merged")
    after = tensors_in(tmp_path / "merged")
    assert plan.touched == [f"model.layers.1.block_sparse_moe.experts.{e}.{ours}.weight" for e in range(4)]
    for expert, weight in enumerate(plan.touched):
        assert_close(after[weight], before[weight] + 3.0 * B[expert] @ A[expert], weight)


def mlx(directory: Path, tensors: Tensors, **parameters: object) -> Path:
    (directory / "mlx").mkdir()
    save_file(tensors, directory / "mlx/adapters.safetensors")
    (directory / "mlx/adapter_config.json").write_text(json.dumps({"lora_parameters": parameters}))
    return directory / "mlx"


def test_an_embedding_that_mlx_trained_is_the_head_of_a_tied_base_too(tmp_path: Path, make_model: MakeModel) -> None:
    """There it adds the same delta where it puts out tokens, and fuses it into the one weight."""
    base = make_model(tied=True)
    generator = torch.Generator().manual_seed(2)
    name, shapes = "model.embed_tokens", {"lora_a": (64, 2), "lora_b": (2, 16)}
    tensors = {f"{name}.{part}": torch.randn(*shape, generator=generator) for part, shape in shapes.items()}
    convert(mlx(tmp_path, tensors, scale=2.0), tmp_path / "out", open_checkpoint(base).architecture)
    merge(base, tmp_path / "out", tmp_path / "merged")
    merged, weight = tensors_in(tmp_path / "merged"), f"{name}.weight"
    assert "lm_head.weight" not in merged
    fused = tensors_in(base)[weight] + 2.0 * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
    assert_close(merged[weight], fused, weight)
    assert relative(logits(tmp_path / "merged"), peft_logits(base, tmp_path / "out")) <= 1e-5


def test_a_head_and_an_embedding_of_one_tensor_are_two_modules(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(tied=True)
    generator = torch.Generator().manual_seed(2)
    sides = {"model.embed_tokens": (64, 16), "lm_head": (16, 64)}  # MLX has inputs first
    tensors = {
        f"{module}.lora_{part}": torch.randn(*((inputs, 2) if part == "a" else (2, outputs)), generator=generator)
        for module, (inputs, outputs) in sides.items()
        for part in "ab"
    }
    convert(mlx(tmp_path, tensors, scale=2.0), tmp_path / "out", open_checkpoint(base).architecture)
    model = PeftModel.from_pretrained(load_model(base), tmp_path / "out").base_model.model
    product = {module: 2.0 * tensors[f"{module}.lora_a"] @ tensors[f"{module}.lora_b"] for module in sides}
    assert_close(model.lm_head.get_delta_weight("default"), product["lm_head"].T, "lm_head")
    embedded = model.model.embed_tokens.get_delta_weight("default")
    assert_close(embedded, product["model.embed_tokens"], "model.embed_tokens")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dora_of_mlx_is_one_of_pefts(
    kind: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(kind)
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    original = make_adapter(base, target_modules=targets, use_dora=True)
    convert(as_mlx_dora(original, tmp_path), tmp_path / "out", open_checkpoint(base).architecture)
    assert relative(peft_logits(base, tmp_path / "out"), peft_logits(base, original)) <= 1e-6


def as_mlx_dora(adapter: Path, out: Path) -> Path:
    suffix, tensors = ".lora_magnitude_vector", load_file(adapter / "adapter_model.safetensors")
    magnitudes = {key.removeprefix(PREFIX).removesuffix(suffix): m for key, m in tensors.items() if suffix in key}
    source = as_mlx(adapter, out)
    known = load_file(source / "adapters.safetensors")
    save_file(known | {f"{module}.m": m for module, m in magnitudes.items()}, source / "adapters.safetensors")
    return source


def without_one(tensors: Tensors) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("layers.1.self_attn.q_proj.m")}


def cut_short(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.1.self_attn.q_proj.m": torch.ones(3)}


@pytest.mark.parametrize(
    ("change", "says"), [(without_one, "no magnitude"), (cut_short, r"shape \[3\] for 16 outputs")]
)
def test_magnitudes_that_peft_cannot_hold_name_their_module(
    change: Callable[[Tensors], Tensors],
    says: str,
    tmp_path: Path,
    make_model: MakeModel,
    make_adapter: MakeAdapter,
) -> None:
    base = make_model()
    source = as_mlx_dora(make_adapter(base, use_dora=True), tmp_path)
    save_file(change(load_file(source / "adapters.safetensors")), source / "adapters.safetensors")
    with pytest.raises(ComposerError, match=says) as caught:
        convert(source, tmp_path / "out", open_checkpoint(base).architecture)
    assert caught.value.subject == "model.layers.1.self_attn.q_proj"
    assert not (tmp_path / "out").exists()


def test_a_magnitude_of_an_embedding_has_another_norm_in_mlx(tmp_path: Path, make_model: MakeModel) -> None:
    sizes = {"lora_a": (64, 2), "lora_b": (2, 16), "m": (64,)}
    tensors = {f"model.embed_tokens.{part}": torch.ones(*size) for part, size in sizes.items()}
    with pytest.raises(NotSupported, match="embed_tokens has no magnitude") as caught:
        convert(mlx(tmp_path, tensors), tmp_path / "out", open_checkpoint(make_model()).architecture)
    assert caught.value.next_step == "Fuse it into the base with MLX."


def test_modules_that_are_not_found_are_all_named(tmp_path: Path, make_model: MakeModel) -> None:
    names = [f"model.layers.{layer}.block_sparse_moe.switch_mlp.some_other_proj" for layer in (3, 4)]
    tensors = {f"{name}.lora_{part}": torch.ones(2, 2) for name in names for part in "ab"}
    with pytest.raises(InvalidFile) as caught:
        convert(mlx(tmp_path, tensors), tmp_path / "out", open_checkpoint(make_model()).architecture)
    assert all(name in caught.value.message for name in names)


def test_a_checkpoint_is_not_taken_for_an_adapter(make_model: MakeModel) -> None:
    for shard in ("8KB", "1GB"):
        with pytest.raises(InvalidFile, match="is a checkpoint: a complete model, not an adapter") as caught:
            recognise(make_model(shard=shard, name=shard))
        assert caught.value.next_step == "Name an adapter's directory."


@pytest.fixture
def make_moe(tmp_path: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


def test_unknown_keys_and_modules_are_listed(tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    architecture = open_checkpoint(base).architecture
    tensors = load_file(as_kohya(make_adapter(base), tmp_path))
    save_file(tensors | {"lora_te_x.lora_sideways": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ComposerError, match=r"unknown keys: 'lora_te_x.lora_sideways'"):
        convert(tmp_path / "odd.safetensors", tmp_path / "out", architecture)
    save_file(
        {f"lora_te_nowhere.{part}.weight": torch.zeros(2, 2) for part in ("lora_down", "lora_up")},
        tmp_path / "lost.safetensors",
    )
    with pytest.raises(ComposerError, match=r"does not have, or has several of: 'lora_te_nowhere'"):
        convert(tmp_path / "lost.safetensors", tmp_path / "out", architecture)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("adapter.gguf", b"GGUF" + bytes(20), "llama.cpp"),
        ("model.nemo", b"whatever", "Megatron"),
        ("adapter_0.pt", b"PK", "pickle"),
    ],
)
def test_what_is_not_converted_is_refused_by_name_with_a_way_out(
    name: str, content: bytes, says: str, tmp_path: Path, make_model: MakeModel
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NotSupported, match=says) as raised:
        convert(tmp_path / name, tmp_path / "out", open_checkpoint(make_model()).architecture)
    assert raised.value.next_step


@pytest.mark.parametrize("key", ["dora_scale", "lokr_t2", "lora_mid.weight"])
def test_parts_without_plain_factors_are_refused_by_name(key: str, tmp_path: Path, make_model: MakeModel) -> None:
    save_file({f"lora_te_model_layers_0_self_attn_q_proj.{key}": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(NotSupported, match=key):
        convert(tmp_path / "a.safetensors", tmp_path / "out", open_checkpoint(make_model()).architecture)


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "alpha": (2,)},
        {"lora_down.weight": (0, 16), "lora_up.weight": (16, 0), "alpha": ()},
        {"lora_down.weight": (0, 16), "lora_up.weight": (16, 0)},
        {"lora_down.weight": (16,), "lora_up.weight": (16, 2)},
        {"hada_w1_a": (16,), "hada_w1_b": (3, 16), "hada_w2_a": (16, 3), "hada_w2_b": (3, 16)},
        {"hada_w1_a": (16, 3), "hada_w1_b": (3, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)},
        {"hada_w1_a": (16, 3), "hada_w1_b": (3, 16), "hada_w2_a": (8, 3), "hada_w2_b": (3, 16)},
    ],
)
def test_parts_that_do_not_belong_together_name_their_module(
    parts: dict[str, tuple[int, ...]], tmp_path: Path, make_model: MakeModel
) -> None:
    flat = "lora_te_model_layers_0_self_attn_q_proj"
    save_file({f"{flat}.{name}": torch.ones(shape) for name, shape in parts.items()}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidFile) as raised:
        convert(tmp_path / "a.safetensors", tmp_path / "out", open_checkpoint(make_model()).architecture)
    assert "q_proj" in raised.value.subject
