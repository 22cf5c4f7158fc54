"""Laws of the formats: any bytes result in a header or InvalidFile; the weights digest depends on weights alone."""

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from composer.errors import InvalidFile
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.hashing import hash_checkpoint
from composer.formats.checkpoints.header import DTYPE_BITS, Header, TensorSpec, encode_header, parse_header

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
specs = st.builds(
    TensorSpec, st.sampled_from(["F32", "BF16", "I64", "U8"]), st.lists(st.integers(0, 5), max_size=3).map(tuple)
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(list(DTYPE_BITS)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
    ),
    max_leaves=12,
)


def parsed_or_refused(content: bytes) -> Header | None:
    try:
        return parse_header(content, len(content))
    except InvalidFile:
        return None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_invalid(content: bytes) -> None:
    parsed_or_refused(content)
    parsed_or_refused(len(content).to_bytes(8, "little") + content)


@given(st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), json_values, max_size=4), st.integers(0, 16))
def test_any_json_is_a_header_or_invalid(table: dict[str, object], data_bytes: int) -> None:
    text = json.dumps(table).encode()
    parsed_or_refused(len(text).to_bytes(8, "little") + text + bytes(data_bytes))


@given(st.dictionaries(names, specs, max_size=6), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_an_encoded_header_parses_to_the_same(tensors: dict[str, TensorSpec], metadata: dict[str, str]) -> None:
    try:
        head = encode_header(tensors, metadata)
    except UnicodeEncodeError:  # a lone surrogate in the metadata has no bytes
        return
    header = parse_header(head, len(head) + sum(spec.size_bytes for spec in tensors.values()))
    assert {name: entry.spec for name, entry in header.tensors.items()} == tensors
    assert header.metadata == metadata
    assert all(entry.begin % (DTYPE_BITS[entry.dtype] // 8) == 0 for entry in header.tensors.values())


@given(st.dictionaries(names, specs, min_size=1, max_size=4), st.data())
def test_a_flipped_bit_in_a_header_never_crashes(tensors: dict[str, TensorSpec], data: st.DataObject) -> None:
    content = bytearray(encode_header(tensors) + bytes(sum(spec.size_bytes for spec in tensors.values())))
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    parsed_or_refused(bytes(content))


def write_checkpoint(path: Path, tensors: dict[str, torch.Tensor], shards: list[list[str]]) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weight_map: dict[str, str] = {}
    for number, held in enumerate(shards):
        file = f"part-{number}.safetensors"
        save_file({name: tensors[name] for name in held}, path / file, {"shard": str(number)})
        weight_map |= dict.fromkeys(held, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def digest(tensors: dict[str, torch.Tensor], shards: list[list[str]]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), tensors, shards)
        return hash_checkpoint(open_checkpoint(Path(directory))).weights_digest


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_weights_digest_ignores_sharding_and_order_and_sees_one_bit(data: st.DataObject) -> None:
    held = data.draw(st.lists(names.filter(lambda name: "/" not in name), min_size=1, max_size=5, unique=True))
    tensors = {name: torch.randint(0, 256, (data.draw(st.integers(1, 6)),), dtype=torch.uint8) for name in held}
    order = data.draw(st.permutations(held))
    cut = data.draw(st.integers(0, len(order)))
    resharded = [part for part in (order[:cut], order[cut:]) if part]
    before = digest(tensors, [held])
    assert digest(tensors, resharded) == before
    name = data.draw(st.sampled_from(held))
    flipped = tensors[name].clone()
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest({**tensors, name: flipped}, resharded) != before
