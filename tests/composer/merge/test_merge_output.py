"""The output of a merge on disk: all of it, or nothing; and verification that detects errors in between."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from composer.errors import InvalidFile, NotSupported, RefusedOutput
from composer.formats.checkpoints.checkpoint import Architecture, Checkpoint, open_checkpoint
from composer.formats.checkpoints.hashing import hash_checkpoint, hash_file
from composer.formats.checkpoints.staging import staged_directory
from composer.merge import chunks, copying, shards
from composer.merge.grown import Vocabulary
from composer.merge.io.output_file import OutputFile
from composer.merge.plan import MergePlan, plan_merge
from composer.merge.run import run_merge
from composer.merge.side_files import planned_side_files
from tests.composer.tiny import MakeAdapter, MakeModel, tensors_in
from tests.device import DEVICE


@pytest.fixture
def plan(make_model: MakeModel, make_adapter: MakeAdapter) -> MergePlan:
    base = make_model(dtype=torch.bfloat16, shard="6KB")
    return plan_merge(open_checkpoint(base), [(make_adapter(base), 1.0)])


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path)


def test_a_merged_directory_is_a_checkpoint_with_all_that_the_base_had(plan: MergePlan, tmp_path: Path) -> None:
    base = plan.checkpoint.path
    (base / "tokenizer.json").write_text("{}")
    (base / "LICENSE").write_text("as you like")
    (base / "README.md").write_text("the card of the base, which is another model")
    for weights in ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", ".hidden"):
        (base / weights).write_text("not for the copy")
    plan = replace(plan, side_files=planned_side_files(base, [], Vocabulary(plan.checkpoint.architecture)))
    report = run_merge(plan, tmp_path / "merged", device=DEVICE, note={"recipe": {"name": "both"}})
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert files == {
        *plan.checkpoint.shards,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "LICENSE",
        "model.safetensors.index.json",
        "adaptory.json",
        "README.md",
    }
    assert AutoConfig.from_pretrained(tmp_path / "merged").model_type == "llama"
    assert opened(tmp_path / "merged").architecture == plan.checkpoint.architecture
    note = json.loads((tmp_path / "merged/adaptory.json").read_text())
    assert note["note"] == {"recipe": {"name": "both"}}
    assert note["adapters"] == [
        {
            "name": "adapter",
            "weight": 1.0,
            "digest": hash_file(tmp_path / "adapter/adapter_model.safetensors"),
            "config": hash_file(tmp_path / "adapter/adapter_config.json"),
        }
    ]
    assert note["base"]["architecture_digest"] == hash_checkpoint(plan.checkpoint).architecture_digest
    assert report.copied_bytes + report.rewritten_bytes == plan.size_bytes
    assert report.touched_tensors == len(plan.touched) == 6


def test_the_same_merge_twice_gives_the_same_bytes(plan: MergePlan, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_merge(plan, tmp_path / name, device=DEVICE)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_plan_names_copied_and_rewritten_shards_and_survives_json(plan: MergePlan) -> None:
    shown = json.loads(json.dumps(plan.to_json()))
    assert sorted(shown["copied_shards"] + shown["rewritten_shards"]) == list(plan.checkpoint.shards)
    assert shown["copied_shards"]
    assert len(shown["touched_tensors"]) == 6


def test_progress_counts_every_byte_once(plan: MergePlan, tmp_path: Path) -> None:
    done: list[int] = []
    run_merge(plan, tmp_path / "merged", device=DEVICE, progress=done.append)
    assert sum(done) == plan.size_bytes


def test_tensors_larger_than_a_chunk_are_merged_the_same(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_merge(plan, tmp_path / "whole", device=DEVICE)
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 40)
    monkeypatch.setattr(copying, "_COPY_BYTES", 100)
    run_merge(plan, tmp_path / "pieces", device=DEVICE)
    complete = tensors_in(tmp_path / "whole")
    assert all(torch.equal(tensor, complete[name]) for name, tensor in tensors_in(tmp_path / "pieces").items())


def nothing_is_left(tmp_path: Path) -> bool:
    return not [path for path in tmp_path.iterdir() if path.name.startswith("merged")]


def test_an_existing_output_and_a_missing_parent_are_refused(plan: MergePlan, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(RefusedOutput, match="exists"):
        run_merge(plan, tmp_path / "there", device=DEVICE)
    with pytest.raises(RefusedOutput, match="Create it first"):
        run_merge(plan, tmp_path / "not/there", device=DEVICE)
    assert list((tmp_path / "there").iterdir()) == []


def test_a_merge_that_fails_leaves_nothing(plan: MergePlan, tmp_path: Path) -> None:
    def fail(count: int) -> None:
        raise ValueError("the caller's own")

    with pytest.raises(ValueError, match="own"):
        run_merge(plan, tmp_path / "merged", device=DEVICE, progress=fail)
    assert nothing_is_left(tmp_path)


def test_a_merge_that_fails_closes_its_files_only_once_no_job_writes_to_them(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor of a file closed too early may already belong to another file, such as a database."""
    pwrite, close, writing, events = os.pwrite, os.close, threading.Event(), list[str]()

    def slowly(file: int, buffer: bytes, offset: int) -> int:
        writing.set()
        time.sleep(0.2)
        events.append("written")
        return pwrite(file, buffer, offset)

    def closing(file: int) -> None:
        where = Path(f"/proc/self/fd/{file}").readlink()
        events.extend(["closed"] if ".partial-" in where.parent.name and where.suffix == ".safetensors" else [])
        close(file)

    def fail(count: int) -> None:
        writing.wait()
        raise ValueError("the caller's own")

    monkeypatch.setattr(os, "pwrite", slowly)
    monkeypatch.setattr(os, "close", closing)
    with pytest.raises(ValueError, match="own"):
        run_merge(plan, tmp_path / "merged", device=DEVICE, progress=fail)
    assert {"written", "closed"} <= set(events)
    assert "written" not in events[events.index("closed") :]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)  # noqa: S607
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)  # noqa: S607


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(small_disk: Path) -> None:
    with pytest.raises(RefusedOutput, match="disk is full") as caught, staged_directory(small_disk / "merged", 2 << 20):
        pytest.fail("nothing should have been started")
    assert caught.value.code == "disk_full"


def test_a_file_above_a_limit_names_the_output_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(RefusedOutput, match="merged needs") as caught,
            staged_directory(tmp_path / "merged", 0) as staging,
        ):
            (staging / "shard").write_bytes(bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "larger than" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_has_not_written_yet_needs_its_space_still(tmp_path: Path) -> None:
    staging = tmp_path / f"merged.partial-{'a' * 12}"
    staging.mkdir()
    with (staging / "shard").open("wb") as shard:
        shard.truncate(1 << 40)
    sparse = shutil.disk_usage(tmp_path).free + (1 << 39)
    with pytest.raises(RefusedOutput, match="disk is full"), staged_directory(tmp_path / "merged", sparse, "a" * 12):
        pytest.fail("there is no room for it")


def test_a_disk_that_fills_up_during_a_merge_is_one_clear_error_and_leaves_nothing(
    plan: MergePlan, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer.merge.run._SPARE_BYTES", 0)

    def fill(count: int) -> None:
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        with (small_disk / "another tenant").open("ab") as file:
            file.write(bytes(max(0, free - 4096)))

    with pytest.raises(RefusedOutput, match="disk is full") as caught:
        run_merge(plan, small_disk / "merged", device=DEVICE, progress=fill)
    assert caught.value.code == "disk_full"
    assert [path.name for path in small_disk.iterdir()] == ["another tenant"]


def test_a_bit_that_flips_on_the_way_of_a_copied_range_is_noticed(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copying.copy_range

    def flipping(part: copying.CopiedRange, source: int, target: int) -> None:
        copy(part, source, target)
        flip(target, part.target + part.size_bytes - 1)

    monkeypatch.setattr(shards, "copy_range", flipping)
    refuses(plan, tmp_path)


def test_a_bit_that_flips_on_the_way_of_a_rewritten_tensor_is_noticed(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = OutputFile.write

    def flipping(target: OutputFile, buffer: memoryview, offset: int, address: int) -> None:
        write(target, buffer, offset, address)
        flip(target.file, offset + 1)

    monkeypatch.setattr(OutputFile, "write", flipping)
    refuses(plan, tmp_path)


def flip(file: int, offset: int) -> None:
    os.pwrite(file, bytes([os.pread(file, 1, offset)[0] ^ 0b0100_0000]), offset)


def refuses(plan: MergePlan, tmp_path: Path) -> None:
    with pytest.raises(RefusedOutput) as caught:
        run_merge(plan, tmp_path / "merged", device=DEVICE)
    assert caught.value.code == "verification"
    assert nothing_is_left(tmp_path)


def test_a_base_shard_cut_off_after_planning_is_named(plan: MergePlan, tmp_path: Path) -> None:
    shard = next(shard for shard in plan.shards if not shard.rewritten)
    with (plan.checkpoint.path / shard.file).open("r+b") as file:
        file.truncate(shard.size_bytes - 16)
    # If the file system clones, nothing is read, and the header shows the difference.
    with pytest.raises(InvalidFile, match=rf"became shorter|{shard.file} is not a valid safetensors file"):
        run_merge(plan, tmp_path / "merged", device=DEVICE)
    assert nothing_is_left(tmp_path)


def test_a_file_system_without_kernel_copies_is_copied_plainly(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_here(*arguments: object) -> int:
        raise OSError(18, os.strerror(18))

    run_merge(plan, tmp_path / "kernel", device=DEVICE)
    monkeypatch.setattr(os, "copy_file_range", not_here)
    run_merge(plan, tmp_path / "plain", device=DEVICE)
    for file in plan.checkpoint.shards:
        assert (tmp_path / "kernel" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_a_file_system_that_shares_blocks_is_asked_to_and_nothing_is_copied_then(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulates FICLONE, which btrfs and XFS have, by copying."""
    cloned: list[int] = []
    copied: list[copying.CopiedRange] = []
    copy = copying.copy_range

    def clone(target: int, request: int, source: int) -> None:
        assert request == 0x40049409
        cloned.append(os.sendfile(target, source, 0, os.fstat(source).st_size))

    def counted(part: copying.CopiedRange, source: int, target: int) -> None:
        copied.append(part)
        copy(part, source, target)

    run_merge(plan, tmp_path / "copied", device=DEVICE)
    monkeypatch.setattr(fcntl, "ioctl", clone)
    monkeypatch.setattr(shards, "copy_range", counted)
    run_merge(plan, tmp_path / "cloned", device=DEVICE)
    untouched = [shard for shard in plan.shards if not shard.rewritten]
    assert sorted(cloned) == sorted(shard.size_bytes for shard in untouched)
    assert {part.file for part in copied}.isdisjoint({shard.source for shard in untouched})
    for file in plan.checkpoint.shards:
        assert (tmp_path / "cloned" / file).read_bytes() == (tmp_path / "copied" / file).read_bytes()


def test_a_link_of_the_name_of_what_is_written_first_is_refused_and_left_alone(plan: MergePlan, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "theirs").touch()
    links = [tmp_path / f"merged.partial-{key}" for key in (plan.key, "0123456789ab")]
    for link in links:
        link.symlink_to(victim)
    with pytest.raises(RefusedOutput, match="link has the name"):
        run_merge(plan, tmp_path / "merged", device=DEVICE)
    links[0].unlink()
    run_merge(plan, tmp_path / "merged", device=DEVICE)
    assert links[1].is_symlink()
    assert [file.name for file in victim.iterdir()] == ["theirs"]


def test_a_link_out_of_the_base_is_refused_before_anything_is_written(plan: MergePlan, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not yours")
    (plan.checkpoint.path / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidFile, match="leads out of"):
        plan_merge(plan.checkpoint, [(tmp_path / "adapter", 1.0)])


def test_no_link_is_followed_out_of_the_base(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    base.mkdir()
    target.mkdir()
    (tmp_path / "secret").write_text("not yours")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidFile, match="leads out of base"):
        planned_side_files(base, [], Vocabulary(Architecture("", False, {})))


@pytest.mark.parametrize("device", ["bogus", "cpu:x", "meta"])
def test_a_device_that_does_not_exist_is_refused_by_name(
    device: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    plan = plan_merge(open_checkpoint(base), [(make_adapter(base), 1.0)])
    with pytest.raises(NotSupported, match=device) as caught:
        run_merge(plan, tmp_path / "out", device=device)
    assert caught.value.code == "device"
