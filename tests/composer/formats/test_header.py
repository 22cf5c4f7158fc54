"""Safetensors headers: correct reading, and one precise error for each defect."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.deltas.tensors import TORCH_DTYPES
from composer.errors import InvalidFile
from composer.formats.checkpoints.header import HeaderLimits, TensorSpec, encode_header, parse_header, read_header


def file_with(table: object, data_bytes: int = 0) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def entry(begin: int, end: int, dtype: str = "F32", shape: list[object] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_file_of_the_real_writer_is_read_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(2, 3),
        "b": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.tensor(1),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    assert {name: (e.dtype, e.shape) for name, e in header.tensors.items()} == {
        "a": ("F32", (2, 3)), "b": ("BF16", (5,)), "c": ("I64", ()), "empty": ("F32", (0, 4)),
    }  # fmt: skip
    a = header.tensors["a"]
    assert (tmp_path / "x.safetensors").read_bytes()[a.begin : a.end] == tensors["a"].numpy().tobytes()


def test_the_real_reader_reads_what_we_encode(tmp_path: Path) -> None:
    specs = {"odd": TensorSpec("BF16", (3,)), "wide": TensorSpec("F64", (2,)), "ü": TensorSpec("F32", (1, 1))}
    head = encode_header(specs, {"k": "v"})
    assert len(head) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(head + bytes(6 + 16 + 4))
    assert {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "x.safetensors").items()} == {
        "odd": (3,), "wide": (2,), "ü": (1, 1),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_the_floats_of_another_maker_are_read_and_written(dtype: str, tmp_path: Path) -> None:
    head = encode_header({"a": TensorSpec(dtype, (3,))})
    (tmp_path / "x.safetensors").write_bytes(head + bytes(3))
    assert read_header(tmp_path / "x.safetensors").tensors["a"].dtype == dtype
    assert load_file(tmp_path / "x.safetensors")["a"].dtype == TORCH_DTYPES[dtype]


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "a length beyond the file": ((1000).to_bytes(8, "little") + b"{}", "cut off"),
    "a length beyond reason": ((2**63).to_bytes(8, "little") + b"{}", "more than the"),
    "no JSON": (file_with(b"hello"), "not JSON"),
    "no UTF-8": (file_with(b'{"\xff": 1}'), "not JSON"),
    "bottomless nesting": (file_with(b"[" * 100_000), "not JSON"),
    "a list": (file_with([]), "not a JSON object"),
    "a name twice": (file_with(b'{"a": 1, "a": 1}'), "'a' twice"),
    "metadata that is not an object": (file_with({"__metadata__": 3}), "metadata"),
    "metadata that is not text": (file_with({"__metadata__": {"k": 3}}), "'k' is not a string"),
    "a tensor without shape": (file_with({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4), "must have dtype"),
    "a tensor with more": (file_with({"a": {**entry(0, 4), "x": 1}}, 4), "nothing else"),
    "an unknown dtype": (file_with({"a": entry(0, 4, "F31")}, 4), "'F31'"),
    "a dtype that is a list": (file_with({"a": {**entry(0, 4), "dtype": []}}, 4), "dtype"),
    "a negative dimension": (file_with({"a": entry(0, 4, shape=[-1])}, 4), "malformed"),
    "a negative zero": (
        file_with(b'{"a": {"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "malformed",
    ),
    "a boolean dimension": (file_with({"a": entry(0, 4, shape=[True])}, 4), "malformed"),
    "a fractional dimension": (file_with({"a": entry(0, 4, shape=[1.0])}, 4), "malformed"),
    "a wrong size": (file_with({"a": entry(0, 8, shape=[1])}, 8), "not F32 x"),
    "an end before the begin": (
        file_with({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, 8),
        "not F32 x",
    ),
    "an overlap": (file_with({"a": entry(0, 8), "b": entry(4, 12)}, 12), "'b' overlaps"),
    "a hole": (file_with({"a": entry(0, 4), "b": entry(8, 12)}, 12), "'b' leaves a hole"),
    "a cut-off file": (file_with({"a": entry(0, 8)}, 4), "end at byte"),
    "a file with more behind": (file_with({"a": entry(0, 8)}, 12), "end at byte"),
    "a newline in a name": (file_with({"a\nb": entry(0, 4)}, 4), "control characters"),
    "half a character in a name": (
        file_with(b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
        "control",
    ),
    "no name": (file_with({"": entry(0, 4)}, 4), "is empty"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_name_and_the_reason(case: str, tmp_path: Path) -> None:
    content, reason = BROKEN[case]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match=reason) as caught:
        read_header(path)
    assert caught.value.subject == "weights.safetensors"


def test_limits_bound_what_is_parsed() -> None:
    content = file_with({"a": entry(0, 4), "b": entry(4, 8)}, 8)
    with pytest.raises(InvalidFile, match="2 tensors, more than the 1"):
        parse_header(content, len(content), HeaderLimits(tensors=1))
    with pytest.raises(InvalidFile, match="more than the 10"):
        parse_header(content, len(content), HeaderLimits(header_bytes=10))


def test_a_huge_claimed_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(InvalidFile, match="200000000 bytes"):
        read_header(path)


def test_pickles_are_refused_by_name_and_by_content(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter_model.bin")
    (tmp_path / "renamed.safetensors").write_bytes((tmp_path / "adapter_model.bin").read_bytes())
    (tmp_path / "old.safetensors").write_bytes(b"\x80\x04rest of a pickle")
    assert zipfile.is_zipfile(tmp_path / "renamed.safetensors")
    for name in ("adapter_model.bin", "renamed.safetensors", "old.safetensors"):
        with pytest.raises(InvalidFile, match=r"pickle.*Convert it") as caught:
            read_header(tmp_path / name)
        assert caught.value.code == "pickle"


def test_a_header_over_16_megabytes_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(InvalidFile, match="more than the 16000000 allowed"):
        parse_header((16_000_001).to_bytes(8, "little"), 10**9)


def many(count: int) -> dict[str, TensorSpec]:
    name = "base_model.model.model.layers.{}.mlp.experts.{}.down_proj.lora_A.weight"
    return {name.format(number // 128, number % 128): TensorSpec("BF16", (8, 1)) for number in range(count)}


def test_a_header_of_50_000_tensors_is_read() -> None:
    specs = many(50_000)
    head = encode_header(specs)
    read = parse_header(head, len(head) + 50_000 * 16).tensors
    assert {name: entry.spec for name, entry in read.items()} == specs


def test_several_large_headers_at_once_are_each_read(tmp_path: Path) -> None:
    counts = [12_000, 13_000, 14_000, 15_000]
    for count in counts:
        head = encode_header(many(count))
        assert len(head) > 1_000_000
        (tmp_path / f"{count}.safetensors").write_bytes(head + bytes(count * 16))
    with ThreadPoolExecutor(4) as pool:
        headers = list(pool.map(lambda count: read_header(tmp_path / f"{count}.safetensors"), counts))
    assert [len(header.tensors) for header in headers] == counts


COSTLY: dict[str, Callable[[], bytes]] = {
    "empty lists": lambda: b'{"a":[' + b"[[]]," * 3_179_000 + b"[]]}",
    "empty objects": lambda: b"{" + b",".join(b'"%x":{}' % number for number in range(1_380_000)) + b"}",
    "numbers": lambda: b'{"a":[1' + b",1" * 7_900_000 + b"]}",
    "strings with quotes in them": lambda: b'{"a":[""' + b',"\\\\\\""' * 1_700_000 + b"]}",
}
READ_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from composer.errors import InvalidFile
from composer.formats.checkpoints.header import read_header

taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 200_000_000,) * 2)  # of which malloc may reserve 128 MB for a thread
try:
    read_header(Path(sys.argv[1]))
except InvalidFile as error:
    print(error.code, error.subject, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tells its memory by /proc")
@pytest.mark.parametrize("case", COSTLY)
def test_a_header_that_would_cost_much_memory_is_refused_before_it_is_parsed(case: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(file_with(COSTLY[case]()))
    command = [sys.executable, "-c", READ_IN_LITTLE_MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("bad_safetensors w.safetensors")
    assert "more than the 1000000 commas and opening brackets" in done.stdout


def test_brackets_within_strings_do_not_count() -> None:
    """kohya's trainer keeps whole JSON documents in its metadata."""
    metadata = {"ss_datasets": json.dumps([{"tags": {'a "b" \\': [1, 2]}}] * 100), "ss_end": "\\"}
    content = file_with({"__metadata__": metadata, "a": entry(0, 4)}, 4)
    assert parse_header(content, len(content), HeaderLimits(structure=10)).metadata == metadata
    with pytest.raises(InvalidFile, match="more than the 9 commas and opening brackets"):
        parse_header(content, len(content), HeaderLimits(structure=9))


@pytest.mark.parametrize("string", ['"', '""', "\\", '\\"', '\\\\"[', "[\n,", "é{", '{"a":[1,2]}', "", "\u0000"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_what_counts_is_exactly_what_stands_outside_of_strings(string: str, ascii_only: bool) -> None:
    content = file_with(json.dumps({"__metadata__": {string: string, "k": string}}, ensure_ascii=ascii_only).encode())
    assert parse_header(content, len(content), HeaderLimits(structure=3)).metadata["k"] == string
    with pytest.raises(InvalidFile, match="more than the 2 commas"):
        parse_header(content, len(content), HeaderLimits(structure=2))
