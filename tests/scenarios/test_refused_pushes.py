"""Pushes that must not happen: each is refused with the module or file in its message, and leaves nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PromptTuningConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from registry.client import push
from registry.client.selection import Selection, select_files
from registry.errors import Invalid, NotFound, RegistryError
from registry.formats.references import parse_repository
from registry.wire.transfer import PutOut
from tests import services
from tests.composer.small_model import save_adapter
from tests.scenarios.conftest import stock
from tests.scenarios.traces import Traces, api_of, traces
from tests.scenarios.world import Cli, World, nothing

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, np.ndarray]
Damage = Callable[[Path], None]


def in_tensors(change: Callable[[Tensors], Tensors]) -> Damage:
    def damage(directory: Path) -> None:
        save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS)

    return damage


def in_config(**changes: object) -> Damage:
    def damage(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(config | changes))

    return damage


def first_a(tensors: Mapping[str, np.ndarray]) -> str:
    return next(name for name in sorted(tensors) if "layers.1.self_attn.v_proj.lora_A" in name)


def renamed(old: str, new: str) -> Damage:
    return in_tensors(lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()})


def with_value(value: float) -> Damage:
    def change(tensors: Tensors) -> Tensors:
        tensor = tensors[first_a(tensors)].copy()
        tensor.flat[3] = value
        return tensors | {first_a(tensors): tensor}

    return in_tensors(change)


def wider(tensors: Tensors) -> Tensors:
    name = first_a(tensors)
    return tensors | {name: np.concatenate([tensors[name], tensors[name]], axis=1)}


def pickled(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, directory / "adapter_model.bin")
    (directory / WEIGHTS).unlink()


def pickle_beside(directory: Path) -> None:
    torch.save({"step": 3}, directory / "optimizer.pt")


def cut(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[:-100])


def enormous(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + data[8:])


DAMAGED: dict[str, tuple[Damage, list[str]]] = {
    "a wrong prefix": (renamed("base_model.model.model.", "base_model.model.other."), ["other.layers"]),
    "a target that matches nothing": (renamed("layers.1.self_attn", "layers.9.self_attn"), ["layers.9.self_attn"]),
    "a shape that does not fit": (in_tensors(wider), ["layers.1.self_attn.v_proj"]),
    "a NaN": (with_value(np.nan), ["layers.1.self_attn.v_proj", "NaN"]),
    "an infinite value": (with_value(-np.inf), ["layers.1.self_attn.v_proj", "infinite"]),
    "a pickle": (pickled, ["adapter_model.bin", "pickle"]),
    "a pickle beside the weights": (pickle_beside, ["optimizer.pt", "pickle"]),
    "no config": (lambda directory: (directory / CONFIG).unlink(), [CONFIG]),
    "a config that is not JSON": (lambda directory: (directory / CONFIG).write_text("{"), [CONFIG]),
    "no weights": (lambda directory: (directory / WEIGHTS).unlink(), [WEIGHTS]),
    "weights that are cut off": (cut, [WEIGHTS]),
    "a header of 2^60 bytes": (enormous, [WEIGHTS, str(2**60)]),
    "weights that are text": (lambda directory: (directory / WEIGHTS).write_text("not tensors at all"), [WEIGHTS]),
    "a rank that differs from the tensors": (in_config(r=7, rank_pattern={}), ["self_attn", "rank"]),
}  # fmt: skip


def damaged(world: World, tmp_path: Path, what: str) -> Path:
    directory = tmp_path / what.replace(" ", "-").replace("^", "")
    shutil.copytree(world.adapters["sql"], directory)
    DAMAGED[what][0](directory)
    return directory


@pytest.fixture(scope="module", params=services.ONE_PAIRING)
def untouched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, world: World) -> Cli:
    """One registry of each pairing for every refusal: each must leave it as empty as it was."""
    home = tmp_path_factory.mktemp("refused") / "home"
    return stock(Cli({"ADAPTORY_HOME": str(home), **services.pairing(request.param)}), world)


@pytest.mark.parametrize("what", list(DAMAGED))
def test_a_damaged_adapter_is_refused_by_name_and_leaves_nothing(
    untouched: Cli, world: World, tmp_path: Path, what: str
) -> None:
    directory = damaged(world, tmp_path, what)
    include = ["--include", "optimizer.pt"] if "beside" in what else []
    refused = untouched("push", directory, "acme/sql:1.0.0", "--base", "tiny", *include)
    assert refused.code == 6, refused.err
    assert "Traceback" not in refused.err
    for fragment in DAMAGED[what][1]:
        assert fragment in refused.err
    assert traces(untouched) == Traces(frozenset(), frozenset(), ())
    assert untouched("log", "acme/sql").code == 3, "not even the repository is there"


def test_an_unknown_base_is_not_found_and_leaves_nothing(stocked_embedded: Cli, world: World) -> None:
    refused = stocked_embedded("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "huge")
    assert refused.code == 3
    assert "'huge'" in refused.err
    assert "adaptory base" in refused.err
    assert traces(stocked_embedded) == Traces(frozenset(), frozenset(), ())


@pytest.mark.on("SQLite")
def test_the_server_refuses_by_itself_whatever_a_client_sends(stocked: Cli, world: World, tmp_path: Path) -> None:
    """Blobs may stay as orphans, since their bytes were right; a release or a work file may not."""
    name = parse_repository("acme/sql")
    request = {"version": "1.0.0", "bump": None, "base": "tiny", "notes": ""}
    with api_of(stocked) as api:
        for what, (_, fragments) in DAMAGED.items():
            directory = damaged(world, tmp_path, what)
            files = push.collect(Selection(directory, tuple(sorted(path.name for path in directory.iterdir()))))
            with pytest.raises(RegistryError) as raised:
                push.push(api, files, name, "adapter", request, lambda _count: None)
            assert raised.value.exit_code == 6, f"{what}: {raised.value!r}"
            message = f"{raised.value.subject} {raised.value}"
            assert all(fragment in message for fragment in fragments), f"{what}: {message}"
        files = push.collect(select_files(world.adapters["sql"]))
        with pytest.raises(NotFound):
            push.push(api, files, name, "adapter", request | {"base": "huge"}, lambda _count: None)
    left = traces(stocked)
    assert (left.work, left.releases) == (frozenset(), ())
    assert stocked("log", "acme/sql").code == 3


@pytest.mark.on("PostgreSQL")
def test_a_release_cannot_name_bytes_that_nobody_sent_or_a_pickle(stocked_embedded: Cli, world: World) -> None:
    def row(path: str, content: bytes) -> dict[str, object]:
        return {"path": path, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    request = {"version": "1.0.0", "base": "tiny"}
    with api_of(stocked_embedded) as api:
        for files, code in (
            ([row(CONFIG, b"{}"), row(WEIGHTS, b"never sent")], "blob_missing"),
            ([row("adapter_model.bin", b"x")], "pickle"),
            ([row("../outside", b"x")], "bad_path"),
            ([row("GIT~1/config", b"x")], "hidden_file"),
        ):
            with pytest.raises(RegistryError) as raised:
                api.post("/v1/adapters/acme/sql/releases", {**request, "files": files})
            assert raised.value.code == code
    assert traces(stocked_embedded) == Traces(frozenset(), frozenset(), ())


def test_a_release_that_names_a_stored_file_with_another_size_is_refused_with_both_sizes(
    stocked: Cli, world: World
) -> None:
    published = stocked.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")["release"]
    (weights,) = [row for row in published["files"] if row["path"] == WEIGHTS]
    files = [{**row, "size_bytes": 12_345} if row is weights else row for row in published["files"]]
    with api_of(stocked) as api, pytest.raises(Invalid) as raised:
        api.post("/v1/adapters/acme/sql/releases", {"version": "1.0.1", "base": "tiny", "files": files})
    assert (raised.value.code, raised.value.subject) == ("size_differs", WEIGHTS)
    assert "12,345" in raised.value.detail
    assert f"{weights['size_bytes']:,}" in raised.value.detail


def test_an_upload_whose_bytes_are_others_leaves_nothing(stocked_embedded: Cli) -> None:
    sha256 = hashlib.sha256(b"what was promised").hexdigest()
    row = {"path": "notes.txt", "size_bytes": 17, "sha256": sha256}
    with api_of(stocked_embedded) as api:
        put = api.post("/v1/uploads", {"namespace": "acme", "files": [row]})["files"][0]["put"]
        for content, claimed in ((b"what was delivered", 18), (b"what was", 17), (b"what was promised and more", 17)):
            with pytest.raises(RegistryError):
                api.send(
                    PutOut.read(put | {"headers": put["headers"] | {"Content-Length": str(claimed)}}), iter([content])
                )
    assert traces(stocked_embedded) == Traces(frozenset(), frozenset(), ())


def test_a_file_that_shrinks_while_it_is_pushed_is_named(stocked: Cli, world: World, tmp_path: Path) -> None:
    directory = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    files = push.collect(select_files(directory))
    os.truncate(directory / WEIGHTS, 100)
    with api_of(stocked) as api, pytest.raises(Invalid, match=r"adapter_model\.safetensors has changed"):
        push.send(api, "acme", files, nothing)
    assert traces(stocked).releases == ()


def test_an_adapter_of_zeros_is_published_with_a_warning(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    directory = shutil.copytree(world.adapters["sql"], tmp_path / "zeros")
    in_tensors(lambda tensors: {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()})(directory)
    pushed = stocked_embedded.ok("push", directory, "acme/sql:1.0.0", "--base", "tiny", "--json")
    assert "warning: " in pushed.err
    assert "zero" in pushed.err
    assert [finding["code"] for finding in pushed.json["warnings"]] == ["zero_delta"]
    assert traces(stocked_embedded).releases == ("acme/sql:1.0.0",)


def test_an_activated_lora_is_stored_and_shown_but_never_merged_or_composed(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    model = LlamaForCausalLM.from_pretrained(world.base)
    activated = {"alora_invocation_tokens": [1, 2]}
    save_adapter(model, tmp_path / "alora", 5, r=2, lora_alpha=4, target_modules=["q_proj"], **activated)
    pushed = cli.json("push", tmp_path / "alora", "acme/alora:1.0.0", "--base", "tiny")
    assert pushed["release"]["adapter"]["variant"] == "alora_invocation_tokens"
    cli.ok("pull", "acme/alora:1.0.0", "-o", tmp_path / "pulled")

    merged = cli("merge", "--base", world.base, "--adapter", tmp_path / "alora", "-o", tmp_path / "merged")
    assert (merged.code, "invocation tokens" in merged.err) == (1, True), merged.err
    assert not (tmp_path / "merged").exists()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"inputs": ["acme/alora:1.0.0"], "method": "stack", "model": "acme/merged:1.0.0", "probe": 0})
    )
    composed = cli("compose", recipe)
    assert (composed.code, "invocation tokens" in composed.err) == (1, True), composed.err
    assert traces(cli).releases == ("acme/alora:1.0.0",)
    assert traces(cli).work == frozenset()


def test_a_type_that_is_no_delta_of_weights_is_refused_by_name(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(world.base)
    adapter = tmp_path / "prompt"
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(adapter)
    refused = stocked_embedded("push", adapter, "acme/prompt:1.0.0", "--base", "tiny")
    assert refused.code == 1, "a known format that is not supported is refused; it is not damaged"
    assert "PROMPT_TUNING" in refused.err
    assert traces(stocked_embedded) == Traces(frozenset(), frozenset(), ())
    merged = stocked_embedded("merge", "--base", world.base, "--adapter", adapter, "-o", tmp_path / "merged")
    assert (merged.code, "PROMPT_TUNING" in merged.err) == (1, True)
