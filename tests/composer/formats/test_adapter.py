"""Reading an adapter: facts, placement on a base, health, and where it loads; each refusal names the module or file."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftType
from safetensors.torch import load_file, save_file

from composer.errors import ComposerError, InvalidFile, NotSupported
from composer.findings import Finding, Severity
from composer.formats.adapters.config.config import parse_config
from composer.formats.adapters.config.types import REFUSED, TYPES
from composer.formats.adapters.facts import AdapterFacts, facts, health, read_adapter
from composer.formats.adapters.inspection import inspect
from composer.formats.adapters.placement.placement import place
from composer.formats.adapters.placement.result import PlacementResult
from composer.formats.checkpoints.checkpoint import Architecture, open_checkpoint
from composer.merge.plan import plan_merge
from tests.composer.tiny import MakeAdapter, MakeModel, tensors_in

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def change_tensors(adapter: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)


def change_config(adapter: Path, **fields: object) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | fields))


def placed_on(adapter: Path, architecture: Architecture | None) -> PlacementResult:
    opened = read_adapter(adapter)
    return place(opened.config, opened.header, architecture, opened.name)


def facts_of(adapter: Path, architecture: Architecture | None = None) -> AdapterFacts:
    opened = read_adapter(adapter)
    return facts(opened.config, opened.header, placed_on(adapter, architecture))


def test_facts_are_what_the_files_say(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    adapter = make_adapter(
        base,
        r=4,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 8},
        alpha_pattern={"layers.1.self_attn.q_proj": 2},
        modules_to_save=["lm_head"],
    )
    read = facts_of(adapter, open_checkpoint(base).architecture)
    assert (read.type, read.variant, read.rank_max, read.alpha, read.use_rslora) == (
        "lora",
        "rslora",
        8,
        16.0,
        True,
    )
    assert read.targets == ("down_proj", "q_proj")
    assert read.modules == 6
    assert read.modules_to_save == ("lm_head",)
    assert read.dtype == "F32"
    assert read.parameters == sum(tensor.numel() for tensor in tensors_in(adapter).values())
    assert read.size_bytes == (adapter / WEIGHTS).stat().st_size
    assert read.ranks["model.layers.2.mlp.down_proj"] == 8
    assert read.alphas["model.layers.1.self_attn.q_proj"] == 2
    assert read.alphas["model.layers.2.self_attn.q_proj"] == 16
    assert json.loads(json.dumps(read.to_json()))["targets"] == ["down_proj", "q_proj"]


def test_scales_follow_the_patterns_of_peft() -> None:
    config = parse_config(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 8,
                "lora_alpha": 16,
                "rank_pattern": {"q_proj": 4, "^model.layers.1.k_proj": 2, "l.*.v_proj": 32},
                "alpha_pattern": {"layers.1.q_proj": 1},
            }
        ).encode()
    )
    assert config.scale_for("model.layers.0.q_proj") == 4
    assert config.scale_for("model.layers.1.q_proj") == 0.25
    assert config.scale_for("model.layers.1.xq_proj") == 2
    assert config.scale_for("model.layers.1.k_proj") == 8
    assert config.scale_for("other.model.layers.1.k_proj") == 2
    assert config.scale_for("model.layers.1.v_proj") == 0.5


@pytest.mark.parametrize("variant", ["use_dora", "plain"])
def test_a_dora_adapter_is_placed_for_storing(variant: str, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    adapter = make_adapter(base, use_dora=variant == "use_dora")
    placed = placed_on(adapter, open_checkpoint(base).architecture)
    assert placed.findings == []
    assert all(("magnitude" in module.parts) is (variant == "use_dora") for module in placed.modules)
    assert facts_of(adapter).variant == ("dora" if variant == "use_dora" else "lora")


def test_gpt2_weights_are_placed_as_stored(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model("gpt2", tied=True)
    adapter = make_adapter(base, target_modules=["c_attn", "attn.c_proj", "wte", "lm_head"])
    placed = placed_on(adapter, open_checkpoint(base).architecture)
    assert placed.findings == []
    kinds = {module.module: (module.kind, module.weight, module.tied) for module in placed.low_rank}
    assert kinds["transformer.h.0.attn.c_attn"] == ("conv1d", "transformer.h.0.attn.c_attn.weight", False)
    assert kinds["transformer.h.1.attn.c_proj"] == ("conv1d", "transformer.h.1.attn.c_proj.weight", False)
    assert kinds["transformer.wte"] == ("embedding", "transformer.wte.weight", True)
    assert kinds["lm_head"] == ("linear", "transformer.wte.weight", True)


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda adapter: change_tensors(
        adapter, lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}
    )


def without(ending: str) -> Callable[[Path], None]:
    return lambda adapter: change_tensors(
        adapter, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(ending)}
    )


def added(more: Tensors) -> Callable[[Path], None]:
    return lambda adapter: change_tensors(adapter, lambda tensors: tensors | more)


def configured(**fields: object) -> Callable[[Path], None]:
    return lambda adapter: change_config(adapter, **fields)


def narrow(adapter: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return tensors | {f"{Q0}.lora_A.weight": tensors[f"{Q0}.lora_A.weight"][:, :8].clone()}

    change_tensors(adapter, change)


# case -> (damage, code, subject, words of the message)
MISPLACED: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "a wrong prefix": (
        renamed("model.model.layers", "model.transformer.layers"),
        *("wrong_prefix", "transformer.layers", "the base expects .base_model.model.model.layers.0.self_attn.q_proj"),
    ),
    "one tensor of another model": (
        renamed("layers.2.self_attn.q", "layers.9.self_attn.q"),
        *("unmatched_tensor", "layers.9.self_attn.q_proj", "not a tensor of the base"),
    ),
    "targets for nothing": (configured(target_modules=["w_pack", "qkv"]), "no_target", "w_pack", "matches"),
    "a target whose tensors were lost": (
        configured(target_modules=["q_proj", "v_proj", "k_proj"]),
        *("no_target", "k_proj", "the base has such a module"),
    ),
    "a head that was lost": (configured(modules_to_save=["score", "lm_head"]), "no_target", "lm_head", "base has one"),
    "a regex for nothing": (configured(target_modules=r".*\.qkv"), "no_target", "qkv", "matches"),
    "another shape": (narrow, "shape_mismatch", "layers.0.self_attn.q_proj", "16 x 8.* 16 x 16"),
    "another rank": (configured(r=8), "rank_mismatch", "q_proj", "rank 4 .* says 8"),
    "a pattern for nothing": (configured(rank_pattern={"k_proj": 2}), "pattern_unused", "k_proj", "rank_pattern"),
    "an A without B": (without(f"{Q0}.lora_B.weight"), "missing_pair", "layers.0.self_attn.q_proj", "no lora_B"),
    "DoRA without magnitudes": (configured(use_dora=True), *("missing_part", "q_proj", "lacks the magnitude")),
    "magnitudes without DoRA": (
        added({f"{Q0}.lora_magnitude_vector": torch.ones(16)}),
        *("unflagged_part", "layers.0.self_attn.q_proj", "goes with use_dora"),
    ),
    "a part twice": (
        added({f"{Q0}.lora_A.default.weight": torch.ones(4, 16)}),
        *("duplicate_tensor", "q_proj", "same part"),
    ),
    "a saved bias twice in two shapes": (
        added({f"{Q0}.modules_to_save.bias": torch.ones(4), f"{Q0}.bias": torch.ones(5)}),
        *("duplicate_tensor", "q_proj", "same part"),
    ),
    "a convolution where the base has a matrix": (
        added({f"{Q0[:-6]}k_proj.lora_{part}.weight": torch.ones(4, 4, 1, 1) for part in "AB"}),
        *("shape_mismatch", "k_proj", "4 x 4 x 1 x 1.* 8 x 16"),
    ),
    "factors that make no pair": (
        added(
            {f"{Q0[:-6]}k_proj.lora_A.weight": torch.ones(4, 4), f"{Q0[:-6]}k_proj.lora_B.weight": torch.ones(4, 4, 2)}
        ),
        *("unsupported_layer", "k_proj", "make no pair"),
    ),
    "an unknown part": (added({f"{Q0}.lora_X": torch.ones(4, 4)}), "unmatched_tensor", "q_proj", "lora_X"),
    "some keys without prefix": (
        renamed("base_model.model.model.layers.0", "model.layers.0"),
        *("wrong_prefix", "layers.0", "lacks the prefix"),
    ),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_what_does_not_fit_is_an_error_that_names_the_module(
    case: str, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    change, code, subject, says = MISPLACED[case]
    base = make_model()
    adapter = make_adapter(base)
    change(adapter)
    errors = [
        finding for finding in placed_on(adapter, open_checkpoint(base).architecture).findings if finding.code == code
    ]
    assert errors
    assert errors[0].severity is Severity.ERROR
    assert subject in errors[0].subject
    assert re.search(says, errors[0].message), errors[0].message


def test_a_pattern_for_other_modules_too_is_a_warning_and_merged(
    make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(base := make_model(), alpha_pattern={"q_proj": 3, "gate_proj": 5})
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    unused = [finding for finding in plan.findings if finding.code == "pattern_unused"]
    assert [(finding.severity, finding.subject) for finding in unused] == [(Severity.WARNING, "gate_proj")]


def test_a_raw_state_dict_and_a_save_without_prefix_are_read(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    adapter = make_adapter(base, modules_to_save=["lm_head"])
    architecture = open_checkpoint(base).architecture
    expected = {(module.module, module.weight) for module in placed_on(adapter, architecture).modules}

    def raw(name: str) -> str:
        bare = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        return bare.replace("lm_head.default.", "lm_head.modules_to_save.default.")

    change_tensors(adapter, lambda tensors: {raw(name): tensor for name, tensor in tensors.items()})
    placed = placed_on(adapter, architecture)
    assert {finding.code: finding.severity for finding in placed.findings} == dict.fromkeys(
        ["no_prefix", "raw_keys"], Severity.NOTICE
    )
    assert {(module.module, module.weight) for module in placed.modules} == expected
    codes = {finding.code for finding in plan_merge(open_checkpoint(base), [(adapter, 1.0)]).findings}
    assert {"no_prefix", "raw_keys"} <= codes


def drop(name: str) -> Callable[[Path], object]:
    return lambda adapter: (adapter / name).unlink()


def flatten(adapter: Path) -> None:
    change_tensors(adapter, lambda tensors: {name: tensor.flatten() for name, tensor in tensors.items()})


def to_pickle(adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


UNREADABLE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no config": (drop(CONFIG), "missing_config", CONFIG),
    "no weights": (drop(WEIGHTS), "missing_weights", WEIGHTS),
    "only a pickle": (to_pickle, "pickle", "adapter_model.bin"),
    "no tensors": (lambda adapter: change_tensors(adapter, lambda tensors: {}), "empty_adapter", WEIGHTS),
    "an ungathered shard": (flatten, "ungathered", "lora_A.weight"),
    "a config that is not JSON": (lambda adapter: (adapter / CONFIG).write_text("{"), "bad_config", CONFIG),
    "a setting twice": (lambda adapter: (adapter / CONFIG).write_text('{"r": 8, "r": 4}'), "bad_config", CONFIG),
    "a config of a million lists": (
        lambda adapter: (adapter / CONFIG).write_text('{"peft_type": "LORA", "x": [' + "[]," * 1_000_000 + "0]}"),
        "bad_config",
        CONFIG,
    ),
    "a config without a type": (configured(peft_type=None), "bad_config", CONFIG),
    "a rank of zero": (configured(r=0), "bad_config", CONFIG),
    "a flag that is neither true nor false": (configured(use_dora="x"), "bad_config", CONFIG),
    "an alpha that is not a number": (configured(lora_alpha="16"), "bad_config", CONFIG),
    "a broken regex": (configured(rank_pattern={"(": 2}), "bad_config", CONFIG),
    "a regex that never ends": (configured(target_modules="(a+)+x"), "bad_config", CONFIG),
    "a regex with a reference": (configured(target_modules=r"(a|b).*\1"), "bad_config", CONFIG),
    "a regex with flags": (configured(rank_pattern={"(?i)q_proj": 2}), "bad_config", CONFIG),
    "too many regexes": (configured(rank_pattern={f".*{n}.*": 2 for n in range(1000)}), "bad_config", CONFIG),
    "a regex too long": (configured(rank_pattern={"q" * 1001: 2}), "bad_config", CONFIG),
    "a regex too deep": (configured(rank_pattern={"(" * 60 + "q" + ")" * 60: 2}), "bad_config", CONFIG),
    "a setting of tomorrow": (configured(use_tomorrow=True), "unknown_config", CONFIG),
    "two variants": (configured(use_dora=True, lora_bias=True), "two_variants", CONFIG),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_directory_that_is_no_adapter_is_refused_with_the_file(
    case: str, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    change, code, subject = UNREADABLE[case]
    adapter = make_adapter(make_model())
    change(adapter)
    with pytest.raises((InvalidFile, NotSupported)) as caught:
        read_adapter(adapter)
    error: ComposerError = caught.value
    assert error.code == code
    assert subject in error.subject


def test_unknown_settings_that_are_off_do_not_matter(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(make_model())
    change_config(adapter, use_tomorrow=False, tomorrow_config=None, tomorrow_list=[])
    assert read_adapter(adapter).config.variant == "lora"


@pytest.mark.parametrize(
    ("peft_type", "reason"),
    [
        ("PROMPT_TUNING", "a prompt, not a change of weights"),
        ("XLORA", "chooses by input"),
        ("OSF", "decomposition of the base"),
        ("TOMORROW", "does not know"),
    ],
)
def test_a_type_that_no_weight_can_express_is_refused_by_name(
    peft_type: str, reason: str, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(make_model())
    change_config(adapter, peft_type=peft_type)
    with pytest.raises(NotSupported, match=f"{peft_type}.*{reason}") as caught:
        placed_on(adapter, None)
    assert caught.value.code == "adapter_type"
    assert caught.value.next_step


def health_of(adapter: Path) -> list[Finding]:
    opened = read_adapter(adapter)
    return health(opened.weights_path, opened.header)


def test_every_type_that_peft_knows_is_read_or_refused_with_a_reason() -> None:
    assert {kind.value for kind in PeftType} - {"LORA"} <= set(TYPES) | set(REFUSED)
    assert not set(TYPES) & set(REFUSED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nan_or_an_infinity_is_an_error_naming_the_tensor(
    dtype: torch.dtype, value: float, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(make_model())
    change_tensors(adapter, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert health_of(adapter) == []

    def poison(tensors: Tensors) -> Tensors:
        tensors[f"{Q0}.lora_B.weight"][3, 1] = value
        return tensors

    change_tensors(adapter, poison)
    assert [(finding.code, finding.severity, finding.subject) for finding in health_of(adapter)] == [
        ("not_finite", Severity.ERROR, f"{Q0}.lora_B.weight")
    ]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_an_untrained_adapter_is_a_warning_and_half_of_one_is_not(
    zero: float, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(make_model())
    change_tensors(
        adapter,
        lambda ts: {n: torch.full_like(t, zero) if "lora_B" in n and "q_proj" in n else t for n, t in ts.items()},
    )
    assert health_of(adapter) == []
    change_tensors(adapter, lambda ts: {n: torch.full_like(t, zero) if "lora_B" in n else t for n, t in ts.items()})
    assert [(finding.code, finding.severity) for finding in health_of(adapter)] == [("zero_delta", Severity.WARNING)]


@pytest.mark.parametrize("field", ["peft_version", "base_model_name_or_path", "revision"])
@pytest.mark.parametrize("value", [7, ["x"], "\ud800"])
@pytest.mark.parametrize("peft_type", ["LORA", "IA3"])
def test_what_a_config_says_of_its_origin_is_text_that_can_be_stored(field: str, value: object, peft_type: str) -> None:
    with pytest.raises(InvalidFile, match=field):
        parse_config(json.dumps({"peft_type": peft_type, field: value}).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["v_proj"]},
        {"target_modules": r".*\.v_proj"},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"exclude_modules": r".*layers\.0.*q_proj"},
        {"layers_to_transform": [1, 2]},
        {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
        {"layers_to_transform": 0, "layers_pattern": ["h"]},
    ],
)
def test_factors_that_peft_would_ignore_are_an_error(
    fields: dict[str, object], make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    assert placed_on(adapter, open_checkpoint(base).architecture).findings == []
    change_config(adapter, **fields)
    findings = placed_on(adapter, open_checkpoint(base).architecture).findings
    assert "model.layers.0.self_attn.q_proj" in [f.subject for f in findings if f.code == "untargeted_tensor"]


def test_an_adapter_is_accepted_only_if_safetensors_itself_opens_it(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    """Half a surrogate pair in the metadata is JSON to Python, and none to safetensors."""
    weights = make_adapter(make_model(), "sql") / WEIGHTS
    assert inspect(weights.parent, None).adapter.header.tensors
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = {**json.loads(content[8 : 8 + length]), "__metadata__": {"k": "\ud800"}}
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(InvalidFile, match="its own library opens") as caught:
        read_adapter(weights.parent)
    assert caught.value.code == "bad_safetensors"
