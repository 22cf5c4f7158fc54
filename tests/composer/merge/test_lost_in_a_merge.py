"""A merge that cuts to a rank reports the loss, separately from rounding."""

from pathlib import Path

import pytest

from composer.export.combine import combine
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from tests.composer.tiny import MakeAdapter, MakeModel
from tests.device import DEVICE
from tests.scenarios.world import Cli


def test_a_merge_by_svd_reports_the_loss_of_its_cut_as_combine_does(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapters = [(make_adapter(base, name=f"a{seed}", seed=seed), 1.0) for seed in (1, 2, 3)]
    report = run_merge(plan_merge(open_checkpoint(base), adapters, "svd"), tmp_path / "merged", device=DEVICE)
    combined = combine(adapters, tmp_path / "combined", open_checkpoint(base).architecture, "svd")
    assert report.lost == pytest.approx(combined.lost, rel=1e-4)
    assert report.lost > 0.1, "three adapters of one rank do not fit into that rank"
    assert report.to_json()["lost"] == report.lost
    assert {compression.module for compression in report.compressions} == {
        compression.module for compression in combined.compressions
    }


def test_the_command_prints_the_loss_beside_the_rounding(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapters = [make_adapter(base, name=f"a{seed}", seed=seed) for seed in (1, 2, 3)]
    named = [word for adapter in adapters for word in ("--adapter", adapter)]
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home")})
    cut = cli.ok("merge", "--base", base, *named, "--method", "svd", "-o", tmp_path / "cut").out
    lost = next(float(line.split()[1]) for line in cut.splitlines() if line.strip().startswith("lost "))
    assert lost > 0.1
    assert "rounding: lost share" in cut
    assert "modules that lost most" in cut
    exact = cli.ok("merge", "--base", base, *named, "-o", tmp_path / "exact").out
    assert not [line for line in exact.splitlines() if line.strip().startswith("lost ")], "a sum loses nothing"
