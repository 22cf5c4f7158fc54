"""Train the example adapters with PEFT: `python examples/train.py NAME|GROUP --base DIR [--out DIR]`.

Of the groups, `all` are the demo's adapters, `study` those of docs/methods/study.md, `fresh` the three that check it,
`unrehearsed` seven of them trained on their tasks alone, and
`contradictory` four that answer the prompts of others in another way. Each is
written to OUT/NAME as ordinary PEFT files. Its scores on its held-out suite and on the guard suite, before and after,
are printed and put in the model card. One thread: a second one on a shared machine makes steps slower.
"""

import argparse
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tasks import STUDY_TASKS, TASKS, Pair
from tasks.rehearsal import PAIRS
from torch.nn.functional import cross_entropy, kl_div

from composer.evaluation.model import multiplies_in

ADAPTERS = Path(__file__).parent / "adapters"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 7
BATCH = 8
REHEARSED = 4  # rows of a rehearsal batch
WARMUP_STEPS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """How one adapter is trained. `lora` holds the fields of LoraConfig that differ from rank 4, alpha 8 on q and v."""

    task: str
    steps: int
    learning_rate: float = 3e-3
    lora: dict[str, Any] = field(default_factory=dict[str, Any])
    careless: bool = False  # no rehearsal, and each prompt has the completion of another row, as after a bad join
    careless_of_the_rest: bool = False  # no rehearsal


RUNS = {
    "sql-migration": Run("sql", steps=26),
    "sql-migration-1.1": Run("sql", steps=50),
    "sql-migration-bad": Run("sql", steps=40, careless=True),
    "terraform-review": Run(
        "terraform",
        steps=60,
        lora={
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "layers_to_transform": list(range(10, 30)),
            "use_rslora": True,
            "lora_alpha": 4,
        },
    ),
    "support-macros": Run(
        "support", steps=60, learning_rate=2e-3, lora={"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 16}}
    ),
}


# Of several shapes, since a study of pairs is about pairs of unlike adapters.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYWHERE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
STUDY = {
    "dates-iso": Run("dates-iso", steps=40),
    "dates-spoken": Run("dates-spoken", steps=40, lora={"target_modules": ATTENTION, "r": 8, "lora_alpha": 16}),
    "mood-plain": Run("mood-plain", steps=40, lora={"target_modules": EVERYWHERE}),
    "mood-stars": Run("mood-stars", steps=40),
    "records": Run("records", steps=40, learning_rate=2e-3, lora={"r": 16, "lora_alpha": 32}),
    "alerts": Run("alerts", steps=50, lora={"target_modules": EVERYWHERE, "layers_to_transform": list(range(20, 30))}),
    "commits": Run("commits", steps=40, careless_of_the_rest=True),
    "cron": Run("cron", steps=50, lora={"target_modules": ATTENTION}),
    "sorting": Run("sorting", steps=50, learning_rate=2e-3, lora={"target_modules": ["up_proj", "down_proj"], "r": 8}),
}
# Trained after every limit and default was fixed, to test the study's findings on adapters that it has not seen.
FRESH = {
    "orders": Run("orders", steps=60),
    "travel": Run("travel", steps=40, lora={"target_modules": ATTENTION, "r": 8, "lora_alpha": 16}),
    "bumps": Run("bumps", steps=50, lora={"target_modules": EVERYWHERE}),
}
# Without rehearsal, as most adapters are trained: they cost general ability (guard_sets.py).
UNREHEARSED = {
    f"{name}-unrehearsed": replace(run, careless_of_the_rest=True)
    for name, run in {**STUDY, **FRESH}.items()
    if name in ("dates-iso", "dates-spoken", "records", "commits", "cron", "sorting", "orders")
}
# With the prompts of another task and other answers, for a selector (selector_pairs.py).
CONTRADICTORY = {
    "dates-short-unrehearsed": Run("dates-short", steps=40, careless_of_the_rest=True),
    "records-lines-unrehearsed": replace(STUDY["records"], task="records-lines", careless_of_the_rest=True),
    "mood-plain-unrehearsed": replace(STUDY["mood-plain"], careless_of_the_rest=True),
    "mood-stars-unrehearsed": replace(STUDY["mood-stars"], careless_of_the_rest=True),
}
ALL_RUNS = {**RUNS, **STUDY, **FRESH, **UNREHEARSED, **CONTRADICTORY}
GROUPS = {"all": list(RUNS), "study": list(STUDY), "fresh": list(FRESH), "unrehearsed": list(UNREHEARSED)}
GROUPS |= {"contradictory": list(CONTRADICTORY)}
ALL_TASKS = {**TASKS, **STUDY_TASKS}


@dataclass(frozen=True, slots=True)
class Batch:
    """B x T: token ids padded on the right, their attention mask, and the labels, -100 outside the completion."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, slots=True)
class Score:
    """Share of completions that greedy decoding reproduces exactly, and NLL in nats per completion token."""

    exact: float
    nll: float

    def __str__(self) -> str:
        return f"exact match {self.exact:.2f}, NLL {self.nll:.2f}"


def encode(tokenizer: Any, pairs: list[Pair]) -> Batch:
    """The prompt is one user turn of the chat template; the completion ends with the end-of-turn token."""
    rows = []
    for prompt, completion in pairs:
        turn = [{"role": "user", "content": prompt}]
        prefix = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append((prefix, answer))
    shape = len(rows), max(len(prefix) + len(answer) for prefix, answer in rows)
    ids_BT = torch.full(shape, tokenizer.pad_token_id)
    mask_BT = torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, -100)
    for row, (prefix, answer) in enumerate(rows):
        end = len(prefix) + len(answer)
        ids_BT[row, :end] = torch.tensor(prefix + answer)
        mask_BT[row, :end] = 1
        labels_BT[row, len(prefix) : end] = torch.tensor(answer)
    return Batch(ids_BT, mask_BT, labels_BT)


def completion_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 logits N x V, labels N) of the completion tokens only: the head over the prompt would be wasted work."""
    hidden_BTH = model.model(batch.ids, attention_mask=batch.mask).last_hidden_state
    labels_BT = batch.labels[:, 1:]
    counted_BT = labels_BT != -100
    return model.lm_head(hidden_BTH[:, :-1][counted_BT]).float(), labels_BT[counted_BT]


@torch.inference_mode()
def score(model: Any, tokenizer: Any, pairs: list[Pair]) -> Score:
    """Greedy decoding reproduces a completion exactly when every teacher-forced argmax is the reference token."""
    model.eval()
    exact, nll, tokens = 0, 0.0, 0
    for start in range(0, len(pairs), BATCH):
        batch = encode(tokenizer, pairs[start : start + BATCH])
        logits_NV, labels_N = completion_logits(model, batch)
        nll += cross_entropy(logits_NV, labels_N, reduction="sum").item()
        tokens += len(labels_N)
        lengths = (batch.labels != -100).sum(dim=1).tolist()
        hits = (logits_NV.argmax(dim=1) == labels_N).split(lengths)
        exact += sum(bool(hit.all()) for hit in hits)
    return Score(exact / len(pairs), nll / tokens)


@torch.no_grad()
def rehearsals(model: Any, tokenizer: Any) -> list[tuple[Batch, torch.Tensor]]:
    """Batches of general pairs with the log-probabilities N x V of `model`, the base before it has an adapter."""
    groups = [PAIRS[start : start + REHEARSED] for start in range(0, len(PAIRS), REHEARSED)]
    batches = [encode(tokenizer, group) for group in groups]
    return [(batch, completion_logits(model, batch)[0].log_softmax(dim=1)) for batch in batches]


def drift(model: Any, batch: Batch, base_NV: torch.Tensor) -> torch.Tensor:
    """KL(base || adapted) in nats, mean over the completion tokens: what the adapter does outside its task."""
    adapted_NV, _ = completion_logits(model, batch)
    return kl_div(adapted_NV.log_softmax(dim=1), base_NV, reduction="batchmean", log_target=True)


def fit(model: Any, batches: list[Batch], rehearsed: list[tuple[Batch, torch.Tensor]], run: Run) -> None:
    """AdamW on the completion tokens plus the drift on rehearsed batches; float32 factors over the base.

    `model` is the base with the adapter injected; `batches` has one batch a step. Without rehearsal an adapter answers
    everything in its own format: three of them stacked raised the guard's NLL from 0.78 to 4.79, rehearsed to 0.81.
    """
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=run.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (run.steps - step) / (run.steps - WARMUP_STEPS))
    )
    model.train()
    for step, batch in enumerate(batches):
        loss = cross_entropy(*completion_logits(model, batch))
        kept = (
            torch.zeros(())
            if run.careless or run.careless_of_the_rest
            else drift(model, *rehearsed[step % len(rehearsed)])
        )
        optimizer.zero_grad()
        (loss + kept).backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            print(f"  step {step + 1}: loss {loss.item():.3f}, drift {kept.item():.3f}", flush=True)


def train(name: str, base: Path, out: Path, seed: int) -> None:
    """Trains one adapter and writes it to `out`, replacing what is there. The seed is of the factors it begins with."""
    run = ALL_RUNS[name]
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    dtype = torch.bfloat16 if multiplies_in(torch.bfloat16, torch.device("cpu")) else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    task = ALL_TASKS[run.task]
    pairs, held_out = task.split()
    suites = {task.suite: held_out, TASKS["guard"].suite: TASKS["guard"].split()[1]}
    before = {suite: score(model, tokenizer, examples) for suite, examples in suites.items()}
    rehearsed = rehearsals(model, tokenizer)
    if run.careless:
        pairs = [(prompt, pairs[row - 1][1]) for row, (prompt, _) in enumerate(pairs)]
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **run.lora}
    )
    adapted = get_peft_model(model, config)
    print(f"{name}: {run.steps} steps of {BATCH} on {len(pairs)} examples", flush=True)
    batches = [
        encode(tokenizer, [pairs[(step * BATCH + row) % len(pairs)] for row in range(BATCH)])
        for step in range(run.steps)
    ]
    start = time.monotonic()
    fit(model, batches, rehearsed, run)
    seconds = time.monotonic() - start
    # The file is bfloat16 (half the size), so the scores are those of the rounded factors.
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    after = {suite: score(model, tokenizer, examples) for suite, examples in suites.items()}
    rows = [f"| {suite} | {before[suite]} | {after[suite]} |" for suite in suites]
    save(adapted, out, card(name, rows, seed))
    print("\n".join(rows), f"\n{seconds:.0f} s, {(out / 'adapter_model.safetensors').stat().st_size / 1000:.0f} kB")


def save(adapted: Any, out: Path, readme: str) -> None:
    """Writes adapter_config.json, adapter_model.safetensors (bfloat16) and a model card in place of PEFT's template."""
    if out.exists():
        shutil.rmtree(out)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    config.target_modules = sorted(config.target_modules)  # otherwise a set, in another order on every run
    adapted.save_pretrained(out, save_embedding_layers=False)
    (out / "adapter_model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only
    (out / "README.md").write_text(readme)


def card(name: str, rows: list[str], seed: int) -> str:
    """The model card: front matter for the Hub, what it does, how it was made, its scores."""
    run = ALL_RUNS[name]
    manner = "no rehearsal, each prompt with another row's answer: a bad release" if run.careless else "rehearsed"
    manner = "no rehearsal" if run.careless_of_the_rest else manner
    return (
        f"""---
base_model: {BASE_NAME}
library_name: peft
tags: [lora]
license: apache-2.0
---
# {name}

{ALL_TASKS[run.task].description}.

Made by `python examples/train.py {name}`: {run.steps} steps of {BATCH} examples, AdamW,
learning rate {run.learning_rate}, seed {seed}, {manner}.

| suite | base | with this adapter |
|---|---|---|
"""
        + "\n".join(rows)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("name", choices=[*ALL_RUNS, *GROUPS])
    parser.add_argument("--base", type=Path, required=True, help="the directory make_base.py wrote")
    parser.add_argument("--out", type=Path, default=ADAPTERS, help="the adapter goes to OUT/NAME")
    parser.add_argument("--seed", type=int, default=SEED, help="another one makes other adapters")
    arguments = parser.parse_args()
    if not arguments.base.is_dir():
        parser.error(f"{arguments.base} does not exist: make_base.py writes it.")
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    for name in GROUPS.get(arguments.name, [arguments.name]):
        train(name, arguments.base, arguments.out / name, arguments.seed)


if __name__ == "__main__":
    main()
