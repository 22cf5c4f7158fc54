"""Types whose files do not contain the size of a weight: read on a base, refused by name without one."""

from copy import deepcopy
from pathlib import Path

import pytest
from peft import FourierFTConfig, MissConfig, OFTConfig, PeftConfig, RandLoraConfig, VeraConfig

from composer.deltas.delta import LowRank
from composer.deltas.variants.load import load_deltas
from composer.errors import NotSupported
from composer.export.combine import combine
from composer.formats.adapters.inspection import inspect
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.adapted import save_adapted
from tests.composer.tiny import MakeModel

TARGETS = ["q_proj", "v_proj"]
UNSIZED: dict[str, PeftConfig] = {
    "VERA": VeraConfig(r=8, target_modules=TARGETS),
    "MISS": MissConfig(r=4, target_modules=TARGETS),
    "FOURIERFT": FourierFTConfig(n_frequency=20, target_modules=TARGETS),
    "RANDLORA": RandLoraConfig(r=4, target_modules=TARGETS),
    "OFT": OFTConfig(r=2, oft_block_size=0, target_modules=TARGETS),
}


@pytest.mark.parametrize("settings", [{}, {"rank": 64}])
@pytest.mark.parametrize("kind", UNSIZED)
def test_a_size_that_only_the_base_tells_is_asked_for(
    kind: str, settings: dict[str, object], tmp_path: Path, make_model: MakeModel
) -> None:
    adapter = save_adapted(make_model(), deepcopy(UNSIZED[kind]), tmp_path / "adapter")
    for use in (
        lambda: combine([(adapter, 1.0)], tmp_path / "out", settings=settings),
        lambda: load_deltas(adapter, None),
    ):
        with pytest.raises(NotSupported, match=f"{kind} file does not contain the size") as caught:
            use()
        assert caught.value.code == "needs_base"
        assert caught.value.subject.endswith("q_proj")
        assert "--base" in caught.value.next_step
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", UNSIZED)
def test_on_its_base_and_when_it_is_only_looked_at_nothing_is_asked(
    kind: str, tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model()
    adapter = save_adapted(base, deepcopy(UNSIZED[kind]), tmp_path / "adapter")
    assert len(load_deltas(adapter, open_checkpoint(base).architecture).deltas) == 6
    seen = inspect(adapter, None)
    assert (seen.findings, seen.facts.modules) == ([], 6)


@pytest.mark.parametrize("kind", ["VERA", "MISS"])
def test_factors_that_are_made_of_others_are_made_once_and_wait_on_the_disk(
    kind: str, tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model()
    adapter = save_adapted(base, deepcopy(UNSIZED[kind]), tmp_path / "adapter")
    deltas = load_deltas(adapter, open_checkpoint(base).architecture).deltas
    for first, again in zip(deltas, deltas, strict=True):
        assert isinstance(first, LowRank)
        assert isinstance(again, LowRank)
        assert first.stored
        for factor, other in ((first.A_RI, again.A_RI), (first.B_OR, again.B_OR)):
            assert factor.data_ptr() == other.data_ptr()
