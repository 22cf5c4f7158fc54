"""An adapter whose file lacks a layer that its config targets: every reader names the layer."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.scenarios.world import Cli, World

LAYER = "layers.1."


@pytest.fixture
def lossy(world: World, tmp_path: Path) -> Path:
    """The adapter of the SQL team, saved without the tensors of its second layer."""
    directory = tmp_path / "lossy"
    shutil.copytree(world.adapters["sql"], directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if LAYER not in name}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    return directory


def test_a_layer_without_tensors_is_named_by_merge_inspect_and_push(
    stocked_on_disk: Cli, world: World, lossy: Path, tmp_path: Path
) -> None:
    expected = "The file has no tensors for model.layers.1.self_attn."
    merged = stocked_on_disk.ok("merge", "--base", world.base, "--adapter", lossy, "-o", tmp_path / "out")
    assert expected in merged.err
    assert expected in stocked_on_disk.ok("inspect", lossy, "--base", world.base).out
    pushed = stocked_on_disk.ok("push", lossy, "acme/sql:1.0.0", "--base", "tiny")
    assert expected in pushed.err
    assert expected in stocked_on_disk.ok("inspect", "acme/sql:1.0.0").out


def test_an_adapter_that_has_all_that_it_targets_is_not_accused(
    stocked_on_disk: Cli, world: World, tmp_path: Path
) -> None:
    for name in ("sql", "support", "terraform"):
        ran = stocked_on_disk.ok("inspect", world.adapters[name], "--base", world.base)
        assert "no tensors for" not in ran.out
    chosen = tmp_path / "chosen"
    shutil.copytree(world.adapters["sql"], chosen)
    tensors = load_file(chosen / "adapter_model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if LAYER not in name}
    save_file(own, chosen / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((chosen / "adapter_config.json").read_text()) | {"layers_to_transform": [0]}
    (chosen / "adapter_config.json").write_text(json.dumps(config))
    assert "no tensors for" not in stocked_on_disk.ok("inspect", chosen, "--base", world.base).out
