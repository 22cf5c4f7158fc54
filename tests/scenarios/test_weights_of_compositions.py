"""Files of a composition that are pushed again keep its inputs, licences and verdict."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from composer.formats.adapters.facts import WEIGHTS_FILE
from registry.domain.catalog import releases
from registry.domain.channels import withdrawals
from registry.formats.references import parse_repository, parse_version
from registry.transfer import commits as transfers
from tests.durability import test_commits as hub
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.test_licences_and_upgrades import with_card
from tests.scenarios.world import Cli, World

CARD = "README.md"


def composed(cli: Cli, world: World, directory: Path) -> None:
    """acme/both and acme/merged, of an adapter under the GPL and another."""
    gpl = with_card(directory / "gpl", world.adapters["sql"], license="gpl-3.0")
    cli.ok("push", gpl, "acme/gpl:1.0.0", "--base", "tiny")
    cli.ok("push", world.adapters["support"], "acme/support:1.0.0", "--base", "tiny")
    recipe = {"inputs": ["acme/gpl:1.0.0", "acme/support:1.0.0"], "method": "mean", "gates": [], "probe": 0}
    outputs = {"adapter": "acme/both:1.0.0", "model": "acme/merged:1.0.0"}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe | outputs))
    cli.ok("compose", directory / "recipe.yaml")


def inputs(cli: Cli, ref: str) -> list[Any]:
    return cli.json("show", ref)["inputs"]


def forged(cli: Cli, ref: str, directory: Path) -> Path:
    """Its files, with a card that states MIT."""
    cli.ok("pull", ref, "-o", directory)
    (directory / CARD).write_text("---\nlicense: mit\n---\n")
    return directory


@pytest.mark.parametrize("name", ["both", "merged"])
def test_weights_of_a_composition_that_are_pushed_again_keep_its_inputs_licences_and_verdict(
    stocked_embedded: Cli, world: World, tmp_path: Path, name: str
) -> None:
    cli = stocked_embedded
    composed(cli, world, tmp_path)
    directory = forged(cli, f"acme/{name}:1.0.0", tmp_path / "pulled")
    shutil.copy(world.adapters["terraform"] / WEIGHTS_FILE, directory / "more.safetensors")
    kind = ("--kind", "model") if name == "merged" else ()
    for target in (f"acme/{name}:1.1.0", "other/name:1.0.0"):
        pushed = cli.json("push", directory, target, "--base", "tiny", *kind)
        assert "composed_weights" in [warning["code"] for warning in pushed["warnings"]]
        assert inputs(cli, target) == inputs(cli, f"acme/{name}:1.0.0") != []
        policy = {"version": 1, "licenses": {"refuse": ["gpl-3.0"]}, "verdict": "ok"}
        (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
        channel = f"{target.partition(':')[0]}@prod"
        cli.ok("policy", "set", channel, tmp_path / "policy.yaml")
        refused = cli("promote", target, "--to", "prod", "--json").json["error"]["findings"]
        results: Mapping[str, Any] = {result["rule"]: result for result in refused}
        assert not results["no gpl-3.0"]["passed"]
        assert "not composed here" not in results["verdict ok"]["detail"]


@pytest.mark.long
def test_weights_of_a_composition_that_has_been_taken_down_keep_its_inputs(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    """Like retention after some days, which bars nothing; its files were pulled before."""
    cli = stocked_embedded
    composed(cli, world, tmp_path)
    directory = forged(cli, "acme/both:1.0.0", tmp_path / "pulled")
    made = inputs(cli, "acme/both:1.0.0")
    with resources_of(cli.environment) as resources, resources.write() as session:
        release = releases.find(session, parse_repository("acme/both"), parse_version("1.0.0"))
        withdrawals.take_down(session, hub.actor(resources), release, "it is old", bar=False)
    cli.ok("gc", "--grace-hours", "0")
    cli.ok("push", directory, "other/name:1.0.0", "--base", "tiny")
    assert inputs(cli, "other/name:1.0.0") == made != []


@pytest.mark.on("PostgreSQL")
def test_one_changed_weight_ends_what_is_inherited(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    cli = stocked_embedded
    composed(cli, world, tmp_path)
    weights = forged(cli, "acme/both:1.0.0", tmp_path / "pulled") / WEIGHTS_FILE
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    pushed = cli.json("push", tmp_path / "pulled", "acme/both:1.1.0", "--base", "tiny")
    assert pushed["release"]["inputs"] == []


def test_an_adapter_that_others_have_composed_alone_is_still_its_authors(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    """Otherwise anyone could give it inputs, effective when its author pushes it with another card."""
    cli = stocked_embedded
    cli.ok("combine", "--adapter", world.adapters["sql"], "--method", "stack", "-o", tmp_path / "own")
    cli.ok("push", tmp_path / "own", "acme/own:1.0.0", "--base", "tiny")
    recipe = {"inputs": ["acme/own:1.0.0"], "method": "stack", "adapter": "other/copy:1.0.0", "gates": [], "probe": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.ok("compose", tmp_path / "recipe.yaml")
    own, copy = (
        {row["path"]: row["sha256"] for row in cli.json("show", ref)["files"]} for ref in ("acme/own", "other/copy")
    )
    assert own[WEIGHTS_FILE] == copy[WEIGHTS_FILE]
    (tmp_path / "own" / CARD).write_text("Another card")
    assert cli.json("push", tmp_path / "own", "acme/own:1.0.1", "--base", "tiny")["release"]["inputs"] == []


@pytest.mark.long
def test_a_tag_of_the_hub_keeps_the_inputs_of_the_weights_that_it_publishes(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    composed(cli, world, tmp_path)
    files = {path.name: path.read_bytes() for path in forged(cli, "acme/both:1.0.0", tmp_path / "pulled").iterdir()}
    files[CARD] = b"---\nlicense: mit\nbase_model: tiny\n---\n"
    with resources_of(cli.environment) as resources:
        name = parse_repository("acme/tagged")
        hub.create(resources, name)
        head = hub.commit(resources, files, name)
        findings = transfers.release(resources, hub.actor(resources), name, head, parse_version("1.0.0"), "")
    assert "composed_weights" in [finding["code"] for finding in findings]
    assert inputs(cli, "acme/tagged:1.0.0") == inputs(cli, "acme/both:1.0.0")
