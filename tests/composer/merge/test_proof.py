"""A merged checkpoint proves that it answers as its base with the adapters active, or is not kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.errors import RefusedOutput
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.suite import Suite
from composer.merge.plan import MergePlan, plan_merge
from composer.merge.proof import Proof, ProofPrompt, proof_prompts, prove
from composer.merge.run import run_merge
from tests.composer.adapted import save_adapted
from tests.composer.merge.test_tokenizers import trained
from tests.composer.small_model import save_adapter, save_llama
from tests.device import DEVICE

SUITE = Suite.from_json(
    {
        "name": "letters",
        "kind": "target",
        "chat": True,
        "examples": [
            {"prompt": f"which letter is {number}?", "completion": f"letter {number}, {number}"} for number in range(8)
        ],
    }
)
PROMPTS = proof_prompts([SUITE])


def adapter_of(base: Path, directory: Path, seed: int = 1, **config: object) -> Path:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    save_adapter(AutoModelForCausalLM.from_pretrained(base), directory, seed, **settings)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def members(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("members")
    return [adapter_of(base, directory / name, seed) for seed, name in enumerate(("red", "green"), start=1)]


def planned(base: Path, members: list[Path], method: str = "stack", **settings: object) -> MergePlan:
    return plan_merge(open_checkpoint(base), [(member, 0.7) for member in members], method, settings)


@pytest.fixture(scope="module")
def plan(base: Path, members: list[Path]) -> MergePlan:
    return planned(base, members)


@pytest.fixture
def merged(plan: MergePlan, tmp_path: Path) -> Path:
    run_merge(plan, tmp_path / "out", DEVICE)
    return tmp_path / "out"


def merged_and_proved(plan: MergePlan, out: Path, asked: list[ProofPrompt] = PROMPTS) -> Proof:
    report = run_merge(plan, out, DEVICE, prompts=asked)
    assert report.proof is not None
    return report.proof


def proof_of(plan: MergePlan, directory: Path) -> Proof:
    return prove(plan, directory, PROMPTS, DEVICE)


def test_a_merge_answers_as_its_base_with_the_adapters_and_its_note_and_card_say_so(
    plan: MergePlan, tmp_path: Path
) -> None:
    proof = merged_and_proved(plan, tmp_path / "out")
    assert proof.state == "proved"
    assert proof.equal == proof.positions == 8 * len("letter 1, 1.")
    assert proof.distance <= 1e-5 < proof.limit == 1e-3 < proof.base_distance
    assert "answers as the base with its adapters on 96 of 96 positions of 8 prompts" in proof.words
    note = json.loads((tmp_path / "out" / "adaptory.json").read_text())
    assert note["proof"]["state"] == "proved"
    assert proof.words in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_the_weights_is_within_the_limit_of_their_dtype(
    base: Path, members: list[Path], tmp_path: Path, dtype: str
) -> None:
    rounded = plan_merge(open_checkpoint(base), [(member, 1.0) for member in members], dtype=dtype)
    proof = merged_and_proved(rounded, tmp_path / "out")
    assert (proof.state, proof.dtype) == ("proved", dtype)


@pytest.mark.parametrize(
    ("method", "settings"), [("ties", {"density": 0.5}), ("svd", {"rank": 4}), ("dare_linear", {"density": 0.5})]
)
def test_what_is_no_sum_is_compared_with_the_base_and_the_combined_adapter(
    base: Path, members: list[Path], tmp_path: Path, method: str, settings: dict[str, object]
) -> None:
    proof = merged_and_proved(planned(base, members, method, **settings), tmp_path / "out")
    assert (proof.state, proof.reference) == ("proved", "the base with the combined adapter")


def test_two_dora_adapters_in_turn_are_compared_with_their_combination(base: Path, tmp_path: Path) -> None:
    members = [adapter_of(base, tmp_path / name, seed, use_dora=True) for seed, name in ((1, "red"), (2, "green"))]
    in_turn = plan_merge(open_checkpoint(base), [(member, 1.0) for member in members], "stack", {"sequential": True})
    proof = merged_and_proved(in_turn, tmp_path / "out")
    assert proof.state == "proved"


@pytest.mark.parametrize("method", ["stack", "ties"])
def test_an_adapter_of_both_sides_of_a_tied_weight_is_proved(tmp_path: Path, method: str) -> None:
    base = save_llama(tmp_path / "base", tied=True)
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    adapter = save_adapted(base, config, tmp_path / "adapter")
    proof = merged_and_proved(plan_merge(open_checkpoint(base), [(adapter, 1.0)], method), tmp_path / "out")
    assert proof.state == "proved", proof


def test_of_a_change_of_one_side_of_a_shared_tensor_the_proof_says_why_it_is_impossible(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", tied=True)
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    shared = plan_merge(open_checkpoint(base), [(adapter, 1.0)], "stack", {"tied": "shared"})
    proof = merged_and_proved(shared, tmp_path / "out")
    assert proof.state == "impossible"
    assert "tied=shared" in proof.words


def test_tokens_of_an_adapter_with_its_own_tokenizer_are_expected_of_the_result(base: Path, tmp_path: Path) -> None:
    padded = tmp_path / "base"
    shutil.copytree(base, padded)
    model = AutoModelForCausalLM.from_pretrained(padded)
    model.resize_token_embeddings(model.config.vocab_size + 16)
    model.save_pretrained(padded)
    adapter = trained(padded, tmp_path / "adapter")
    asked = [ProofPrompt("<|think|> which letter?", "<|answer|>a", chat=True)]
    plan = plan_merge(open_checkpoint(padded), [(adapter, 1.0)])
    assert merged_and_proved(plan, tmp_path / "out", asked).state == "proved"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(padded / name, tmp_path / "out" / name)
    assert "into other tokens" in prove(plan, tmp_path / "out", asked, DEVICE).why


def test_a_lost_tokenizer_fails_the_proof(plan: MergePlan, merged: Path) -> None:
    (merged / "tokenizer.json").unlink()
    assert proof_of(plan, merged).state == "failed"


def test_a_lost_template_fails_the_proof_also_on_prompts_without_a_chat(plan: MergePlan, merged: Path) -> None:
    (merged / "chat_template.jinja").unlink()
    proof = prove(plan, merged, [ProofPrompt("which letter?", "a")], DEVICE)
    assert (proof.state, proof.why) == ("failed", "the result has no chat template.")


def test_another_template_fails_the_proof(plan: MergePlan, merged: Path) -> None:
    template = merged / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "human") + " ")
    assert "template" in proof_of(plan, merged).why


def test_a_directory_that_transformers_cannot_load_fails_the_proof(plan: MergePlan, merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert proof_of(plan, merged).state == "failed"


def test_two_swapped_tensors_fail_the_proof(plan: MergePlan, merged: Path) -> None:
    file = merged / "model.safetensors"
    tensors = load_file(file)
    one, other = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, file, {"format": "pt"})
    proof = proof_of(plan, merged)
    assert proof.state == "failed"
    assert "differ by more than" in proof.why


def test_a_swapped_shard_fails_the_proof(base: Path, members: list[Path], tmp_path: Path) -> None:
    sharded = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(base).save_pretrained(sharded)
    plan = planned(sharded, members)
    run_merge(plan, tmp_path / "out", DEVICE)
    changed = next(shard.file for shard in plan.shards if shard.rewritten)
    shutil.copyfile(sharded / changed, tmp_path / "out" / changed)  # the base's own, of the same size
    assert proof_of(plan, tmp_path / "out").state == "failed"


def test_values_that_are_not_finite_fail_the_proof(plan: MergePlan, merged: Path) -> None:
    tensors = load_file(merged / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    assert proof_of(plan, merged).state == "failed"


def test_a_merge_that_fails_its_proof_leaves_nothing(base: Path, members: list[Path], tmp_path: Path) -> None:
    padded = tmp_path / "base"
    shutil.copytree(base, padded)
    tokenizer = padded / "tokenizer.json"
    tokenizer.write_text(
        tokenizer.read_text() + " " * (64 << 20)
    )  # beyond the size of a side file, which is not copied
    with pytest.raises(RefusedOutput, match="does not answer as the base with its adapters") as refused:
        run_merge(planned(padded, members), tmp_path / "out", DEVICE, prompts=PROMPTS)
    assert refused.value.code == "proof_failed"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_prompts_on_which_the_base_answers_alike_do_not_prove_a_merge(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    small = plan_merge(open_checkpoint(base), [(adapter, 1e-7)])
    proof = merged_and_proved(small, tmp_path / "out")
    assert proof.state == "undecided"
    assert "these prompts do not show what the adapters change" in proof.words


def test_of_a_base_that_transformers_cannot_load_the_proof_says_that_nothing_was_compared(
    base: Path, members: list[Path], tmp_path: Path
) -> None:
    bare = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(bare)
    proof = merged_and_proved(planned(bare, members), tmp_path / "out")
    assert proof.state == "impossible"
    assert "could not be compared" in (tmp_path / "out" / "README.md").read_text()


def test_prompts_beyond_the_context_are_left_out_of_a_proof_also_if_only_their_chat_is(
    plan: MergePlan, tmp_path: Path
) -> None:
    asked = [ProofPrompt("a" * 500, "b"), ProofPrompt("a" * 110, "b"), ProofPrompt("which letter?", "a")]
    proof = merged_and_proved(plan, tmp_path / "out", asked)
    assert (proof.state, proof.prompts) == ("proved", 1)
    assert "fits into the context" in merged_and_proved(plan, tmp_path / "none", asked[:2]).why


def test_a_template_that_writes_the_time_does_not_fail_the_proof(
    base: Path, members: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%f') }}" + template.read_text())
    timed = planned(tmp_path / "base", members)
    proof = merged_and_proved(timed, tmp_path / "out", [ProofPrompt("which letter?", "a")])
    assert proof.state == "proved", proof
    (tmp_path / "out" / "chat_template.jinja").unlink()
    assert proof_of(timed, tmp_path / "out").state == "failed"


def test_a_tokenizer_that_makes_no_tokens_fails_the_proof(plan: MergePlan, merged: Path) -> None:
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    tokenizer["model"] |= {"vocab": {}, "unk_token": "none"}
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": ""}
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert proof_of(plan, merged).state == "failed"
