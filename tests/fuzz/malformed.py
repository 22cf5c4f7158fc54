"""Adapters that are wrong in one way each: headers, lengths, offsets, numbers, configs. All of them are malformed."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.checkpoints.header import DTYPE_BITS, TensorSpec
from tests.durability.small import MODULE, RANK, SIZE

BASE = Architecture("llama", False, {f"{MODULE}.weight": TensorSpec("F32", (SIZE, SIZE))})
A, B = (f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB")
DATA_BYTES = 2 * RANK * SIZE * 4

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON value, NaN and lone surrogates included."""
huge = st.sampled_from([2**31, 2**53, 2**60, 2**63, 2**64, 10**400, -1, -(2**60)])


@dataclass
class Adapter:
    """A valid adapter, until it is changed as `wrong` describes."""

    config: Any = field(
        default_factory=lambda: {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"]}
    )
    header: Any = field(
        default_factory=lambda: {
            "__metadata__": {"format": "pt"},
            A: {"dtype": "F32", "shape": [RANK, SIZE], "data_offsets": [0, DATA_BYTES // 2]},
            B: {"dtype": "F32", "shape": [SIZE, RANK], "data_offsets": [DATA_BYTES // 2, DATA_BYTES]},
        }
    )
    data: bytearray = field(default_factory=lambda: bytearray(np.full(DATA_BYTES // 4, 0.5, "<f4").tobytes()))
    config_bytes: bytes | None = None
    weights_bytes: bytes | None = None
    wrong: str = "nothing"

    def weights(self) -> bytes:
        if self.weights_bytes is not None:
            return self.weights_bytes
        text = self.header if isinstance(self.header, bytes) else json.dumps(self.header).encode()
        return len(text).to_bytes(8, "little") + text + self.data

    def write(self, directory: Path) -> Path:
        directory.mkdir(exist_ok=True)
        config = self.config_bytes if self.config_bytes is not None else json.dumps(self.config).encode()
        (directory / "adapter_config.json").write_bytes(config)
        (directory / "adapter_model.safetensors").write_bytes(self.weights())
        return directory


Harm = Callable[[st.DrawFn, Adapter], None]


def claimed_length(draw: st.DrawFn, adapter: Adapter) -> None:
    content = adapter.weights()
    true = int.from_bytes(content[:8], "little")
    longer = st.integers(true + 1, 2**64 - 1) | st.sampled_from([2**60, 2**63, 2**64 - 1, 16_000_001, len(content)])
    adapter.weights_bytes = draw(longer | st.integers(0, true - 1)).to_bytes(8, "little") + content[8:]


def truncated(draw: st.DrawFn, adapter: Adapter) -> None:
    content = adapter.weights()
    adapter.weights_bytes = content[: draw(st.integers(0, len(content) - 1))]


def too_long(draw: st.DrawFn, adapter: Adapter) -> None:
    adapter.weights_bytes = adapter.weights() + draw(st.binary(min_size=1, max_size=50))


def not_safetensors(draw: st.DrawFn, adapter: Adapter) -> None:
    magic = draw(
        st.sampled_from([b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"GGUF", b"\x7fELF", b"<html>", b"", b"\0" * 8])
    )
    adapter.weights_bytes = magic + draw(st.binary(max_size=200))


def offsets(draw: st.DrawFn, adapter: Adapter) -> None:
    entry = adapter.header[draw(st.sampled_from([A, B]))]
    side = draw(st.integers(0, 1))
    value = draw(st.integers(-(2**70), 2**70) | st.integers(0, DATA_BYTES) | huge | junk)
    if type(value) is int and value == entry["data_offsets"][side]:
        value += 4
    entry["data_offsets"][side] = value


def overlapping(draw: st.DrawFn, adapter: Adapter) -> None:
    """Right by themselves, wrong together."""
    shift = draw(st.integers(-DATA_BYTES // 2, DATA_BYTES).filter(bool))
    adapter.header[B]["data_offsets"] = [DATA_BYTES // 2 + shift, DATA_BYTES + shift]


def dtype(draw: st.DrawFn, adapter: Adapter) -> None:
    same_size = {name for name, bits in DTYPE_BITS.items() if bits == 32}
    other = st.sampled_from(sorted(set(DTYPE_BITS) - same_size)) | st.text(max_size=6) | junk
    value = draw(other.filter(lambda value: not isinstance(value, str) or value not in same_size))
    adapter.header[draw(st.sampled_from([A, B]))]["dtype"] = value


def shape(draw: st.DrawFn, adapter: Adapter) -> None:
    entry = adapter.header[draw(st.sampled_from([A, B]))]
    sizes = st.lists(st.integers(0, 2**64) | huge | st.just(0) | st.sampled_from([1, 4, 8, 16]), max_size=20)
    entry["shape"] = draw((sizes | junk).filter(lambda value: value != entry["shape"]))


def entry_fields(draw: st.DrawFn, adapter: Adapter) -> None:
    name = draw(st.sampled_from([A, B]))
    if draw(st.booleans()):
        del adapter.header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))]
    elif draw(st.booleans()):
        adapter.header[name][draw(st.text(max_size=5))] = draw(junk)
    else:
        adapter.header[name] = draw(junk)


def names(draw: st.DrawFn, adapter: Adapter) -> None:
    old = draw(st.sampled_from([A, B]))
    other = draw(st.text(st.characters(), max_size=30) | st.integers(0, 2000).map(lambda count: f"{old}{'x' * count}"))
    new = other if other not in (A, B, "__metadata__") else f"{old}.x"
    adapter.header = {new if name == old else name: value for name, value in adapter.header.items()}


def missing(draw: st.DrawFn, adapter: Adapter) -> None:
    """Removes one of the two factors, with its bytes; or everything."""
    gone = draw(st.sampled_from([{A}, {B}, {A, B}]))
    adapter.header = {name: value for name, value in adapter.header.items() if name not in gone}
    for name in {A, B} - gone:
        adapter.header[name]["data_offsets"] = [0, DATA_BYTES // 2]
    adapter.data = adapter.data[: (2 - len(gone)) * DATA_BYTES // 2]


def twice(draw: st.DrawFn, adapter: Adapter) -> None:
    text = json.dumps(adapter.header)
    name = draw(st.sampled_from([A, B, "__metadata__"]))
    adapter.header = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(adapter.header[name])}}}".encode()


def metadata(draw: st.DrawFn, adapter: Adapter) -> None:
    value = draw(junk)
    texts = isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    adapter.header["__metadata__"] = {"a": 1} if texts else value


def no_json(draw: st.DrawFn, adapter: Adapter) -> None:
    depth = st.integers(1_000, 60_000)
    adapter.header = draw(
        st.binary(max_size=100)
        | depth.map(lambda count: b"[" * count)
        | depth.map(lambda count: b'{"a":' * count)
        | st.integers(4_301, 9_000).map(lambda digits: b'{"a": ' + b"9" * digits + b"}")
        | junk.filter(lambda value: not isinstance(value, dict)).map(lambda value: json.dumps(value).encode())
    )


def not_finite(draw: st.DrawFn, adapter: Adapter) -> None:
    at = 4 * draw(st.integers(0, DATA_BYTES // 4 - 1))
    bits = 0x7F80_0000 | draw(st.integers(0, 2**23 - 1)) | draw(st.sampled_from([0, 1 << 31]))
    adapter.data[at : at + 4] = bits.to_bytes(4, "little")


def rank(draw: st.DrawFn, adapter: Adapter) -> None:
    adapter.config["r"] = draw(
        (st.integers() | huge | junk).filter(lambda value: type(value) is not int or value != RANK)
    )


def alpha(draw: st.DrawFn, adapter: Adapter) -> None:
    wrong = junk.filter(lambda value: isinstance(value, bool) or not isinstance(value, int | float))
    adapter.config["lora_alpha"] = draw(
        wrong | st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300, 10**400])
    )


def peft_type(draw: st.DrawFn, adapter: Adapter) -> None:
    adapter.config["peft_type"] = draw(
        (junk | st.sampled_from(["lora", "LOHA", "X" * 5_000])).filter(lambda v: v != "LORA")
    )


def unknown_setting(draw: st.DrawFn, adapter: Adapter) -> None:
    name = draw(st.text(st.characters(), max_size=10) | st.integers(1, 20_000).map(lambda count: "y" * count))
    adapter.config[f"use_{name}x"] = draw(junk.filter(bool))


def two_variants(draw: st.DrawFn, adapter: Adapter) -> None:
    flags = ["use_dora", "use_qalora", "kasa_config", "megatron_config", "lora_bias", "arrow_config"]
    for flag in draw(st.lists(st.sampled_from(flags), min_size=2, unique=True)):
        adapter.config[flag] = draw(junk.filter(bool))


def patterns(draw: st.DrawFn, adapter: Adapter) -> None:
    regex = st.sampled_from(["(", "[", "(a+)+$", "a" * 100_000, "(?P<x>a)(?P=x)", "\\", "*", "(?<=a)b", "a{1,99999}"])
    field_name = draw(st.sampled_from(["rank_pattern", "alpha_pattern"]))
    of_no_use = st.sampled_from(["no.such.module", "half \ud800", "[\ud800]"]).map(lambda key: {key: 3})
    adapter.config[field_name] = draw(
        st.dictionaries(regex, st.just(4), min_size=1)
        | st.dictionaries(
            st.just("q_proj"), junk.filter(lambda v: type(v) is not int and type(v) is not float), min_size=1
        )
        | junk.filter(lambda value: bool(value) and not isinstance(value, dict))
        | of_no_use
    )


def flags(draw: st.DrawFn, adapter: Adapter) -> None:
    name = draw(st.sampled_from(["use_rslora", "fan_in_fan_out", "bias"]))
    allowed = ("none", "lora_only", "all")
    adapter.config[name] = draw(junk.filter(lambda v: bool(v) and not isinstance(v, bool) and v not in allowed))


def targets(draw: st.DrawFn, adapter: Adapter) -> None:
    name = draw(st.sampled_from(["target_modules", "exclude_modules", "modules_to_save"]))
    numbers = st.lists(st.integers() | st.none(), min_size=1, max_size=3)
    bad_names = st.sampled_from(["z" * 5_000, "half \ud800"]).map(lambda text: [text, "q_proj"])
    known = bad_names | st.just(["no.such.module"]) if name == "target_modules" else st.just(["z" * 5_000])
    adapter.config[name] = draw(known | numbers | st.integers(min_value=1) | st.just({"q_proj": 1}) | st.just(True))


def rows_and_stacks(draw: st.DrawFn, adapter: Adapter) -> None:
    """Tokens and parameters that are trained according to the config, but have no tensor."""
    name = draw(st.sampled_from(["trainable_token_indices", "target_parameters"]))
    ids, paths = st.lists(st.integers(0, 5), min_size=1), st.just(["mlp.experts.gate_up_proj", "down_proj"])
    adapter.config[name] = draw(junk.filter(bool) | huge.filter(bool) | ids | paths)


def identity(draw: st.DrawFn, adapter: Adapter) -> None:
    name = draw(st.sampled_from(["base_model_name_or_path", "peft_version", "revision"]))
    adapter.config[name] = draw(
        junk.filter(lambda v: v is not None and not isinstance(v, str)) | st.just("half \ud800")
    )


def config_no_json(draw: st.DrawFn, adapter: Adapter) -> None:
    document = json.dumps(adapter.config).encode()
    adapter.config_bytes = draw(
        st.integers(0, len(document) - 1).map(lambda count: document[:count])
        | st.integers(1_000, 60_000).map(lambda count: b'{"r":' * count)
        | st.binary(max_size=60)
        | st.integers(4_301, 9_000).map(lambda digits: document[:-1] + b', "r": ' + b"9" * digits + b"}")
        | junk.filter(lambda value: not isinstance(value, dict)).map(lambda value: json.dumps(value).encode())
        | st.just(b"\xef\xbb\xbf" + document.replace(b"LORA", b"\xff\xfe"))
    )


HARMS: tuple[Harm, ...] = (
    claimed_length, truncated, too_long, not_safetensors, offsets, overlapping, dtype, shape, entry_fields, names,
    missing, twice, metadata, no_json, not_finite, rank, alpha, peft_type, unknown_setting, two_variants, patterns,
    flags, targets, rows_and_stacks, identity, config_no_json,
)  # fmt: skip


@st.composite
def malformed(draw: st.DrawFn) -> Adapter:
    adapter, harm = Adapter(), draw(st.sampled_from(HARMS))
    harm(draw, adapter)
    adapter.wrong = harm.__name__
    return adapter
