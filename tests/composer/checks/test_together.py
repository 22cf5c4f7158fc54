"""Adapters that do not belong together: the same finding in every command, and an error with --strict."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer.checks.check import check
from composer.conflicts.report import conflicts
from composer.deltas.variants.load import load_deltas
from composer.errors import Mismatch
from composer.export.combine import combine
from composer.findings import Finding
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.policy import Policy
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from tests.composer.small_model import save_tokenizer
from tests.composer.tiny import MakeAdapter, MakeModel, tensors_in
from tests.device import DEVICE
from tests.scenarios.world import Cli


def with_base(adapter: Path, name: str) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    return adapter


def named(base: Path, name: str) -> Path:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": name}))
    return base


def opposite(adapter: Path, directory: Path) -> Path:
    """The adapter with the sign of its deltas reversed."""
    shutil.copytree(adapter, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    turned = {name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(turned, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def codes(findings: "tuple[Finding, ...] | list[Finding]") -> set[str]:
    return {finding.code for finding in findings}


@pytest.fixture
def base(make_model: MakeModel) -> Path:
    return make_model(dtype=torch.bfloat16, shard="1GB")


@pytest.fixture
def pair(base: Path, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    return make_adapter(base, "a", seed=1), make_adapter(base, "b", seed=2)


def other_bases(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return with_base(pair[0], "acme/one"), with_base(pair[1], "zeta/two")


def a_copy(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(pair[0], tmp_path / "copy")
    return pair[0], tmp_path / "copy"


def loose_rows(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    save_file({"embed": torch.ones(2, 16)}, pair[0] / "new_embeddings.safetensors")
    return pair


def reversed_too(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return pair[0], opposite(pair[0], tmp_path / "opposite")


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (other_bases, "contradicting_bases"),
        (a_copy, "same_adapter"),
        (loose_rows, "new_embeddings"),
        (reversed_too, "zero_result"),
    ],
)
def test_merge_combine_and_conflicts_find_the_same_and_refuse_it_when_strict(
    base: Path,
    pair: tuple[Path, Path],
    tmp_path: Path,
    made: Callable[[tuple[Path, Path], Path], tuple[Path, Path]],
    code: str,
) -> None:
    checkpoint = open_checkpoint(base)
    assert code not in codes(plan_merge(checkpoint, [(path, 1.0) for path in pair]).findings)
    given = [(path, 1.0) for path in made(pair, tmp_path)]
    assert code in codes(plan_merge(checkpoint, given).findings)
    assert code in codes(combine(given, tmp_path / "out", checkpoint.architecture).findings)
    loaded = [load_deltas(path, checkpoint.architecture) for path, _ in given]
    assert code in codes(conflicts(loaded, [1.0, 1.0], base=checkpoint).findings)
    assert conflicts(loaded, [1.0, 1.0], policy=Policy(strict=True)).verdict == "refuse"
    with pytest.raises(Mismatch) as refused:
        plan_merge(checkpoint, given, strict=True)
    assert refused.value.code == code
    assert refused.value.next_step
    with pytest.raises(Mismatch):
        combine(given, tmp_path / "strict", checkpoint.architecture, strict=True)
    assert not (tmp_path / "strict").exists()


def test_an_adapter_of_another_base_than_the_checkpoint_is_named(base: Path, pair: tuple[Path, Path]) -> None:
    adapter = with_base(pair[0], "acme/one")
    assert plan_merge(open_checkpoint(base), [(adapter, 1.0)]).findings[0].code == "no_tokenizer"
    (finding, _) = plan_merge(open_checkpoint(named(base, "zeta/two")), [(adapter, 1.0)]).findings
    assert finding.code == "contradicting_bases"
    assert "acme/one" in finding.message
    assert "zeta/two" in finding.message


def test_tokenizers_that_differ_are_an_error_of_a_conflict_report_too(
    base: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for adapter, token in zip(pair, ("<|one|>", "<|two|>"), strict=True):
        save_tokenizer(adapter)
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        tokenizer.add_tokens([token], special_tokens=True)
        tokenizer.save_pretrained(adapter)
    loaded = [load_deltas(path, open_checkpoint(base).architecture) for path in pair]
    assert codes(check(loaded)) == {"tokenizers_differ"}
    report = conflicts(loaded, [1.0, 1.0])
    assert report.verdict == "refuse"
    with pytest.raises(Mismatch) as refused:
        plan_merge(open_checkpoint(base), [(path, 1.0) for path in pair])
    assert refused.value.code == "tokenizers_differ"


@pytest.mark.parametrize(
    ("method", "settings", "weights"),
    [
        ("sce", {"density": 0.0001}, (1.0, 1.0)),
        ("ties", {}, (1.0, -1.0)),
        ("pico_ties", {}, (1.0, -1.0)),
    ],
)
def test_a_merge_that_changes_no_weight_of_the_base_says_so_and_is_not_written_when_strict(
    base: Path,
    pair: tuple[Path, Path],
    tmp_path: Path,
    method: str,
    settings: dict[str, object],
    weights: tuple[float, float],
) -> None:
    given = [(pair[0], weights[0]), (pair[1] if method == "sce" else pair[0], weights[1])]
    plan = plan_merge(open_checkpoint(base), given, method, settings)
    report = run_merge(plan, tmp_path / "out", device=DEVICE)
    assert "zero_result" in codes(report.findings)
    before, after = tensors_in(base), tensors_in(tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_strict_merge_leaves_nothing_behind_when_its_result_is_refused(
    base: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = plan_merge(open_checkpoint(base), [(path, 1.0) for path in pair], "sce", {"density": 0.0001}, strict=True)
    with pytest.raises(Mismatch) as refused:
        run_merge(plan, tmp_path / "out", device=DEVICE)
    assert refused.value.code == "zero_result"
    assert not list(tmp_path.glob("out*"))


def test_a_conflict_report_measures_that_a_method_adds_nothing(base: Path, pair: tuple[Path, Path]) -> None:
    loaded = [load_deltas(path, open_checkpoint(base).architecture) for path in pair]
    for density, nothing in ((0.0001, True), (0.5, False)):
        report = conflicts(loaded, [1.0, 1.0], parse_settings("sce", {"density": density}))
        assert ("zero_result" in codes(report.findings)) is nothing


def test_values_that_float16_makes_zero_are_counted_exactly(
    base: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    torch.manual_seed(1)
    for tensor in tensors.values():
        if tensor.dim() == 2:
            tensor[torch.rand(tensor.shape) < 0.1] = 1e-9
            tensor[0, 0] = 0.0
            tensor[0, 1] = 5e-8  # float16 has 5.96e-8, the nearest
    save_file(tensors, file, metadata={"format": "pt"})
    plan = plan_merge(open_checkpoint(base), [(pair[0], 1.0)], dtype="float16")
    report = run_merge(plan, tmp_path / "out", device=DEVICE)
    (finding,) = [finding for finding in report.findings if finding.code == "f16_flushed"]
    exact = run_merge(plan_merge(open_checkpoint(base), [(pair[0], 1.0)], dtype="float32"), tmp_path / "exact", "cpu")
    wide, narrow = tensors_in(tmp_path / "exact"), tensors_in(tmp_path / "out")
    flushed = {name: int(((wide[name] != 0) & (narrow[name] == 0)).sum()) for name in wide}
    assert finding.measure == sum(flushed.values()) > 700
    assert finding.subject == max(flushed, key=lambda name: flushed[name])
    assert not [finding for finding in exact.findings if finding.code == "f16_flushed"]


def test_an_adapter_in_the_directory_of_the_base_is_not_copied_and_the_merged_model_loads(
    base: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    save_tokenizer(base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(pair[1] / name, base)
    for name in ("trainer_state.json", "events.out.tfevents.1", "all_results.json", "README.md", "modeling_own.py"):
        (base / name).write_text("{}")
    run_merge(plan_merge(open_checkpoint(base), [(pair[0], 1.0)]), tmp_path / "out", device=DEVICE)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {
        "adaptory.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "README.md", "modeling_own.py",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    merged = tensors_in(tmp_path / "out")
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
    assert not [name for name in model.state_dict() if "lora" in name]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_the_commands_print_the_fix_and_strict_ends_each_with_the_code(
    base: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home")})
    one, other = with_base(pair[0], "acme/one"), with_base(pair[1], "zeta/two")
    both = ("--adapter", one, "--adapter", other)
    merged = cli.ok("merge", "--base", base, *both, "-o", tmp_path / "merged")
    assert "a was trained on acme/one, b was trained on zeta/two" in " ".join(merged.err.split())
    assert "Use the base that each was trained on." in " ".join(merged.err.split())
    named(base, "zeta/two")
    for command in (
        ("merge", "--base", base, *both, "-o", tmp_path / "x"),
        ("combine", "--base", base, *both, "-o", tmp_path / "x"),
        ("inspect", one, "--base", base),
        ("conflicts", one, other, "--base", base),
    ):
        assert cli(*command, "--strict").code != 0, command
    assert not (tmp_path / "x").exists()
