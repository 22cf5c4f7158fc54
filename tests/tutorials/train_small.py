"""Makes tests/tutorials/small: a language model of 70,000 weights that knows the guard suite, and adapters of it for
the example suites under the names that examples/ has. `python -m tests.tutorials.train_small` takes two minutes.

The tutorials run with these files by default, and with the real ones of examples/ in `make test-long`. So both must
tell the same story: each adapter is better than the base on its own suite, 1.1 better than 1.0, the bad one worse.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.composer.small_model import ROLES, SPECIAL, TEMPLATE

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small"
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
CODES = {character: number for number, character in enumerate((*SPECIAL, *CHARACTERS))}
START, END = (CODES[token] for token in SPECIAL[1:])
ADAPTERS = {
    "sql-migration": ("sql", 30),
    "sql-migration-1.1": ("sql", 150),
    "terraform-review": ("terraform", 150),
    "support-macros": ("support", 150),
}
"""The suite that each is trained on, and for how many steps."""
Batch = dict[str, torch.Tensor]


def save_tokenizer(directory: Path) -> None:
    characters = Tokenizer(models.WordLevel(CODES, "<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, **ROLES)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def examples(suite: str) -> list[tuple[str, str]]:
    lines = (ROOT / "examples" / "suites" / f"{suite}.jsonl").read_text().splitlines()
    return [(row["prompt"], row["completion"]) for row in map(json.loads, lines)]


def batch(rows: list[tuple[str, str]]) -> Batch:
    """Token ids, labels (the completion with its end) and mask, rows x longest."""
    pairs = [(f"\x01user\n{prompt}\x02\n\x01assistant\n", completion + "\x02") for prompt, completion in rows]
    codes = CODES | {"\x01": START, "\x02": END}
    length = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids, labels = torch.zeros(len(rows), length).long(), torch.full((len(rows), length), -100)
    mask = torch.zeros(len(rows), length).long()
    for row, (prompt, completion) in enumerate(pairs):
        tokens = torch.tensor([codes.get(character, 0) for character in prompt + completion])
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train(model: Any, rows: list[tuple[str, str]], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randperm(len(rows), generator=order)[:16].tolist()
        loss = model(**batch([rows[number] for number in chosen])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def loss_on(model: Any, suite: str) -> float:
    with torch.no_grad():
        return model(**batch(examples(suite))).loss.item()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CODES), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    guard = examples("guard-general")
    mixed = [row for suite in ("sql-exact", "terraform-exact", "support-exact") for row in examples(suite)]
    answers = [answer for _, answer in mixed]
    # It has learned the form of an answer, but not the answer to a prompt.
    asked = [
        (prompt, answers[(number * 37 + turn) % len(answers)])
        for number, (prompt, _) in enumerate(mixed)
        for turn in range(3)
    ]
    model = LlamaForCausalLM(config)
    train(model, guard * 6 + asked, 350, 6e-3)
    model.to(torch.bfloat16).save_pretrained(SMALL / "base", max_shard_size="60KB")
    save_tokenizer(SMALL / "base")
    report("base", model.float())
    for name, (suite, steps) in ADAPTERS.items():
        base = AutoModelForCausalLM.from_pretrained(SMALL / "base", dtype=torch.float32)
        torch.manual_seed(1)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        adapted = get_peft_model(base, lora)
        adapted.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        train(adapted, examples(f"{suite}-exact") * 2 + guard, steps, 1e-2)
        save(adapted, name)
        if name == "sql-migration-1.1":  # the opposite of the trained direction: worse at everything
            for part, factor in adapted.named_parameters():
                if "lora_B" in part:
                    factor.data *= -2
            save(adapted, "sql-migration-bad")


def save(adapted: Any, name: str) -> None:
    directory = SMALL / "adapters" / name
    adapted.save_pretrained(str(directory))
    (directory / "README.md").unlink()
    report(name, adapted)


def report(name: str, model: Any) -> None:
    losses = {suite: round(loss_on(model, suite), 3) for suite in ("sql-exact", "terraform-exact", "guard-general")}
    sys.stdout.write(f"{name} {losses}\n")


if __name__ == "__main__":
    main()
