"""Tasks of lm-evaluation-harness as YAML files, with their data beside them."""

import json
from pathlib import Path
from typing import Any

import yaml

MEAN = {"aggregation": "mean", "higher_is_better": True}
CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} ",
    "doc_to_choice": ["red", "green", "blue"],
    "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}
WORDS: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "filter_list": [{"name": "strict", "filter": [{"function": "take_first"}]}],
    "metric_list": [MEAN | {"metric": "exact_match"}],
}
LOSS: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


def write_task(directory: Path, name: str, fields: dict[str, Any], answers: list[Any], version: object = 1.0) -> None:
    directory.mkdir(exist_ok=True)
    rows = [{"question": f"say {number}", "answer": answer} for number, answer in enumerate(answers)]
    data = directory / f"{name}.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    located = {"data_files": {"test": str(data)}, "cache_dir": str(directory.parent / "cache")}
    document = {"task": name, "dataset_path": "json", "dataset_kwargs": located, "test_split": "test"}
    document |= fields | {"metadata": {"version": version}}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(document))
