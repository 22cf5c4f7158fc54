"""A config that ties the head to the embedding, beside files that also store the head: loading by transformers,
training and merging by PEFT, and our merge."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.errors import Mismatch
from composer.formats.adapters.placement.naming import split_key
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.hashing import hash_checkpoint
from composer.formats.recipes.rounding import Mode, Rounding
from composer.merge.plan import plan_merge
from composer.merge.rebuild import plan_rebuild, rebuild
from composer.merge.run import run_merge
from tests.composer.adapted import (
    assert_all_close,
    assert_merged_like_peft,
    change_tensors,
    logits,
    merge,
    peft_logits,
    peft_merged,
    relative,
    save_adapted,
)
from tests.composer.tiny import MakeAdapter, MakeModel, load_model, tensors_in
from tests.device import DEVICE

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = {"trainable_token_indices": [3, 5]}
TYING = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}


def with_head(base: Path, noise: float, name: str, embedding_name: str = EMBEDDING) -> Path:
    """The tied base with its head in a file of its own: the embedding's bytes, or others."""
    copy = shutil.copytree(base, base.parent / name)
    torch.manual_seed(3)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    embedding = load_file(copy / index["weight_map"][embedding_name])[embedding_name]
    save_file({HEAD: embedding + torch.randn_like(embedding) * noise}, copy / "head.safetensors", {"format": "pt"})
    index["weight_map"][HEAD] = "head.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


def is_loaded_tied(directory: Path) -> bool:
    model = load_model(directory)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and embedding.weight is head.weight


def is_said_tied(directory: Path) -> bool:
    return json.loads((directory / "config.json").read_text())["tie_word_embeddings"]


@pytest.fixture
def once(make_model: MakeModel) -> Path:
    return make_model(tied=True)


@pytest.fixture
def twice(once: Path) -> Path:
    return with_head(once, 0.0, "twice")


@pytest.fixture
def apart(once: Path) -> Path:
    return with_head(once, 0.5, "apart")


def test_transformers_ties_a_stored_head_only_if_it_is_the_embedding(twice: Path, apart: Path) -> None:
    """All other tests here rely on this: a release of transformers that loads differently fails it."""
    for base, tied in ((twice, True), (apart, False)):
        assert is_loaded_tied(base) is tied
        checkpoint = open_checkpoint(base)
        assert checkpoint.architecture.tied is tied
        assert checkpoint.own_head == (None if tied else HEAD)


@pytest.mark.parametrize("settings", [TOKENS, TYING, {"target_modules": ["lm_head", "q_proj"]}])
@pytest.mark.parametrize("tied", ["shared", "untie"])
def test_a_head_that_is_stored_twice_merges_as_if_it_were_stored_once(
    settings: dict[str, object], tied: str, once: Path, twice: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(once, **settings)
    for base in (once, twice):
        merge(base, adapter, tmp_path / f"{base.name}-merged", tied=tied)
    expected, actual = tensors_in(tmp_path / "base-merged"), tensors_in(tmp_path / "twice-merged")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert is_said_tied(tmp_path / "twice-merged") is is_said_tied(tmp_path / "base-merged")
    assert torch.equal(logits(tmp_path / "twice-merged"), logits(tmp_path / "base-merged"))
    # Shared, a change of one side is one of both, which is PEFT's merge and not the model that it trained.
    if tied == "untie" or settings in (TOKENS, TYING):
        assert relative(logits(tmp_path / "twice-merged"), peft_logits(twice, adapter)) <= 1e-5


def test_a_head_that_is_stored_twice_asks_as_well_how_to_treat_the_tied_tensor(
    twice: Path, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(twice, target_modules=["lm_head"])
    with pytest.raises(Mismatch) as caught:
        plan_merge(open_checkpoint(twice), [(adapter, 1.0)], settings={"tied": "refuse"})
    assert caught.value.code == "tied_weight"


def test_a_head_that_is_stored_twice_is_copied_when_the_embedding_is(
    twice: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    plan = merge(twice, make_adapter(twice), tmp_path / "merged")
    assert (tmp_path / "merged/head.safetensors").read_bytes() == (twice / "head.safetensors").read_bytes()
    assert len(plan.shards) == len(open_checkpoint(twice).shards)


def test_a_head_that_is_stored_twice_stays_tied_when_values_are_rounded_by_chance(
    twice: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    checkpoint, adapter = open_checkpoint(twice), make_adapter(twice)
    plan = plan_merge(checkpoint, [(adapter, 1.0)], dtype="bf16", rounding=Rounding(Mode.STOCHASTIC, 1))
    run_merge(plan, tmp_path / "merged", DEVICE)
    assert is_loaded_tied(tmp_path / "merged")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        TOKENS,
        TYING,
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_a_head_with_values_of_its_own_is_merged_apart_as_in_peft(
    settings: dict[str, object], apart: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter, merged = make_adapter(apart, **settings), tmp_path / "merged"
    merge(apart, adapter, merged)
    assert not is_said_tied(merged)
    assert_all_close(load_model(merged).state_dict(), peft_merged(apart, adapter), 1e-6)
    assert relative(logits(merged), peft_logits(apart, adapter)) <= 1e-5


@pytest.mark.parametrize("tokens", [{"wpe": [0, 1]}, {"wte": [3], "wpe": [0, 1]}], ids=str)
def test_trained_rows_of_another_table_than_the_embedding_are_not_the_heads(
    tokens: dict[str, list[int]], make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    apart = with_head(make_model("gpt2", tied=True), 0.5, "apart", "transformer.wte.weight")
    adapter, merged = (
        make_adapter(apart, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=tokens),
        tmp_path / "merged",
    )
    merge(apart, adapter, merged)
    assert_all_close(load_model(merged).state_dict(), peft_merged(apart, adapter), 1e-6)


def test_a_merge_with_a_stored_head_can_be_rebuilt(
    twice: Path, apart: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    for base in (twice, apart):
        adapter, merged = make_adapter(base, name=f"for-{base.name}", **TOKENS), tmp_path / f"{base.name}-merged"
        merge(base, adapter, merged)
        checkpoint = open_checkpoint(base)
        assert rebuild(plan_rebuild(merged, checkpoint, [adapter]), merged, DEVICE).verdict == "same"
        result = open_checkpoint(merged)
        assert result.index is not None
        assert set(result.index["weight_map"]) == set(result.architecture.tensors)
        assert set(hash_checkpoint(result).tensor_hashes) == set(result.architecture.tensors)
        assert result.architecture.tied is (base is twice)


def test_rows_of_tokens_that_are_saved_for_both_sides_are_merged_once(once: Path, tmp_path: Path) -> None:
    """As PEFT saves them if nothing else is trained. Separate rows for the head untie it."""
    adapter = save_adapted(once, peft.TrainableTokensConfig(token_indices=[7, 2, 30]), tmp_path / "adapter")
    assert {split_key(key).module for key in load_file(adapter / "adapter_model.safetensors")} == {
        "model.embed_tokens",
        "lm_head",
    }
    assert_merged_like_peft(once, adapter, tmp_path / "merged")
    assert is_said_tied(tmp_path / "merged")
    assert HEAD not in tensors_in(tmp_path / "merged")
    change_tensors(adapter, lambda rows: {key: row + ("lm_head" in key) for key, row in rows.items()})
    merge(once, adapter, tmp_path / "untied")
    changed, base = tensors_in(tmp_path / "untied"), tensors_in(once)[EMBEDDING]
    for name in (EMBEDDING, HEAD):
        moved = (changed[name] != base).any(dim=1).nonzero().flatten().tolist()
        assert moved == [2, 7, 30]
    assert torch.allclose(changed[HEAD][[2, 7, 30]], changed[EMBEDDING][[2, 7, 30]] + 1)
