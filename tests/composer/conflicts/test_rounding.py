"""The loss from rounding a combination to a base's dtype, on real PEFT adapters of a tiny model."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from composer.conflicts.report import conflicts
from composer.deltas.variants.load import LoadedAdapter
from composer.findings import Severity
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.small_model import save_llama, scaled


def test_what_rounding_will_lose_is_reported_before_the_merge(tmp_path: Path, red: LoadedAdapter) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "full"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    report = conflicts([scaled(red, 1e-4, "faint")], [1.0], base=open_checkpoint(tmp_path / "half"))
    assert {finding.code: finding.severity for finding in report.findings}["bf16_swallow"] is Severity.WARNING
    assert report.together.lost_share is not None
    assert report.together.lost_share > 0.9


def test_without_a_base_the_lost_share_is_unknown(red: LoadedAdapter) -> None:
    assert conflicts([red], [1.0]).together.lost_share is None
