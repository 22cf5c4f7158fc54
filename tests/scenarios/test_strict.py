"""--strict makes warnings errors: nothing is published, and the command names what to do."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.scenarios.world import Cli, World


@pytest.fixture
def foreign(world: World, tmp_path: Path) -> Path:
    """An adapter whose config names another model than the base's alias."""
    shutil.copytree(world.adapters["sql"], tmp_path / "foreign")
    path = tmp_path / "foreign/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "zeta/two"}))
    return tmp_path / "foreign"


def test_a_push_for_another_base_than_the_adapter_names_warns_and_is_refused_when_strict(
    stocked_on_disk: Cli, world: World, foreign: Path, tmp_path: Path
) -> None:
    cli = stocked_on_disk
    refused = cli("push", foreign, "acme/foreign:1.0.0", "--base", "tiny", "--strict")
    assert refused.code != 0
    assert "zeta/two" in refused.err
    assert cli("show", "acme/foreign:1.0.0").code == 3
    warned = cli.json("push", foreign, "acme/foreign:1.0.0", "--base", "tiny")
    assert "contradicting_bases" in {finding["code"] for finding in warned["warnings"]}
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    report = cli.json("conflicts", "acme/foreign:1.0.0", "acme/sql:1.0.0")
    assert "contradicting_bases" in {finding["code"] for finding in report["findings"]}
    recipe = tmp_path / "recipe.yaml"
    inputs = ["acme/foreign:1.0.0", "acme/sql:1.0.0"]
    recipe.write_text(yaml.safe_dump({"inputs": inputs, "method": "stack", "adapter": "acme/both:1.0.0", "probe": 0}))
    composed = cli("compose", recipe, "--strict")
    assert composed.code != 0
    assert "zeta/two" in composed.err
    assert cli("show", "acme/both:1.0.0").code == 3
    cli.ok("compose", recipe)
