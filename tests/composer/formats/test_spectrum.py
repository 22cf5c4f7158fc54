"""The use of ranks, against dense float64 matrices and against singular values chosen by the test."""

import json
import subprocess
import sys
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch

from composer.findings import Severity
from composer.formats.adapters.inspection import Inspection, inspect
from composer.formats.adapters.spectrum import MAX_RANK, Spectrum, spectrum
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.handmade import dense, factors_of, random_factors, write_adapter
from tests.composer.tiny import MakeAdapter, MakeModel

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def spectrum_of(seen: Inspection) -> Spectrum:
    ranks = spectrum(seen.adapter, seen.placed)
    assert ranks is not None
    return ranks


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)],
)
def test_norms_and_ranks_are_those_of_the_dense_delta(tmp_path: Path, dtype: torch.dtype, precision: float) -> None:
    factors = random_factors(1, rank=5)
    seen = write_adapter(tmp_path / "a", {Q0: factors}, dtype=dtype)
    sigma = np.linalg.svd(dense(seen, Q0, factors), compute_uv=False)[:5]
    p = sigma / sigma.sum()
    (ranks,) = spectrum_of(seen).modules
    assert (ranks.module, ranks.rank, ranks.entries) == (Q0, 5, 24 * 17)
    assert ranks.norm == pytest.approx(np.sqrt((sigma**2).sum()), rel=precision)
    assert ranks.effective_rank == pytest.approx(exp(-(p * np.log(p)).sum()), rel=precision)
    assert ranks.rank_95 == int(np.searchsorted(np.cumsum(sigma**2) / (sigma**2).sum(), 0.95) + 1)


def test_the_ranks_that_hold_the_energy_are_counted_in_directions(tmp_path: Path) -> None:
    ranks = spectrum_of(write_adapter(tmp_path / "a", {Q0: factors_of([4.0, 1.5, 0.5, 0.1, 0.01])}, lora_alpha=5))
    (module,) = ranks.modules
    energy = [16.0, 2.25, 0.25, 0.01, 0.0001]
    assert (sum(energy[:1]) < 0.95 * sum(energy) < sum(energy[:2]), module.rank_95) == (True, 2)
    assert (sum(energy[:2]) < 0.99 * sum(energy) < sum(energy[:3]), module.rank_99) == (True, 3)
    assert module.energy == {rank: pytest.approx(sum(energy[:rank]) / sum(energy)) for rank in (1, 2, 4)}
    assert ranks.energy == module.energy
    p = [part / 6.11 for part in (4.0, 1.5, 0.5, 0.1, 0.01)]
    assert module.effective_rank == pytest.approx(exp(-sum(part * log(part) for part in p)), rel=1e-6)


def test_equal_directions_are_all_used_and_one_direction_is_one(tmp_path: Path) -> None:
    seen = write_adapter(tmp_path / "a", {Q0: factors_of([2.0] * 6), Q1: factors_of([7.0])})
    equal, single = spectrum_of(seen).modules
    assert (equal.rank_95, equal.rank_99) == (6, 6)
    assert equal.effective_rank == pytest.approx(6.0)
    assert (single.rank_95, single.effective_rank, single.energy) == (1, pytest.approx(1.0), {})


def test_a_rank_that_is_not_used_is_a_hint_with_its_number(tmp_path: Path) -> None:
    sigma = [5.0, 4.0, 3.0, 2.0, 1.5, 1.2, 1.0] + [0.01] * 57
    seen = write_adapter(tmp_path / "a", {Q0: factors_of(sigma, 80, 70), Q1: factors_of(sigma, 80, 70)})
    ranks = spectrum_of(seen)
    (hint,) = ranks.hints()
    assert (hint.code, hint.severity, hint.measure) == ("rank_unused", "notice", ranks.rank_95)
    assert f"Rank 64, but 95 % of the energy is in {ranks.rank_95}" in hint.message
    assert ranks.rank_95 <= 7
    assert spectrum_of(write_adapter(tmp_path / "b", {Q0: factors_of([1.0, 0.9, 0.8])})).hints() == []


def test_one_rank_for_all_modules_is_counted_over_their_energy_together(tmp_path: Path) -> None:
    """A weak module with a flat spectrum does not require more rank than a strong one with a single direction."""
    seen = write_adapter(tmp_path / "a", {Q0: factors_of([100.0, 0.1, 0.1]), Q1: factors_of([1.0, 1.0, 1.0])})
    assert (spectrum_of(seen).rank_95, max(module.rank_95 for module in spectrum_of(seen).modules)) == (1, 3)


def test_near_zero_modules_are_a_hint_that_names_them(tmp_path: Path) -> None:
    seen = write_adapter(tmp_path / "a", {Q0: factors_of([1.0, 1.0]), Q1: factors_of([1e-3, 1e-3])})
    ranks = spectrum_of(seen)
    (hint,) = ranks.hints()
    assert (hint.code, hint.subject, hint.measure, ranks.near_zero) == ("near_zero_modules", Q1, 1, [Q1])
    rows = {row["module"]: row["near_zero"] for row in ranks.to_json()["modules"]}
    assert rows == {Q0: False, Q1: True}


def test_an_untrained_adapter_has_a_spectrum_of_zeros_and_is_said_to_add_nothing(tmp_path: Path) -> None:
    A, B = random_factors(1)
    ranks = spectrum_of(write_adapter(tmp_path / "a", {Q0: (A, 0 * B)}))
    assert (ranks.norm, ranks.rank_95, ranks.effective_rank, ranks.near_zero) == (0, 0, 0, [])
    assert [(hint.code, hint.severity) for hint in ranks.hints()] == [("zero_delta", Severity.WARNING)]
    json.loads(json.dumps(ranks.to_json(), allow_nan=False))


def test_a_rank_above_the_outputs_counts_what_the_delta_can_have(tmp_path: Path) -> None:
    factors = random_factors(1, outputs=3, rank=9)
    seen = write_adapter(tmp_path / "a", {Q0: factors})
    (ranks,) = spectrum_of(seen).modules
    assert ranks.norm == pytest.approx(np.linalg.norm(dense(seen, Q0, factors)))
    assert ranks.rank_99 <= 3


def test_every_layout_of_peft_has_the_norm_of_its_own_delta(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    for kind, targets in (("llama", ["q_proj", "embed_tokens"]), ("gpt2", ["c_attn"])):
        base = make_model(kind, name=f"{kind}-base")
        adapter = make_adapter(base, name=f"{kind}-adapter", target_modules=targets)
        seen = inspect(adapter, open_checkpoint(base).architecture)
        assert {row.module for row in spectrum_of(seen).modules} == {placed.module for placed in seen.placed.low_rank}
        assert all(row.norm > 0 for row in spectrum_of(seen).modules)


def test_modules_without_a_spectrum_are_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    wide = random_factors(1, outputs=4, inputs=4, rank=MAX_RANK + 1)
    huge = random_factors(2)
    seen = write_adapter(
        tmp_path / "a", {Q0: wide, Q1: (huge[0] * 1e300, huge[1] * 1e300), "lm_head": random_factors(3)}
    )
    ranks = spectrum_of(seen)
    assert [row.module for row in ranks.modules] == ["lm_head"]
    assert sorted(ranks.left_out) == [Q0, Q1]
    json.loads(json.dumps(ranks.to_json(), allow_nan=False))


def test_modules_whose_energies_have_no_finite_sum_are_left_out(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)]
    modules = {name: (np.full((2, 4), 2.8e76), np.full((4, 2), 2.8e76)) for name in names}
    ranks = spectrum_of(write_adapter(tmp_path / "a", {**modules, "lm_head": random_factors(1, rank=2)}, lora_alpha=2))
    assert ([row.module for row in ranks.modules], len(ranks.left_out)) == (["lm_head"], 12)
    json.dumps(ranks.to_json(), allow_nan=False)


def test_the_arithmetic_on_factors_needs_no_torch() -> None:
    code = "from composer.formats.adapters import compare, spectrum\nimport sys\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
