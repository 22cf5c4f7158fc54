"""A Hugging Face checkpoint on disk: config, shards, and the location of each tensor."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from composer.errors import InvalidFile, NotSupported
from composer.formats.checkpoints.files import LocalFile, StoredFile
from composer.formats.checkpoints.header import (
    CONVERT,
    PICKLE_SUFFIXES,
    Header,
    TensorEntry,
    TensorSpec,
    read_header,
    stored_header,
)
from composer.formats.checkpoints.quantized import Nf4, is_part, nf4_weights
from composer.formats.checkpoints.tying import embedding_tensors, head_tensors, said_tied, same_bytes
from composer.formats.untrusted import LONE_SURROGATE, has_more_values, printable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEQUANTIZE = "or use `adaptory merge --dequantize`, which decodes this one"
"""The fix for a base that can be decoded."""
MAX_JSON_BYTES = 100_000_000
_JSON_VALUES = 1_000_000  # an index of as many tensors
_NAME_BYTES = 255  # of a file's, on every file system that is in use
_FP8_METHODS = frozenset({"fp8", "fbgemm_fp8"})  # whose weights have scales beside them
_FP8_FORMATS = (None, "float-quantized")  # of compressed-tensors: the others pack integers, or drop zeros


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything about a base that checking an adapter requires: no weights, so a registry can store it.

    `tied`: the output head shares the input embedding's tensor, or is stored again with the same bytes, so that loading
    makes them one. `tensors` are named as on disk.
    """

    model_type: str
    tied: bool
    tensors: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `shards` are in file-name order, and `files` has the file of each; `index` is the index
    file, None for a single file. `path` is the directory of everything but the weights, which may be elsewhere. With
    `dequantize`, its quantized tensors stand for their decoded values, which `architecture` describes."""

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, StoredFile]
    shards: Mapping[str, Header]
    index: Mapping[str, Any] | None
    dequantize: bool = False

    @cached_property
    def architecture(self) -> Architecture:
        """Model type, weight tying, and the shape and dtype of each tensor, with packed ones decoded."""
        tensors = {name: entry.spec for header in self.shards.values() for name, entry in header.tensors.items()}
        if self.packed:
            tensors = {name: spec for name, spec in tensors.items() if not is_part(name)}
            tensors |= {name: packed.spec for name, packed in self.packed.items()}
        tied = said_tied(self.config, tensors) and self.own_head is None
        return Architecture(str(self.config.get("model_type", "")), tied, tensors)

    @property
    def is_local(self) -> bool:
        """Whether all weights are files on this machine."""
        return all(isinstance(file, LocalFile) for file in self.files.values())

    @cached_property
    def own_head(self) -> str | None:
        """The head whose bytes differ from the embedding's although the config says that they are tied: loading trusts
        the file, and so does this. None if the config is right."""
        heads, embeddings = head_tensors(self._shard_by_tensor), embedding_tensors(self._shard_by_tensor)
        if len(heads) != 1 or len(embeddings) != 1 or not said_tied(self.config, self._shard_by_tensor):
            return None
        return None if same_bytes(self.locate(heads[0]), self.locate(embeddings[0])) else heads[0]

    @cached_property
    def packed(self) -> Mapping[str, Nf4]:
        """The 4-bit weights by name; empty unless the checkpoint was opened to be dequantized."""
        return nf4_weights(self._shard_by_tensor, self.locate) if self.dequantize else {}

    @cached_property
    def _shard_by_tensor(self) -> dict[str, str]:
        return {name: shard for shard, header in self.shards.items() for name in header.tensors}

    def locate(self, name: str) -> tuple[StoredFile, TensorEntry]:
        """File and entry of a tensor. Raises KeyError for a name that is not in the architecture."""
        shard = self._shard_by_tensor[name]
        return self.files[shard], self.shards[shard].tensors[name]


Weights = Mapping[str, StoredFile]


def open_checkpoint(path: Path, dequantize: bool = False, weights: Weights | None = None) -> Checkpoint:
    """Opens the checkpoint in directory `path`: reads config, index and headers, but no weights.

    `weights` are files elsewhere, by name; the directory then has everything else. Raises InvalidFile naming the file
    (missing config or shard, tensors that index and shards disagree about, pickles), and NotSupported for a quantized
    base; for fp8 or 4-bit NormalFloat only without `dequantize`, or with `weights`.
    """
    path = path.absolute()  # "." has no name for a message
    config = read_json(path / "config.json", "missing_config", "This directory is not a Hugging Face checkpoint.")
    _refuse_quantized(path, config, dequantize, is_local=weights is None)
    if (path / INDEX_FILE).is_file():
        index = read_json(path / INDEX_FILE, "missing_index", "Download the checkpoint again.")
        files = _files_of(path, weights, _weight_map(index))
        shards = _read_shards(files, _weight_map(index))
        _refuse_another(path, shards, weights)
    elif file := _file_of(path, weights, SINGLE_FILE):
        index, files, shards = None, {SINGLE_FILE: file}, {SINGLE_FILE: _header_of(file)}
    else:
        raise missing_weights(path, SINGLE_FILE)
    _refuse_packed(path, shards)
    return Checkpoint(path, config, files, shards, index, dequantize)


def _file_of(path: Path, weights: Weights | None, name: str) -> StoredFile | None:
    if weights is not None:
        return weights.get(name)
    file = contained(path, name)
    return LocalFile(file) if file.is_file() else None


def _header_of(file: StoredFile) -> Header:
    return read_header(file.path) if isinstance(file, LocalFile) else stored_header(file)


def _refuse_quantized(path: Path, config: Mapping[str, Any], dequantize: bool, *, is_local: bool) -> None:
    stated: object = config.get("quantization_config")
    if not stated:
        return
    if not isinstance(stated, dict):
        raise InvalidFile(
            "bad_config",
            f"config.json: quantization_config is {printable(stated)}, not a mapping.",
            subject="config.json",
            next_step="Save or download the checkpoint again.",
        )
    settings = cast("dict[str, Any]", stated)
    method = str(settings.get("quant_method", "quantized"))[:40]
    decodable = _decodable(method, settings)
    if not decodable or not dequantize or not is_local:
        way = f", {DEQUANTIZE}" if is_local else ", or download this one for `adaptory merge --dequantize`"
        raise NotSupported(
            "quantized_base",
            f"{path.name} is quantized ({quantization(settings)}).",
            subject="config.json",
            next_step=f"Use the unquantized base{way if decodable else ''}.",
        )


def quantization(settings: Mapping[str, Any]) -> str:
    """The quantization that a config states, in a few words."""
    words = (settings.get("quant_method", "quantized"), settings.get("format"))
    return ", ".join(str(word)[:40] for word in words if word)


def _decodable(method: str, settings: Mapping[str, Any]) -> bool:
    if method == "bitsandbytes":
        return settings.get("bnb_4bit_quant_type", "nf4") == "nf4" and bool(
            settings.get("load_in_4bit") or settings.get("_load_in_4bit")
        )
    if method == "compressed-tensors":
        return not _is_sparse(settings) and settings.get("format") in _FP8_FORMATS
    return method in _FP8_METHODS


def _is_sparse(settings: Mapping[str, Any]) -> bool:
    stated: object = settings.get("sparsity_config") or {}
    return not isinstance(stated, dict) or cast("dict[str, Any]", stated).get("format", "dense") != "dense"


def _refuse_another(path: Path, shards: Mapping[str, Header], weights: Weights | None) -> None:
    """Raises InvalidFile if both exist: some loaders read the single file, others the index."""
    there = (path / SINGLE_FILE).is_file() if weights is None else SINGLE_FILE in weights
    if SINGLE_FILE not in shards and there:
        raise InvalidFile(
            "two_checkpoints",
            f"{path.name} has weights twice: {SINGLE_FILE}, and the shards of {INDEX_FILE}.",
            subject=SINGLE_FILE,
        )


def _refuse_packed(path: Path, shards: Mapping[str, Header]) -> None:
    """Raises for packed weights that the config does not mention, as old tools left them."""
    for shard, header in shards.items():
        for name in header.tensors:
            if name.endswith(".qweight"):
                message = f"{path.name} is quantized (GPTQ or AWQ: {name})."
                raise NotSupported("quantized_base", message, subject=shard)


def local_directory(locations: Iterable[str]) -> Path | None:
    """The first of a base's `file://` locations that has a checkpoint on this machine."""
    for url in locations:
        try:
            path = Path(unquote(urlsplit(url).path))
        except ValueError:  # no URL at all: nothing is there
            continue
        if url.startswith("file://") and (path / "config.json").is_file():
            return path
    return None


def missing_weights(path: Path, expected: str) -> InvalidFile:
    """The error for a directory without safetensors, which depends on whether there are pickles to convert."""
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES) if path.is_dir() else []
    if pickles:
        message = f"{path.name} has its weights only as a pickle ({pickles[0]}), which runs code when opened."
        return InvalidFile("pickle", message, subject=pickles[0], next_step=CONVERT)
    return InvalidFile(
        "missing_weights",
        f"{path.name} has no {expected}.",
        subject=expected,
    )


def read_json(path: Path, code: str, next_step: str) -> dict[str, Any]:
    """The JSON object in a file of at most 100 MB and a million values. Raises InvalidFile, with `code` for a missing
    file."""
    if not path.is_file():
        raise InvalidFile(code, f"{path.parent.name} has no {path.name}.", subject=path.name, next_step=next_step)
    contained(path.parent, path.name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InvalidFile(
            "too_large",
            f"{path.name} is larger than {MAX_JSON_BYTES} bytes.",
            subject=path.name,
            next_step="Name a checkpoint's directory: its JSON files are small.",
        )
    content = path.read_bytes()
    if has_more_values(content, _JSON_VALUES):
        raise _damaged("too_large", path.name, f"has more than {_JSON_VALUES:,} values")
    try:
        value, wanted = json.loads(content.decode("utf-8")), "a JSON object"
    except (ValueError, RecursionError) as error:
        value, wanted = None, f"JSON: {error}"
    if not isinstance(value, dict):
        raise InvalidFile("bad_json", f"{path.name} is not {wanted}.", subject=path.name)
    return cast(dict[str, Any], value)


def contained(directory: Path, name: str) -> Path:
    """`directory / name`, if no link leads out of the directory. A Hugging Face cache keeps `snapshots/<commit>/file`
    as a link to `blobs/`: that one neighbour counts as inside."""
    real = (directory / name).resolve()
    home = directory.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if Path(name).name != name or not any(real.is_relative_to(allowed) for allowed in homes):
        raise InvalidFile("link_outside", f"{name} leads out of {directory.name}.", subject=name)
    return directory / name


def _files_of(path: Path, weights: Weights | None, wanted: Mapping[str, str]) -> dict[str, StoredFile]:
    files: dict[str, StoredFile] = {}
    for shard in sorted(set(wanted.values())):
        file = _file_of(path, weights, shard)
        if file is None:
            raise InvalidFile("missing_shard", f"{path.name} has no {shard}, which its index names.", subject=shard)
        files[shard] = file
    return files


def _read_shards(files: Mapping[str, StoredFile], wanted: Mapping[str, str]) -> dict[str, Header]:
    shards = {shard: _header_of(file) for shard, file in files.items()}
    for name, shard in wanted.items():
        if name not in shards[shard].tensors:
            raise _damaged("missing_tensor", shard, f"has no tensor {name!r}, though the index says so")
    for shard, header in shards.items():
        for name in header.tensors:
            if wanted.get(name) != shard:
                raise _damaged("unindexed_tensor", shard, f"has a tensor {name!r} that the index does not place there")
    return shards


def _weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    """Maps each tensor to the name of its shard. Raises InvalidFile for a malformed index."""
    stated: object = index.get("weight_map")
    if not isinstance(stated, dict) or not stated:
        raise _damaged("bad_index", INDEX_FILE, "has no weight_map")
    if not isinstance(index.get("metadata") or {}, dict):
        raise _damaged("bad_index", INDEX_FILE, "has metadata that is not a mapping")
    for name, file in cast("dict[str, object]", stated).items():
        if not _is_name(file):
            raise _damaged(
                "bad_index", INDEX_FILE, f"places {printable(name)} in {printable(file)}, which is not a valid shard"
            )
    return cast("dict[str, str]", stated)


def _is_name(value: object) -> bool:
    """Whether a shard can have that name. A file with another suffix would be taken for one of the files that accompany
    the weights."""
    if not isinstance(value, str) or "\0" in value or LONE_SURROGATE.search(value):
        return False
    return (
        value.endswith(".safetensors") and not Path(value).name.startswith(".") and len(value.encode()) <= _NAME_BYTES
    )


def _damaged(code: str, file: str, how: str) -> InvalidFile:
    return InvalidFile(code, f"{file} {how}.", subject=file, next_step="Save or download the checkpoint again.")
