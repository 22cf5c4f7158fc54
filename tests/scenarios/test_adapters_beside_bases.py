"""A base's directory that also has an adapter, which transformers would apply to everything loaded from there."""

import shutil
from pathlib import Path

import pytest

from composer.evaluation.model import load_model
from tests.scenarios.conftest import stock
from tests.scenarios.small_hub import small_hub
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.test_hub_import_and_export import online, stored
from tests.scenarios.world import Cli, World

ADAPTER_FILE = "adapter_config.json"
ADAPTER = (ADAPTER_FILE, "adapter_model.safetensors")


def with_adapter(base: Path, adapter: Path) -> Path:
    for name in ADAPTER:
        shutil.copy(adapter / name, base / name)
    return base


@pytest.fixture
def based(on_disk: Cli, world: World, tmp_path: Path) -> tuple[Cli, Path]:
    """A registry with an adapter and a suite, whose base has another adapter in its directory."""
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    cli = stock(on_disk, World(base, world.adapters, world.suites))
    cli.ok("push", world.adapters["support"], "acme/support:1.0.0", "--base", "tiny")
    cli.ok("suite", "add", write_suite(tmp_path, "exact"))
    return cli, with_adapter(base, world.adapters["terraform"])


@pytest.mark.parametrize("what", ["acme/support:1.0.0", "tiny"])
def test_nothing_is_measured_with_an_adapter_that_its_digest_does_not_name(based: tuple[Cli, Path], what: str) -> None:
    cli, _ = based
    refused = cli("eval", what, "--suite", "exact")
    said = " ".join(refused.err.split())
    assert (refused.code, "base has an adapter beside its model" in said) == (6, True), refused.err
    assert not cli.json("base", "show", "tiny")["scores"]


def test_a_merged_model_has_no_configuration_of_an_adapter_that_it_does_not_have(
    based: tuple[Cli, Path], tmp_path: Path
) -> None:
    cli, _ = based
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("inputs: [acme/support:1.0.0]\nmethod: stack\nmodel: acme/merged:1.0.0\n")
    cli.ok("compose", recipe)
    cli.ok("pull", "acme/merged:1.0.0", "-o", tmp_path / "merged")
    assert not (tmp_path / "merged" / ADAPTER_FILE).exists()
    assert load_model(tmp_path / "merged").model.config.model_type == "llama"


@pytest.mark.long
def test_a_base_from_a_hub_comes_without_the_adapter_beside_it(on_disk: Cli, world: World, tmp_path: Path) -> None:
    base = with_adapter(Path(shutil.copytree(world.base, tmp_path / "base")), world.adapters["terraform"])
    with small_hub() as hub:
        hub.put("acme/base", stored(base))
        me = online(on_disk, tmp_path / "me").having(HF_ENDPOINT=hub.url)
        me.ok("base", "add", "hf://acme/base", "--name", "tiny")
        assert not set(hub.downloads()) & set(ADAPTER)
        me.ok("push", world.adapters["support"], "acme/support:1.0.0", "--base", "tiny")
        me.ok("suite", "add", write_suite(tmp_path, "exact"))
        me.ok("eval", "acme/support:1.0.0", "--suite", "exact")
