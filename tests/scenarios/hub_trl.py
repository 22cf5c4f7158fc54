"""Trains an adapter with TRL for two steps and pushes it: prints the repository, its files, and its release's commit.

Run as hub_client.py.
"""

import json
import sys
from contextlib import redirect_stdout

from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    arguments = SFTConfig(
        f"{sys.argv[1]}/trained", hub_model_id="acme/Trained-By-TRL", push_to_hub=True, max_steps=2, max_length=16,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with redirect_stdout(sys.stderr):
        examples = Dataset.from_list([{"text": "a b c"}] * 4)
        trainer = SFTTrainer("acme/merged", arguments, train_dataset=examples, peft_config=adapter)
        trainer.train()
        trainer.push_to_hub()
    name = str(trainer.hub_model_id)
    HfApi().create_tag(name, tag="1.0.0", tag_message="Two steps")
    seen = [name, HfApi().list_repo_files(name), HfApi().model_info(name, revision="1.0.0").sha]
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main()
