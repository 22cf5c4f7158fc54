"""Extracts a LoRA from a fine-tuned checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from composer.deltas.variants.load import load_deltas
from composer.errors import InvalidFile, Mismatch, NotSupported, RefusedOutput
from composer.export.extract import extract
from composer.findings import Severity
from composer.formats.adapters.inspection import inspect
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from tests.composer.adapted import relative
from tests.composer.deltas.test_variants_experts import mixtral, save_base
from tests.composer.tiny import MakeAdapter, MakeModel, load_model, tensors_in


def _finetuned(base: Path, out: Path, changes: dict[str, torch.Tensor]) -> Path:
    """The base with `changes` added to parameters."""
    model = load_model(base)
    with torch.no_grad():
        for name, change in changes.items():
            model.get_parameter(name).add_(change)
    model.save_pretrained(out)
    return out


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_an_adapter_added_is_extracted_again(
    kind: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(kind)
    targets = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn", "c_fc"]
    adapter = make_adapter(base, r=3, lora_alpha=6, target_modules=targets)
    merged = tmp_path / "merged"
    run_merge(plan_merge(open_checkpoint(base), [(adapter, 1.0)]), merged)
    report = extract(open_checkpoint(base), open_checkpoint(merged), tmp_path / "out", rank=3)
    assert (report.modules, report.ranks, report.saved) == (6 if kind == "llama" else 4, {3: report.modules}, ())
    assert report.lost < 1e-5
    loaded = PeftModel.from_pretrained(load_model(base), tmp_path / "out").eval()
    assert relative(_logits(loaded), _logits(load_model(merged))) <= 1e-5


def _as_on_the_hub(checkpoint: Path, out: Path, masks: tuple[str, ...] = ("bias",)) -> Path:
    """GPT-2 as its authors published it: names without `transformer.`, and the attention's masks."""
    shutil.copytree(checkpoint, out)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_in(checkpoint).items()}
    tensors |= {f"h.{layer}.attn.{mask}": torch.ones(1, 1, 32, 32).tril() for layer in (0, 1) for mask in masks}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("names", ["of the base", "of the fine-tuned one", "of both"])
def test_gpt2_is_extracted_and_merged_under_the_names_of_the_hub(
    names: str, tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model("gpt2", tied=True)
    torch.manual_seed(4)
    changes = {
        f"transformer.h.1.{name}.weight": torch.randn(rows, 2) @ torch.randn(2, columns) * 0.1
        for name, rows, columns in (("attn.c_attn", 16, 48), ("mlp.c_fc", 16, 64), ("mlp.c_proj", 64, 16))
    } | {"transformer.ln_f.weight": torch.randn(16) * 0.1, "transformer.wte.weight": torch.randn(64, 1) * 0.1}
    finetuned = _finetuned(base, tmp_path / "finetuned", changes)
    expected = _logits(load_model(finetuned))
    if names != "of the fine-tuned one":
        base = _as_on_the_hub(base, tmp_path / "hub-base")
    if names != "of the base":
        finetuned = _as_on_the_hub(finetuned, tmp_path / "hub-finetuned", ("bias", "masked_bias"))
    report = extract(open_checkpoint(base), open_checkpoint(finetuned), tmp_path / "out", rank=2)
    assert report.lost < 1e-5
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    loaded = PeftModel.from_pretrained(load_model(base), tmp_path / "out").eval()
    assert relative(_logits(loaded), expected) <= 1e-5
    assert not any(finding.severity is Severity.ERROR for finding in inspect(tmp_path / "out", open_checkpoint(base)
                   .architecture).findings)  # fmt: skip
    run_merge(plan_merge(open_checkpoint(base), [(tmp_path / "out", 1.0)]), tmp_path / "merged")
    assert relative(_logits(load_model(tmp_path / "merged")), expected) <= 1e-5


def test_the_error_is_that_of_the_best_matrix_of_the_rank(tmp_path: Path, make_model: MakeModel) -> None:
    base, name = make_model(), "model.layers.1.self_attn.o_proj.weight"
    change = torch.randn(16, 16, generator=torch.Generator().manual_seed(3)) * 0.1
    finetuned = _finetuned(base, tmp_path / "finetuned", {name: change})
    sigma = torch.linalg.svdvals(change.double())
    for rank in (1, 5, 16):
        report = extract(open_checkpoint(base), open_checkpoint(finetuned), tmp_path / f"r{rank}", rank=rank)
        best = float(sigma[rank:].norm() / sigma.norm())
        assert [compression.module for compression in report.compressions] == [name.removesuffix(".weight")]
        assert report.lost == pytest.approx(best, abs=1e-5)
    report = extract(open_checkpoint(base), open_checkpoint(finetuned), tmp_path / "energy", energy=0.9)
    assert report.lost**2 <= 0.1 + 1e-6
    (rank,) = report.ranks
    assert float(sigma[rank - 1 :].square().sum() / sigma.square().sum()) > 0.1, "a lower rank would hold it too"


def test_norms_are_saved_in_full_and_an_embedding_gets_a_pair(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    torch.manual_seed(5)
    changes = {
        "model.layers.0.input_layernorm.weight": torch.randn(16) * 0.3,
        "model.embed_tokens.weight": torch.randn(64, 1) @ torch.randn(1, 16) * 0.1,
    }
    finetuned = _finetuned(base, tmp_path / "finetuned", changes)
    report = extract(open_checkpoint(base), open_checkpoint(finetuned), tmp_path / "out", rank=2)
    assert report.saved == ("model.layers.0.input_layernorm.weight",)
    loaded = PeftModel.from_pretrained(load_model(base), tmp_path / "out").eval()
    assert relative(_logits(loaded), _logits(load_model(finetuned))) <= 1e-5


def test_a_tied_embedding_acts_on_both_sides(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(tied=True)
    torch.manual_seed(6)
    change = torch.randn(64, 2) @ torch.randn(2, 16) * 0.1
    finetuned = _finetuned(base, tmp_path / "finetuned", {"model.embed_tokens.weight": change})
    extract(open_checkpoint(base), open_checkpoint(finetuned), tmp_path / "out", rank=2)
    merged = tmp_path / "merged"
    run_merge(plan_merge(open_checkpoint(base), [(tmp_path / "out", 1.0)]), merged)
    theirs, ours = tensors_in(finetuned), tensors_in(merged)
    assert relative(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"]) <= 1e-5
    loaded = PeftModel.from_pretrained(load_model(base), tmp_path / "out").eval()
    assert relative(_logits(loaded), _logits(load_model(finetuned))) <= 1e-5


def test_what_is_extracted_fits_its_base(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(dtype=torch.bfloat16)
    finetuned = _finetuned(base, tmp_path / "finetuned", {"lm_head.weight": torch.full((64, 16), 0.01)})
    extract(open_checkpoint(base), open_checkpoint(finetuned), tmp_path / "out")
    loaded = load_deltas(tmp_path / "out", open_checkpoint(base).architecture)
    assert [delta.module for delta in loaded.deltas] == ["lm_head"]


def test_equal_and_unlike_checkpoints_are_refused_and_leave_nothing(tmp_path: Path, make_model: MakeModel) -> None:
    base, wider = make_model(), make_model(name="wider", vocabulary=80)
    copy = shutil.copytree(base, tmp_path / "copy")
    with pytest.raises(Mismatch, match="the same weights") as same:
        extract(open_checkpoint(base), open_checkpoint(copy), tmp_path / "out")
    assert same.value.code == "nothing_to_extract"
    with pytest.raises(Mismatch, match=r"64 x 16 in base and 80 x 16 in wider") as unlike:
        extract(open_checkpoint(base), open_checkpoint(wider), tmp_path / "out")
    assert unlike.value.code == "architecture_differs"
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_not_finite_is_refused_by_its_tensor(tmp_path: Path, make_model: MakeModel) -> None:
    base, name = make_model(), "model.layers.1.self_attn.o_proj.weight"
    finetuned = _finetuned(base, tmp_path / "finetuned", {name: torch.full((16, 16), float("nan"))})
    for first, second, owner in ((base, finetuned, "the fine-tuned checkpoint"), (finetuned, base, "the base")):
        with pytest.raises(InvalidFile, match=f"{name} of {owner} has a NaN") as refused:
            extract(open_checkpoint(first), open_checkpoint(second), tmp_path / "out")
        assert (refused.value.code, refused.value.subject) == ("not_finite", name)
        assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_before_anything_is_read(tmp_path: Path, make_model: MakeModel) -> None:
    base, out = open_checkpoint(make_model()), tmp_path / "out"
    out.mkdir()
    read: list[int] = []
    with pytest.raises(RefusedOutput, match="exists"):
        extract(base, base, out, progress=read.append)
    assert not read


def test_a_cut_that_misses_much_of_the_change_is_a_warning(tmp_path: Path, make_model: MakeModel) -> None:
    base, name = make_model(), "model.layers.1.self_attn.o_proj.weight"
    change = torch.randn(16, 16, generator=torch.Generator().manual_seed(3)) * 0.1
    finetuned = _finetuned(base, tmp_path / "finetuned", {name: change})
    few = extract(open_checkpoint(base), open_checkpoint(finetuned), tmp_path / "few", rank=1)
    assert [(finding.code, finding.severity) for finding in few.findings] == [("much_lost", Severity.WARNING)]
    assert extract(open_checkpoint(base), open_checkpoint(finetuned), tmp_path / "all", rank=16).findings == ()


def test_norms_alone_are_no_adapter(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    finetuned = _finetuned(base, tmp_path / "finetuned", {"model.norm.weight": torch.full((16,), 0.5)})
    with pytest.raises(Mismatch, match="only in norms and biases"):
        extract(open_checkpoint(base), open_checkpoint(finetuned), tmp_path / "out")


def test_a_changed_expert_of_a_stack_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(mixtral(), tmp_path / "base")
    model = load_model(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "finetuned")
    with pytest.raises(NotSupported, match="experts"):
        extract(open_checkpoint(base), open_checkpoint(tmp_path / "finetuned"), tmp_path / "out")
