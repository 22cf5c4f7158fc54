"""Loads a model and its adapter by their names in a hub, with PEFT and transformers: prints what they compute.

Run as a program, as hub_client.py, with the directory of the base that the model is a copy of.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

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
        "weights": hashlib.sha256(Path(hf_hub_download("acme/sql", WEIGHTS, revision="prod")).read_bytes()).hexdigest(),
    }
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main()
