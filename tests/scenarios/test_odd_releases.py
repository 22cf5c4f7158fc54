"""Valid but unusual adapters and bases, with nothing but names and small arrays."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from composer.formats.checkpoints.hashing import weights_digest
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli

TARGETS = [f"projection_{number:03}" for number in range(320)]


def add_base(cli: Cli, name: str) -> None:
    """A base of 320 modules with different names; its weights differ from those of every other name."""
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    rows = [(f"model.layers.0.{target}.weight", "F32", (2, 2), sha256) for target in TARGETS]
    body = {
        "name": name,
        "model_type": "llama",
        "tied": False,
        "weights_digest": weights_digest(rows),
        "tensors": [dict(zip(("name", "dtype", "shape", "sha256"), row, strict=True)) for row in rows],
    }
    with api_of(cli) as api:
        api.post("/v1/bases", body)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of every module of the base."""
    directory = tmp_path / "wide"
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": TARGETS}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.{}.lora_{}.weight"
    ones = {"A": np.ones((1, 2), np.float32), "B": np.ones((2, 1), np.float32)}
    tensors = {name.format(target, part): array for target in TARGETS for part, array in ones.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.long
def test_an_adapter_with_hundreds_of_targets_is_released_and_found(cli: Cli, adapter: Path) -> None:
    add_base(cli, "wide")
    cli.ok("push", adapter, "acme/wide:1.0.0", "--base", "wide")
    cli.ok("push", adapter, "acme/twin:1.0.0", "--base", "wide")
    hits = cli.json("search", "--targets-include", TARGETS[-1])["items"]
    assert sorted(release["repository"] for release in hits) == ["acme/twin", "acme/wide"]
    assert hits[0]["adapter"]["targets"] == TARGETS
    assert cli.json("search", "--targets-within", ",".join(TARGETS[:100]))["items"] == []


def test_the_same_files_for_another_base_are_another_release(cli: Cli, adapter: Path) -> None:
    add_base(cli, "old")
    add_base(cli, "new")
    first = cli.json("push", adapter, "acme/wide", "--bump", "minor", "--base", "old")["release"]
    again = cli.json("push", adapter, "acme/wide", "--bump", "minor", "--base", "old")
    assert (again["created"], again["release"]["version"]) == (False, first["version"])
    moved = cli.json("push", adapter, "acme/wide", "--bump", "major", "--base", "new")
    assert (moved["created"], moved["release"]["version"]) == (True, "1.0.0")
    assert (moved["release"]["base"]["name"], moved["release"]["commit"]) == ("new", first["commit"])


@pytest.mark.long
def test_lists_of_bases_and_repositories_say_everything_page_by_page(cli: Cli, adapter: Path) -> None:
    add_base(cli, "wide")
    for repository in ("acme/b", "acme.lab/a", "acme/a"):
        cli.ok("push", adapter, f"{repository}:1.0.0", "--base", "wide", "--channel", "prod")
    cli.ok("push", adapter, "acme/a:1.1.0-rc.1", "--base", "wide", "--channel", "canary", "--new-channel")
    cli.ok("yank", "acme/b:1.0.0", "--reason", "wrong")
    with api_of(cli) as api:
        items = api.get("/v1/adapters")["items"]
        assert list(api.pages("/v1/adapters", limit=1)) == items
        assert api.get("/v1/bases")["items"][0]["tensor_count"] == len(TARGETS)
        assert len(api.get("/v1/bases/wide", tensors=True)["tensors"]) == len(TARGETS)
    listed = {row["repository"]: (row["latest"], row["channels"]) for row in items}
    assert listed == {
        "acme/a": ("1.0.0", {"canary": "1.1.0-rc.1", "prod": "1.0.0"}),
        "acme/b": (None, {}),  # the release that it would serve is yanked
        "acme.lab/a": ("1.0.0", {"prod": "1.0.0"}),
    }
