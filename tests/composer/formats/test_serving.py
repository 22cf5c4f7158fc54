"""Servers that load an adapter: refusals with reasons, and a judgement that is valid for every rank limit."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from composer.errors import NotSupported
from composer.export.combine import combine
from composer.findings import Severity
from composer.formats.adapters.facts import read_adapter
from composer.formats.adapters.inspection import inspect
from composer.formats.adapters.placement.naming import is_raw
from composer.formats.adapters.serving import SERVERS, Loading, judge, loads, loads_in, parse_profile
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.adapted import logits, peft_logits, relative
from tests.composer.formats.test_adapter import Q0, change_tensors, facts_of, placed_on
from tests.composer.tiny import MakeAdapter, MakeModel, load_model

LOADS: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "plain": ({}, {}),
    "rank 32": ({"r": 32}, {"vllm:16": "rank 32"}),
    "rank 24 on 32": ({"r": 24}, {"vllm:16": "rank 24"}),
    "rslora": ({"use_rslora": True}, {"llamacpp": "rsLoRA"}),
    "ranks differ": (
        {"rank_pattern": {"q_proj": 2}},
        dict.fromkeys(["vllm:16", "vllm:32", "sglang"], "different scales"),
    ),
    "dora": ({"use_dora": True}, {"vllm:16": "dora", "vllm:32": "dora", "sglang": "dora", "llamacpp": "DoRA"}),
    "a head": (
        {"modules_to_save": ["lm_head"]},
        dict.fromkeys(["vllm:16", "vllm:32", "sglang", "llamacpp"], "modules_to_save"),
    ),
    "trained tokens": (
        {"trainable_token_indices": [1]},
        dict.fromkeys(["vllm:16", "vllm:32", "sglang", "llamacpp"], "trainable_token_indices"),
    ),
    "pissa": ({"init_lora_weights": "pissa"}, dict.fromkeys(["vllm:16", "vllm:32", "sglang"], "pissa")),
}


@pytest.mark.parametrize("case", LOADS)
def test_servers_refuse_what_their_sources_say(case: str, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    settings, refusals = LOADS[case]
    adapter = make_adapter(make_model(), **settings)
    for profile in ("vllm:16", "vllm:32", "sglang", "llamacpp", "peft"):
        loading = loading_of(adapter, profile)
        assert loading.loads is (profile not in refusals)
        assert refusals.get(profile, "") in " ".join(loading.reasons)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_served_by_peft_alone_in_groups_too(
    groups: int, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(make_model())
    factors = {f"{Q0}.lora_A.weight": torch.ones(4, 16 // groups, 3, 3)}
    factors |= {f"{Q0}.lora_B.weight": torch.ones(16, 4 // groups, 1, 1)}
    change_tensors(adapter, lambda tensors: tensors | factors)
    for profile in ("vllm:16", "sglang", "lorax", "llamacpp"):
        assert "convolutions" in " ".join(loading_of(adapter, profile).reasons), profile
    assert loading_of(adapter, "peft").loads


def loading_of(adapter: Path, profile: str) -> Loading:
    opened = read_adapter(adapter)
    return loads_in(opened.config, facts_of(adapter), placed_on(adapter, None), profile)


@pytest.mark.parametrize("case", LOADS)
def test_what_is_judged_once_answers_for_every_rank_limit(
    case: str, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    """A search has only the mask, the reasons and the rank of a release."""
    adapter = make_adapter(make_model(), **LOADS[case][0])
    opened, summary = read_adapter(adapter), facts_of(adapter)
    mask, refusals = judge(opened.config, summary, placed_on(adapter, None))
    kept = json.loads(json.dumps(refusals))
    for server in SERVERS:
        assert bool(mask & parse_profile(server).bit) == (server not in refusals)
    for text in ("vllm:8", "vllm:512", "sglang", "lorax", "llamacpp", "peft"):
        assert loads(mask, kept, summary.rank_max, parse_profile(text)) == loading_of(adapter, text)


def test_a_rank_that_no_vllm_takes_is_refused_whatever_its_limit(
    make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(make_model(), r=513, lora_alpha=513)
    for profile in ("vllm:512", "vllm"):
        assert "513 is above 512" in " ".join(loading_of(adapter, profile).reasons)
    assert loading_of(adapter, "sglang").loads


def test_tensors_that_no_flag_announces_are_refused_where_only_factors_are_read(
    make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(make_model())
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(32, 16)}
    change_tensors(adapter, lambda tensors: tensors | copy)
    for profile in ("vllm:16", "sglang", "lorax", "llamacpp"):
        assert "base_layer" in " ".join(loading_of(adapter, profile).reasons)
    assert loading_of(adapter, "peft").loads


def without_prefix(name: str) -> str:
    return name.removeprefix("base_model.model.")


def in_a_state_dict(name: str) -> str:
    return name.replace(".weight", ".default.weight")


@pytest.mark.parametrize(
    ("rename", "code", "refusing"),
    [(without_prefix, "no_prefix", {"peft", "lorax"}), (in_a_state_dict, "raw_keys", set(SERVERS) - {"peft"})],
)
def test_keys_that_a_server_does_not_take_are_named_and_a_combination_has_pefts_own(
    rename: Callable[[str], str],
    code: str,
    refusing: set[str],
    tmp_path: Path,
    make_model: MakeModel,
    make_adapter: MakeAdapter,
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    trained, untouched = peft_logits(base, adapter), logits(base)
    change_tensors(adapter, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    seen = inspect(adapter, open_checkpoint(base).architecture)
    assert [(finding.code, finding.severity) for finding in seen.findings] == [(code, Severity.NOTICE)]
    assert {server for server in SERVERS if not loading_of(adapter, server).loads} == refusing
    assert (relative(peft_logits(base, adapter), untouched) > 0.01) is ("peft" not in refusing)
    for server in refusing:
        (way_out,) = loading_of(adapter, server).way_out
        assert "combine with one adapter" in way_out
    combine([(adapter, 1.0)], tmp_path / "combined")
    assert relative(peft_logits(base, tmp_path / "combined"), trained) <= 1e-6
    assert all(loading_of(tmp_path / "combined", server).loads for server in SERVERS)


@pytest.mark.parametrize(
    ("settings", "leads_to"),
    [({"modules_to_save": ["lm_head"]}, "combine with one adapter"), ({"trainable_token_indices": [1, 2]}, "merge: ")],
)
def test_peft_itself_refuses_a_state_dict_with_more_than_pairs(
    settings: dict[str, object], leads_to: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base, **settings)
    state = PeftModel.from_pretrained(load_model(base), adapter).state_dict()
    change_tensors(adapter, lambda _: {key: tensor.clone() for key, tensor in state.items() if is_raw(key)})
    with pytest.raises(KeyError):
        peft_logits(base, adapter)
    loading = loading_of(adapter, "peft")
    assert (loading.loads, len(loading.way_out)) == (False, 1)
    assert leads_to in loading.way_out[0]
    if "combine" in leads_to:
        combine([(adapter, 1.0)], tmp_path / "combined")
        assert loading_of(tmp_path / "combined", "peft").loads


def test_no_server_is_said_to_load_what_is_no_known_part(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(make_model())
    change_tensors(adapter, lambda tensors: tensors | {f"{Q0}.lora_X.weight": torch.ones(4, 16)})
    seen = inspect(adapter, None)
    assert [(finding.code, finding.severity) for finding in seen.findings] == [("unmatched_tensor", Severity.ERROR)]
    assert "q_proj.lora_X.weight is not a known part of a LORA adapter" in seen.findings[0].message
    assert seen.facts.modules_to_save == ()
    for server in SERVERS:
        assert "q_proj.lora_X" in " ".join(loading_of(adapter, server).reasons)


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 16}}]
)
def test_the_way_out_of_a_pattern_leads_to_what_llamacpp_converts(
    settings: dict[str, object], tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(make_model(), **settings)
    (way_out,) = loading_of(adapter, "llamacpp").way_out
    rank = re.search(r"--rank (\d+)", way_out)
    combine([(adapter, 1.0)], tmp_path / "out", settings={"rank": rank[1]} if rank else {})
    assert bool(rank) is ("rank_pattern" in settings)
    assert all(loading_of(tmp_path / "out", profile).loads for profile in ("llamacpp", "vllm:16", "sglang"))


def test_a_release_that_was_never_judged_says_so() -> None:
    loading = loads(0, {}, 8, parse_profile("vllm:16"))
    assert (loading.loads, "before this was judged" in loading.reasons[0]) == (False, True)


@pytest.mark.parametrize("profile", ["tgi", "vllm:big", "vllm:24", "vllm:", "vllm:٣", "sglang:16", ""])
def test_an_unknown_server_names_the_known_ones(profile: str, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    with pytest.raises(NotSupported, match="llamacpp"):
        loading_of(make_adapter(make_model()), profile)
