"""Digests: equal to the definition, in every implementation."""

import hashlib
import subprocess
import time
from pathlib import Path

import pytest
import torch

from composer.errors import InvalidFile
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.hashing import hash_checkpoint, hash_file
from tests.composer.tiny import MakeModel, tensors_in


def test_the_digests_follow_their_definition(make_model: MakeModel) -> None:
    base = make_model(dtype=torch.bfloat16)
    weights, architecture = hashlib.sha256(), hashlib.sha256(b"llama\n")
    tensors = tensors_in(base)
    for name in sorted(tensors):
        shape = "x".join(map(str, tensors[name].shape))
        digest = hashlib.sha256(tensors[name].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        weights.update(f"{name}\tBF16\t{shape}\t{digest}\n".encode())
        architecture.update(f"{name}\t{shape}\n".encode())
    identity = hash_checkpoint(open_checkpoint(base))
    assert identity.weights_digest == weights.hexdigest()
    assert identity.architecture_digest == architecture.hexdigest()
    assert identity.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert identity.size_bytes == identity.parameters * 2


def test_the_architecture_digest_ignores_values_and_dtype_and_the_weights_digest_does_not(
    make_model: MakeModel,
) -> None:
    one, two = (
        hash_checkpoint(open_checkpoint(make_model(dtype=dtype, name=str(dtype))))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert one.architecture_digest == two.architecture_digest
    assert one.weights_digest != two.weights_digest


@pytest.mark.parametrize("workers", [1, 7])
def test_progress_counts_every_byte_once(workers: int, make_model: MakeModel) -> None:
    done: list[int] = []
    identity = hash_checkpoint(open_checkpoint(make_model()), done.append, workers)
    assert sum(done) == identity.size_bytes


def test_interrupted_hashing_does_not_read_the_rest(make_model: MakeModel) -> None:
    checkpoint, seen = open_checkpoint(make_model()), list[int]()

    def stop(count: int) -> None:
        seen.append(count)
        time.sleep(0.02)  # longer than it takes to notice the first one
        raise InterruptedError

    with pytest.raises(InterruptedError):
        hash_checkpoint(checkpoint, stop, workers=1)
    assert len(seen) < len(checkpoint.architecture.tensors) / 2


@pytest.mark.parametrize("size", [0, 1, 2**20, 3 * 2**20 + 17])
def test_a_file_hash_is_sha256sums(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(torch.arange(size).to(torch.uint8).numpy().tobytes())
    printed = subprocess.run(["sha256sum", tmp_path / "file"], capture_output=True, text=True, check=True).stdout  # noqa: S607
    assert hash_file(tmp_path / "file") == printed.split()[0]


def test_a_shard_that_shrinks_meanwhile_is_named(make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(make_model(shard="1GB"))
    with (checkpoint.path / "model.safetensors").open("r+b") as file:
        file.truncate(checkpoint.shards["model.safetensors"].size_bytes - 8)
    with pytest.raises(InvalidFile, match=r"model.safetensors became shorter"):
        hash_checkpoint(checkpoint)
