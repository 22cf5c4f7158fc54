"""Rounding to the output's dtype: to the nearest, or by chance that depends on nothing but the place of a value."""

from pathlib import Path

import pytest
import torch

from composer.errors import NotSupported
from composer.findings import Severity
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.rounding import Mode, Rounding, parse_rounding
from composer.merge import chunks
from composer.merge.io.rounding import round_into
from composer.merge.plan import plan_merge
from composer.merge.run import MergeReport, run_merge
from tests.composer.tiny import MakeAdapter, MakeModel, tensors_in
from tests.device import DEVICE

CHANCE = Rounding(Mode.STOCHASTIC, seed=7)


def rounded(exact: torch.Tensor, dtype: torch.dtype, rounding: Rounding = CHANCE, begin: int = 0) -> torch.Tensor:
    out = torch.empty(exact.shape, dtype=dtype)
    round_into(rounding, out, exact.clone(), "a.weight", begin)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-7, 1e-5, 3e-2, 1.0, 60.0])
def test_chance_chooses_one_of_the_two_neighbours_and_is_right_on_average(dtype: torch.dtype, size: float) -> None:
    exact = torch.full((200_000,), 1.2345678 * size)
    exact[::2] *= -1
    actual = rounded(exact, dtype).double()
    low = torch.full((), 1.2345678 * size).to(dtype)
    neighbours = {
        float(low),
        float(torch.nextafter(low, torch.tensor(1e4, dtype=dtype))),
        float(torch.nextafter(low, torch.tensor(-1e4, dtype=dtype))),
    }
    values = set(actual.abs().unique().tolist())
    assert len(values) == 2
    assert values <= neighbours
    step = max(values) - min(values)
    allowed = 5 * step * 0.5 / 200_000**0.5
    assert float(actual.abs().mean()) == pytest.approx(float(exact[1]), abs=allowed)


def test_double_precision_is_rounded_by_chance_too() -> None:
    exact = torch.full((20_000,), 1.2345678)
    assert torch.equal(rounded(exact.double(), torch.bfloat16), rounded(exact, torch.bfloat16))
    assert len(rounded(exact.double(), torch.bfloat16).unique()) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_dtype_holds_exactly_is_left_alone(dtype: torch.dtype) -> None:
    exact = torch.randn(10_000).to(dtype).float()
    exact[:4] = torch.tensor([0.0, -0.0, 2.0**-24, 65504.0]).to(dtype).float()
    assert torch.equal(rounded(exact, dtype).float(), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_nan_and_an_infinity_stay_what_they_are(dtype: torch.dtype) -> None:
    actual = rounded(torch.tensor([float("nan"), float("inf"), -float("inf")] * 50), dtype)
    assert bool(actual[::3].isnan().all())
    assert bool((actual[1::3] == float("inf")).all())
    assert bool((actual[2::3] == -float("inf")).all())


@pytest.mark.parametrize("begin", [0, 1, 15, 16, 17, 1000])
def test_any_part_of_a_tensor_is_rounded_as_in_the_whole(begin: int) -> None:
    exact = torch.randn(2_000)
    full = rounded(exact, torch.bfloat16)
    assert torch.equal(rounded(exact[begin : begin + 777], torch.bfloat16, begin=begin), full[begin : begin + 777])


def test_another_seed_or_tensor_is_another_chance() -> None:
    exact = torch.randn(2_000)
    ours, out = rounded(exact, torch.bfloat16), torch.empty(2_000, dtype=torch.bfloat16)
    assert not torch.equal(rounded(exact, torch.bfloat16, Rounding(Mode.STOCHASTIC, 8)), ours)
    round_into(CHANCE, out, exact.clone(), "b.weight", 0)
    assert not torch.equal(out, ours)


@pytest.mark.parametrize(("mode", "seed"), [("up", 0), ("stochastic", -1), ("stochastic", 2**64)])
def test_an_unknown_rounding_and_a_bad_seed_are_refused(mode: str, seed: int) -> None:
    with pytest.raises(NotSupported):
        parse_rounding(mode, seed)


def merged(
    tmp_path: Path, base: Path, adapter: Path, name: str, rounding: Rounding, dtype: str | None = None
) -> MergeReport:
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)], dtype=dtype, rounding=rounding)
    return run_merge(plan, tmp_path / name, DEVICE)


@pytest.fixture
def small(make_model: MakeModel, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    """A base in bfloat16 and an adapter whose delta is far smaller than a step of most weights."""
    base = make_model(dtype=torch.bfloat16)
    return base, make_adapter(base, size=0.0005, r=2, lora_alpha=1)


def test_a_stochastic_merge_does_not_depend_on_how_it_is_cut(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(tmp_path, *small, "whole", CHANCE)
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 40)
    merged(tmp_path, *small, "pieces", CHANCE)
    full, pieces = tensors_in(tmp_path / "whole"), tensors_in(tmp_path / "pieces")
    # The chances are the same; a product of another shape may differ in float32's last bit, and seldom turns one.
    differing = sum(int((tensor != pieces[name]).sum()) for name, tensor in full.items())
    assert differing <= sum(tensor.numel() for tensor in full.values()) / 500


def test_a_delta_that_the_nearest_value_swallows_is_reported_and_survives_stochastic_rounding_and_fp32(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    nearest = merged(tmp_path, *small, "nearest", Rounding())
    (finding,) = nearest.findings
    assert (finding.code, finding.severity) == ("bf16_swallow", Severity.WARNING)
    survival = nearest.survival.to_json()
    assert survival["lost_share"] > 0.5
    assert survival["error"] > 0.4
    by_chance = merged(tmp_path, *small, "chance", CHANCE)
    assert by_chance.findings == ()
    assert by_chance.survival.to_json()["lost_share"] < nearest.survival.to_json()["lost_share"]
    exact = merged(tmp_path, *small, "exact", Rounding(), "fp32")
    assert exact.findings == ()
    assert exact.survival.to_json()["energy_kept"] == pytest.approx(1, abs=1e-3)
    assert exact.survival.to_json()["error"] < 1e-3


def test_the_survival_report_is_what_the_files_say(
    make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Few rows, so that the sample is all of them, against the same merge in float32."""
    base = make_model(dtype=torch.bfloat16)
    adapter = make_adapter(base, size=0.02, target_modules=["v_proj"])
    report = merged(tmp_path, base, adapter, "merged", Rounding())
    merged(tmp_path, base, adapter, "exact", Rounding(), "fp32")
    before, after, exact = (tensors_in(path) for path in (base, tmp_path / "merged", tmp_path / "exact"))
    names = [name for name in before if "v_proj" in name]
    W, M, E = (torch.cat([side[name].double() for name in names]) for side in (before, after, exact))
    survival = report.survival.to_json()
    rows = sum(before[name].shape[0] for name in names)
    assert survival["sampled_rows"] <= rows
    assert survival["error"] == pytest.approx(float((M - E).norm() / (E - W).norm()), rel=0.3)
    assert survival["lost_share"] == pytest.approx(float(((M == W) & (E != W)).double().mean()), abs=0.1)
    assert survival["energy_kept"] == pytest.approx(float((M - W).norm() ** 2 / (E - W).norm() ** 2), rel=0.1)
