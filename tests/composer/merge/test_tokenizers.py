"""A merged model has the tokenizer and chat template that its adapters were trained with, or the merge is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from composer.errors import Mismatch
from composer.export.combine import combine
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.rebuild import plan_rebuild, rebuild
from composer.merge.run import run_merge
from tests.composer.small_model import SIZES, TEMPLATE, WIDTHS, save_tokenizer
from tests.device import DEVICE

PADDED = SIZES["vocab_size"] + 16
NEW = ("<|think|>", "<|answer|>")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with more rows than its tokenizer has tokens."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, **WIDTHS, "vocab_size": PADDED})).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def trained(base: Path, directory: Path, tokens: tuple[str, ...] = NEW, seed: int = 1) -> Path:
    """An adapter that trains these tokens, in rows that the base pads, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([*tokens], special_tokens=True)
    torch.manual_seed(seed)
    rows = tokenizer.convert_tokens_to_ids([*tokens])
    settings = {"trainable_token_indices": {"embed_tokens": rows}} if rows else {}
    config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(directory)
    return directory


def templated(directory: Path, template: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


def merged_tokenizer(base: Path, out: Path, *adapters: Path) -> PreTrainedTokenizerBase:
    run_merge(plan_merge(open_checkpoint(base), [(adapter, 1.0) for adapter in adapters]), out, device=DEVICE)
    return AutoTokenizer.from_pretrained(out)


def test_tokens_trained_in_padded_rows_can_be_read_and_written_after_the_merge(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter")
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    assert [finding.code for finding in plan.findings] == ["adapter_tokenizer"]
    tokenizer = merged_tokenizer(base, tmp_path / "out", adapter)
    rows = tokenizer.convert_tokens_to_ids([*NEW])
    assert rows == [SIZES["vocab_size"], SIZES["vocab_size"] + 1]
    assert tokenizer.chat_template == TEMPLATE
    before, after = (
        LlamaForCausalLM.from_pretrained(directory).get_input_embeddings().weight
        for directory in (base, tmp_path / "out")
    )
    assert not torch.equal(before[rows], after[rows])
    note = json.loads((tmp_path / "out" / "adaptory.json").read_text())
    assert note["tokenizer"] == {"vocabulary": "adapter", "template": None}


def test_trained_tokens_without_a_tokenizer_are_refused_by_number(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink(missing_ok=True)
    with pytest.raises(Mismatch, match=rf"trains the tokens {SIZES['vocab_size']}, ") as caught:
        plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    assert (caught.value.code, caught.value.subject) == ("tokens_without_tokenizer", "adapter")


def test_two_adapters_with_other_tokens_are_refused_and_both_named(base: Path, tmp_path: Path) -> None:
    one, other = trained(base, tmp_path / "one"), trained(base, tmp_path / "other", ("<|sql|>",), seed=2)
    with pytest.raises(Mismatch, match="one and other were trained with different tokenizers") as caught:
        plan_merge(open_checkpoint(base), [(one, 1.0), (other, 1.0)])
    assert caught.value.code == "tokenizers_differ"
    with pytest.raises(Mismatch, match="one and other were trained with different tokenizers"):
        combine([(one, 1.0), (other, 1.0)], tmp_path / "both", open_checkpoint(base).architecture)


def test_an_adapter_with_the_bases_tokens_goes_with_one_that_has_more(base: Path, tmp_path: Path) -> None:
    plain, more = trained(base, tmp_path / "plain", ()), trained(base, tmp_path / "more", seed=2)
    for order in ((plain, more), (more, plain)):
        out = tmp_path / f"out-{order[0].name}"
        assert merged_tokenizer(base, out, *order).convert_tokens_to_ids(NEW[0]) == SIZES["vocab_size"]
    other = trained(base, tmp_path / "other", (), seed=3)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).write_bytes((more / file).read_bytes())
    combine([(plain, 0.5), (other, 0.5)], tmp_path / "both", open_checkpoint(base).architecture)
    assert AutoTokenizer.from_pretrained(tmp_path / "both").convert_tokens_to_ids(NEW[1]) == SIZES["vocab_size"] + 1


def test_a_chat_template_of_its_own_goes_into_the_merged_model(base: Path, tmp_path: Path) -> None:
    adapter = templated(trained(base, tmp_path / "adapter", ()), "{{ messages[0]['content'] }}")
    assert merged_tokenizer(base, tmp_path / "out", adapter).chat_template == "{{ messages[0]['content'] }}"
    other = templated(trained(base, tmp_path / "other", (), seed=2), "another {{ messages[0]['content'] }}")
    with pytest.raises(Mismatch, match="adapter and other were trained with different chat templates") as caught:
        plan_merge(open_checkpoint(base), [(adapter, 1.0), (other, 1.0)])
    assert caught.value.code == "tokenizers_differ"


def test_a_merge_of_before_is_rebuilt_with_the_tokenizer_that_it_had(base: Path, tmp_path: Path) -> None:
    adapter = templated(trained(base, tmp_path / "adapter", ()), "another template")
    out = tmp_path / "out"
    run_merge(plan_merge(open_checkpoint(base), [(adapter, 1.0)]), out, device=DEVICE)
    assert rebuild(plan_rebuild(out, open_checkpoint(base), [adapter]), out, device=DEVICE).verdict == "same"
    note = json.loads((out / "adaptory.json").read_text())
    del note["tokenizer"]
    (out / "adaptory.json").write_text(json.dumps(note))
    for name in ("tokenizer_config.json", "chat_template.jinja"):  # copied by an earlier merge
        (out / name).unlink(missing_ok=True)
        if (base / name).is_file():
            (out / name).write_bytes((base / name).read_bytes())
    assert rebuild(plan_rebuild(out, open_checkpoint(base), [adapter]), out, device=DEVICE).verdict == "same"


def test_a_tokenizer_that_was_only_saved_again_is_the_bases(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", ())
    content = json.loads((adapter / "tokenizer.json").read_text())
    (adapter / "tokenizer.json").write_text(json.dumps({**content, "truncation": {"max_length": 9}}, indent=1))
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    assert plan.findings == ()
    assert plan.side_files.files["tokenizer.json"] == base / "tokenizer.json"
