"""Changes between two releases: facts, every delta, scores with their errors, files, provenance."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.composer.handmade import random_factors, write_adapter
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))


def dense_deltas(directory: Path, scale: float) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    tensors = load_file(directory / "adapter_model.safetensors")
    modules = {key.partition(".lora_")[0] for key in tensors}
    return {
        module.removeprefix("base_model.model."): (
            scale * tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
        ).numpy()
        for module in modules
    }


@pytest.mark.on("SQLite")
def test_two_releases_are_compared_in_everything_they_say(stocked: Cli, world: World, tmp_path: Path) -> None:
    cli = stocked
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    changed = tmp_path / "changed"
    shutil.copytree(world.adapters["other-sql"], changed)
    (changed / "README.md").write_text("---\nlicense: mit\n---\n")
    (changed / "notes.txt").write_text("new")
    cli.ok("push", changed, "acme/sql:1.1.0", "--base", "tiny", "--include", "*.txt")

    document = cli.json("diff", "acme/sql:1.0.0", "acme/sql:1.1.0")
    assert (document["old"], document["new"], document["change"]) == ("acme/sql:1.0.0", "acme/sql:1.1.0", "weights")
    assert {"name": "license", "old": None, "new": "mit"} in document["provenance"]
    assert document["files"] == {
        "added": ["notes.txt"],
        "removed": [],
        "changed": ["README.md", "adapter_model.safetensors"],
    }
    old, new = dense_deltas(world.adapters["sql"], 2.0), dense_deltas(changed, 2.0)
    rows = {row["module"]: row for row in document["deltas"]["modules"]}
    assert set(rows) == set(old)
    for module, row in rows.items():
        assert row["norm_difference"] == pytest.approx(np.linalg.norm(new[module] - old[module]), rel=1e-9)
        assert row["energy_gained"] + row["energy_lost"] == pytest.approx(row["norm_difference"] ** 2, rel=1e-9)
    energy = sum(np.linalg.norm(new[module] - old[module]) ** 2 for module in old)
    assert document["deltas"]["whole"]["norm_difference"] ** 2 == pytest.approx(energy, rel=1e-9)
    shown = cli.ok("diff", "acme/sql:1.0.0", "acme/sql:1.1.0").out
    assert "other weights" in shown
    assert "notes.txt" in shown
    assert "all deltas" in shown


def test_a_breaking_change_is_called_one_with_its_reasons(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    for name in ("sql", "terraform"):
        cli.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    document = cli.json("diff", "acme/sql", "acme/terraform")
    assert document["change"] == "breaking"
    assert {finding["code"] for finding in document["breaking"]} == {"other_type", "more_targets"}
    facts = {row["name"]: (row["old"], row["new"]) for row in document["facts"]}
    assert facts["rank_max"] == (4, 2)
    assert facts["targets"] == (["q_proj", "v_proj"], ["o_proj", "q_proj"])
    statuses = {row["module"].split(".")[-1]: row["status"] for row in document["deltas"]["modules"]}
    assert statuses == {"q_proj": "changed", "v_proj": "removed", "o_proj": "added"}


@pytest.mark.on("PostgreSQL")
def test_scores_are_compared_with_the_error_of_their_difference(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    digest = next(item["digest"] for item in cli.json("suite", "list")["items"] if item["name"] == "sql-exact")
    measured = {"1.0.0": ((0.5, 0.03), (1.0, 0.2)), "1.1.0": ((0.7, 0.04), (0.9, 0.2))}
    for (version, values), name in zip(measured.items(), ("sql", "other-sql"), strict=True):
        cli.ok("push", world.adapters[name], f"acme/sql:{version}", "--base", "tiny")
        scores = [
            {"suite_digest": digest, "metric": metric, "value": value, "stderr": stderr, "n": 6, "higher_is_better": up}
            for metric, up, (value, stderr) in zip(("accuracy", "nll"), (True, False), values, strict=True)
        ]
        with api_of(cli) as api:
            api.post(f"/v1/adapters/acme/sql/releases/{version}/scores", {"scores": scores})
    rows = {row["metric"]: row for row in cli.json("diff", "acme/sql:1.0.0", "acme/sql:1.1.0")["scores"]}
    accuracy, nll = rows["accuracy"], rows["nll"]
    assert (accuracy["difference"], accuracy["stderr"]) == (pytest.approx(0.2), pytest.approx(0.05))
    assert (accuracy["better"], accuracy["beyond"]) == (True, True)
    assert (nll["better"], nll["beyond"]) == (True, False), "0.1 is within the error of 0.28"
    shown = cli.ok("diff", "acme/sql:1.1.0", "acme/sql:1.0.0").out
    assert "worse" in shown
    assert "within its error" in shown


def test_two_directories_need_no_registry(tmp_path: Path) -> None:
    one, other = random_factors(1), random_factors(2)
    write_adapter(tmp_path / "old", {Q0: one, Q1: one}, dtype=torch.float32)
    write_adapter(tmp_path / "new", {Q0: one, Q1: other}, dtype=torch.float32)
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": "http://127.0.0.1:1"})
    document = cli.json("diff", tmp_path / "old", tmp_path / "new")
    assert [(row["module"], row["status"]) for row in document["deltas"]["modules"]] == [(Q1, "changed"), (Q0, "same")]
    assert document["change"] == "weights"
    assert Q0 not in cli.ok("diff", tmp_path / "old", tmp_path / "new").out, "what did not change is not listed"
    assert Q0 in cli.ok("diff", tmp_path / "old", tmp_path / "new", "--all").out
    assert cli.json("diff", tmp_path / "old", tmp_path / "old")["change"] == "none"


def test_a_release_is_compared_with_what_would_follow_it(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    cli, edited = stocked_embedded, tmp_path / "edited"
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    shutil.copytree(world.adapters["sql"], edited)
    assert cli.json("diff", "acme/sql", edited)["change"] == "none"
    tensors = load_file(edited / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {first: 2 * tensors[first]}, edited / "adapter_model.safetensors")
    document = cli.json("diff", "acme/sql", edited)
    (row,) = [row for row in document["deltas"]["modules"] if row["status"] == "changed"]
    assert row["cosine"] == pytest.approx(1)
    assert (row["energy_gained"], row["energy_lost"]) == (
        pytest.approx(row["norm_old"] ** 2),
        pytest.approx(0, abs=1e-9),
    )
    assert document["breaking"] == [], "nobody knows the base of a directory"


def test_a_damaged_directory_is_refused_and_named(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(world.adapters["sql"], damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    refused = stocked_embedded("diff", world.adapters["sql"], damaged)
    assert refused.code == 6
    assert "adapter_model.safetensors" in refused.err
