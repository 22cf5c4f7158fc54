"""The memory of a merge, which hardly includes factors."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from composer.deltas.delta import LowRank
from composer.deltas.stored import Factor, MappedFile, SpillFile, StoredFactor, map_tensor, read_into, tensor_of
from composer.errors import InvalidFile
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.header import TensorSpec, encode_header, parse_header, read_header
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from tests.composer.tiny import MakeAdapter, MakeModel, tensors_in
from tests.device import DEVICE

MB = 1 << 20


def mapped_bytes() -> int:
    """Resident memory of this process that is mapped from files, on disk or in memory."""
    status = Path("/proc/self/status").read_text()
    return sum(int(status.split(kind)[1].split()[0]) * 1024 for kind in ("RssFile:", "RssShmem:"))


def test_a_mapped_tensor_takes_memory_while_it_is_looked_at_and_is_read_again_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.arange(8 * MB, dtype=torch.int64), "b": torch.ones(3)}, path)
    entries = read_header(path).tensors
    file = MappedFile.open(path)
    a, b = file.tensor(entries["a"]), file.tensor(entries["b"])
    before = mapped_bytes()
    total = int(a.sum())
    assert mapped_bytes() - before > 60 * MB
    file.drop_pages()
    assert mapped_bytes() - before < 4 * MB
    assert int(a.sum()) == total == (8 * MB - 1) * 4 * MB
    assert b.tolist() == [1, 1, 1]


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_all_tensors_of_a_file_share_one_mapping_that_goes_with_the_last_of_them(tmp_path: Path) -> None:
    """A process may have some 65,000 mappings: fewer than the tensors of many adapters."""
    path = tmp_path / "file.safetensors"
    names = [f"w{number}" for number in range(50)]
    save_file({name: torch.full((100,), number) for number, name in enumerate(names)}, path)
    entries = read_header(path).tensors
    file = MappedFile.open(path)
    mapped = [file.tensor(entries[name]) for name in names]
    assert mappings_of(path) == 1
    file.drop_pages()
    assert [int(row[0]) for row in mapped] == list(range(50))

    save_file({name: torch.full((100,), -1) for name in names}, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").rename(path)
    assert int(map_tensor(path, entries["w3"])[0]) == -1, "another file of that name is another mapping"
    assert int(mapped[3][0]) == 3
    del file, mapped
    assert mappings_of(path) == 0


def test_a_file_larger_than_all_memory_is_mapped(tmp_path: Path) -> None:
    path, rows = tmp_path / "file.safetensors", 2 * (psutil.virtual_memory().total + psutil.swap_memory().total) >> 20
    specs = {"large": TensorSpec("U8", (rows, MB)), "small": TensorSpec("I64", (3,))}
    head = encode_header(specs, {})
    size = len(head) + sum(spec.size_bytes for spec in specs.values())
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)  # a hole: it occupies no space on the disk
    entries = parse_header(head, size).tensors
    assert map_tensor(path, entries["small"]).tolist() == [0, 0, 0]
    assert int(map_tensor(path, entries["large"])[-1].sum()) == 0


VIEWS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda matrix: matrix,
    "rows": lambda matrix: matrix[700:900],
    "columns": lambda matrix: matrix[:, 16:48],
    "a few columns of many": lambda matrix: matrix[5:7, 3:4],
    "rows and columns": lambda matrix: matrix[10:20, :64],
    "transposed": lambda matrix: matrix.T,
    "rows of the transposed": lambda matrix: matrix.T[8:9],
    "columns of the transposed": lambda matrix: matrix.T[:, 100:101],
    "every other column": lambda matrix: matrix[:, ::2],
    "nothing": lambda matrix: matrix[:0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_view_of_a_mapped_matrix_is_read_as_it_is(view: str, dtype: torch.dtype, tmp_path: Path) -> None:
    matrix = torch.randn(1_000, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"before": torch.ones(3), "m": matrix}, tmp_path / "file.safetensors")
    entry = read_header(tmp_path / "file.safetensors").tensors["m"]
    spill = SpillFile()
    spill.put([torch.ones(5)])
    sources: list[Factor] = [MappedFile.open(tmp_path / "file.safetensors").factor(entry), *spill.put([matrix]), matrix]
    assert sum(isinstance(source, StoredFactor) for source in sources) == 2
    for source in sources:
        expected = VIEWS[view](matrix).float()
        assert torch.equal(tensor_of(VIEWS[view](source)).float(), expected)
        out = torch.full(expected.shape, 7.0)
        read_into(out, VIEWS[view](source))
        assert torch.equal(out, expected)


def test_a_merge_looks_at_no_factor_where_it_is_mapped(
    make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """The memory of a merge must not grow with its adapters, even if the kernel caches their files."""
    base = make_model()
    adapters = [(make_adapter(base, r=rank, target_modules="all-linear"), 1.0) for rank in (4, 16, 80)]
    plan = plan_merge(open_checkpoint(base), adapters)
    for path, _ in adapters:
        for factor in (delta for shard in plan.shards for tensor in shard.tensors for delta in tensor.deltas):
            assert isinstance(factor, LowRank)
            factor.drop_pages()
        assert resident_of(path / "adapter_model.safetensors") == 0
    run_merge(plan, tmp_path / "merged", DEVICE)
    assert [resident_of(path / "adapter_model.safetensors") for path, _ in adapters] == [0, 0, 0]


def resident_of(path: Path) -> int:
    """Bytes of the file that this process has in memory, by its mappings."""
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


def test_an_adapter_that_is_cut_off_meanwhile_is_named(
    make_model: MakeModel, make_adapter: MakeAdapter, accelerator: str, tmp_path: Path
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    os.truncate(adapter / "adapter_model.safetensors", 4_096)
    for device in ("cpu", accelerator):
        with pytest.raises(InvalidFile, match=r"adapter_model\.safetensors became shorter"):
            run_merge(plan, tmp_path / "merged", device)
    assert not (tmp_path / "merged").exists()


def test_a_factor_that_was_given_back_may_be_merged_again(
    make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_model()
    plan = plan_merge(open_checkpoint(base), [(make_adapter(base), 1.0)])
    for name in ("one", "two"):
        run_merge(plan, tmp_path / name, DEVICE)
    two = tensors_in(tmp_path / "two")
    assert all(torch.equal(tensor, two[name]) for name, tensor in tensors_in(tmp_path / "one").items())
