"""Combinations that are cut to a rank, and weights that differ by layer and module."""

import json
from pathlib import Path

import pytest
import yaml
from peft import PeftModel

from composer.deltas.delta import LowRank
from composer.deltas.variants.load import load_deltas
from composer.errors import NotSupported
from composer.export.combine import combine
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.weights import Weight, layer_of, parse_rule, parse_weight
from composer.methods.combine import combine_deltas
from tests.composer.adapted import peft_logits, relative
from tests.composer.tiny import MakeAdapter, MakeModel, assert_close, load_model


@pytest.mark.parametrize(
    "method", ["svd", "stack", "ties", "dare_ties", "knots_ties", "core_tsv", "ctm_mean", "pico_stack"]
)
def test_a_combination_cut_to_a_rank_is_an_adapter_that_peft_loads(
    method: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapters = [(make_adapter(base, f"a{i}", seed=i + 1), 1.0) for i in range(3)]
    architecture = open_checkpoint(base).architecture
    report = combine(adapters, tmp_path / "out", architecture, method, {"rank": 6})
    assert set(report.ranks) == {6}
    assert len(report.compressions) == report.modules
    assert 0 < report.lost < 1
    model = PeftModel.from_pretrained(load_model(base), tmp_path / "out")
    combined = combine_deltas([load_deltas(path, architecture) for path, _ in adapters], [1.0] * 3, method, {"rank": 6})
    for delta in combined.deltas:
        assert isinstance(delta, LowRank)
        left, right = delta.stored_factors()
        assert_close(
            model.get_submodule(f"base_model.model.{delta.module}").get_delta_weight("default"),
            left @ right,
            delta.module,
        )


def test_a_share_of_the_energy_gives_each_module_a_rank_of_its_own(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapters = [
        (make_adapter(base, "a0", r=8, rank_pattern={"v_proj": 2}), 1.0),
        (make_adapter(base, "a1", seed=2, r=8, rank_pattern={"v_proj": 2}), 0.2),
    ]
    report = combine(adapters, tmp_path / "out", open_checkpoint(base).architecture, "svd", {"energy": 0.95})
    assert len(report.ranks) > 1
    assert report.lost**2 <= 0.05 + 1e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    model = PeftModel.from_pretrained(load_model(base), tmp_path / "out")
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


def test_a_rank_is_that_of_every_module_and_loses_nothing_where_there_is_less(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base, r=4, rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 3})
    report = combine([(adapter, 1.0)], tmp_path / "out", settings={"rank": 8})
    assert (report.ranks, report.lost < 1e-6) == ({8: 6}, True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (8, {}, {})
    assert relative(peft_logits(base, tmp_path / "out"), peft_logits(base, adapter)) <= 1e-5


def test_a_method_of_full_space_without_a_rank_is_no_adapter(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapters = [(make_adapter(base, f"a{i}", seed=i + 1), 1.0) for i in range(2)]
    with pytest.raises(NotSupported, match="rank=32"):
        combine(adapters, tmp_path / "out", open_checkpoint(base).architecture, "ties")
    assert not (tmp_path / "out").exists()


def test_an_adapter_can_have_other_weights_in_some_layers_and_modules(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    one, other = make_adapter(base, "a0"), make_adapter(base, "a1", seed=2)
    rules = (parse_rule("1-2/v_proj=0.25"), parse_rule("q_proj=0"))
    combined = combine_deltas(
        [load_deltas(path, open_checkpoint(base).architecture) for path in (one, other)], [1.0, Weight(2.0, rules)]
    )
    expected = {
        0: {"q_proj": 0.0, "v_proj": 2.0},
        1: {"q_proj": 0.0, "v_proj": 0.25},
        2: {"q_proj": 0.0, "v_proj": 0.25},
    }
    scales: dict[str, list[float]] = {}
    for delta in combined.deltas:
        assert isinstance(delta, LowRank)
        scales.setdefault(delta.module, []).append(delta.scale / 2)  # alpha 8, r 4
    for module, scale in scales.items():
        wanted = expected[layer_of(module)][module.split(".")[-1]]
        assert scale == ([1.0, wanted] if wanted else [1.0])


def test_what_no_rule_can_say_is_refused() -> None:
    for text in ("0.5", "=1", "9-3=1", "q_proj=much", "a b=1", "0-9/=1x", "0-9/=0.5", "/q_proj=0.5", "/=1"):
        with pytest.raises(NotSupported, match="weight"):
            parse_rule(text)


def test_what_is_advised_where_a_weight_cannot_be_read_can_be_read() -> None:
    with pytest.raises(NotSupported) as caught:
        parse_weight("much")
    advised = caught.value.next_step.partition("{")[2].partition("}")[0]
    assert parse_weight(yaml.safe_load(f"{{{advised.replace('...', '')}}}")) == Weight(1.0)


@pytest.mark.parametrize("text", ["\u0661", "\uff10.5", "1_0", "1e"])
def test_a_weight_is_a_number_in_ascii(text: str) -> None:
    with pytest.raises(NotSupported, match="is not a finite number"):
        parse_weight(text)
    with pytest.raises(NotSupported, match="cannot be read"):
        parse_rule(f"0-9={text}")
