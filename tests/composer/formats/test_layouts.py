"""An adapter in another layout than PEFT's is named as such wherever it is opened, and can be inspected."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from composer.deltas.variants.load import load_deltas
from composer.errors import InvalidFile, NotSupported
from composer.export.convert import convert
from composer.formats.adapters.facts import read_adapter
from composer.formats.adapters.inspection import inspect_foreign
from composer.formats.adapters.layouts import recognise
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.export.test_convert import LAYOUTS, as_kohya
from tests.composer.export.test_convert_lokr import lokr_file
from tests.composer.tiny import MakeAdapter, MakeModel


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_only_peft_is_read_another_layout_is_named_with_a_way_out(
    layout: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    directory = tmp_path / "foreign"
    directory.mkdir()
    source = LAYOUTS[layout](make_adapter(base), directory)
    with pytest.raises(InvalidFile, match=f"in the layout of {layout}, not PEFT's") as caught:
        load_deltas(source if source.is_dir() else directory, open_checkpoint(base).architecture)
    assert "adaptory convert" in caught.value.next_step


def test_keys_of_kohya_under_pefts_names_are_named_too(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    as_kohya(adapter, tmp_path).rename(adapter / "adapter_model.safetensors")
    with pytest.raises(InvalidFile, match="in the layout of kohya"):
        load_deltas(adapter, None)
    assert convert(adapter, tmp_path / "out", open_checkpoint(base).architecture).layout == "kohya"


def to_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def without_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


@pytest.mark.parametrize("change", [to_pickle, without_config])
def test_what_is_incomplete_in_pefts_layout_is_reported_as_everywhere(
    change: Callable[[Path], None], tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    change(adapter)
    with pytest.raises(InvalidFile) as elsewhere:
        load_deltas(adapter, None)
    with pytest.raises(InvalidFile) as caught:
        convert(adapter, tmp_path / "out", open_checkpoint(base).architecture)
    assert (caught.value.code, str(caught.value)) == (elsewhere.value.code, str(elsewhere.value))


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_look_tells_what_is_in_another_layout(
    layout: str, with_base: bool, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    source = LAYOUTS[layout](make_adapter(base), tmp_path)  # rank 4, alpha 8, of q_proj and v_proj in 3 layers
    facts, findings = inspect_foreign(source, open_checkpoint(base).architecture if with_base else None)
    assert (facts.type, facts.rank_max, facts.alpha, facts.modules, facts.dtype) == ("lora", 4, 8.0, 6, "F32")
    assert set(facts.alphas.values()) == {8.0}
    flat = layout == "kohya" and not with_base
    assert facts.targets == (("self_attn_q_proj", "self_attn_v_proj") if flat else ("q_proj", "v_proj"))
    assert [finding.code for finding in findings] == ["another_layout"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_an_alpha_is_read_in_whatever_type_it_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    pair = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(16, 2)}
    facts, _ = inspect_foreign(lokr_file(tmp_path, q_proj=pair | {"alpha": torch.tensor(6, dtype=dtype)}), None)
    assert (facts.alpha, facts.rank_max) == (6.0, 2)


def test_weights_under_the_name_of_a_refused_layout_are_refused_as_that(tmp_path: Path) -> None:
    pair = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(16, 2)}
    lokr_file(tmp_path, q_proj=pair).rename(tmp_path / "adapter.gguf")
    for path in (tmp_path, tmp_path / "adapter.gguf"):
        with pytest.raises(NotSupported, match="is gguf"):
            inspect_foreign(path, None)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_finite_number_is_refused_by_a_look_as_by_a_conversion(
    alpha: float, tmp_path: Path, make_model: MakeModel
) -> None:
    pair = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(16, 2)}
    source = lokr_file(tmp_path, self_attn_q_proj=pair | {"alpha": torch.tensor(alpha)})
    architecture = open_checkpoint(make_model()).architecture
    with pytest.raises(InvalidFile, match="not a finite number") as conversion:
        convert(source, tmp_path / "out", architecture)
    with pytest.raises(InvalidFile, match="not a finite number") as look:
        inspect_foreign(source, architecture)
    assert (look.value.code, str(look.value)) == (conversion.value.code, str(conversion.value))


@pytest.mark.parametrize(
    ("parts", "kind", "rank", "alpha"),
    [
        ({"lokr_w1": (4, 4), "lokr_w2_a": (4, 3), "lokr_w2_b": (3, 4)}, "lokr", 3, 3.0),
        ({"lokr_w1": (4, 4), "lokr_w2": (4, 4)}, "lokr", 0, 0.0),
        ({"hada_w1_a": (16, 3), "hada_w1_b": (3, 16), "hada_w2_a": (16, 3), "hada_w2_b": (3, 16)}, "loha", 3, 3.0),
    ],
)
def test_a_look_tells_the_type(
    parts: dict[str, tuple[int, ...]], kind: str, rank: int, alpha: float, tmp_path: Path
) -> None:
    tensors = {name: torch.ones(shape) for name, shape in parts.items()}
    facts, _ = inspect_foreign(lokr_file(tmp_path, q_proj=tensors), None)
    assert (facts.type, facts.rank_max, facts.alpha) == (kind, rank, alpha)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "another.safetensors"])
def test_a_pipe_in_place_of_weights_is_not_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    os.mkfifo(tmp_path / name)
    with pytest.raises(InvalidFile, match="not a regular file"):
        recognise(tmp_path)


def test_a_config_that_is_too_large_is_not_read_to_its_end(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(make_model())
    os.truncate(adapter / "adapter_config.json", 1 << 40)
    with pytest.raises(InvalidFile, match=r"adapter_config\.json is larger than the 10,000,000 bytes"):
        read_adapter(adapter)
