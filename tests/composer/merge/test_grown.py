"""Vocabularies that an adapter has grown: merged with rows, config and tokenizer, as PEFT merges it."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from composer.errors import Mismatch
from composer.findings import Severity
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.rebuild import rebuild
from composer.merge.run import run_merge
from tests.composer.adapted import assert_all_close, change_tensors, logits
from tests.composer.tiny import MakeModel, load_model
from tests.device import DEVICE

GROWN = 70


def save_grown(base: Path, directory: Path, **settings: object) -> Path:
    """A base with six new tokens, and an adapter trained on it."""
    torch.manual_seed(3)
    model = load_model(base)
    model.resize_token_embeddings(GROWN)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **settings})  # pyright: ignore[reportArgumentType]
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(str(directory))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text('{"of": "the adapter"}')
    return directory


def peft_grown(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = load_model(base)
    model.resize_token_embeddings(GROWN)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {}),
        (True, {}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (True, {"trainable_token_indices": [3, *range(64, GROWN)]}),
        (False, {"trainable_token_indices": [3, *range(64, GROWN)]}),
    ],
    ids=["resized", "resized and tied", "saved whole", "trained tokens, tied", "trained tokens"],
)
def test_a_grown_vocabulary_is_merged_with_its_rows_config_and_tokenizer(
    tied: bool, settings: dict[str, object], tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model(tied=tied)
    (base / "tokenizer.json").write_text('{"of": "the base"}')
    (base / "vocab.json").write_text('{"of": "the base"}')
    adapter = save_grown(base, tmp_path / "adapter", **settings)
    expected = peft_grown(base, adapter)
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    run_merge(plan, tmp_path / "merged", device=DEVICE)
    assert rebuild(plan, tmp_path / "merged").different == ()
    merged = load_model(tmp_path / "merged")
    assert_all_close(merged.state_dict(), expected, 1e-6)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == GROWN
    assert logits(tmp_path / "merged").shape[-1] == GROWN
    assert "the adapter" in (tmp_path / "merged" / "tokenizer.json").read_text()
    assert not (tmp_path / "merged" / "vocab.json").exists()
    assert [finding.code for finding in plan.findings if "vocabulary" in finding.message] == ["grown_vocabulary"]


def test_trained_rows_are_rounded_once_to_the_outputs_dtype(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(tied=True, dtype=torch.bfloat16)
    adapter = save_grown(base, tmp_path / "adapter", trainable_token_indices=[*range(64, GROWN)])
    run_merge(plan_merge(open_checkpoint(base), [(adapter, 1.0)], dtype="float32"), tmp_path / "merged", device=DEVICE)
    assert_all_close(load_model(tmp_path / "merged").state_dict(), peft_grown(base, adapter), 1e-6)


def test_what_lacks_rows_is_refused(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_grown(base, tmp_path / "adapter")
    change_tensors(adapter, lambda all_: {key: one for key, one in all_.items() if "lm_head" not in key})
    with pytest.raises(Mismatch) as caught:
        plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    assert caught.value.code == "shape_mismatch"


def test_tokens_with_a_gap_before_them_lack_rows(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(tied=True)
    adapter = save_grown(base, tmp_path / "adapter", trainable_token_indices=[66, 67])
    with pytest.raises(Mismatch) as caught:
        plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    assert caught.value.code == "shape_mismatch"


def test_new_rows_that_do_not_take_part_are_refused(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    grown = save_grown(base, tmp_path / "grown")
    with pytest.raises(Mismatch, match="does not get all of them") as caught:
        plan_merge(open_checkpoint(base), [(grown, 0.5)], settings={"replacements": "delta"})
    assert caught.value.code == "vocabulary_mismatch"


def test_an_adapter_without_a_tokenizer_is_a_warning(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_grown(base, tmp_path / "adapter")
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    assert [finding.severity for finding in plan.findings if finding.code == "no_tokenizer"] == [Severity.WARNING]
