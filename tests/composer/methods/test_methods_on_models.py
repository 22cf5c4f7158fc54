"""Methods on complete adapters: weights of 0, deltas that read the base, half precision, mistakes."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.deltas.delta import Delta, LowRank, Replacement, RowwiseDelta
from composer.deltas.tensors import torch_device
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.errors import ComposerError
from composer.formats.checkpoints.checkpoint import Architecture, open_checkpoint
from composer.formats.recipes.methods import PIPELINES, Compressed, Pico, effective_weights, parse_settings
from composer.formats.recipes.weights import Weight, parse_rule
from composer.methods.combine import combine_deltas
from tests import second_device
from tests.composer.adapted import assert_rows_follow_the_device, relative
from tests.composer.tiny import MakeAdapter, MakeModel, adapter_maker, model_maker, tensors_in
from tests.doses import one_of_each

EVERY_METHOD = one_of_each(
    (name for name, pipeline in PIPELINES.items() if not pipeline.fitted),
    lambda name: name.removeprefix("pico_").removesuffix("_svd"),
)
"""By default one form of each: most have four, plain, `pico_`, `_svd` and both."""
PARITY = [name for name in PIPELINES if name.startswith("peft_")]


@dataclass(frozen=True)
class Shared:
    """A base and three adapters of it, which tests must not change."""

    base: Path
    adapters: tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    directory = tmp_path_factory.mktemp("shared")
    base, make_adapter = model_maker(directory)(), adapter_maker(directory)
    one, two, three = (make_adapter(base, f"a{seed}", seed=seed) for seed in (1, 2, 3))
    return Shared(base, (one, two, three))


def loaded(base: Path, *adapters: Path) -> list[LoadedAdapter]:
    architecture = open_checkpoint(base).architecture
    return [load_deltas(adapter, architecture) for adapter in adapters]


def merged(base: Path, deltas: list[Delta]) -> dict[str, torch.Tensor]:
    """The tensors that change, in float64."""
    weights: dict[str, torch.Tensor] = {}
    for delta in deltas:
        W = weights.setdefault(delta.weight, tensors_in(base)[delta.weight].double())
        original = tensors_in(base)[delta.weight].double()
        if isinstance(delta, Replacement):
            weights[delta.weight] = delta.tensor.double()
        elif isinstance(delta, RowwiseDelta):
            weights[delta.weight] = W + delta.rows(original, 0)
        else:
            left, right = delta.stored_factors()
            weights[delta.weight] = W + left.double() @ right.double()
    return weights


@pytest.mark.parametrize(("method", "settings"), [("ties", {}), ("magnitude_prune", {}), ("dare_linear", {})])
def test_trained_tokens_are_what_they_are_under_every_method_that_drops_nothing(
    method: str, settings: dict[str, object], make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    tokens = make_adapter(base, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    name = "model.embed_tokens.weight"
    plain = merged(base, combine_deltas(loaded(base, tokens), [1.0], "stack").deltas)
    ours = merged(base, combine_deltas(loaded(base, tokens), [1.0], method, {"density": 1.0, **settings}).deltas)
    assert torch.allclose(ours[name], plain[name], atol=1e-5)
    assert not torch.allclose(plain[name], tensors_in(base)[name].double())


def test_a_replacement_taken_as_a_delta_is_the_replacement(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    saved = make_adapter(base, modules_to_save=["lm_head"])
    for method in ("stack", "ties"):
        settings = {"replacements": "delta"} | ({"density": 1.0} if method == "ties" else {})
        ours = merged(base, combine_deltas(loaded(base, saved), [1.0], method, settings).deltas)
        expected = load_file(saved / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
        assert torch.allclose(ours["lm_head.weight"], expected.double(), atol=1e-5)
    with pytest.raises(ComposerError, match="no factors"):
        combine_deltas(loaded(base, saved), [1.0], "stack", {"replacements": "delta", "rank": 4})


def in_dtype(adapter: Path, dtype: torch.dtype) -> Path:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    return adapter


@pytest.mark.parametrize("method", PARITY)
def test_parity_modes_take_factors_of_any_dtype(method: str, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    adapters = [in_dtype(make_adapter(base, f"a{i}", seed=i + 1), torch.bfloat16) for i in range(2)]
    halves = combine_deltas(loaded(base, *adapters), [0.7, 0.5], method).deltas
    wide = combine_deltas(
        loaded(base, *(in_dtype(adapter, torch.float32) for adapter in adapters)), [0.7, 0.5], method
    ).deltas
    for one, other in zip(halves, wide, strict=True):
        assert isinstance(one, LowRank)
        assert isinstance(other, LowRank)
        assert torch.equal(one.B_OR, other.B_OR)
        assert torch.equal(one.A_RI, other.A_RI)


@pytest.mark.parametrize("method", ["peft_linear", "peft_cat", "peft_ties_svd", "ties", "svd"])
def test_lambda_is_a_factor_on_every_result(method: str, shared: Shared) -> None:
    base, adapters = shared.base, shared.adapters[:2]
    expected = merged(base, combine_deltas(loaded(base, *adapters), [1.0, 1.0], method).deltas)
    tenth = merged(base, combine_deltas(loaded(base, *adapters), [1.0, 1.0], method, {"lambda": 0.1}).deltas)
    for name, W in tensors_in(base).items():
        if name in expected:
            assert torch.allclose(tenth[name] - W, 0.1 * (expected[name] - W), atol=1e-6)


def test_what_has_the_weight_0_is_as_if_it_were_not_there(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    one, other = make_adapter(base, "a0"), make_adapter(base, "a1", seed=2, modules_to_save=["lm_head"])
    dora = [make_adapter(base, f"d{i}", seed=i + 3, use_dora=True) for i in range(2)]
    for method in ("stack", "linear", "ties"):
        with_it = merged(base, combine_deltas(loaded(base, one, other), [1.0, 0.0], method).deltas)
        without = merged(base, combine_deltas(loaded(base, one), [1.0], method).deltas)
        assert with_it.keys() == without.keys()
        assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert combine_deltas(loaded(base, *dora), [1.0, 0.0]).deltas
    with pytest.raises(ComposerError, match="Every weight is 0"):
        combine_deltas(loaded(base, one), [0.0], "mean")


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_an_adapter_of_weight_0_is_absent_from_every_method(method: str, shared: Shared) -> None:
    base, (one, two, idle) = shared.base, shared.adapters
    with_it = merged(base, combine_deltas(loaded(base, one, idle, two), [1.0, 0.0, 0.5], method).deltas)
    without = merged(base, combine_deltas(loaded(base, one, two), [1.0, 0.5], method).deltas)
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], without[name]) for name in without)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_method_computes_on_a_device_what_it_computes_on_the_cpu(
    method: str, accelerator: str, shared: Shared
) -> None:
    """Its factors immediately, its elections with the rows that they concern."""
    one, two, _ = shared.adapters
    both, settings = loaded(shared.base, one, two), {"protect": 1} if method == "stack" else {}
    parsed, before = parse_settings(method, settings), second_device.CALLS["mm"]
    there = combine_deltas(both, [1.0, 0.5], method, settings, device=torch_device(accelerator)).deltas
    if accelerator == second_device.NAME and isinstance(parsed, Compressed) and parsed.pipeline.space != "full":
        computed = parsed.pipeline.space != "factors" or "protect" in settings or isinstance(parsed, Pico)
        assert (second_device.CALLS["mm"] > before) == computed
    for delta, expected in zip(there, combine_deltas(both, [1.0, 0.5], method, settings).deltas, strict=True):
        if isinstance(delta, RowwiseDelta):
            assert_rows_follow_the_device(delta, accelerator)
        else:
            assert isinstance(delta, LowRank)
            assert isinstance(expected, LowRank)
            assert delta.A_RI.device.type == delta.B_OR.device.type == "cpu", "factors wait on the CPU or on disk"
            ours, theirs = (left @ right for left, right in (delta.stored_factors(), expected.stored_factors()))
            assert relative(ours, theirs) < 1e-5


def test_slips_in_weights_and_settings_are_refused(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    both = loaded(base, make_adapter(base, "a0"), make_adapter(base, "a1", seed=2))
    with pytest.raises(ComposerError, match="protect names input 9"):
        combine_deltas(both, [1.0, 1.0], "stack", {"protect": 9})
    with pytest.raises(ComposerError, match="matches no module"):
        combine_deltas(both, [Weight(1.0, (parse_rule("q_prj=0"),)), 1.0])
    with pytest.raises(ComposerError, match="add up to 0"):
        combine_deltas(both, [1.0, -1.0], "linear", {"normalize": True})
    saved = loaded(base, make_adapter(base, "a2", seed=3, modules_to_save=["lm_head"]))
    with pytest.raises(ComposerError, match="cannot scale"):
        combine_deltas([*both, *saved], [1.0, 1.0, 1.0], "mean")
    loha = replace(
        both[0], deltas=(RowwiseDelta(module="m", weight="m.weight", stored_shape=(8, 8), rows=lambda W, begin: W),)
    )
    with pytest.raises(ComposerError, match="rank or energy"):
        combine_deltas([loha], [1.0], "ties_svd")


def test_the_model_wide_trim_counts_what_it_filters(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    both = loaded(base, make_adapter(base, "a0"), make_adapter(base, "a1", seed=2))
    settings = {"scope": "model", "density": 0.2, "restore": "none"}
    deltas = combine_deltas(both[:1] * 2, [1.0, 1.0], "pico_magnitude_prune", settings).deltas
    entries = [delta.rows(torch.zeros(delta.stored_shape), 0) for delta in deltas if isinstance(delta, RowwiseDelta)]
    share = sum(int(entry.count_nonzero()) for entry in entries) / sum(entry.numel() for entry in entries)
    assert share == pytest.approx(0.2, abs=0.01)
    dora = loaded(base, make_adapter(base, "d0", use_dora=True))
    with pytest.raises(ComposerError, match="scope"):
        combine_deltas(dora, [1.0], "magnitude_prune", {"scope": "model"})


def test_effective_weights_of_a_mean_follow_the_rules_of_all() -> None:
    one, other = effective_weights([Weight(1.0, (parse_rule("0=3"),)), 1.0], parse_settings("mean"))
    assert (one.of("layers.0.q"), other.of("layers.0.q")) == (0.75, 0.25)
    assert (one.of("layers.1.q"), other.of("layers.1.q")) == (0.5, 0.5)


def test_weights_that_cancel_do_not_blow_an_election_up(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    both = loaded(base, make_adapter(base, "a0"), make_adapter(base, "a1", seed=2))
    settings = {"density": 1.0, "divide": "weights"}
    for delta in combine_deltas(both, [1.0, -0.9999], "ties", settings).deltas:
        assert isinstance(delta, RowwiseDelta)
        assert float(delta.rows(torch.zeros(delta.stored_shape), 0).abs().max()) < 100


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_masks_are_the_same_with_a_checkpoint_at_hand_and_without(
    method: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    """GPT-2's published checkpoints have names without `transformer.`: a merge knows that, `combine` does not."""
    base = make_model("gpt2", shard="1GB")
    adapter = make_adapter(base, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_in(base).items()}
    save_file(tensors, published / "model.safetensors", {"format": "pt"})

    def rows(architecture: Architecture | None) -> dict[str, torch.Tensor]:
        deltas = combine_deltas([load_deltas(adapter, architecture)], [1.0], method).deltas
        names = {delta.module: delta.weight for delta in deltas}
        assert all(name.startswith("h." if architecture else "transformer.") for name in names.values())
        return {
            delta.module: delta.rows(torch.zeros(delta.stored_shape), 0)
            for delta in deltas
            if isinstance(delta, RowwiseDelta)
        }

    known, unknown = rows(open_checkpoint(published).architecture), rows(None)
    assert known.keys() == unknown.keys() != set()
    assert all(torch.equal(known[module], unknown[module]) for module in known)
    assert len({tuple((mask != 0).flatten().tolist()) for mask in known.values()}) == len(known), (
        "each has its own mask"
    )


@pytest.mark.parametrize("method", ["svd", "ties_svd", "core_ties", "pico_stack"])
def test_factors_that_no_float32_can_decompose_are_one_clear_error(
    method: str, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapters = [make_adapter(base, seed=seed) for seed in (1, 2)]
    for adapter in adapters:
        tensors = load_file(adapter / "adapter_model.safetensors")
        huge = {name: torch.full_like(tensor, 1e30) for name, tensor in tensors.items()}
        save_file(huge, adapter / "adapter_model.safetensors")
    with pytest.raises(ComposerError) as caught:
        combine_deltas(loaded(base, *adapters), [1.0, 1.0], method)
    assert caught.value.code == "not_decomposable"
    assert "q_proj" in caught.value.message
