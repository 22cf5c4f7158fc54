"""Rebuilds a merged checkpoint from its note and compares: equal, rounding, or different."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.errors import InvalidFile, Mismatch
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.header import read_header
from composer.formats.recipes.rounding import Mode, Rounding
from composer.merge import chunks
from composer.merge.plan import plan_merge
from composer.merge.rebuild import Rebuilt, plan_rebuild, rebuild, steps_apart
from composer.merge.run import run_merge
from tests.composer.tiny import MakeAdapter, MakeModel
from tests.device import DEVICE


@pytest.fixture
def base(make_model: MakeModel) -> Path:
    base = make_model(dtype=torch.bfloat16, shard="6KB")
    (base / "tokenizer.json").write_text("{}")
    return base


@pytest.fixture
def adapters(base: Path, make_adapter: MakeAdapter) -> list[Path]:
    return [make_adapter(base, "one", seed=1), make_adapter(base, "two", seed=2, target_modules=["q_proj", "up_proj"])]


def merged(base: Path, adapters: list[Path], out: Path, **options: object) -> Path:
    pairs = list(zip(adapters, [0.5, -1.25], strict=True))
    run_merge(plan_merge(open_checkpoint(base), pairs, **options), out, DEVICE)  # pyright: ignore[reportArgumentType]
    return out


def again(base: Path, adapters: list[Path], out: Path) -> Rebuilt:
    return rebuild(plan_rebuild(out, open_checkpoint(base), adapters), out, DEVICE)


OPTIONS: dict[str, dict[str, object]] = {
    "stacked": {},
    "a mean in float16": {"method": "linear", "settings": {"normalize": True}, "dtype": "fp16"},
    "by chance": {"rounding": Rounding(Mode.STOCHASTIC, 5)},
    "ties": {"method": "ties", "settings": {"density": 0.5}},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_merge_made_again_is_the_same_whatever_the_adapters_order_and_what_a_release_adds(
    case: str, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = merged(base, adapters, tmp_path / "merged", **OPTIONS[case])
    (out / "README.md").write_text("a card that the release has besides")
    rebuilt = again(base, adapters[::-1], out)
    assert rebuilt.verdict == "same"
    files = {file.name for file in out.iterdir()} - {"adaptory.json", "README.md", "generation_config.json"}
    assert files <= set(rebuilt.same)


def test_products_of_other_shapes_may_differ_in_their_last_bit_which_counts_as_rounding(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of another size imitate another machine, whose kernel adds in another order."""
    out = merged(base, adapters, tmp_path / "merged")
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 40)
    assert again(base, adapters, out).verdict in ("same", "rounding")


def test_progress_counts_every_byte_once(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    plan, done = plan_rebuild(out, open_checkpoint(base), adapters), list[int]()
    rebuild(plan, out, DEVICE, done.append)
    assert sum(done) == plan.size_bytes


def nudge(file: Path, tensor: str, element: int, by: int) -> None:
    """Move one bfloat16 element of a file by that many steps of its bits."""
    entry = read_header(file).tensors[tensor]
    with file.open("r+b") as opened:
        opened.seek(entry.begin + 2 * element)
        bits = int.from_bytes(opened.read(2), "little")
        opened.seek(entry.begin + 2 * element)
        opened.write((bits + by).to_bytes(2, "little"))


def touched(base: Path, out: Path) -> tuple[Path, str]:
    """A file of the merged checkpoint, and a tensor in it that the adapters changed."""
    for file in sorted(out.glob("*.safetensors")):
        before, after = load_file(base / file.name), load_file(file)
        for name, tensor in after.items():
            if not torch.equal(tensor, before[name]):
                return file, name
    raise AssertionError("nothing was changed")


@pytest.mark.parametrize(("by", "verdict", "counts"), [(1, "rounding", (1, 0)), (2, "different", (0, 1))])
def test_a_neighbouring_value_is_rounding_and_another_one_is_different(
    by: int, verdict: str, counts: tuple[int, int], base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    file, tensor = touched(base, out)
    nudge(file, tensor, 3, by)
    rebuilt = again(base, adapters, out)
    assert rebuilt.verdict == verdict
    (difference,) = rebuilt.different
    assert (difference.file, difference.neighbours, difference.others) == (file.name, *counts)
    assert (tensor in difference.why) is (difference.others > 0)
    assert file.name not in rebuilt.same


def test_more_neighbours_than_rounding_gives_are_no_rounding(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    file, tensor = touched(base, out)
    for element in range(20):
        nudge(file, tensor, element, 1)
    rebuilt = again(base, adapters, out)
    assert rebuilt.verdict == "different"
    (difference,) = rebuilt.different
    assert (difference.neighbours, difference.others) == (20, 0)
    assert f"20 elements of {tensor}" in difference.why


def test_a_tensor_without_elements_is_made_again_too(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    file = base / min(index["weight_map"].values())
    save_file({**load_file(file), "model.nothing.weight": torch.zeros(0, dtype=torch.bfloat16)}, file)
    index["weight_map"]["model.nothing.weight"] = file.name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert again(base, adapters, merged(base, adapters, tmp_path / "merged", dtype="fp32")).verdict == "same"


def test_a_changed_copy_a_missing_file_and_another_config_are_named(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    names = [file.name for file in sorted(out.glob("*.safetensors"))]
    copied = next(name for name in names if (out / name).read_bytes() == (base / name).read_bytes())
    gone = next(name for name in names if name != copied)
    (out / gone).unlink()
    content = bytearray((out / copied).read_bytes())
    content[-1] ^= 1
    (out / copied).write_bytes(content)
    (out / "more.safetensors").write_bytes(content)
    (out / "tokenizer.json").write_text("[]")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": 65}))
    rebuilt = again(base, adapters, out)
    assert rebuilt.verdict == "different"
    assert {difference.file: difference.why for difference in rebuilt.different} == {
        copied: "has different bytes where the base was copied",
        gone: "is missing",
        "more.safetensors": "does not belong to this merge",
        "tokenizer.json": "is another",
        "config.json": "has different contents",
    }


def test_a_side_file_that_is_gone_is_missing(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    (out / "tokenizer.json").unlink()
    rebuilt = again(base, adapters, out)
    assert rebuilt.verdict == "different"
    assert [(difference.file, difference.why) for difference in rebuilt.different] == [("tokenizer.json", "is missing")]


def test_another_base_gives_another_model(
    base: Path, adapters: list[Path], tmp_path: Path, make_model: MakeModel
) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    other = make_model(dtype=torch.bfloat16, shard="6KB", name="other")
    for file in other.glob("*.safetensors"):
        save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert again(other, adapters, out).verdict == "different"


def test_an_adapter_that_was_not_merged_is_refused(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    with pytest.raises(Mismatch, match="two that was merged"):
        plan_rebuild(out, open_checkpoint(base), adapters[:1])
    alone = tmp_path / "alone"
    run_merge(plan_merge(open_checkpoint(base), [(adapters[0], 1.0)]), alone, DEVICE)
    with pytest.raises(Mismatch, match=r"two \(.*\) is not one of the merged adapters"):
        plan_rebuild(alone, open_checkpoint(base), adapters)


def test_an_adapter_whose_config_is_another_by_now_is_refused_by_name(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    config = adapters[0] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 99}))
    with pytest.raises(Mismatch, match=r"one that was merged: adapter_config.json differs"):
        plan_rebuild(out, open_checkpoint(base), adapters)
    note = json.loads((out / "adaptory.json").read_text())
    for row in note["adapters"]:
        del row["config"]
    (out / "adaptory.json").write_text(json.dumps(note))
    assert again(base, adapters, out).verdict == "different", "made before notes had configs"


@pytest.mark.parametrize("note", [None, {"made": "combine"}, {"made": "merge"}, {"made": "merge", "adapters": [1]}])
def test_a_directory_without_a_note_of_a_merge_is_refused(
    note: dict[str, object] | None, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    shutil.copytree(base, out)
    if note is not None:
        (out / "adaptory.json").write_text(json.dumps(note))
    with pytest.raises(InvalidFile):
        plan_rebuild(out, open_checkpoint(base), adapters)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": [1]}, {"settings": None}, {"method": 3}, {"dtype": 4}, {"adapters": {"a": 1}}, {"adapters": 1},
        {"rounding": None}, {"rounding": {"mode": "nearest", "seed": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_note_of_another_form_is_one_clear_error(
    change: dict[str, object], base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    note = json.loads((out / "adaptory.json").read_text())
    (out / "adaptory.json").write_text(json.dumps(note | change))
    with pytest.raises(InvalidFile, match="does not name all inputs of the merge"):
        plan_rebuild(out, open_checkpoint(base), adapters)


def test_a_mistake_of_the_plan_is_not_the_notes(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = merged(base, adapters, tmp_path / "merged")
    monkeypatch.setattr("composer.merge.plan.combine_parsed", None)
    with pytest.raises(TypeError):
        plan_rebuild(out, open_checkpoint(base), adapters)


@pytest.mark.parametrize(
    ("one", "other", "counts"),
    [
        ([1.0, 2.0], [1.0, 2.0], (0, 0)),
        ([0.0], [-0.0], (1, 0)),
        ([float("inf")], [torch.finfo(torch.bfloat16).max], (0, 1)),
        ([-1.0], [-1.0078125], (1, 0)),
        ([-1.0], [1.0], (0, 1)),
    ],
)
def test_steps_are_counted_across_zero_and_signs(one: list[float], other: list[float], counts: tuple[int, int]) -> None:
    assert steps_apart(torch.tensor(one, dtype=torch.bfloat16), torch.tensor(other, dtype=torch.bfloat16)) == counts


def test_integers_are_the_same_or_not() -> None:
    assert steps_apart(torch.tensor([1, 2]), torch.tensor([1, 3])) == (0, 1)


def test_what_an_earlier_version_of_the_method_made_is_said_to_be_that_and_not_different(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = merged(base, adapters, tmp_path / "merged", method="ctm_mean")
    note = json.loads((out / "adaptory.json").read_text())
    assert note.pop("method_version") == 2
    (out / "adaptory.json").write_text(json.dumps(note))
    assert again(base, adapters, out).verdict == "same", "the numbers of these inputs did not change"
    nudge(next(out.glob("*1-of*.safetensors")), "model.layers.0.self_attn.q_proj.weight", 0, 9)
    rebuilt = again(base, adapters, out)
    assert (rebuilt.verdict, rebuilt.earlier) == ("earlier", "ctm_mean 1")
    (out / "adaptory.json").write_text(json.dumps({**note, "method_version": 2}))
    assert again(base, adapters, out).verdict == "different"
