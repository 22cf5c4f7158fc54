"""The facts of an adapter's files: tensors matched with the base, summarized, and searched for NaN. No torch."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from composer.errors import InvalidFile
from composer.findings import Finding, Severity, zero_deltas
from composer.formats.adapters.config.config import CONFIG_BYTES, AdapterConfig, parse_config
from composer.formats.adapters.config.types import TYPES
from composer.formats.adapters.layouts import CONFIG_FILE, PEFT, WEIGHTS_FILE, another_layout, recognise
from composer.formats.adapters.placement.naming import split_key
from composer.formats.adapters.placement.pairs import FACTOR_PARTS
from composer.formats.adapters.placement.result import PlacementResult
from composer.formats.checkpoints.checkpoint import contained, missing_weights
from composer.formats.checkpoints.files import LocalFile
from composer.formats.checkpoints.header import Header, TensorEntry
from composer.formats.untrusted import read_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_CHUNK_BYTES = 4 << 20
_PRODUCT = FACTOR_PARTS | {"lora_E", "lora_diag"}
# dtype -> (unsigned type of the same width, bits without the sign, exponent bits): a float is NaN or Inf when its
# exponent is all ones.
_FLOAT_BITS = {
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter directory, opened: config and header, no tensors."""

    path: Path
    config: AdapterConfig
    header: Header

    @property
    def weights_path(self) -> Path:
        return self.path / WEIGHTS_FILE

    @property
    def name(self) -> str:
        return self.path.resolve().name


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """Facts of one adapter. `targets` are the last path components of modules; `size_bytes` is the weight file's.
    `rank_max` and `alpha` are 0 for types without them."""

    type: str
    variant: str
    rank_max: int
    alpha: float
    targets: tuple[str, ...]
    modules: int
    parameters: int
    size_bytes: int
    dtype: str
    modules_to_save: tuple[str, ...]
    use_rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    base_model_name_or_path: str | None
    peft_version: str | None

    def to_json(self) -> dict[str, Any]:
        """The facts as sent over REST: `ranks` and `alphas` only for modules that differ from `rank_max` and
        `alpha`."""
        return asdict(self) | {
            "targets": list(self.targets),
            "modules_to_save": list(self.modules_to_save),
            "ranks": {module: rank for module, rank in self.ranks.items() if rank != self.rank_max},
            "alphas": {module: alpha for module, alpha in self.alphas.items() if alpha != self.alpha},
        }


def read_adapter(path: Path) -> Adapter:
    """Opens the adapter in directory `path`.

    Raises InvalidFile naming the file: missing config, missing or pickled weights, empty or flattened factors (a shard
    of ZeRO-3 or FSDP that was saved without gathering), weights that safetensors' own library does not open, or a
    layout other than PEFT's. Raises NotSupported for a setting of a newer PEFT, and for a layout that cannot be
    converted.
    """
    if not path.is_dir():
        raise InvalidFile(
            "missing_directory",
            f"{path} is not a directory.",
            subject=str(path),
            next_step="Name the directory that training wrote.",
        )
    seen = recognise(path)
    if seen.layout != PEFT:
        raise another_layout(path.name, seen.layout)
    if not (path / CONFIG_FILE).is_file():
        message = f"{path.name} has no {CONFIG_FILE}."
        raise InvalidFile("missing_config", message, subject=CONFIG_FILE)
    header = seen.header
    if header is None or not (path / WEIGHTS_FILE).is_file():  # if its only weights have another name
        raise missing_weights(path, WEIGHTS_FILE)
    config = parse_config(read_bytes(contained(path, CONFIG_FILE), CONFIG_BYTES))
    if not header.tensors:
        raise InvalidFile("empty_adapter", f"{WEIGHTS_FILE} has no tensors.", subject=WEIGHTS_FILE)
    for name, entry in header.tensors.items():
        is_factor = config.peft_type == "LORA" and split_key(name).part in FACTOR_PARTS
        if is_factor and (len(entry.shape) < 2 or 0 in entry.shape):
            message = f"{name} has the shape {list(entry.shape)}: it is a shard that was saved without gathering."
            raise InvalidFile("ungathered", message, subject=name)
    adapter = Adapter(path, config, header)
    _refuse_unopened(adapter.weights_path)
    return adapter


def _refuse_unopened(path: Path) -> None:
    """Opens the file with safetensors' own reader, as other programs do; the header is already checked."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        message = f"{path.name} is not a safetensors file that its own library opens: {error}."
        next_step = "Save it again with safetensors."
        raise InvalidFile("bad_safetensors", message, subject=path.name, next_step=next_step) from error


def facts(config: AdapterConfig, header: Header, placed: PlacementResult) -> AdapterFacts:
    """Summarizes an adapter from its config, its header and its placement."""
    kind, adapted = TYPES.get(config.peft_type), placed.adapted
    if kind is not None and kind.replaces:  # it has a weight of each module that it replaces
        adapted = [module for module in placed.modules if kind.parts[0] in module.parts]
    # Super-Tuning may have a plain pair beside its values, with an alpha of 2 r where it has none.
    rank = int(config.options.get("r", 0))
    side_rank, side_alpha = rank, (float(config.options["lora_alpha"]) or 2.0 * rank) if rank else 0.0
    sizes: Counter[str] = Counter()
    for entry in header.tensors.values():
        sizes[entry.dtype] += entry.size_bytes
    return AdapterFacts(
        type=config.peft_type.lower(),
        variant=config.variant,
        rank_max=max((module.rank for module in adapted), default=0) or config.rank or side_rank,
        alpha=config.alpha or side_alpha,
        targets=tuple(sorted({module.module.split(".")[-1] for module in adapted})),
        modules=len(adapted),
        parameters=sum(entry.spec.elements for entry in header.tensors.values()),
        size_bytes=header.size_bytes,
        dtype=sizes.most_common(1)[0][0] if sizes else "F32",
        modules_to_save=tuple(sorted({module.module for module in placed.modules if module.kind == "replacement"})),
        use_rslora=config.use_rslora,
        ranks={module.module: module.rank for module in adapted if module.rank},
        alphas={module.module: module.alpha for module in adapted if module.rank},
        base_model_name_or_path=config.base_model_name_or_path,
        peft_version=config.peft_version,
    )


def health(path: Path, header: Header) -> list[Finding]:
    """Finds NaN or Inf in a tensor (error `not_finite`), and an adapter that does nothing (warning `zero_delta`). Reads
    the weights file at `path` in chunks of 4 MiB and compares bit patterns, so that every float format costs the same.
    """
    findings: list[Finding] = []
    zero_parts: dict[str, bool] = {}
    for name, entry in header.tensors.items():
        finite, zero = _scan(path, entry)
        if not finite:
            findings.append(Finding("not_finite", Severity.ERROR, name, f"{name} has a NaN or an infinite value."))
        split = split_key(name)
        # s * B @ A is zero if one of the two is; anything else always acts.
        factor = split.part in _PRODUCT
        pair = split.module if factor else name
        zero_parts[pair] = zero_parts.get(pair, False) or (zero and factor)
    if zero_parts and all(zero_parts.values()):
        findings += zero_deltas("The adapter", zero_parts, len(zero_parts))
    return findings


def _scan(path: Path, entry: TensorEntry) -> tuple[bool, bool]:
    """(finite, all zero) of one tensor. Integers are finite, and reported as not zero, since no caller needs that."""
    if entry.dtype not in _FLOAT_BITS:
        return True, False
    kind, magnitude, exponent = _FLOAT_BITS[entry.dtype]
    zero = True
    for bits in _chunks(path, entry, kind):
        # Without the sign, bit patterns are ordered like magnitudes: one maximum answers both questions.
        largest = int((bits & bits.dtype.type(magnitude)).max())
        if largest >= exponent:
            return False, False
        zero = zero and largest == 0
    return True, zero


def _chunks(path: Path, entry: TensorEntry, kind: str) -> "Iterator[npt.NDArray[np.unsignedinteger[Any]]]":
    """The tensor in parts, each valid until the next."""
    import numpy as np  # most readers of facts need no tensor

    file, block = LocalFile(path), memoryview(bytearray(min(_CHUNK_BYTES, entry.size_bytes)))
    for begin in range(entry.begin, entry.end, _CHUNK_BYTES):
        chunk = block[: entry.end - begin]
        file.read_into(chunk, begin)
        yield np.frombuffer(chunk, dtype=kind)
