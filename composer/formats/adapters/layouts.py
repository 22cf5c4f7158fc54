"""Detects the layout of an adapter directory or file, by its names and keys: PEFT's, or another that `convert` reads or
refuses. No torch.

kohya        `lora_te_…lora_down.weight`, `.lora_up.weight`, `.alpha`; LyCORIS' `hada_*` and `lokr_*` beside it
diffusers    `transformer.….lora_A.weight` or `.lora.down.weight`, alpha in the metadata or a tensor
mlx          adapters.safetensors with `lora_a`, `lora_b` transposed and a scale in adapter_config.json
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from composer.errors import ComposerError, InvalidFile, NotSupported
from composer.formats.adapters.placement.naming import PEFT_PREFIX
from composer.formats.checkpoints.checkpoint import contained, missing_weights
from composer.formats.checkpoints.header import Header, read_header
from composer.formats.untrusted import printable, refuse_endless

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT, KOHYA, DIFFUSERS, MLX = "peft", "kohya", "diffusers", "mlx"
SET_FILE = "adapter_set.json"
"""The file of a set of adapters: composer.formats.sets."""
MLX_FILE = "adapters.safetensors"
_MAGIC = {b"GGUF": "gguf"}
# layout -> why it is not read, and the fix.
REFUSED = {
    "gguf": (
        "its names and the rows of q and k are those of llama.cpp",
        "Convert the PEFT adapter that it was made from.",
    ),
    "nemo": (
        "Megatron interleaves the heads in fused weights",
        "Export it to Hugging Face PEFT with NeMo's own script.",
    ),
    "megatron": (
        "Megatron interleaves the heads in fused weights",
        "Export it to Hugging Face PEFT where it was trained.",
    ),
    "torchtune": ("it is a pickle, with q and k permuted in Meta's format", "Save it with torchtune's PEFT format."),
}
DIFFUSERS_ROOT = re.compile(r"^(?:unet|transformer|text_encoder(?:_\d)?)\.")


@dataclass(frozen=True, slots=True)
class Recognised:
    """A detected layout. `layout` is peft, kohya, diffusers, mlx, or one of those that are refused; `header` is that of
    the file that shows it, None if a name did."""

    layout: str
    header: Header | None = None


def recognise(path: Path) -> Recognised:
    """The layout of an adapter directory or file. Raises InvalidFile if it has none of them."""
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise InvalidFile("missing_directory", f"{path} does not exist.", subject=str(path))
    if (path / MLX_FILE).is_file():
        return Recognised(MLX)
    file = weights_in(path)
    if file is not None and file.name == WEIGHTS_FILE:
        header = read_header(contained(path, file.name))
        return Recognised(KOHYA if _is_kohya(header.tensors) else PEFT, header)
    if (path / CONFIG_FILE).is_file() and file is None:
        return Recognised(PEFT)
    _refuse_other_kinds(path)
    for other in sorted(path.iterdir()):
        if other.suffix in (".gguf", ".nemo") or re.fullmatch(r"adapter_.*\.pt", other.name):
            return _of_file(other)
    if file is None:
        raise missing_weights(path, WEIGHTS_FILE)
    return _of_file(file)


def _refuse_other_kinds(path: Path) -> None:
    """Raises InvalidFile for a directory of a set or of a model."""
    if (path / SET_FILE).is_file():
        message = f"{path.name} is a set of adapters, and this needs one adapter."
        raise InvalidFile("a_set", message, subject=str(path))
    if (path / "config.json").is_file():
        message = f"{path.name} is a checkpoint: a complete model, not an adapter."
        raise InvalidFile("a_checkpoint", message, subject=str(path))


def weights_in(path: Path) -> Path | None:
    """The weights file of an adapter directory: the one that PEFT or MLX names, otherwise the only safetensors file."""
    for name in (MLX_FILE, WEIGHTS_FILE):
        if (path / name).is_file():
            return path / name
    files = list(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def another_layout(name: str, layout: str) -> ComposerError:
    """The error for an adapter that is not PEFT's, if only PEFT's is accepted."""
    if layout in REFUSED:
        why, way_out = REFUSED[layout]
        return NotSupported(f"layout_{layout}", f"{name} is {layout}: {why}.", subject=name, next_step=way_out)
    message = f"{name} is an adapter in the layout of {layout}, not PEFT's."
    next_step = "Convert it: `adaptory convert DIR --base BASE -o OUT`."
    return InvalidFile("another_layout", message, subject=name, next_step=next_step)


def _is_kohya(keys: Iterable[str]) -> bool:
    return any(key.startswith("lora_") for key in keys)


def _of_file(path: Path) -> Recognised:
    if path.suffix in (".nemo", ".gguf"):  # regardless of content: no loader looks for weights under these names
        return Recognised(path.suffix[1:])
    if re.fullmatch(r"adapter_.*\.pt", path.name):
        return Recognised("torchtune")
    refuse_endless(path)
    with path.open("rb") as file:
        if layout := _MAGIC.get(file.read(4)):
            return Recognised(layout)
    header = read_header(contained(path.parent, path.name))
    return Recognised(_of_keys(path, list(header.tensors)), header)


def _of_keys(path: Path, keys: list[str]) -> str:
    if any(".linear_in." in key or ".linear_out." in key for key in keys):
        return "megatron"
    if _is_kohya(keys):
        return KOHYA
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        return PEFT
    if any(DIFFUSERS_ROOT.match(key) or ".lora.down." in key or ".lora_A." in key for key in keys):
        return DIFFUSERS
    raise InvalidFile(
        "unknown_layout",
        f"{path.name} does not have a known adapter layout; its keys look like {printable(keys[0] if keys else '')}.",
        subject=path.name,
        next_step=f"Known layouts are {PEFT}, {KOHYA}, {DIFFUSERS} and {MLX}.",
    )
