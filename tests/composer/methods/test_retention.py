"""What a merge says that it keeps of its adapters, against the dense matrices."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from composer.conflicts.report import conflicts
from composer.deltas.delta import LowRank
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.export.combine import combine
from composer.findings import Severity
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import parse_settings
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from composer.methods.combine import CombinedDeltas, combine_parsed
from composer.methods.retention import KeptAdapter, retention_of
from tests.composer.tiny import MakeAdapter
from tests.device import DEVICE

NAMES = ("sql", "terraform", "yaml")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Wide enough that rank 24 is not most of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapters(base: Path, make_adapter: MakeAdapter) -> list[Path]:
    """Three of rank 8, of unequal size."""
    return [
        make_adapter(base, name, seed=i, size=size, r=8, lora_alpha=8)
        for i, (name, size) in enumerate(zip(NAMES, (0.3, 0.2, 0.1), strict=True))
    ]


def dense(delta: LowRank) -> torch.Tensor:
    return delta.scale * delta.B_OR.double() @ delta.A_RI.double()


def by_module(adapter: LoadedAdapter) -> dict[str, torch.Tensor]:
    return {delta.module: dense(delta) for delta in adapter.deltas if isinstance(delta, LowRank)}


@pytest.mark.parametrize(
    ("method", "settings", "weights"),
    [
        ("svd", {}, (1.0, 1.0, 1.0)),
        ("stack", {"lambda": 0.5}, (1.0, -0.5, 2.0)),
        ("mean", {}, (1.0, 1.0, 1.0)),
        ("ties", {}, (1.0, 1.0, 0.5)),
        ("core_tsv", {}, (1.0, 1.0, 1.0)),
        ("ties_svd", {"rank": 4}, (1.0, 1.0, 1.0)),
        ("stack", {"protect": "1"}, (1.0, 1.0, 1.0)),
    ],
)
def test_retention_is_that_of_the_dense_matrices(
    method: str, settings: dict[str, object], weights: tuple[float, ...], base: Path, adapters: list[Path]
) -> None:
    loaded = [load_deltas(path, open_checkpoint(base).architecture) for path in adapters]
    parsed = parse_settings(method, settings)
    combined = combine_parsed(loaded, weights, parsed)
    kept = retention_of(loaded, weights, parsed, combined)
    M: dict[str, torch.Tensor] = {}
    for delta in combined.deltas:
        factored = isinstance(delta, LowRank)
        made = dense(delta) if factored else delta.rows(torch.zeros(delta.stored_shape), 0).double()
        M[delta.module] = M.get(delta.module, 0) + made
    deltas = [by_module(adapter) for adapter in loaded]
    factor = parsed.factor / (sum(weights) if parsed.divides else 1)
    S = {name: sum(factor * w * own[name] for w, own in zip(weights, deltas, strict=True)) for name in M}

    def flat(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([parts[name].flatten() for name in sorted(M)])

    off = float((flat(S) - flat(M)).norm() / flat(S).norm())
    assert kept.of_sum == pytest.approx(max(0.0, 1 - off), abs=1e-5)
    for member, own in zip(kept.members, deltas, strict=True):
        assert member.retention == pytest.approx(float(flat(M) @ flat(own) / flat(own).square().sum()), abs=1e-5)
        assert member.modules == {
            name: pytest.approx(float((M[name] * own[name]).sum() / own[name].square().sum()), abs=1e-5) for name in own
        }


def test_a_merge_that_loses_half_of_three_adapters_says_so_everywhere(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """`svd` at the rank of the inputs, 8 of 24."""
    uses = [(path, 1.0) for path in adapters]
    report = run_merge(plan_merge(open_checkpoint(base), uses, "svd"), tmp_path / "merged", DEVICE)
    assert 0.3 < report.lost < 0.7
    assert report.retention.of_sum == pytest.approx(1 - report.lost, abs=1e-4), "the cut is all that is lost"
    words = report.retention.words
    assert words.startswith(f"keeps {100 - 100 * report.lost:.0f} % of the sum; sql ")
    note = json.loads((tmp_path / "merged/adaptory.json").read_text())
    assert note["retention"] == report.to_json()["retention"]
    assert note["retention"]["words"] == words
    assert f"It {words}." in (tmp_path / "merged/README.md").read_text()
    combined = combine(uses, tmp_path / "combined", method="svd", settings={"rank": 8})
    assert combined.retention.words == words
    assert f"It {words}." in (tmp_path / "combined/README.md").read_text()
    loaded = [load_deltas(path, open_checkpoint(base).architecture) for path in adapters]
    compared = conflicts(loaded, [1.0, 1.0, 1.0], parse_settings("svd"))
    assert compared.kept.words == words
    assert [member.retention for member in compared.members] == [member.retention for member in compared.kept.members]


def test_a_loss_above_the_limit_is_a_finding(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    checkpoint, uses = open_checkpoint(base), [(path, 1.0) for path in adapters]
    report = run_merge(plan_merge(checkpoint, uses, "svd", {"rank": 2}), tmp_path / "cut", DEVICE)
    little = {finding.subject: finding for finding in report.findings if finding.code == "little_kept"}
    assert little["svd"].severity is Severity.WARNING
    assert little["svd"].measure == pytest.approx(1 - report.lost)
    assert report.retention.words in little["svd"].message
    gone = [member.name for member in report.retention.members if (member.retention or 0) < 0.1]
    assert set(little) == {"svd", *gone}
    assert gone, "the smallest adapter does not survive a cut to rank 2"
    compared = conflicts([load_deltas(path, None) for path in adapters], [1.0] * 3, parse_settings("svd", {"rank": 2}))
    own = {finding.subject: finding.severity for finding in compared.findings if finding.code == "little_kept"}
    assert own == dict.fromkeys(little, Severity.NOTICE), "a conflict report judges by what it measures"
    exact = run_merge(plan_merge(checkpoint, uses), tmp_path / "exact", DEVICE)
    assert (exact.retention.of_sum, exact.findings) == (1.0, ())


def test_what_is_nearly_gone_is_0_percent_whatever_its_sign() -> None:
    assert KeptAdapter("minus", 1.0, -0.00127).words == "minus 0 %"


def test_what_depends_on_the_base_is_not_known_and_a_negative_weight_is_no_loss(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    plain, dora = make_adapter(base, "plain", r=4), make_adapter(base, "dora", r=4, use_dora=True)
    unknown = run_merge(plan_merge(open_checkpoint(base), [(plain, 1.0), (dora, 1.0)]), tmp_path / "one", DEVICE)
    assert (unknown.retention.of_sum, unknown.retention.words) == (None, "")
    less = run_merge(plan_merge(open_checkpoint(base), [(plain, -0.5)]), tmp_path / "two", DEVICE)
    assert less.retention.words == "keeps 100 % of the sum; plain -50 % (weight -0.5)"
    assert less.findings == ()


def test_of_a_fitted_method_no_words_are_said_since_answers_survive_what_the_weights_lose(
    base: Path, adapters: list[Path]
) -> None:
    loaded = [load_deltas(path, open_checkpoint(base).architecture) for path in adapters]
    opposite = [replace(delta, scale=-delta.scale) for delta in loaded[0].deltas if isinstance(delta, LowRank)]
    made = CombinedDeltas([*opposite], [], [], "shared")
    kept = retention_of(loaded, [1.0] * 3, parse_settings("regmean"), made)
    assert (kept.of_sum, kept.words, kept.findings("regmean", 0.0)) == (0.0, "", [])
    assert all(member.retention is not None for member in kept.members)
    assert retention_of(loaded, [1.0] * 3, parse_settings("svd"), made).words.startswith("keeps 0 % of the sum")
