"""How large deltas are beside a base's weights, on real PEFT adapters of a tiny model."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from composer.conflicts import amplification
from composer.conflicts.render.text import tables
from composer.conflicts.report import ConflictReport, conflicts
from composer.deltas.delta import Layout, LowRank
from composer.deltas.variants.load import LoadedAdapter
from composer.findings import Severity
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.files import LocalFile
from composer.formats.checkpoints.header import read_header
from composer.merge.io.source import Source
from tests.composer.small_model import dense, save_llama, scaled


def low_rank(adapter: LoadedAdapter) -> list[LowRank]:
    return [delta for delta in adapter.deltas if isinstance(delta, LowRank)]


def weights_of(base: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}


def codes(report: ConflictReport) -> dict[str, Severity]:
    return {finding.code: finding.severity for finding in report.findings}


def test_with_a_base_at_hand_sizes_are_compared_with_its_weights(
    base: Path, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    red, green = scaled(red, 0.3, "red"), scaled(green, 0.3, "green")
    report = conflicts([red, green], [1.0, 0.5], base=open_checkpoint(base))
    weights = weights_of(base)
    norms = sum(weights[delta.weight].double().square().sum().item() for delta in low_rank(green))
    expected = 0.5 * (sum(dense(delta).square().sum().item() for delta in low_rank(green)) / norms) ** 0.5
    assert report.members[1].size.amplification == pytest.approx(expected, rel=0.2), "a sample of rows stands for all"
    assert conflicts([red, green], [1.0, 1.0]).members[1].size.amplification is None
    assert "amplified" not in codes(report)
    member = report.members[1]
    ratios = {
        delta.module: 0.5 * float(np.linalg.norm(dense(delta), 2) / np.linalg.norm(weights[delta.weight], 2))
        for delta in low_rank(green)
    }
    assert {module: size.spectral_amplification for module, size in member.modules.items()} == pytest.approx(
        ratios, rel=0.02
    )
    assert member.size.spectral_amplification == pytest.approx(max(ratios.values()), rel=0.02)
    assert codes(conflicts([red, scaled(green, 50.0, "loud")], [1.0, 1.0], base=open_checkpoint(base)))["amplified"]


def test_a_direction_stronger_than_any_of_the_base_is_named(
    base: Path, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    weights = weights_of(base)
    delta, *others = low_rank(red)
    loud = 3 * np.linalg.norm(weights[delta.weight], 2) / np.linalg.norm(dense(delta), 2)
    deltas = (replace(delta, scale=delta.scale * float(loud)), *others)
    report = conflicts([replace(red, deltas=deltas), green], [1.0, 1.0], base=open_checkpoint(base))
    (finding,) = [one for one in report.findings if one.code == "amplified" and delta.module in one.subject]
    assert finding.measure == pytest.approx(3, rel=0.02)
    assert f"{delta.module} is 3 times as strong" in finding.message
    assert "spectral norm" in str(tables(report))


def test_only_as_many_weights_are_looked_at_as_there_is_time_for(
    base: Path, red: LoadedAdapter, green: LoadedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those first where a delta may be largest beside the weight, so that the worst one is found all the same."""
    checkpoint, (first, second, third, *others) = open_checkpoint(base), low_rank(red)
    red = replace(red, deltas=(first, second, replace(third, scale=third.scale * 5), *others))
    everything = conflicts([red, green], [1.0, 1.0], base=checkpoint).members[0]
    monkeypatch.setattr(amplification, "SPECTRAL_BYTES", 4 * 32 * 32 * 2)
    some = conflicts([red, green], [1.0, 1.0], base=checkpoint).members[0]
    looked_at = [one for one in some.modules.values() if one.spectral_amplification is not None]
    assert 0 < len(looked_at) <= 2 < len(everything.modules)
    assert all(one.amplification is not None for one in some.modules.values())
    worst = max(everything.modules, key=lambda module: everything.modules[module].spectral_amplification or 0.0)
    assert worst == third.module
    assert some.modules[worst].spectral_amplification == some.size.spectral_amplification
    assert some.size.spectral_amplification == pytest.approx(everything.size.spectral_amplification, rel=1e-6)


def test_what_rounding_will_lose_is_reported_before_the_merge(tmp_path: Path, red: LoadedAdapter) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "full"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    report = conflicts([scaled(red, 1e-4, "faint")], [1.0], base=open_checkpoint(tmp_path / "half"))
    assert codes(report)["bf16_swallow"] is Severity.WARNING
    assert report.together.lost_share is not None
    assert report.together.lost_share > 0.9


SHAPES = ((1, 5), (40, 7), (300, 900), (256, 256))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LARGEST = [
    pytest.param((1024, 1024), one, marks=[pytest.mark.long] if number else []) for number, one in enumerate(DTYPES)
]


@pytest.mark.parametrize(("shape", "dtype"), [*product(SHAPES, DTYPES), *LARGEST])
def test_the_largest_singular_value_is_numpys(
    shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights with no direction that stands out, which is the hardest case, cut into uneven blocks of rows."""
    monkeypatch.setattr(amplification, "_BLOCK_ELEMENTS", 17 * shape[1])
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    path = tmp_path / "model.safetensors"
    save_file({"weight": W}, path)
    delta = LowRank(
        module="m",
        weight="weight",
        layout=Layout.LINEAR,
        A=torch.zeros(1, shape[1]),
        B=torch.zeros(shape[0], 1),
        scale=1.0,
    )
    source = Source(LocalFile(path), read_header(path).tensors["weight"], shape[1])
    largest = amplification.largest_singular_value(amplification.BaseWeight("m", source, [(delta, 1.0)]))
    exact = np.linalg.svd(W.double().numpy(), compute_uv=False)[0]
    assert exact * 0.99 <= largest <= exact * (1 + 1e-5)


def test_a_weight_of_zeros_has_no_largest_direction(base: Path, red: LoadedAdapter, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    model.save_pretrained(tmp_path / "zeros")
    member = conflicts([red], [1.0], base=open_checkpoint(tmp_path / "zeros")).members[0]
    assert member.modules["model.layers.0.self_attn.q_proj"].spectral_amplification is None
    assert member.size.spectral_amplification is not None
