"""`adaptory verify REF --rebuild`: a composed model is made again from base and inputs, and compared with its bytes."""

from pathlib import Path

import pytest

from tests.scenarios.test_compositions import release_all, write_recipe
from tests.scenarios.world import Cli, World

MODEL = "acme/assistant-merged:1.0.0"


@pytest.fixture
def composed(stocked_embedded: Cli, world: World, tmp_path: Path) -> Cli:
    cli = release_all(stocked_embedded, world)
    cli.ok("compose", write_recipe(tmp_path, probe=0), "--follow")
    return cli


def test_a_composed_model_is_rebuilt_from_its_lineage(composed: Cli) -> None:
    found = composed.json("verify", MODEL, "--rebuild")
    assert found["rebuild"]["verdict"] == "same"
    assert {"model.safetensors.index.json", "config.json", "tokenizer.json"} <= set(found["rebuild"]["same"])
    assert found["rebuild"]["different"] == []
    assert "signed_by" not in found
    assert "made again: same" in composed.ok("verify", MODEL, "--rebuild").out


def test_bytes_that_the_inputs_do_not_give_are_refused_and_named(composed: Cli) -> None:
    composed.ok("verify", MODEL, "--rebuild")  # now it lies in the cache, where a disk or somebody may spoil it
    cache = Path(composed.environment["ADAPTORY_HOME"]) / "cache"
    shard = next(file for file in cache.glob("*/acme--assistant-merged/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0b0100_0000
    shard.unlink()
    shard.write_bytes(content)
    refused = composed("verify", MODEL, "--rebuild", "--json")
    assert refused.code == 1
    assert shard.name in refused.out
    assert "is not what its inputs give" in refused.err


def test_what_no_composition_made_has_nothing_to_be_rebuilt_from(composed: Cli, world: World) -> None:
    refused = composed("verify", "acme/sql:1.0.0", "--rebuild")
    assert refused.code == 1
    assert "nothing to make it from again" in refused.err


@pytest.mark.parametrize("words", [("acme/sql",), (".", "--rebuild")])
def test_without_a_question_or_a_release_it_says_what_to_write(words: tuple[str, ...], stocked_embedded: Cli) -> None:
    assert stocked_embedded("verify", *words).code == 2
