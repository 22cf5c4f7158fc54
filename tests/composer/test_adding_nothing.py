"""Adapters that add nothing, and inputs that cancel: the same findings for any cause and in any command."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from composer.conflicts.report import conflicts
from composer.deltas.delta import LowRank, RowwiseDelta
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.errors import Mismatch
from composer.export.combine import combine
from composer.findings import Severity
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import parse_settings
from composer.merge.plan import plan_merge
from composer.methods.basis import norm_of, pair_of
from composer.methods.combine import combine_deltas
from tests.composer.methods.test_methods_on_models import Shared, loaded, shared

__all__ = ["shared"]
SUMS = ["pico_stack", "pico_svd", "pico_tsv", "pico_iso", "pico_magnitude_prune_svd", "pico_dare_linear_svd"]


def added(adapter: LoadedAdapter, weight: float, method: str) -> tuple[float, set[str]]:
    """The norm of the sum of an adapter and its opposite, and the codes of the findings."""
    made = combine_deltas([adapter, adapter], [weight, -1.0], method, {"tied": "untie"})
    norms = [norm_of(pair_of(delta)) for delta in made.deltas if isinstance(delta, LowRank)]
    return sum(norm**2 for norm in norms) ** 0.5, {finding.code for finding in made.findings}


@pytest.mark.parametrize("method", SUMS)
def test_an_adapter_and_its_opposite_add_nothing_and_pico_does_not_restore_the_rounding(
    shared: Shared, method: str
) -> None:
    (one,) = loaded(shared.base, shared.adapters[0])
    norm, codes = added(one, 1.0, method)
    assert norm == 0
    assert "cancelled" in codes


def test_a_sum_that_pico_multiplies_by_a_large_factor_is_a_finding(shared: Shared) -> None:
    (one,) = loaded(shared.base, shared.adapters[0])
    norm, codes = added(one, 0.98, "pico_stack")
    assert norm > 0
    assert "restored_norm" in codes
    assert "restored_norm" not in added(one, 0.5, "pico_stack")[1]


def test_what_is_made_row_by_row_is_not_restored_from_rounding_either(shared: Shared) -> None:
    (one,) = loaded(shared.base, shared.adapters[0])
    made = combine_deltas([one, one], [1.0, -1.0], "pico_magnitude_prune", {"tied": "untie", "density": 0.5})
    rows = [delta.rows(torch.zeros(delta.stored_shape), 0) for delta in made.deltas if isinstance(delta, RowwiseDelta)]
    assert rows
    assert not any(bool(row.any()) for row in rows)
    assert "cancelled" in {finding.code for finding in made.findings}


@pytest.mark.parametrize("cause", ["lora_alpha", "lambda", "weight"])
@pytest.mark.parametrize("method", ["stack", "ties_svd", "peft_cat"])
def test_adding_nothing_is_one_finding_in_merge_combine_and_conflicts(
    shared: Shared, tmp_path: Path, cause: str, method: str
) -> None:
    base, idle = open_checkpoint(shared.base), tmp_path / "idle"
    shutil.copytree(shared.adapters[0], idle)
    if cause == "lora_alpha":
        config = json.loads((idle / "adapter_config.json").read_text())
        (idle / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    weight, settings = 1e-60 if cause == "weight" else 1.0, {"lambda": 0.0} if cause == "lambda" else {}
    plan = plan_merge(base, [(idle, weight)], method, settings)
    report = combine([(idle, weight)], tmp_path / "out", base.architecture, method, settings)
    compared = conflicts([load_deltas(idle, base.architecture)], [weight], method=parse_settings(method, settings))
    for findings in (plan.findings, report.findings, compared.findings):
        (finding,) = [finding for finding in findings if finding.code == "zero_delta"]
        assert (finding.severity, finding.subject) == (Severity.WARNING, "idle")


@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_an_adapter_without_weight_beside_another_is_the_same_finding(
    shared: Shared, tmp_path: Path, weight: float
) -> None:
    base, given = open_checkpoint(shared.base), [(shared.adapters[0], 1.0), (shared.adapters[1], weight)]
    adapters = [load_deltas(path, base.architecture) for path, _ in given]
    plan = plan_merge(base, given)
    report = combine(given, tmp_path / "out", base.architecture)
    for findings in (plan.findings, report.findings, conflicts(adapters, [1.0, weight]).findings):
        assert [finding.subject for finding in findings if finding.code == "zero_delta"] == [adapters[1].name]


def test_weights_of_zero_alone_are_refused_by_merge_combine_and_conflicts(shared: Shared, tmp_path: Path) -> None:
    base, given = open_checkpoint(shared.base), [(path, 0.0) for path in shared.adapters[:2]]
    adapters = [load_deltas(path, base.architecture) for path, _ in given]
    for attempt in (
        lambda: plan_merge(base, given),
        lambda: combine(given, tmp_path / "out", base.architecture),
        lambda: conflicts(adapters, [0.0, 0.0]),
    ):
        with pytest.raises(Mismatch) as refused:
            attempt()
        assert refused.value.code == "nothing_added"


def test_a_combined_adapter_is_as_readable_as_its_config(shared: Shared, tmp_path: Path) -> None:
    """safetensors writes for the owner alone."""
    combine([(shared.adapters[0], 1.0)], tmp_path / "out")
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
