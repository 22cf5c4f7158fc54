"""A user trains an adapter: the trainer publishes it, with its training data and results."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from registry.errors import Conflict, NotFound, Usage
from registry.sdk import AdaptoryCallback, Registry
from tests import services
from tests.scenarios.world import Cli, World, environment

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
IDS = torch.tensor([[1, 2, 3, 4 + number] for number in range(8)])


@pytest.fixture
def cli(stocked: Cli) -> Generator[Cli]:
    """The registry that the environment names, embedded or served."""
    with environment(stocked.environment, []):
        yield stocked


def trainer_of(
    world: World, output: Path, *callbacks: TrainerCallback, adapted: bool = True, **options: Any
) -> Trainer:
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in IDS.tolist()])
    arguments = TrainingArguments(
        str(output), max_steps=10, save_steps=5, eval_steps=5, eval_strategy="steps", report_to=[], use_cpu=True,
        per_device_train_batch_size=2, learning_rate=0.05, disable_tqdm=True, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(world.base)
    return Trainer(
        get_peft_model(base, LoraConfig(**LORA)) if adapted else base,
        arguments,
        default_data_collator,
        rows,
        rows.select(range(6)),
        callbacks=list(callbacks),
    )


def test_ten_steps_of_training_are_published_at_each_save_and_at_the_end(
    cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = yaml.safe_load(world.suites["sql"].read_text()) | {"metrics": {"loss": "lower"}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    cli.ok("suite", "add", tmp_path / "suite.yaml")
    subprocess.run("git init -q . && git -c user.name=a -c user.email=a@b commit -qm x --allow-empty", shell=True)  # noqa: S602, S607
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S607
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0-step.5", "--base", "tiny")
    callback = AdaptoryCallback(
        "acme/sql:1.0.0", base="tiny", every_save=True, data=["acme/queries"], suite="sql-exact",
        hyperparameters={"mixture": "a"}, provenance={"license": "mit"},
    )  # fmt: skip
    trainer = trainer_of(world, tmp_path / "out", callback)
    with pytest.warns(UserWarning, match="The adapter of step 5 was not published: .*1.0.0-step.5"):
        trainer.train()
    assert [str(release) for release in callback.releases] == ["acme/sql:1.0.0-step.10", "acme/sql:1.0.0"]
    assert not (tmp_path / "out" / "adaptory").exists()

    with Registry() as registry:
        release = registry.resolve("acme/sql")
        pulled = registry.pull(release)
    provenance = release.document["provenance"]
    assert (provenance["code_commit"], provenance["license"]) == (head, "mit")
    assert provenance["data"] == [{"name": "acme/queries", "digest": None, "license": None}]
    assert provenance["trainer"].startswith("transformers 5.")
    settings = provenance["hyperparameters"]
    assert (settings["learning_rate"], settings["steps"], settings["max_steps"], settings["mixture"]) == (
        0.05,
        10,
        10,
        "a",
    )
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert settings["eval_loss"] == evaluated[-1] < evaluated[0]
    (score,) = release.scores
    assert (score.suite, score.metric, score.value, score.n) == ("sql-exact", "loss", evaluated[-1], 6)
    assert (score.reported, score.higher_is_better) == (True, False)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world.base), pulled)
    torch.testing.assert_close(loaded(IDS).logits, trainer.model.eval()(IDS).logits)


def test_the_best_adapter_is_published_with_the_evaluation_that_made_it_the_best(
    cli: Cli, world: World, tmp_path: Path
) -> None:
    callback = AdaptoryCallback("acme/sql", bump="auto", base="tiny", suite="sql-exact")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(world, tmp_path / "out", callback, **best)
    trainer.train()
    (release,) = callback.releases
    settings = release.document["provenance"]["hyperparameters"]
    first, last = (row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    assert (settings["steps"], settings["eval_step"], settings["eval_loss"]) == (5, 5, first)
    assert first != last


class Meanwhile(TrainerCallback):
    """Somebody else publishes that version during the training."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def on_step_end(self, args: Any, state: Any, control: Any, **_context: Any) -> None:
        if state.global_step == 9:
            with Registry() as registry:
                registry.push(self._directory, "acme/sql:1.0.0", base="tiny")


@pytest.mark.long
def test_a_push_that_fails_at_the_end_raises_and_the_adapter_is_kept(cli: Cli, world: World, tmp_path: Path) -> None:
    output = tmp_path / "out"
    callback = AdaptoryCallback("acme/sql:1.0.0", base="tiny")
    with pytest.raises(Conflict) as raised:
        trainer_of(world, output, callback, Meanwhile(world.adapters["sql"]), save_strategy="no").train()
    assert raised.value.__notes__ == [
        f"The adapter is in {output / 'adaptory'}: adaptory push {output / 'adaptory'} acme/sql:1.0.0"
    ]
    cli.ok("push", output / "adaptory", "acme/sql:1.0.1", "--base", "tiny")


@pytest.mark.long
def test_what_would_fail_at_the_end_fails_before_the_first_step(cli: Cli, world: World, tmp_path: Path) -> None:
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    for callback, error in (
        (AdaptoryCallback("acme/sql:1.0.0"), Conflict),
        (AdaptoryCallback("acme/sql", bump="auto", base="huge"), NotFound),
        (AdaptoryCallback("acme/sql", bump="auto", suite="sql-exakt"), NotFound),
    ):
        trainer = trainer_of(world, tmp_path / "out", callback)
        with pytest.raises(error):
            trainer.train()
        assert trainer.state.global_step == 0
    for target, options in (("acme/sql", {}), ("acme/sql:2.0.0-rc.1", {"every_save": True})):
        with pytest.raises(Usage):
            AdaptoryCallback(target, **options)
    trainer = trainer_of(world, tmp_path / "out", AdaptoryCallback("acme/sql", bump="auto"), adapted=False)
    with pytest.raises(Usage, match="no PEFT adapter"):
        trainer.train()


def test_other_ranks_ask_no_registry(tmp_path: Path) -> None:
    callback = AdaptoryCallback("acme/sql", bump="auto", every_save=True, url="http://127.0.0.1:9")
    arguments, state = TrainingArguments(str(tmp_path)), TrainerState(is_world_process_zero=False)
    for event in (callback.on_train_begin, callback.on_save, callback.on_train_end):
        event(arguments, state, TrainerControl())
    assert callback.releases == []


RANKS = """
import os, sys
from pathlib import Path
from tests.scenarios.test_training import trainer_of
from tests.scenarios.world import World
from registry.sdk import AdaptoryCallback

callback = AdaptoryCallback("acme/sql:1.0.0", base="tiny", every_save=True)
trainer_of(World(Path(sys.argv[1]), {}, {}), Path("out"), callback, ddp_backend="gloo").train()
Path(f"published-{os.environ['RANK']}").write_text(" ".join(map(str, callback.releases)))
"""


@pytest.mark.long
def test_of_two_processes_one_publishes(cli: Cli, world: World, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launch, f"--master-port={services.free_port()}", "train.py", str(world.base)]
    subprocess.run(command, cwd=tmp_path, env=where, check=True)
    published = [(tmp_path / f"published-{rank}").read_text() for rank in range(2)]
    assert published == ["acme/sql:1.0.0-step.5 acme/sql:1.0.0-step.10 acme/sql:1.0.0", ""]


def test_trl_publishes_every_save_of_ten_steps_with_a_bump(cli: Cli, world: World, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": f"select {number}", "completion": " from t"} for number in range(7)])
    callback = AdaptoryCallback("acme/sql", bump="minor", base="tiny", every_save=True, suite="sql-exact")
    trainer = SFTTrainer(
        str(world.base),
        SFTConfig(
            str(tmp_path / "out"), max_steps=10, save_steps=5, eval_strategy="steps", eval_steps=10, report_to=[],
            use_cpu=True, per_device_train_batch_size=2, learning_rate=0.05, disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=LoraConfig(**LORA),
        callbacks=[callback],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="The evaluation has 7 examples, sql-exact only 6"):
        trainer.train()
    assert [str(release) for release in callback.releases] == ["acme/sql:0.1.0", "acme/sql:0.2.0"]
    with Registry() as registry:
        release, pulled = registry.resolve("acme/sql"), registry.pull("acme/sql")
    assert release.scores == ()
    assert release.document["provenance"]["trainer"].startswith("trl 1.")
    assert release.document["provenance"]["hyperparameters"]["eval_mean_token_accuracy"] > 0
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world.base), pulled)

    trainer.save_model()
    pushed = cli.ok("push", tmp_path / "out", "acme/sql:1.0.0", "--base", "tiny")
    assert "left out: checkpoint-*/, training_args.bin" in pushed.err
    published = {row["path"] for row in cli.json("show", "acme/sql:1.0.0")["files"]}
    assert published >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"}
