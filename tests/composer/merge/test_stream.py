"""A merge that streams from remote files: the bytes of a local merge, and a hash of every tensor that passed."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import RoadConfig

from composer.deltas.delta import RowwiseDelta
from composer.deltas.tensors import torch_device
from composer.errors import InvalidFile, NotSupported, RefusedOutput, became_shorter
from composer.formats.checkpoints.checkpoint import Checkpoint, open_checkpoint
from composer.formats.checkpoints.hashing import hash_checkpoint, weights_digest
from composer.formats.recipes.rounding import Mode, Rounding
from composer.merge import chunks, rounding_loss, stream
from composer.merge.chunks import Rewriter
from composer.merge.plan import MergePlan, plan_merge
from composer.merge.run import run_merge
from composer.merge.stream import Origin, StreamedShard, stream_shard
from tests.composer.adapted import save_adapted
from tests.composer.merge.test_grown import GROWN, save_grown
from tests.composer.merge.test_merge_own_head import with_head
from tests.composer.tiny import MakeAdapter, MakeModel
from tests.device import DEVICE

Adapters = list[tuple[Path, float]]
STOCHASTIC = Rounding(Mode.STOCHASTIC, 7)


@dataclass(frozen=True)
class Elsewhere:
    """A file that is remote as far as the composer can tell; counts the bytes read."""

    name: str
    content: bytes
    reads: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]], compare=False)

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if offset + buffer.nbytes > len(self.content):
            raise became_shorter(self.name)
        self.reads.append((offset, buffer.nbytes))
        buffer[:] = self.content[offset : offset + buffer.nbytes]


@dataclass
class Taken:
    """A sink that keeps the file; copies bytes with an origin from there, as a store would."""

    content: bytearray = field(default_factory=bytearray)
    copied_bytes: int = 0

    def write(self, block: memoryview, origin: Origin | None) -> None:
        if origin is None:
            self.content += block
            return
        copied = bytearray(block.nbytes)
        origin.file.read_into(memoryview(copied), origin.offset)
        self.content += copied
        self.copied_bytes += block.nbytes

    def finish(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def elsewhere(base: Path) -> Checkpoint:
    """The checkpoint with its weights elsewhere: the directory has only the small files."""
    texts = base.with_name(f"{base.name}-texts")
    shutil.copytree(base, texts, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = {path.name: Elsewhere(path.name, path.read_bytes()) for path in base.glob("*.safetensors")}
    return open_checkpoint(texts, weights=weights)


def streamed(plan: MergePlan) -> tuple[dict[str, bytes], list[StreamedShard]]:
    files: dict[str, bytes] = {}
    made: list[StreamedShard] = []
    for shard in plan.shards:
        sink = Taken()
        one = stream_shard(plan, shard, sink, Rewriter(torch_device(DEVICE), plan.rounding))
        assert sink.copied_bytes == one.copied_bytes
        made.append(StreamedShard.from_json(json.loads(json.dumps(one.to_json()))))
        assert made[-1] == one
        files[shard.file] = bytes(sink.content)
    return files, made


def assert_same(base: Path, adapters: Adapters, out: Path, method: str = "stack", **options: object) -> MergePlan:
    """Streamed and on a disk: the same files, survivals and rows; and the hashes that passed are the base's."""
    plan_on_disk = plan_merge(open_checkpoint(base), adapters, method, **options)  # pyright: ignore[reportArgumentType]
    report = run_merge(plan_on_disk, out, device=DEVICE)
    checkpoint = elsewhere(base)
    plan = plan_merge(checkpoint, adapters, method, **options)  # pyright: ignore[reportArgumentType]
    files, made = streamed(plan)
    assert files == {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert sum(shard.copied_bytes for shard in made) == report.copied_bytes
    assert sum(shard.rewritten_bytes for shard in made) == report.rewritten_bytes
    assert rounding_loss.total(loss for shard in made for loss in shard.survivals.values()) == report.survival
    passed = {name: digest for shard in made for name, digest in shard.tensor_hashes.items()}
    identity = hash_checkpoint(open_checkpoint(base))
    assert passed == identity.tensor_hashes
    tensors = checkpoint.architecture.tensors.items()
    table = ((name, spec.dtype, spec.shape, passed[name]) for name, spec in tensors)
    assert weights_digest(table) == identity.weights_digest
    return plan


TYING: dict[str, object] = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
UNTIED: dict[str, object] = {"settings": {"tied": "untie"}}
CASES: dict[str, tuple[dict[str, object], Sequence[dict[str, object]], str, dict[str, object]]] = {
    "sharded": ({}, [{}], "stack", {}),
    "in one file": ({"shard": "1GB"}, [{}], "stack", {}),
    "bfloat16": ({"dtype": torch.bfloat16}, [{}, {"r": 8}], "stack", {}),
    "rounded stochastically": ({"dtype": torch.bfloat16}, [{}], "stack", {"rounding": STOCHASTIC}),
    "cast": ({"shard": "1GB"}, [{}], "stack", {"dtype": "bf16"}),
    "cast and rounded stochastically": ({}, [{}], "stack", {"dtype": "fp16", "rounding": STOCHASTIC}),
    "ties": ({}, [{}, {"target_modules": ["q_proj", "up_proj"]}], "ties", {}),
    "dare": ({}, [{}, {}], "dare_linear", {"settings": {"seed": 3}}),
    "a norm saved whole": ({}, [{"modules_to_save": ["norm"]}], "stack", {}),
    "a head saved whole": ({}, [{"modules_to_save": ["lm_head"]}], "stack", {}),
    "DoRA": ({}, [{"use_dora": True}], "stack", {}),
    "many directions": ({"shard": "1GB"}, [{"r": 150, "target_modules": ["down_proj"]}], "stack", {}),
    "tied": (
        {"tied": True},
        [{"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}],
        "stack",
        {},
    ),
    "untied by the merge": (
        {"tied": True},
        [{"target_modules": ["lm_head"]}],
        "stack",
        {"settings": {"tied": "untie"}},
    ),
    "gpt2": ({"kind": "gpt2"}, [{"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}], "stack", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_streamed_merge_has_the_bytes_of_one_on_a_disk(
    case: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small chunks and reads, so that tensors are split often."""
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 200)
    monkeypatch.setattr(stream, "READ_BYTES", 1500)
    monkeypatch.setattr(stream, "_AHEAD_BYTES", 5000)
    model, configs, method, options = CASES[case]
    base = make_model(**model)
    weight = 1.0 if len(configs) == 1 else 0.7
    adapters = [(make_adapter(base, f"a{n}", seed=n, **config), weight) for n, config in enumerate(configs)]
    assert_same(base, adapters, tmp_path / "merged", method, **options)


def test_a_delta_that_needs_all_rows_at_once_is_streamed(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(dtype=torch.bfloat16)
    config = RoadConfig(group_size=8, target_modules=["q_proj", "down_proj"])
    adapter = save_adapted(base, config, tmp_path / "rotated")
    plan = assert_same(base, [(adapter, 1.0)], tmp_path / "merged")
    deltas = [delta for shard in plan.shards for tensor in shard.tensors for delta in tensor.deltas]
    assert any(isinstance(delta, RowwiseDelta) and delta.all_rows for delta in deltas)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_head_that_is_stored_beside_its_embedding_is_hashed_too(
    noise: float, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    """Without noise it is left out of the output, with the file that contains nothing else."""
    tied = make_model(tied=True)
    adapter = make_adapter(tied, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=not noise)
    base = with_head(tied, noise, "with-head")
    plan = assert_same(base, [(adapter, 1.0)], tmp_path / "merged")
    assert ("head.safetensors" in {shard.file for shard in plan.shards}) == bool(noise)


def test_a_grown_vocabulary_is_streamed(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_grown(base, tmp_path / "grown")
    plan = assert_same(base, [(adapter, 1.0)], tmp_path / "merged")
    assert plan.config["vocab_size"] == GROWN


def test_each_byte_of_the_base_is_read_once(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model(dtype=torch.bfloat16)
    plan = plan_merge(elsewhere(base), [(make_adapter(base), 1.0)])
    for shard in plan.shards:
        source = shard.source
        assert isinstance(source, Elsewhere)
        source.reads.clear()
        stream_shard(plan, shard, _Nowhere(), Rewriter(torch_device(DEVICE), plan.rounding))
        reads = sorted(source.reads)
        ends = [begin + size for begin, size in reads]
        assert [begin for begin, _ in reads] == [source_begin(plan, shard.file), *ends[:-1]]
        assert ends[-1] == source.size_bytes


class _Nowhere:
    def write(self, block: memoryview, origin: Origin | None) -> None:
        """Takes everything, and keeps nothing."""

    def finish(self) -> str:
        return ""


def source_begin(plan: MergePlan, file: str) -> int:
    return plan.checkpoint.shards[file].data_begin


def _damaged(bit: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def damage(out: torch.Tensor) -> torch.Tensor:
        flat = out.reshape(-1).view(torch.int32)
        flat[0] ^= 1 << bit
        return out

    return damage


def test_a_row_that_was_computed_wrongly_is_found(
    make_model: MakeModel, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model()
    plan = plan_merge(elsewhere(base), [(make_adapter(base), 1.0)])
    computed, damage = Rewriter.computed, _damaged(22)
    monkeypatch.setattr(Rewriter, "computed", lambda self, chunk, source: damage(computed(self, chunk, source)))
    with pytest.raises(RefusedOutput, match="unexpected values"):
        streamed(plan)


def test_a_sink_that_fails_ends_the_stream_with_its_error(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    plan = plan_merge(elsewhere(base), [(make_adapter(base), 1.0)])

    rewritten = next(shard for shard in plan.shards if shard.rewritten)
    with pytest.raises(OSError, match="full"):
        stream_shard(plan, rewritten, _Failing(2), Rewriter(torch_device(DEVICE), plan.rounding))


@dataclass
class _Failing:
    left: int

    def write(self, block: memoryview, origin: Origin | None) -> None:
        self.left -= 1
        if not self.left:
            raise OSError("full")

    def finish(self) -> str:
        raise AssertionError("it has failed")


def test_a_file_that_ends_early_is_named(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    plan = plan_merge(elsewhere(base), [(make_adapter(base), 1.0)])
    shard = plan.shards[0]
    assert isinstance(shard.source, Elsewhere)
    object.__setattr__(shard.source, "content", shard.source.content[:-1])
    with pytest.raises(InvalidFile, match=f"{shard.file} became shorter"):
        stream_shard(plan, shard, _Nowhere(), Rewriter(torch_device(DEVICE), plan.rounding))


def test_a_base_elsewhere_is_not_merged_on_a_disk(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    plan = plan_merge(elsewhere(base), [(make_adapter(base), 1.0)])
    with pytest.raises(NotSupported, match="not on this machine"):
        run_merge(plan, tmp_path / "merged", device=DEVICE)


def test_a_quantized_base_elsewhere_is_refused(make_model: MakeModel) -> None:
    base = make_model()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(NotSupported, match="download this one"):
        elsewhere(base)


def test_a_shard_that_is_not_elsewhere_is_missing(make_model: MakeModel) -> None:
    base = make_model()
    next(base.glob("model-*.safetensors")).unlink()
    with pytest.raises(InvalidFile, match="which its index names"):
        elsewhere(base)
