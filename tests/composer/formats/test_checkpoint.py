"""Opening a base: single file or shards, and one error that names the file for each way of being incomplete."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.errors import ComposerError, InvalidFile, NotSupported
from composer.formats.checkpoints.checkpoint import local_directory, open_checkpoint
from composer.formats.checkpoints.files import local_file
from tests.composer.tiny import MakeModel, tensors_in


def test_a_sharded_and_a_single_checkpoint_have_the_same_architecture(make_model: MakeModel) -> None:
    sharded, single = open_checkpoint(make_model()), open_checkpoint(make_model(name="single", shard="1GB"))
    assert len(sharded.shards) > 2
    assert list(single.shards) == ["model.safetensors"]
    assert sharded.architecture == single.architecture
    file, entry = sharded.locate("model.norm.weight")
    assert entry.name in load_file(local_file(file).path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_without_a_head_of_its_own_is_tied_also_when_the_config_is_silent(
    kind: str, make_model: MakeModel
) -> None:
    for tied in (True, False):
        base = make_model(kind, tied=tied, name=f"{kind}-{tied}")
        config = json.loads((base / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (base / "config.json").write_text(json.dumps(config))
        assert open_checkpoint(base).architecture.tied is tied


INDEX = "model.safetensors.index.json"


def change_index(base: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_tensor(base: Path) -> None:
    shard = min(base.glob("model-*"))
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard)


def set_config(base: Path, **fields: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | fields))


def only_pickles(base: Path) -> None:
    for file in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"PK")


def link_outside(base: Path) -> None:
    shard = min(base.glob("model-*"))
    outside = base.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no config": (lambda base: (base / "config.json").unlink(), "missing_config", "config.json"),
    "a config that is not JSON": (lambda base: (base / "config.json").write_text("{"), "bad_json", "config.json"),
    "a config of very many values": (
        lambda base: (base / "config.json").write_text('{"a": [' + "[]," * 500_001 + "[]]}"),
        "too_large",
        "config.json has more than 1,000,000 values",
    ),
    "a missing shard": (lambda base: min(base.glob("model-*")).unlink(), "missing_shard", "model-00001"),
    "a tensor that is only in the index": (
        lambda base: change_index(base, lambda names: names.update({"x": names["model.norm.weight"]})),
        "missing_tensor",
        "'x'",
    ),
    "a tensor that is not in the index": (
        lambda base: change_index(base, lambda names: names.pop("model.norm.weight")),
        "unindexed_tensor",
        "model.norm.weight",
    ),
    "a tensor missing in its shard": (drop_tensor, "missing_tensor", "model-00001"),
    "an empty index": (lambda base: change_index(base, lambda names: names.clear()), "bad_index", "weight_map"),
    "a shard that climbs out": (
        lambda base: change_index(base, lambda names: names.update({"x": "../outside.safetensors"})),
        "link_outside",
        "outside",
    ),
    "a link that leads out": (link_outside, "link_outside", "model-00001"),
    "only pickles": (only_pickles, "pickle", "pytorch_model.bin"),
    "no weights": (
        lambda base: [file.unlink() for file in base.glob("model*")],
        "missing_weights",
        "model.safetensors",
    ),
    **{
        f"a shard whose name is {what}": (
            lambda base, name=name: change_index(base, lambda names: names.update({"x": name})),
            "bad_index",
            "'x' in",
        )
        for what, name in (
            ("half a text", "a\0b"),
            ("endless", "x" * 5000 + ".safetensors"),
            ("that of a text", "README.md"),
            ("that of our note", "adaptory.json"),
            ("hidden", ".journal.safetensors"),
            ("half a pair", "\ud800"),
            ("a list", ["x"]),
            ("none", None),
        )
    },
    "metadata that are a list": (
        lambda base: (base / INDEX).write_text(json.dumps(json.loads((base / INDEX).read_text()) | {"metadata": [1]})),
        "bad_index",
        "metadata",
    ),
    "weights twice": (
        lambda base: (base / "model.safetensors").write_bytes(max(base.glob("model-*")).read_bytes()),
        "two_checkpoints",
        "model.safetensors, and the shards of",
    ),
    "a quantization that is a text": (
        lambda base: set_config(base, quantization_config="fp8"),
        "bad_config",
        "quantization_config is 'fp8'",
    ),
    "a quantized base": (
        lambda base: set_config(base, quantization_config={"quant_method": "gptq"}),
        "quantized_base",
        "gptq",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_incomplete_checkpoint_is_refused_with_the_file(case: str, make_model: MakeModel) -> None:
    change, code, names = BROKEN[case]
    base = make_model()
    change(base)
    with pytest.raises((InvalidFile, NotSupported), match=names) as caught:
        open_checkpoint(base)
    error: ComposerError = caught.value
    assert error.code == code


def test_a_hugging_face_cache_may_link_to_its_blobs(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in base.iterdir():
        file.rename(blobs / f"digest-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/digest-{file.name}")
    assert open_checkpoint(snapshot).architecture.tensors.keys() == tensors_in(snapshot).keys()


def test_a_location_that_is_no_url_is_passed_over(make_model: MakeModel) -> None:
    base = make_model()
    assert local_directory(["file://[x", base.as_uri()]) == base


@pytest.mark.parametrize(("name", "value"), [("architectures", 7), ("model_type", [])])
def test_a_config_with_another_type_of_value_is_refused_by_its_name(
    name: str, value: object, make_model: MakeModel
) -> None:
    base = make_model()
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(InvalidFile, match=name):
        assert open_checkpoint(base).architecture


def test_weights_packed_by_an_old_tool_are_refused_though_the_config_is_silent(make_model: MakeModel) -> None:
    base = make_model(shard="1GB")
    shard = base / "model.safetensors"
    tensors = load_file(shard) | {"model.layers.0.self_attn.q_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)}
    save_file(tensors, shard)
    with pytest.raises(NotSupported, match="GPTQ or AWQ") as caught:
        open_checkpoint(base)
    assert (caught.value.code, caught.value.subject) == ("quantized_base", shard.name)


def test_the_directory_one_is_in_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InvalidFile, match=r"^here has no config\.json"):
        open_checkpoint(Path())
