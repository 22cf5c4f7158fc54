"""Tensors that wait on the disk until they are merged, those mapped from a file, and the threads that use them."""

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from composer.deltas.delta import LowRank
from composer.deltas.stored import MappedFile, SpillFile
from composer.deltas.tensors import torch_threads
from composer.deltas.variants.load import load_deltas
from composer.errors import InvalidFile, RefusedOutput
from composer.formats.checkpoints.header import read_header
from composer.methods.combine import combine_deltas
from tests.composer.tiny import MakeAdapter, MakeModel

SHAPES = [(3, 5), (0, 4), (1,), (70, 130)]


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_spilled_tensors_have_the_same_values_also_after_their_memory_was_given_back(dtype: torch.dtype) -> None:
    spill = SpillFile()
    for seed in range(3):
        torch.manual_seed(seed)
        given = [(torch.randn(shape) * 50).to(dtype) for shape in SHAPES]
        mapped = spill.put([*given[:-1], given[-1].T])
        for factor in mapped:
            factor.drop()
        assert all(
            torch.equal(factor.tensor, other) for factor, other in zip(mapped, [*given[:-1], given[-1].T], strict=True)
        )


def test_an_empty_list_can_be_spilled() -> None:
    assert SpillFile().put([]) == []


def test_spilled_tensors_take_no_memory_once_it_is_given_back() -> None:
    spill, before = SpillFile(), rss_bytes()
    for _ in range(20):
        (mapped,) = spill.put([torch.ones(1 << 20)])
        assert float(mapped.tensor.sum()) == 1 << 20
        mapped.drop()
    assert rss_bytes() - before < 40 << 20, "of 80 MB"


def test_a_disk_without_room_is_one_clear_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    spill = SpillFile()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RefusedOutput, match="TMPDIR") as caught:
            spill.put([torch.ones(1 << 20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "disk_full"


def test_a_file_that_cannot_be_written_for_another_reason_is_not_called_a_full_disk() -> None:
    spill, pipe = SpillFile(), os.pipe()
    os.dup2(pipe[0], spill._file.fileno())  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(OSError, match="Illegal seek"):
        spill.put([torch.ones(1 << 20)])
    for end in pipe:
        os.close(end)


def test_combined_factors_outlive_the_call_that_made_them(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    loaded = [load_deltas(make_adapter(base, name, seed=seed), None) for seed, name in enumerate("ab")]
    made = [
        delta for delta in combine_deltas(loaded, [1.0, 1.0], "svd", {"rank": 3}).deltas if isinstance(delta, LowRank)
    ]
    before = [delta.A_RI.clone() for delta in made]
    assert before
    for delta in made:
        delta.drop_pages()
    assert all(torch.equal(delta.A_RI, other) for delta, other in zip(made, before, strict=True))


def test_a_file_that_was_emptied_since_it_was_opened_is_one_clear_error(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4, 4)}, tmp_path / "w.safetensors")
    entry = read_header(tmp_path / "w.safetensors").tensors["w"]
    file = MappedFile.open(tmp_path / "w.safetensors")
    assert file.tensor(entry).sum() == 16
    (tmp_path / "w.safetensors").write_bytes(b"")
    for again in (lambda: file, lambda: MappedFile.open(tmp_path / "w.safetensors")):
        with pytest.raises(InvalidFile, match=r"w\.safetensors"):
            again().tensor(entry)


def test_blocks_of_threads_that_overlap_leave_what_was_there_before() -> None:
    before = torch.get_num_threads()
    first, second = torch_threads(1), torch_threads(before + 1)
    first.__enter__()
    second.__enter__()
    assert torch.get_num_threads() == before + 1
    first.__exit__(None, None, None)
    assert torch.get_num_threads() == before + 1, "the second has not ended"
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == before
