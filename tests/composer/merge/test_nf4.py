"""4-bit weights packed by bitsandbytes 0.50 (`data/nf4.safetensors`), beside the original values."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.errors import InvalidFile
from composer.formats.checkpoints.files import LocalFile
from composer.formats.checkpoints.header import TensorEntry, read_header
from composer.formats.checkpoints.quantized import is_part, nf4_weights
from composer.merge.quantized import nf4

DATA = Path(__file__).parent / "data" / "nf4.safetensors"


class OneFile:
    """A checkpoint of one file."""

    def __init__(self, path: Path) -> None:
        self._path, self.tensors = path, read_header(path).tensors

    def locate(self, name: str) -> tuple[LocalFile, TensorEntry]:
        return LocalFile(self._path), self.tensors[name]


@pytest.mark.parametrize("name", ["nested.weight", "plain.weight"])
def test_what_bitsandbytes_packed_is_unpacked_however_many_rows_are_asked_for(name: str) -> None:
    file = OneFile(DATA)
    packed = nf4_weights(file.tensors, file.locate)[name]
    original = load_file(DATA)[f"original.{name}"].float()
    assert (packed.shape, packed.dtype) == (tuple(original.shape), "BF16")
    decoded = nf4.decoded(file.locate, packed).rows(0, packed.shape[0])
    # Another order of halves, blocks or scales is off by more than 1; 4 bits of a normal distribution by 0.09.
    assert 0.08 < float((decoded - original).norm() / original.norm()) < 0.11
    for begin, end in ((0, 1), (3, 11), (packed.shape[0] - 1, packed.shape[0])):
        assert torch.equal(nf4.decoded(file.locate, packed).rows(begin, end), decoded[begin:end])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_bytes_may_be_stored_as_any_dtype(storage: torch.dtype, tmp_path: Path) -> None:
    """FSDP shards 4-bit weights as bytes of the dtype that everything else has: `bnb_4bit_quant_storage`."""
    tensors, file = load_file(DATA), OneFile(DATA)
    packed = nf4_weights(file.tensors, file.locate)["nested.weight"]
    stored = damaged(tmp_path, {"nested.weight": tensors["nested.weight"].reshape(-1).view(storage).reshape(-1, 1)})
    again = nf4_weights(stored.tensors, stored.locate)["nested.weight"]
    assert torch.equal(nf4.decoded(stored.locate, again).rows(3, 11), nf4.decoded(file.locate, packed).rows(3, 11))
    half = damaged(tmp_path, {"nested.weight": tensors["nested.weight"].reshape(-1)[:-4].view(storage)})
    with pytest.raises(InvalidFile, match="size"):
        nf4_weights(half.tensors, half.locate)


def test_rounding_to_four_bits_is_what_bitsandbytes_does() -> None:
    file = OneFile(DATA)
    packed = nf4_weights(file.tensors, file.locate)["plain.weight"]
    original = load_file(DATA)["original.plain.weight"]
    assert torch.equal(nf4.rounded(original), nf4.decoded(file.locate, packed).rows(0, packed.shape[0]))


def test_parts_of_packed_weights_are_known() -> None:
    names = {name for name in OneFile(DATA).tensors if is_part(name)}
    assert len(names) == 3 + 5
    assert not any(name.endswith(".weight") for name in names)


def damaged(tmp_path: Path, changes: Mapping[str, torch.Tensor | None]) -> OneFile:
    tensors: dict[str, torch.Tensor | None] = {**load_file(DATA), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "bad.safetensors")
    return OneFile(tmp_path / "bad.safetensors")


def state(**changes: object) -> torch.Tensor:
    text = json.dumps({"shape": [4, 4], "dtype": "bfloat16", "blocksize": 64, **changes})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "tensor", "says"),
    [
        (".absmax", None, "missing"),
        (".absmax", torch.zeros(3, dtype=torch.uint8), "size"),
        (".quant_state.bitsandbytes__nf4", torch.tensor(list(b"{"), dtype=torch.uint8), "not JSON"),
        (".quant_state.bitsandbytes__nf4", torch.tensor(list(b'{"shape": [4]}'), dtype=torch.uint8), "lacks a known"),
        (".quant_state.bitsandbytes__nf4", state(dtype=[]), "lacks a known shape"),
        (".quant_state.bitsandbytes__nf4", state(nested_blocksize=256, nested_offset=10**400), "lacks a nested"),
        (".quant_state.bitsandbytes__nf4", torch.zeros(20_000, dtype=torch.uint8), "short string"),
    ],
)
def test_what_cannot_be_decoded_is_named(changed: str, tensor: torch.Tensor | None, says: str, tmp_path: Path) -> None:
    file = damaged(tmp_path, {f"nested.weight{changed}": tensor})
    with pytest.raises(InvalidFile, match=rf"nested\.weight cannot be decoded: .*{says}"):
        nf4_weights(file.tensors, file.locate)
