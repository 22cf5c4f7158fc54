"""The table of docs/asks.md: the names of tensors under which an adapter is refused, and whether a server loads it."""

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.scenarios.hub_client import WEIGHTS
from tests.scenarios.world import Cli, World

PREFIX, REFUSED = "base_model.model.", "No tensor matches the base: keys look like"
CASES: dict[str, tuple[str, str, str, bool]] = {
    "peft": (PREFIX, PREFIX, "", True),
    "compiled": (PREFIX, f"{PREFIX}_orig_mod.", REFUSED, False),
    "another-family": (".layers.", ".layer.", REFUSED, False),
    "twice": (PREFIX, PREFIX * 2, REFUSED, False),
    "wrapper": ("model.layers.", "model.language_model.layers.", "no server looks there", False),
    "raw": (".weight", ".default.weight", "has the adapter's name in it", False),
    "bare": (PREFIX, "", "without which PEFT itself loads nothing", True),
}
"""The replaced names, the message of a push, and whether vLLM loads the adapter."""


def test_a_push_says_under_which_names_an_adapter_would_do_nothing_and_a_channel_can_refuse_it(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    for case, (old, new, said, loads) in CASES.items():
        directory = shutil.copytree(world.adapters["sql"], tmp_path / case)
        tensors = {name.replace(old, new): tensor for name, tensor in load_file(directory / WEIGHTS).items()}
        save_file(tensors, directory / WEIGHTS)
        pushed = stocked_embedded("push", directory, f"acme/{case}:1.0.0", "--base", "tiny")
        assert (pushed.code, said in pushed.err) == (6 if said == REFUSED else 0, True), (case, pushed.err)
        if pushed.code == 0:
            [vllm] = stocked_embedded.json("inspect", f"acme/{case}:1.0.0", "--loads-in", "vllm:16")["loads_in"]
            assert vllm["loads"] is loads, case
    loaded = stocked_embedded.json("search", "--loads-in", "vllm:16")["items"]
    assert {row["repository"] for row in loaded} == {"acme/peft", "acme/bare"}
    policy = tmp_path / "policy.yaml"
    policy.write_text('version: 1\nloads_in: ["vllm:16"]\n')
    for case, code in {"peft": 0, "wrapper": 1}.items():
        stocked_embedded.ok("policy", "set", f"acme/{case}@prod", policy)
        promoted = stocked_embedded("promote", f"acme/{case}:1.0.0", "--to", "prod")
        refusal = "FAIL  loads in vllm:16: its paths are those of another model"
        assert (promoted.code, refusal in promoted.err) == (code, bool(code)), promoted.err


@pytest.mark.on("PostgreSQL")
def test_a_policy_names_a_server_that_there_is(stocked_embedded: Cli, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\nloads_in: [vllm:17]\n")
    refused = stocked_embedded("policy", "set", "acme/sql@prod", policy)
    assert (refused.code, "Unknown profile 'vllm:17'" in refused.err) == (6, True), refused.err
