"""Loads a model and its adapter by their names in a hub, with PEFT and transformers: prints what they compute.

Run as a program, as hub_client.py, with the directory of the base that the model is a copy of.
"""

import hashlib
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

WEIGHTS = "adapter_model.safetensors"


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return model(tokens).logits[0, -1, :8].tolist()


def adapted(repository: str, tokens: torch.Tensor, revision: str | None = None) -> list[float]:
    base = AutoModelForCausalLM.from_pretrained("acme/merged", revision="1.0.0")
    return logits(PeftModel.from_pretrained(base, repository, revision=revision), tokens)


def pushed(name: str) -> str:
    """The commit of a new adapter that PEFT has pushed and a tag has released."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained("acme/merged")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).push_to_hub(name)
    HfApi().create_tag(name, tag="0.1.0")
    return str(HfApi().model_info(name, revision="0.1.0").sha)


def trained(directory: Path) -> list[object]:
    """The repository that a trainer has pushed to and tagged, its files, and its release's commit."""
    base = AutoModelForCausalLM.from_pretrained("acme/merged")
    example = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    arguments = TrainingArguments(
        str(directory / "trained"), hub_model_id="acme/Trained-By-Trainer", push_to_hub=True, max_steps=2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = Trainer(model, arguments, train_dataset=[example, example])
    with redirect_stdout(sys.stderr):
        trainer.train()
        trainer.push_to_hub()
    name = str(trainer.hub_model_id)
    HfApi().create_tag(name, tag="1.0.0", tag_message="Two steps")
    return [name, HfApi().list_repo_files(name), HfApi().model_info(name, revision="1.0.0").sha]


def main() -> None:
    base = Path(sys.argv[2])
    tokens = AutoTokenizer.from_pretrained("acme/merged")("a b c", return_tensors="pt").input_ids
    seen = {
        "base": logits(AutoModelForCausalLM.from_pretrained(base), tokens),
        "merged": logits(AutoModelForCausalLM.from_pretrained("acme/merged"), tokens),
        "prod": adapted("acme/sql", tokens, "prod"),
        "alias": adapted("acme/sql.prod", tokens),
        "main": adapted("acme/sql", tokens),
        "pushed": pushed("acme/trained-by-peft"),
        "trained": trained(Path(sys.argv[1])),
        "weights": hashlib.sha256(Path(hf_hub_download("acme/sql", WEIGHTS, revision="prod")).read_bytes()).hexdigest(),
    }
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main()
