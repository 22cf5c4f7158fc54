"""Pickles are refused under any name: no loader of a release needs them, and nobody should be tempted to open one."""

import io
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from registry.errors import Invalid
from registry.formats.pickles import ENDS_BYTES, refuse_pickle_content, refuse_pickle_name
from tests.scenarios.world import Cli, World


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(*entries: tuple[str, str]) -> bytes:
    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries:
                archive.writestr(name, content)

    return written(write)


HOUSE = Path(__file__).parents[2]
STATE = {"weight": torch.zeros(50_000)}
PICKLES: dict[str, bytes] = {
    "torch.save": written(lambda file: torch.save(STATE, file)),
    "torch.save of old": written(lambda file: torch.save(STATE, file, _use_new_zipfile_serialization=False)),
    "torch.save of many tensors": written(lambda file: torch.save([torch.zeros(1) for _ in range(2_000)], file)),
    "a zip whose pickle comes last": zipped(("readme.txt", "x" * 200_000), ("archive/data.pkl", "cos\nsystem\n")),
    "objects in numpy's format": written(lambda file: np.save(file, np.array([{}], object), allow_pickle=True)),
    "a field of objects": written(
        lambda file: np.save(file, np.zeros(2, [("a", "<f4"), ("b", "O")]), allow_pickle=True)
    ),
}


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this ran",)


PICKLES |= {f"code in protocol {protocol}": pickle.dumps([1, Harmful()], protocol) for protocol in range(6)}
PICKLES |= {
    "arrays in protocol 0": pickle.dumps({"weight": np.zeros(50_000)}, 0),
    "code without a protocol": b"\x8c\x08builtins\x8c\x05print\x93)R.",
    "code and then something else": b"cos\nsystem\n(S'true'\ntRnothing that could be read",
    "an instance of old": b"(S'true'\nios\nsystem\n.",
}
RUN = b"cos\nsystem\n(S'true'\ntR."
PICKLES |= {
    "code in a second pickle": b"N." + RUN,
    "code in a third pickle behind values that are left over": b"NN.N(N." + RUN,
    "several in a row": pickle.dumps(1, 0) + pickle.dumps([2, "three"], 1) + pickle.dumps(None, 0),
}
PICKLES |= {
    f"torch.save of old in protocol {protocol}": written(
        lambda file, protocol=protocol: torch.save(
            STATE, file, _use_new_zipfile_serialization=False, pickle_protocol=protocol
        )
    )
    for protocol in (0, 1)
}
READ_BY_LOADERS_ALONE = (
    b"I0x10\n", b"I0b1\n", b"I 7 \n", b"I1_0\n", b"I5\0 and more\n", b"I01\n", b"L0x10L\n", b"L0o7\n", b"L-0x1FL\n",
    b"F1e5\n", b"F-inf\n", b"Fnan\n", b"F1.5\0 and more\n", b"S'\xc3\xa9'\n", b'S"\\x41"\n', b"V\xe9\n",
    b"X\x03\0\0\0\xed\xa0\x80",
    b"\x80\x00N", b"\x80\x01N", b"\x95\x04\0\0\0\0\0\0\0N", b"Np 3\n", b"Np3\0x\n", b"(",
    b"\x8b\0\0\0\0", b"\x96\0\0\0\0\0\0\0\0",
)  # fmt: skip
"""Each puts one value, or a mark, on the stack."""
OTHERS: dict[str, bytes] = {
    "nothing": b"",
    "text": b"see data.pkl in archive.zip",
    "a zip of text": zipped(("readme.txt", "torch.save writes archive/data.pkl " * 100)),
    "numbers in numpy's format": written(lambda file: np.save(file, np.zeros(4))),
    "several arrays": written(lambda file: np.savez(file, a=np.zeros(4), b=np.ones(2))),
}


def ends(content: bytes) -> tuple[bytes, bytes]:
    return content[:ENDS_BYTES], content[-ENDS_BYTES:]


@pytest.mark.parametrize("what", list(PICKLES))
def test_a_pickle_is_known_by_its_bytes(what: str) -> None:
    with pytest.raises(Invalid, match=r"notes\.txt is a pickle"):
        refuse_pickle_content("notes.txt", *ends(PICKLES[what]))


@pytest.mark.parametrize("value", READ_BY_LOADERS_ALONE, ids=repr)
def test_code_behind_a_value_is_known_however_the_value_is_written(value: bytes) -> None:
    assert pickle.loads(value + b"0N.", encoding="utf-8") is None  # noqa: S301
    with pytest.raises(Invalid, match=r"notes\.txt is a pickle"):
        refuse_pickle_content("notes.txt", value + b"0" + RUN)
    with pytest.raises(Invalid, match=r"notes\.txt is a pickle"):
        refuse_pickle_content("notes.txt", value + b"N." + RUN)


@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.binary(max_size=200_000), lambda inner: st.lists(inner), max_leaves=8
    ),
    st.sampled_from([2, 3, 4, 5]),
)
def test_whatever_is_pickled_is_known_by_its_first_bytes(value: Any, protocol: int) -> None:
    with pytest.raises(Invalid):
        refuse_pickle_content("x", pickle.dumps(value, protocol)[:ENDS_BYTES])


@given(
    st.recursive(st.none() | st.integers() | st.text() | st.binary(), lambda inner: st.lists(inner), max_leaves=8),
    st.sampled_from([0, 1]),
)
def test_a_whole_pickle_of_an_old_protocol_is_known_although_it_has_no_sign(value: Any, protocol: int) -> None:
    with pytest.raises(Invalid):
        refuse_pickle_content("x", pickle.dumps(value, protocol))


@given(st.binary())
def test_bytes_of_any_kind_are_judged_and_nothing_else_happens(content: bytes) -> None:
    with suppress(Invalid):
        refuse_pickle_content("x", content)


def test_texts_are_no_pickles_whatever_letters_they_begin_with() -> None:
    tracked = [path for end in ("md", "py", "yaml", "jsonl", "json", "txt") for path in HOUSE.glob(f"[!.]*/**/*.{end}")]
    assert len(tracked) > 300
    for path in tracked:
        refuse_pickle_content(path.name, path.read_bytes()[:ENDS_BYTES])
    for text in (
        "N.B.\ncopyright\nnotice\nby me\n",
        "I. Introduction\nconfig\nname\nbuilt\n",
        "I like it\ncopy\nthat\nback\n",
        "Préface\ncopie\nfaite\nbien\n",
        "Fine\ncopy\nthat\nback\n",
        "See also\ncopy\nthat\nback\n",
        "N.\n" * 100,
    ):
        refuse_pickle_content("notes.txt", text.encode())
    for text in ("copyright\nnotice\n(the terms\n", "cat\ncab\ncar\n.\n", "(in\norder)\n.", ".", "NNNNNNNN", "I am.\n"):
        refuse_pickle_content("notes.txt", text.encode())


@pytest.mark.parametrize("what", list(OTHERS))
def test_what_is_no_pickle_passes(what: str) -> None:
    refuse_pickle_content("notes.txt", *ends(OTHERS[what]))


@pytest.mark.parametrize(
    "name", ["a.pt", "A.PTH", "m.pth.tar", "x.pkl.gz", "y.joblib", "z.mar", "training_args.bin", "w.dill", "v.pkl.z"]
)
def test_names_that_loaders_unpickle_are_refused_before_a_byte_is_sent(name: str) -> None:
    with pytest.raises(Invalid, match="is refused by its name: such files are usually pickles") as raised:
        refuse_pickle_name(f"somewhere/{name}")
    assert "Rename it if it is not a pickle" in raised.value.next_step, "nobody has looked into it"


@pytest.mark.parametrize("name", ["tokenizer.model", "bin", "a.bin.json", "notes.pt.md", "x.npy", "x.npz", "model.pte"])
def test_names_of_other_files_pass(name: str) -> None:
    refuse_pickle_name(name)


def test_a_pickle_under_the_name_of_a_text_is_not_released(stocked: Cli, world: World, tmp_path: Path) -> None:
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    for what in ("torch.save", "torch.save of old", "a zip whose pickle comes last", "code in protocol 0"):
        (adapter / "notes.txt").write_bytes(PICKLES[what])
        refused = stocked("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "*")
        assert (refused.code, "notes.txt is a pickle" in refused.err) == (6, True), refused.err
        assert stocked("log", "acme/sql").code == 3
    (adapter / "notes.txt").unlink()
    for what in ("torch.save", "torch.save of old", "code in protocol 0", "code in protocol 4"):
        for name in ("extra.safetensors", "extra.SafeTensors"):
            (adapter / name).write_bytes(PICKLES[what])
            refused = stocked("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "*")
            assert (refused.code, name in refused.err) == (6, True), refused.err
            assert stocked("log", "acme/sql").code == 3
            (adapter / name).unlink()
    for content in OTHERS.values():
        (adapter / "notes.txt").write_bytes(content)
        (adapter / "like-a-pickle.safetensors").write_bytes(like_a_pickle())
        stocked.ok("push", adapter, "acme/sql", "--bump", "patch", "--base", "tiny", "--include", "*")


def like_a_pickle() -> bytes:
    """A safetensors file that begins like a pickle of protocol 2: its header has 640 bytes."""
    length = next(
        length
        for length in range(640)
        if save({"a": np.zeros(1, np.float32)}, {"note": "x" * length})[:2] == b"\x80\x02"
    )
    return save({"a": np.zeros(1, np.float32)}, {"note": "x" * length})
