"""`adaptory verify REF --rebuild`: a composed model is made again from base and inputs, and compared with its bytes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM

from tests.composer.merge.test_merge_nf4 import pack
from tests.scenarios.test_compositions import write_recipe
from tests.scenarios.test_signatures import Keys
from tests.scenarios.world import Cli, World

MODEL = "acme/assistant-merged:1.0.0"


@pytest.fixture
def composed(small_team: Cli, tmp_path: Path) -> Cli:
    small_team.ok("compose", write_recipe(tmp_path, probe=0), "--follow")
    return small_team


def test_a_composed_model_is_rebuilt_from_its_lineage(composed: Cli) -> None:
    report = composed.json("verify", MODEL, "--rebuild")
    assert report["rebuild"]["verdict"] == "same"
    assert {"model.safetensors.index.json", "config.json", "tokenizer.json"} <= set(report["rebuild"]["same"])
    assert report["rebuild"]["different"] == []
    assert "signed_by" not in report
    assert "rebuilt: same" in composed.ok("verify", MODEL, "--rebuild").out


@pytest.mark.long
def test_a_recipe_may_name_its_inputs_in_another_order_than_they_were_published_in(
    composed: Cli, tmp_path: Path
) -> None:
    inputs = [{"adapter": "acme/support", "weight": 1.5}, {"adapter": "acme/sql@prod", "weight": 0.5}]
    composed.ok("compose", write_recipe(tmp_path, inputs=inputs, adapter=None, model="acme/other:1.0.0", probe=0))
    shown = composed.json("show", "acme/other:1.0.0")["inputs"]
    assert [row["weight"] for row in shown] == [0.5, 1.5], "the registry's order is not the recipe's"
    assert composed.json("verify", "acme/other:1.0.0", "--rebuild")["rebuild"]["verdict"] == "same"


def test_a_seed_without_stochastic_rounding_is_refused(world: World, on_disk: Cli, tmp_path: Path) -> None:
    merge = ("merge", "--base", world.base, "--adapter", world.adapters["sql"], "-o", tmp_path / "merged")
    for rounding in ((), ("--rounding", "nearest")):
        refused = on_disk(*merge, "--seed", "0", *rounding)
        assert (refused.code, "--seed has no effect" in refused.err) == (2, True), refused.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.long
def test_a_recipe_that_rounds_by_chance_gives_bytes_that_it_gives_again(composed: Cli, tmp_path: Path) -> None:
    rounding = {"mode": "stochastic", "seed": 2**64 - 1}
    weights: list[list[bytes]] = []
    for name, changes in (("chance", {"rounding": rounding}), ("nearest", {})):
        output = {"adapter": None, "model": f"acme/{name}:1.0.0", "dtype": "bfloat16", "probe": 0}
        done = composed.json("compose", write_recipe(tmp_path, **output, **changes))
        assert done["lock"].get("rounding") == done["recipe"].get("rounding") == changes.get("rounding")
        assert composed.json("verify", f"acme/{name}:1.0.0", "--rebuild")["rebuild"]["verdict"] == "same"
        composed.ok("pull", f"acme/{name}:1.0.0", "-o", tmp_path / name)
        weights.append([file.read_bytes() for file in sorted((tmp_path / name).glob("*.safetensors"))])
    assert weights[0] != weights[1]
    assert json.loads((tmp_path / "chance" / "adaptory.json").read_text())["rounding"] == rounding


def test_every_output_tells_the_recipe_and_the_lock_that_it_came_from_by_commits(composed: Cli, tmp_path: Path) -> None:
    recipe = yaml.safe_load(write_recipe(tmp_path, probe=0).read_text())
    of_releases = ("inputs", "adapter", "model")
    for output in ("acme/assistant:1.0.0", MODEL):
        directory = tmp_path / output.partition("/")[2]
        composed.ok("pull", output, "-o", directory)
        note = json.loads((directory / "adaptory.json").read_text())["note"]
        assert not set(of_releases) & set(note["recipe"])
        wanted = {name: value for name, value in recipe.items() if name not in of_releases}
        assert {name: note["recipe"][name] for name in wanted} == wanted
        assert note["lock"]["inputs"] == [
            {"commit": composed.json("show", row["adapter"])["commit"], "weight": row["weight"]}
            for row in recipe["inputs"]
        ]


@pytest.mark.long
def test_a_copy_that_was_spoiled_after_it_was_pulled_is_pulled_anew(composed: Cli) -> None:
    composed.ok("verify", MODEL, "--rebuild")  # now it is in the cache, where a disk or a user may damage it
    cache = Path(composed.environment["ADAPTORY_HOME"]) / "cache"
    shard = next(file for file in cache.glob("*/acme--assistant-merged/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1  # the minimum
    shard.unlink()
    shard.write_bytes(content)
    assert composed.json("verify", MODEL, "--rebuild")["rebuild"]["verdict"] == "same"


@pytest.mark.long
def test_what_no_composition_made_has_nothing_to_be_rebuilt_from(composed: Cli, world: World) -> None:
    refused = composed("verify", "acme/sql:1.0.0", "--rebuild")
    assert refused.code == 1
    assert "cannot be rebuilt" in refused.err


@pytest.mark.parametrize("words", [(".",), (".", "--rebuild")])
def test_without_a_question_or_a_release_it_says_what_to_write(words: tuple[str, ...], stocked_embedded: Cli) -> None:
    assert stocked_embedded("verify", *words).code == 2


@pytest.mark.long
def test_an_option_that_says_nothing_here_is_refused(composed: Cli, tmp_path: Path) -> None:
    key = Keys(tmp_path, "team").public
    for words, idle in (
        ((MODEL, "--rebuild", "--dequantize"), "--dequantize"),
        ((MODEL, "--rebuild", "--adapter", "."), "--adapter"),
        ((".", "--key", key, "--dequantize"), "--dequantize"),
        ((".", "--key", key, "--base-dir", "."), "--base-dir"),
    ):
        refused = composed("verify", *words)
        assert refused.code == 2, words
        assert f"{idle} has no effect" in refused.err


def test_what_merge_wrote_into_a_directory_is_made_again_from_the_base_and_adapters_that_are_named(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    merged, (sql, other) = tmp_path / "merged", list(world.adapters.values())[:2]
    stocked_embedded.ok("merge", "--base", world.base, "--adapter", sql, "--adapter", f"{other}=0.5", "-o", merged)
    named = ("--base-dir", world.base, "--adapter", other, "--adapter", sql)
    assert stocked_embedded.json("verify", merged, "--rebuild", *named)["rebuild"]["verdict"] == "same"
    missing = stocked_embedded("verify", merged, "--rebuild", "--base-dir", world.base, "--adapter", sql)
    assert missing.code == 1
    assert other.name in missing.err
    weighted = stocked_embedded("verify", merged, "--rebuild", *named[:-1], f"{sql}=1.0")
    assert (weighted.code, "the weights come from" in weighted.err) == (2, True), weighted.err
    for more in ("adapter.safetensors", "pytorch_model.bin"):
        (merged / more).write_bytes(b"a loader may take it for the model")
        ran = stocked_embedded("verify", merged, "--rebuild", *named)
        assert (ran.code, f"{more} does not belong to this merge" in ran.out) == (1, True), ran.out
        (merged / more).unlink()
    shard = max(merged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    changed = stocked_embedded("verify", merged, "--rebuild", *named)
    assert changed.code == 1
    assert shard.name in changed.out


def test_a_merge_into_what_a_4_bit_base_stands_for_is_made_again_too(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(world.base).save_pretrained(base)
    pack(base)
    sql, merged = world.adapters["sql"], tmp_path / "merged"
    for command in (("merge", "-o", merged), ("combine", "-o", merged, "--adapter", world.adapters["support"])):
        refused = stocked_embedded(*command, "--base", base, "--adapter", sql)
        assert (refused.code, "`adaptory merge --dequantize`" in refused.err) == (1, True), refused.err
    stocked_embedded.ok("merge", "--base", base, "--adapter", sql, "-o", merged, "--dequantize")
    named = ("verify", merged, "--rebuild", "--base-dir", base, "--adapter", sql)
    assert "`adaptory merge --dequantize`" in stocked_embedded(*named).err
    assert stocked_embedded.json(*named, "--dequantize")["rebuild"]["verdict"] == "same"


INTERRUPTED = """
import os, signal, time
from composer.merge.io.journal import ShardJournal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
finish = ShardJournal.finish
def finish_and_be_interrupted(self, path):
    finish(self, path)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
ShardJournal.finish = finish_and_be_interrupted
from registry.cli.start import main
main()
"""


@pytest.mark.long
def test_an_interrupted_merge_says_what_is_left_and_is_resumed(world: World, tmp_path: Path) -> None:
    """The signal comes when the first shard is finished: the real command, in its own process."""
    merge = ["merge", "--base", world.base, "--adapter", world.adapters["sql"], "-o", tmp_path / "merged"]
    words = [sys.executable, "-c", INTERRUPTED, *map(str, merge)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    (left,) = tmp_path.glob("merged.partial-*")
    assert (ran.returncode, ran.stdout) == (130, "")
    assert ran.stderr.splitlines()[-1].startswith(f"interrupted: finished parts are in {left}")
    report = Cli({"ADAPTORY_HOME": str(tmp_path / "home")}).json(*merge)
    assert report["resumed_bytes"] > 0
    assert not left.exists()


def test_what_a_merge_warns_of_is_in_its_document_too(world: World, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    for file in base.glob("tokenizer*"):
        file.unlink()
    merge = ("merge", "--base", base, "--adapter", world.adapters["sql"], "-o", tmp_path / "merged")
    report = Cli({"ADAPTORY_HOME": str(tmp_path / "home")}).json(*merge)
    assert "no_tokenizer" in {finding["code"] for finding in report["findings"]}
