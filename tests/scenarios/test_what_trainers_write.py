"""A trainer's output directory is pushed unchanged: the adapter is sent, the trainer's own files stay."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from registry.cli.releases import transfer
from registry.client.selection import select_files
from tests.scenarios.world import Cli, World

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
LISTINGS: Mapping[str, tuple[list[str], list[str]]] = {
    "trl": (
        [CARD, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
        [
            "training_args.bin",
            "checkpoint-20/optimizer.pt",
            "checkpoint-20/adapter_model.safetensors",
            "runs/a/events.1",
        ],
    ),
    "axolotl": (
        [CARD, "tokenizer.model", "tokenizer_config.json", "added_tokens.json"],
        ["config.json", "debug.log", "checkpoint-9/rng_state_0.pth", "checkpoint-9/global_step9/mp_rank_00.pt"],
    ),
    "unsloth": (
        [CARD, "tokenizer.json", "vocab.json", "merges.txt", "preprocessor_config.json", "LICENSE"],
        ["optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin", "rng_state.pth"],
    ),
    "llama-factory": (
        [CARD, "special_tokens_map.json", "tokenizer.json"],
        ["all_results.json", "train_results.json", "trainer_log.jsonl", "training_loss.png", "llamaboard_config.yaml"],
    ),
}
"""The files that are sent and kept back, besides the adapter's two files, from directories of these trainers."""


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([1, 2, 3, 4 + index])
        return {"input_ids": ids, "labels": ids}


def test_the_output_of_a_trainer_is_pushed_at_the_first_try(stocked_on_disk: Cli, world: World, tmp_path: Path) -> None:
    cli, output = stocked_on_disk, tmp_path / "out"
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(world.base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Numbers(),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()

    cli.ok("base", "add", world.base, "--name", "tiny", "--alias", "local/tiny")
    pushed = cli.ok("push", output, "acme/sql:1.0.0", "--base", "tiny")
    (left_out,) = [line for line in pushed.err.splitlines() if line.startswith("left out: ")]
    for name in ("checkpoint-*", "training_args.bin", "trainer_state.json"):
        assert name in left_out
    published = {row["path"] for row in cli.json("show", "acme/sql:1.0.0")["files"]}
    assert {WEIGHTS, CONFIG, "tokenizer.json", "tokenizer_config.json"} <= published
    assert not any("checkpoint" in path or path.endswith((".bin", ".pt")) for path in published)

    cli.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "pulled")
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world.base), tmp_path / "pulled")
    cli.ok("push", output / "checkpoint-2", "acme/sql", "--bump", "patch", "--base", "tiny")


@pytest.mark.parametrize("trainer", LISTINGS)
def test_what_stays_of_a_directory_is_listed_in_one_line(
    stocked_on_disk: Cli, world: World, tmp_path: Path, trainer: str
) -> None:
    directory = shutil.copytree(world.adapters["sql"], tmp_path / "out")
    goes, stays = LISTINGS[trainer]
    for name in (*goes, *stays):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    pushed = stocked_on_disk.ok("push", directory, "acme/sql:1.0.0", "--base", "tiny", "--json")
    assert {row["path"] for row in pushed.json["release"]["files"]} == {WEIGHTS, CONFIG, *goes}
    assert set(pushed.json["left_out"]) == {f"{name.split('/')[0]}/" if "/" in name else name for name in stays}
    assert len([line for line in pushed.err.splitlines() if line.startswith("left out: ")]) == 1


def test_more_files_are_taken_by_a_pattern_and_one_that_matches_nothing_is_refused(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    directory = shutil.copytree(world.adapters["sql"], tmp_path / "out")
    for name in ("train.yaml", "plots/loss.png", "plots/rate.png", "notes.txt"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    push = ("push", directory, "acme/sql:1.0.0", "--base", "tiny")
    pushed = stocked_on_disk.json(*push, "--include", "*.yaml", "--include", "plots/")
    assert {"train.yaml", "plots/loss.png", "plots/rate.png"} <= {row["path"] for row in pushed["release"]["files"]}
    assert pushed["left_out"] == ["notes.txt"]
    refused = stocked_on_disk(*push, "--include", "*.yml")
    assert (refused.code, "--include *.yml does not match any file" in refused.err) == (2, True)


def test_all_files_that_cannot_be_released_are_named_before_one_is_hashed(
    stocked_on_disk: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(world.adapters["sql"], tmp_path / "out")
    for name in ("optimizer.pt", "training_args.bin", "z.pkl"):
        (directory / name).write_bytes(b"x")
    torch.save({}, directory / "notes.txt")
    (directory / "a").mkdir()
    (directory / "a/optimizer.pt").write_bytes(b"x")
    (directory / "outside").symlink_to(tmp_path)
    monkeypatch.setattr(transfer, "connected", None)  # a command that gets as far as the registry fails
    refused = stocked_on_disk("push", directory, "acme/sql:1.0.0", "--base", "tiny", "--include", "*")
    assert refused.code == 6
    for name in ("a/optimizer.pt", " optimizer.pt", "training_args.bin", "z.pkl", "notes.txt", "outside"):
        assert name in refused.err


def test_a_directory_of_adapters_names_them_and_a_checkpoint_its_option(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    for name in ("checkpoint-500", "checkpoint-1000"):
        shutil.copytree(world.adapters["sql"], tmp_path / "out" / name)
    refused = stocked_on_disk("push", tmp_path / "out", "acme/sql:1.0.0", "--base", "tiny")
    assert refused.code == 6
    assert "checkpoint-500, checkpoint-1000 below it do" in refused.err
    last = tmp_path / "out" / "checkpoint-1000"
    assert f"next: Name one of them, such as the last: {last}" in refused.err, "by number, not by letter"
    refused = stocked_on_disk("push", world.base, "acme/tiny:1.0.0", "--base", "tiny")
    assert (refused.code, "--kind model" in refused.err) == (6, True)


def test_a_merged_model_goes_with_all_its_files_but_a_trainers(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    directory = shutil.copytree(world.base, tmp_path / "model")
    for name in ("training_args.bin", "checkpoint-5/optimizer.pt", "notes.txt", "eval_results.json"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    pushed = stocked_on_disk.json("push", directory, "acme/tiny:1.0.0", "--base", "tiny", "--kind", "model")
    paths = {row["path"] for row in pushed["release"]["files"]}
    assert paths == {path.name for path in world.base.iterdir()} | {"notes.txt"}
    assert set(pushed["left_out"]) == {"checkpoint-5/", "eval_results.json", "training_args.bin"}
    other = shutil.copytree(world.adapters["sql"], tmp_path / "other")
    shutil.copy(world.base / "config.json", other)
    assert stocked_on_disk("push", other, "acme/no:1.0.0", "--base", "tiny", "--kind", "model").code == 6


def test_many_numbered_names_are_one_pattern_in_the_line(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_text("x")
    for number in range(30):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "optimizer.pt").write_text("x")
        (tmp_path / f"file{number:02d}.png").write_text("x")
    summary = select_files(tmp_path).summary()
    assert summary.startswith("checkpoint-*/, file00.png, ")
    assert summary.endswith(" and 25 more")
