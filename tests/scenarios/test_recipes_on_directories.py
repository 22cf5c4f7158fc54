"""One recipe file: `merge` and `combine` run it on directories, `compose` in the registry."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import services
from tests.composer.tiny import tensors_in
from tests.scenarios.world import Cli, World

NAMES = ("sql", "terraform")
RECIPE: dict[str, Any] = {
    "base": "tiny",
    "inputs": [
        {"adapter": f"acme/{name}@prod", "weight": weight, "suite": f"{name}-exact"}
        for name, weight in zip(NAMES, (0.5, -0.25), strict=True)
    ],
    "method": "linear",
    "adapter": "acme/both:1.0.0",
    "model": "acme/both-merged:1.0.0",
    "probe": 0,
    "gates": [],
}


def written(directory: Path, **changes: Any) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (RECIPE | changes).items() if value is not None}))
    return path


def here(world: World, *options: object) -> list[object]:
    """The options that name the files of a recipe on this machine."""
    adapters = [word for name in NAMES for word in ("--adapter", world.adapters[name])]
    suites = [word for name in NAMES for word in ("--suite", world.suites[name])]
    return ["--base", world.base, *adapters, *suites, *options]


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = tensors_in(one), tensors_in(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("small_team", [services.PAIRINGS[0]], indirect=True)
def test_the_same_recipe_gives_the_same_weights_from_directories_from_releases_and_as_a_composition(
    small_team: Cli, world: World, tmp_path: Path
) -> None:
    recipe = written(tmp_path)
    small_team.ok("compose", recipe)
    small_team.ok("pull", "acme/both:1.0.0", "-o", tmp_path / "adapter")
    small_team.ok("pull", "acme/both-merged:1.0.0", "-o", tmp_path / "model")
    merged = small_team.json("merge", recipe, *here(world), "--prove", "-o", tmp_path / "merged")
    assert merged["proof"]["state"] == "proved"
    assert_same(tmp_path / "merged", tmp_path / "model")
    small_team.ok("combine", recipe, *here(world), "-o", tmp_path / "combined")
    assert_same(tmp_path / "combined", tmp_path / "adapter")
    small_team.ok("merge", recipe, "-o", tmp_path / "of-releases")
    assert_same(tmp_path / "of-releases", tmp_path / "model")


def test_a_recipe_may_name_directories_beside_it_and_needs_no_registry(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    for name in ("base", *NAMES):
        (tmp_path / name).symlink_to(world.base if name == "base" else world.adapters[name])
    recipe = written(tmp_path, base="base", inputs=[{"adapter": name} for name in NAMES], method="ties")
    on_disk.ok("merge", recipe, "-o", tmp_path / "merged")
    options = [word for name in NAMES for word in ("--adapter", world.adapters[name])]
    on_disk.ok("merge", "--base", world.base, *options, "--method", "ties", "-o", tmp_path / "by-options")
    assert_same(tmp_path / "merged", tmp_path / "by-options")
    assert not (tmp_path / "home").exists()
    refused = on_disk("compose", recipe)
    assert (refused.code, "sql in" in refused.err) == (2, True)
    assert "is a directory, and a composition combines releases" in refused.err


def test_a_recipe_that_fits_nothing_needs_neither_its_suites_nor_a_registry(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    recipe = written(tmp_path, evaluate=["guard-general"])
    options = [word for name in NAMES for word in ("--adapter", world.adapters[name])]
    on_disk.ok("combine", recipe, "--base", world.base, *options, "-o", tmp_path / "combined")
    assert not (tmp_path / "home").exists()


def test_an_adapter_that_answers_only_after_a_phrase_is_not_fitted_without_it(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.adapters["sql"], tmp_path / "sql")
    (tmp_path / "sql" / "adaptory.json").write_text(json.dumps({"phrases": {"sql-exact": "For MySQL."}}))
    recipe = written(tmp_path, method="regmean", settings={"examples": 4})
    words = [tmp_path / "sql" if word == world.adapters["sql"] else word for word in here(world)]
    refused = on_disk("combine", recipe, *words, "-o", tmp_path / "combined")
    assert (refused.code, "answers sql-exact after the phrase “For MySQL.”" in refused.err) == (2, True), refused.err
    written(tmp_path)
    on_disk.ok("combine", recipe, *words, "-o", tmp_path / "combined")


def test_a_fitted_recipe_is_fitted_on_its_suites_here_as_in_the_registry(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    recipe = written(tmp_path, method="regmean", settings={"examples": 4})
    combined = on_disk.json("combine", recipe, *here(world), "-o", tmp_path / "combined")
    assert len(combined["fit"]["errors"]) == 2
    note = json.loads((tmp_path / "combined" / "adaptory.json").read_text())
    assert [(row["suite"], len(row["examples"])) for row in note["calibration"]] == [
        ("sql-exact", 4), ("terraform-exact", 4),
    ]  # fmt: skip
    on_disk.ok("merge", recipe, *here(world), "-o", tmp_path / "merged")
    fitted, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("merged-adapter", "combined"))
    assert fitted.keys() == own.keys()


def test_a_search_by_a_recipe_chooses_what_is_combined_and_is_in_the_result(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    inputs = [{**source, "weight": 1.0} for source in RECIPE["inputs"]]
    limits = {"thresholds": {"probe_loss": 100, "probe_answers": 0.0}}
    recipe = written(tmp_path, inputs=inputs, optimize={"search": 2, "confirm": 2}, policy=limits)
    made = on_disk.json("combine", recipe, *here(world), "-o", tmp_path / "combined")
    chosen = made["optimized"]["choice"]
    note = json.loads((tmp_path / "combined" / "adaptory.json").read_text())
    assert note["method"] == chosen["method"]
    assert [row["weight"] for row in note["adapters"]] == chosen["factors"]


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, ["--method", "ties"], "--method has no effect with a recipe, which states it"),
        ({}, ["--adapter", "x"], "--adapter names 3 directories for the 2 inputs"),
        ({"inputs": ["sql", "terraform", "support"]}, ["--adapter", "x=0.5"], "x=0.5 in --adapter is not a directory"),
        ({"method": "regmean", "inputs": [{"adapter": "sql"}, {"adapter": "terraform"}]}, [], "no suite of"),
        ({"set": "acme/all:1.0.0", "method": None, "adapter": None, "model": None,
          "inputs": ["acme/sql", "acme/terraform"]}, [], "publishes a set, which combines nothing"),
    ],
)  # fmt: skip
def test_what_a_recipe_on_directories_cannot_do_is_refused(
    on_disk: Cli, world: World, tmp_path: Path, changes: dict[str, Any], options: list[str], said: str
) -> None:
    words = ["--base", world.base, *(word for name in NAMES for word in ("--adapter", world.adapters[name]))]
    refused = on_disk("merge", written(tmp_path, **changes), *words, *options, "-o", tmp_path / "out")
    assert (refused.code, said in refused.err) == (2, True), refused.err
    assert not (tmp_path / "out").exists()


def test_without_a_recipe_and_adapters_and_for_a_directory_as_a_recipe_the_error_says_what_to_name(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    assert "Neither a recipe nor --adapter is given" in on_disk("merge", "--base", world.base, "-o", tmp_path / "o").err
    assert "without a recipe" in on_disk("combine", "--optimize", "-o", tmp_path / "o").err
    refused = on_disk("compose", tmp_path).err
    assert "it is a directory. Name a file in it." in " ".join(refused.replace("next:", "").split())


def test_a_configuration_of_mergekit_is_imported_as_a_recipe_that_merges_directories(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    models = [
        {"model": f"{world.base}+{world.adapters[name]}", "parameters": {"weight": weight}}
        for name, weight in zip(NAMES, (0.5, -0.25), strict=True)
    ]
    config = {"merge_method": "task_arithmetic", "base_model": str(world.base), "models": models}
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(config))
    printed = on_disk.ok("recipe", "import", tmp_path / "mergekit.yaml").out
    on_disk.ok("recipe", "import", tmp_path / "mergekit.yaml", "-o", tmp_path / "imported.yaml")
    assert (tmp_path / "imported.yaml").read_text() == printed
    on_disk.ok("merge", tmp_path / "imported.yaml", "-o", tmp_path / "merged")
    on_disk.ok("merge", written(tmp_path), *here(world), "-o", tmp_path / "own")
    assert_same(tmp_path / "merged", tmp_path / "own")
    again = on_disk("recipe", "import", tmp_path / "mergekit.yaml", "-o", tmp_path / "imported.yaml")
    assert (again.code, "exists" in again.err) == (4, True)


def test_a_recipe_of_directories_without_a_base_says_that_it_needs_one(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    options = [word for name in NAMES for word in ("--adapter", world.adapters[name])]
    refused = on_disk("merge", written(tmp_path, base=None), *options, "-o", tmp_path / "out")
    assert (refused.code, "names no base, and its inputs are directories" in refused.err) == (2, True), refused.err
