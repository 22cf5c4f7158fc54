"""The parity modes beside PEFT's own `add_weighted_adapter`, on real models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from composer.deltas.delta import LowRank
from composer.deltas.variants.load import load_deltas
from composer.errors import ComposerError
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.methods.combine import combine_deltas
from composer.methods.join import stack_factors
from tests.composer.tiny import MakeAdapter, MakeModel, assert_close, load_model

COMBINATIONS = ("cat", "svd", "linear", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd")
WEIGHTS = (0.7, -0.5)


def of_peft(base: Path, adapters: list[Path], combination: str, rank: int | None = None) -> dict[str, torch.Tensor]:
    """module -> its delta in PEFT's combined adapter."""
    model = PeftModel.from_pretrained(load_model(base), adapters[0], adapter_name="a0")
    names = ["a0"]
    for number, adapter in enumerate(adapters[1:], start=1):
        names.append(f"a{number}")
        model.load_adapter(adapter, names[-1])
    settings = {} if rank is None else {"svd_rank": rank}
    model.add_weighted_adapter(
        names, list(WEIGHTS[: len(names)]), "all", combination_type=combination, density=0.4, **settings
    )
    weights: dict[str, torch.Tensor] = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[path] = module.get_delta_weight("all").detach()
    return weights


def ours(base: Path, adapters: list[Path], combination: str, rank: int | None = None) -> dict[str, torch.Tensor]:
    architecture = open_checkpoint(base).architecture
    loaded = [load_deltas(adapter, architecture) for adapter in adapters]
    settings = {"density": 0.4} | ({} if rank is None else {"rank": rank})
    combined = combine_deltas(loaded, list(WEIGHTS[: len(adapters)]), f"peft_{combination}", settings)
    weights: dict[str, torch.Tensor] = {}
    for delta in combined.deltas:
        (one,) = stack_factors([delta], [1.0]) if isinstance(delta, LowRank) else ()
        assert isinstance(one, LowRank)
        left, right = one.stored_factors()
        weights[one.module] = left @ right
    return weights


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_parity_mode_has_the_values_of_peft(
    kind: str, combination: str, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(kind)
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"]
    adapters = [make_adapter(base, f"a{i}", seed=i + 1, target_modules=targets, lora_alpha=4 * i + 4) for i in (0, 1)]
    theirs, actual = of_peft(base, adapters, combination), ours(base, adapters, combination)
    assert theirs.keys() == actual.keys()
    for module, expected in theirs.items():
        error = (actual[module] - expected).norm() / expected.norm()
        assert error <= 1e-4, f"{module} differs by {error:.2e}"


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_the_wrong_scale_that_peft_gives_rslora_is_reproduced(
    combination: str, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    """The scale of the new rank, even in modules where one adapter is alone or has a lower rank."""
    base = make_model()
    adapters = [
        make_adapter(base, "a0", seed=1, use_rslora=True, target_modules=["q_proj", "down_proj"]),
        make_adapter(
            base, "a1", seed=2, use_rslora=True, r=8, target_modules=["q_proj"], rank_pattern={"0.*q_proj": 3}
        ),
    ]
    theirs, actual = of_peft(base, adapters, combination), ours(base, adapters, combination)
    for module, expected in theirs.items():
        assert (actual[module] - expected).norm() / expected.norm() <= 1e-4


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_one_adapter_is_combined_linearly_whatever_was_asked(
    combination: str, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    targets = ["q_proj", "down_proj"]
    adapters = [make_adapter(base, use_rslora=True, target_modules=targets, rank_pattern={"down_proj": 2})]
    theirs, actual = of_peft(base, adapters, combination), ours(base, adapters, combination)
    for module, expected in theirs.items():
        assert_close(actual[module], expected, module)


@pytest.mark.parametrize("combination", [combination for combination in COMBINATIONS if combination.endswith("svd")])
def test_a_cut_goes_to_the_highest_rank_of_any_module_and_tells_what_it_loses(
    combination: str, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapters = [make_adapter(base, f"a{i}", seed=i + 1, rank_pattern={"q_proj": 2}) for i in (0, 1)]
    theirs, actual = of_peft(base, adapters, combination), ours(base, adapters, combination)
    for module, expected in theirs.items():
        assert (actual[module] - expected).norm() / expected.norm() <= 1e-4
    loaded = [load_deltas(adapter, open_checkpoint(base).architecture) for adapter in adapters]
    compressions = combine_deltas(
        loaded, list(WEIGHTS), f"peft_{combination}", {"rank": 1, "density": 1.0}
    ).compressions
    cut = ours(base, adapters, combination, rank=1)
    full = ours(base, adapters, combination, rank=64)
    assert len(compressions) == len(cut)
    if combination == "svd":
        for compression in compressions:
            lost = (full[f"{compression.module}"] - cut[compression.module]).norm()
            assert compression.error == pytest.approx(float(lost), rel=1e-3)


def test_random_masks_are_those_of_torch_when_peft_is_given_the_same_seed(
    make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    # One module, since the masks follow each other in the order of modules.
    target = "model.layers.0.self_attn.q_proj"
    adapters = [make_adapter(base, f"a{i}", seed=i + 1, target_modules=[target]) for i in (0, 1)]
    for combination in ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"):
        torch.manual_seed(0)
        theirs = of_peft_seeded(base, adapters, combination)
        actual = ours(base, adapters, combination)
        assert (actual[target] - theirs[target]).norm() / theirs[target].norm() <= 1e-4, combination


def of_peft_seeded(base: Path, adapters: list[Path], combination: str) -> dict[str, torch.Tensor]:
    """Sets the seed right before the combination: loading draws numbers too."""
    model = PeftModel.from_pretrained(load_model(base), adapters[0], adapter_name="a0")
    model.load_adapter(adapters[1], "a1")
    original = model.base_model._generalized_task_arithmetic_weighted_adapter
    truncated = model.base_model._svd_generalized_task_arithmetic_weighted_adapter

    def seeded(which):
        def call(*arguments, **settings):
            torch.manual_seed(0)
            return which(*arguments, **settings)

        return call

    model.base_model._generalized_task_arithmetic_weighted_adapter = seeded(original)
    model.base_model._svd_generalized_task_arithmetic_weighted_adapter = seeded(truncated)
    model.add_weighted_adapter(["a0", "a1"], list(WEIGHTS), "all", combination_type=combination, density=0.4)
    modules = dict(model.base_model.model.named_modules())
    return {p: m.get_delta_weight("all").detach() for p, m in modules.items() if hasattr(m, "get_delta_weight")}


def test_factors_of_unequal_ranks_cannot_be_combined_apart(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    adapters = [make_adapter(base, "a0", r=4), make_adapter(base, "a1", r=2)]
    with pytest.raises(ComposerError, match="different ranks"):
        ours(base, adapters, "linear")


def test_a_product_beyond_float32_is_refused_with_the_module(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    loaded = [load_deltas(make_adapter(base, name), open_checkpoint(base).architecture) for name in ("a0", "a1")]
    first, *others = (delta for delta in loaded[0].deltas if isinstance(delta, LowRank))
    huge = replace(first, A=first.A_RI * 1e30, B=first.B_OR * 1e30)
    with pytest.raises(ComposerError, match="cannot be decomposed") as caught:
        combine_deltas([replace(loaded[0], deltas=(huge, *others)), loaded[1]], [1.0, 1.0], "peft_svd")
    assert caught.value.subject == first.module
