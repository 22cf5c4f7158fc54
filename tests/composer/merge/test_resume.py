"""A killed merge leaves nothing that looks complete, and the same merge resumes where it stopped."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from composer.errors import Interrupted, RefusedOutput
from composer.formats.checkpoints import staging
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.staging import staged_directory
from composer.merge.copying import CopiedRange, copy_range
from composer.merge.io.journal import JOURNAL_FILE, ShardJournal
from composer.merge.plan import MergePlan, plan_merge
from composer.merge.run import run_merge
from tests.composer.tiny import MakeAdapter, MakeModel
from tests.device import DEVICE

# Slowed down after every piece, so that a signal finds it at any point.
SLOW_MERGE = """
import sys, time
from pathlib import Path
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from tests.device import DEVICE
base, adapter, out = map(Path, sys.argv[1:])
plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)])
print("ready", flush=True)
run_merge(plan, out, DEVICE, lambda count: time.sleep(0.005))
"""


ENDS = [KeyboardInterrupt, Interrupted]
"""Interrupted by a terminal, and by a caller's own progress."""


@pytest.fixture
def base(make_model: MakeModel) -> Path:
    return make_model(dtype=torch.bfloat16, shard="6KB")


@pytest.fixture
def adapter(base: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(base)


@pytest.fixture
def plan(base: Path, adapter: Path) -> MergePlan:
    return plan_merge(open_checkpoint(base), [(adapter, 1.0)])


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def staging_directories(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if ".partial-" in path.name]


def interrupt_after_shards(
    plan: MergePlan, out: Path, count: int, end: type[BaseException] = KeyboardInterrupt
) -> None:
    """Ends the merge like Ctrl-C, or like a caller, once `count` shards are recorded and others have begun. One thread
    waits for that, the first to work on another shard: the others may still hold missing parts."""
    enough, done, waiting = sum(shard.size_bytes for shard in plan.shards[: count + 1]), 0, threading.Lock()

    def interrupt(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if done > enough and waiting.acquire(blocking=False):
            (staging,) = staging_directories(out.parent)
            deadline = time.monotonic() + 60
            while (staging / JOURNAL_FILE).read_text().count("\n") < count and time.monotonic() < deadline:
                time.sleep(0.001)
            raise end

    with pytest.raises(end):
        run_merge(plan, out, DEVICE, interrupt)


@pytest.mark.parametrize("end", ENDS)
def test_an_interrupted_merge_looks_unfinished_and_goes_on_from_its_finished_shards(
    end: type[BaseException], plan: MergePlan, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    interrupt_after_shards(plan, out, 2, end)
    assert not out.exists()
    (staging,) = staging_directories(tmp_path)
    assert {file.name for file in staging.iterdir()} - {shard.file for shard in plan.shards} == {JOURNAL_FILE}
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(staging)
    report = run_merge(plan, out, DEVICE)
    assert 0 < report.resumed_bytes < plan.size_bytes
    assert staging_directories(tmp_path) == []
    uninterrupted = run_merge(plan, tmp_path / "at once", DEVICE)
    assert files_of(out) == files_of(tmp_path / "at once")
    assert report.survival == uninterrupted.survival


def test_progress_of_a_resumed_merge_counts_every_byte_once(plan: MergePlan, tmp_path: Path) -> None:
    interrupt_after_shards(plan, tmp_path / "merged", 2)
    done: list[int] = []
    run_merge(plan, tmp_path / "merged", DEVICE, done.append)
    assert sum(done) == plan.size_bytes


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_merge_killed_at_random_points_ends_with_the_same_bytes(
    seed: int, plan: MergePlan, base: Path, adapter: Path, tmp_path: Path
) -> None:
    run_merge(plan, tmp_path / "at once", DEVICE)
    out, chance = tmp_path / "merged", random.Random(seed)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SLOW_MERGE, base, adapter, out], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if out.exists():
            break
    else:
        run_merge(plan, out, DEVICE)
    assert files_of(out) == files_of(tmp_path / "at once")
    assert staging_directories(tmp_path) == []


def test_a_shard_that_somebody_wrote_to_since_is_written_anew(plan: MergePlan, tmp_path: Path) -> None:
    interrupt_after_shards(plan, tmp_path / "merged", 2)
    (staging,) = staging_directories(tmp_path)
    first = plan.shards[0].file
    with (staging / first).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    run_merge(plan, tmp_path / "merged", DEVICE)
    run_merge(plan, tmp_path / "at once", DEVICE)
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "at once")


def test_a_finished_shard_is_verified_again(plan: MergePlan, tmp_path: Path) -> None:
    """A lying disk: other bytes, with the recorded size and time."""
    interrupt_after_shards(plan, tmp_path / "merged", 2)
    (staging,) = staging_directories(tmp_path)
    shard = staging / (staging / JOURNAL_FILE).read_text().split('"')[1]
    before = shard.stat()
    content = bytearray(shard.read_bytes())
    for offset in range(len(content) - 2000, len(content)):
        content[offset] ^= 0b0100_0000
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RefusedOutput, match="not written as"):
        run_merge(plan, tmp_path / "merged", DEVICE)
    assert staging_directories(tmp_path) == []


def test_another_merge_to_the_same_place_starts_from_nothing(
    plan: MergePlan, base: Path, adapter: Path, tmp_path: Path
) -> None:
    interrupt_after_shards(plan, tmp_path / "merged", 2)
    other = plan_merge(open_checkpoint(base), [(adapter, 0.5)])
    assert other.key != plan.key
    assert run_merge(other, tmp_path / "merged", DEVICE).resumed_bytes == 0
    assert staging_directories(tmp_path) == []


@pytest.mark.parametrize(
    "which", ["base", "adapter", "config", "generation_config.json", "model.safetensors.index.json"]
)
def test_inputs_that_were_written_to_make_another_merge_and_the_old_plan_is_refused(
    plan: MergePlan, base: Path, adapter: Path, tmp_path: Path, which: str
) -> None:
    files = {"adapter": adapter / "adapter_model.safetensors", "config": adapter / "adapter_config.json"}
    files["base"] = base / plan.shards[0].file
    written = files.get(which, base / which)
    kept = written.stat()
    try:
        os.utime(written, ns=(0, kept.st_mtime_ns + 1))
        assert plan_merge(open_checkpoint(base), [(adapter, 1.0)]).key != plan.key
        with pytest.raises(RefusedOutput, match=written.name) as caught:
            run_merge(plan, tmp_path / "merged", DEVICE)
        assert caught.value.code == "inputs_changed"
        assert staging_directories(tmp_path) == []
    finally:
        os.utime(written, ns=(0, kept.st_mtime_ns))


def test_a_base_written_to_during_the_merge_is_refused(plan: MergePlan, base: Path, tmp_path: Path) -> None:
    def touch(count: int) -> None:
        os.utime(base / plan.shards[-1].file, ns=(0, 1))

    with pytest.raises(RefusedOutput) as caught:
        run_merge(plan, tmp_path / "merged", DEVICE, touch)
    assert caught.value.code == "inputs_changed"


@pytest.mark.long
def test_two_processes_on_one_output_do_not_meet(plan: MergePlan, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    process = subprocess.Popen([sys.executable, "-c", SLOW_MERGE, base, adapter, out], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    while not list(tmp_path.glob(f"*.partial-*/{JOURNAL_FILE}")) and process.poll() is None:
        time.sleep(0.001)
    with pytest.raises(RefusedOutput) as caught:
        run_merge(plan, out, DEVICE)
    assert caught.value.code in ("busy", "exists")
    assert process.wait() == 0
    process.stdout.close()
    run_merge(plan, tmp_path / "at once", DEVICE)
    assert files_of(out) == files_of(tmp_path / "at once")


def test_what_is_in_use_is_not_taken_for_abandoned(tmp_path: Path) -> None:
    busy, left, others = (tmp_path / f"out.partial-{key}" for key in ("b" * 12, "c" * 8, "backup"))
    for directory in (busy, left, others):
        directory.mkdir()
    handle = os.open(busy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with staged_directory(tmp_path / "out", 0, "a" * 12) as staging:
        assert staging.name == f"out.partial-{'a' * 12}"
        assert busy.exists()
        assert others.exists(), "nobody's but its maker's"
        assert not left.exists()
    os.close(handle)


def test_of_two_that_finish_at_once_one_is_refused_and_the_other_whole(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = staging._finish  # pyright: ignore[reportPrivateUsage]

    def too_late(directory: Path, out_dir: Path) -> None:
        if not out_dir.exists():
            out_dir.mkdir()
            (out_dir / "theirs").touch()
        finish(directory, out_dir)

    monkeypatch.setattr(staging, "_finish", too_late)
    with pytest.raises(RefusedOutput, match="exists"):
        run_merge(plan, tmp_path / "merged", DEVICE)
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["theirs"]
    assert staging_directories(tmp_path) == []


def test_a_resumed_merge_counts_what_its_first_run_has_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    for file in base.glob("*.safetensors"):
        tensors = {name: tensor.index_fill(0, torch.tensor([0]), 1e-9) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)], dtype="float16")
    at_once = run_merge(plan, tmp_path / "at_once", DEVICE)
    interrupt_after_shards(plan, tmp_path / "merged", 2)
    resumed = run_merge(plan, tmp_path / "merged", DEVICE)
    assert resumed.resumed_bytes > 0
    assert [finding.code for finding in resumed.findings] == ["f16_flushed"]
    assert resumed.findings == at_once.findings


@pytest.mark.parametrize("spoilt", [b'["b", 1', b"\0\0\0\n", b"[1]\n", b'[["b"], 1, 2, 3, {}]\n', b'{"b": 1}\n'])
def test_a_journal_is_believed_up_to_the_line_that_a_crash_spoilt(spoilt: bytes, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode())
    journal = ShardJournal(tmp_path)
    assert not journal.holds("a")
    (tmp_path / "a").write_bytes(b"a")
    journal.finish(tmp_path / "a", {"changed": True})
    with (tmp_path / JOURNAL_FILE).open("ab") as file:
        file.write(spoilt)
    again = ShardJournal(tmp_path)
    assert again.holds("a")
    assert again.measured("a") == {"changed": True}
    assert {file.name for file in tmp_path.iterdir()} == {"a", JOURNAL_FILE}


def test_copying_a_range_of_nothing_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("w+b") as target:
        copy_range(CopiedRange(tmp_path / "source", 1, 0, 0), source.fileno(), target.fileno())
        copy_range(CopiedRange(tmp_path / "source", 1, 4, 2), source.fileno(), target.fileno())
    assert (tmp_path / "target").read_bytes() == b"\0\0\0\0bc"
