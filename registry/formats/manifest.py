"""The canonical manifest of a release's files, the commit id, and the tree of directories."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import PurePosixPath

from composer.formats.checkpoints.reported import is_results_file
from registry.errors import Invalid
from registry.formats.references import Digest

MAX_FILES = 2_000
MAX_PATH_CHARACTERS = 400
MAX_PART_BYTES = 240
"""File systems allow 255; the name of an unfinished copy needs some of these."""
_WINDOWS = re.compile(
    r"[<>|*?\":]|[. ]$|^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\..*)?$", re.IGNORECASE
)
WEIGHTS_SUFFIXES = (".safetensors", ".gguf")
"""Suffixes of files with tensors, in any layout."""
_HIDDEN = re.compile(r"\.|git~\d+$", re.IGNORECASE)
"""Windows also calls `.git` `GIT~1`."""
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of invisible characters, and of those that reorder or break the line."""


TRAINER_FILES = (
    "checkpoint-*/*",
    "global_step*/*",
    "pytorch_model_fsdp_*/*",
    "optimizer_[0-9]*/*",
    "runs/*",
    "wandb/*",
    "__pycache__/*",
    "optimizer.*",
    "scheduler.*",
    "scaler.pt",
    "rng_state*",
    "training_args.*",
    "trainer_state.json",
    "trainer_log.jsonl",
    "*_results.json",
    "events.out.tfevents.*",
    "*.log",
    "latest",
    "zero_to_fp32.py",
)
"""Patterns of files that trainers keep beside a checkpoint."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """A file of a release: its path, size and digest."""

    path: str
    size_bytes: int
    sha256: Digest


def check_path(path: str) -> str:
    """Returns a relative POSIX path in normal form, which cannot lead outside a client's directory. Raises Invalid for
    others."""
    parts = PurePosixPath(path).parts
    bad = (
        not parts
        or len(path) > MAX_PATH_CHARACTERS
        or path != "/".join(parts)
        or path.startswith("/")
        or "\\" in path
        or any(part in {".", ".."} or part.endswith((".", " ")) or ":" in part for part in parts)
        or any(unicodedata.category(character) in _UNSEEN for character in path)
        or any(len(part.encode()) > MAX_PART_BYTES for part in parts)
    )
    if bad:
        raise Invalid("bad_path", f"{path[:120]!r} is not a valid path for a file of a release.", subject=path[:120])
    return path


def refuse_hidden(path: str) -> None:
    """Raises Invalid for hidden files, which programs may execute anywhere, except `.eval_results/*.yaml`, where
    Hugging Face keeps reported scores. Releases from before this check may have some."""
    if not is_results_file(path) and any(_HIDDEN.match(part) for part in path.split("/")):
        raise Invalid("hidden_file", f"{path[:120]!r} is hidden or in a hidden directory.", subject=path[:120])


def refuse_unportable(path: str) -> None:
    """Raises Invalid for a new file that Windows cannot store: a device's name, with any extension, or a character with
    a special meaning there. Releases from before this check may have some, and pulls get them."""
    if any(_WINDOWS.search(part) for part in path.split("/")):
        raise Invalid(
            "bad_path",
            f"{path[:120]!r} cannot be stored on Windows.",
            subject=path[:120],
            next_step='Rename the file: without `<>|*?":`, and not as a device (con, nul, aux, prn, com1, lpt1).',
        )


def is_weights(path: str) -> bool:
    """Whether a file of this name has tensors: an adapter's weights, or a shard of a model."""
    return path.lower().endswith(WEIGHTS_SUFFIXES)


def canonical_manifest(files: Iterable[ManifestFile]) -> bytes:
    """The manifest: one line of JSON, files sorted by path. The same set of files always has the same bytes."""
    rows = sorted(files, key=lambda file: file.path)
    check_paths([file.path for file in rows])
    document = [{"path": file.path, "sha256": file.sha256, "size_bytes": file.size_bytes} for file in rows]
    return json.dumps({"files": document}, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def check_paths(paths: Sequence[str]) -> None:
    """Raises Invalid for paths that cannot be in one release: a bad path, too many, or two that some file system would
    store in one place, such as a file and a directory."""
    if not paths:
        raise Invalid("bad_manifest", "No file would be left.", next_step="Keep at least one file, or add one.")
    if len(paths) > MAX_FILES:
        raise Invalid(
            "bad_manifest",
            f"A release holds at most {MAX_FILES:,} files, not {len(paths):,}.",
            next_step="Pack many small files into one.",
        )
    keyed = sorted((_collision_key(path), path) for path in map(check_path, paths))
    for (key, path), (next_key, next_path) in pairwise(keyed):  # paths below another path directly follow it
        if next_key[: len(key)] == key:
            raise Invalid(
                "bad_manifest",
                f"{path} and {next_path} collide: one is a directory of the other, or they differ only in case or in "
                "the encoding of accents, or not at all.",
                subject=next_path,
            )


def _collision_key(path: str) -> list[str]:
    """A key that is equal for paths that a file system may consider equal: Unicode's canonical caseless matching."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold()).split("/")


def parse_manifest(manifest: str) -> list[ManifestFile]:
    """The files of a canonical manifest, sorted by path."""
    return [
        ManifestFile(file["path"], file["size_bytes"], Digest(file["sha256"])) for file in json.loads(manifest)["files"]
    ]


def commit_id(manifest: bytes) -> str:
    """The first 40 hexadecimal digits of the sha256 of the canonical manifest."""
    return hashlib.sha256(manifest).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """A file, or a directory if `file` is None."""

    path: str
    file: ManifestFile | None = None


def list_directory(files: Sequence[ManifestFile], directory: str, *, recursive: bool) -> list[TreeEntry]:
    """The entries of a directory ("" is the root) by path; with `recursive`, those of its subdirectories too. Empty if
    the directory does not exist."""
    prefix = f"{directory}/" if directory else ""
    entries: dict[str, TreeEntry] = {}
    for file in files:
        if file.path.startswith(prefix):
            for parent in _parents(file.path, len(prefix)):
                entries.setdefault(parent, TreeEntry(parent))
            entries[file.path] = TreeEntry(file.path, file)
    listed = (entry for path, entry in sorted(entries.items()) if recursive or "/" not in path[len(prefix) :])
    return list(listed)


def select_entries(files: Sequence[ManifestFile], paths: Sequence[str]) -> list[TreeEntry]:
    """The entries at those paths that exist, in the order of `paths`."""
    entries = {entry.path: entry for entry in list_directory(files, "", recursive=True)}
    wanted = dict.fromkeys(path.strip("/") for path in paths)
    return [entries[path] for path in wanted if path in entries]


def _parents(path: str, start: int) -> list[str]:
    """The directories of a path whose paths are longer than `start` characters."""
    return [path[:index] for index in range(start, len(path)) if path[index] == "/"]


def is_trainer_file(path: str) -> bool:
    """Recognizes files that trainers keep beside a checkpoint; no push includes them."""
    return matches(path, TRAINER_FILES)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches the path; one that ends with a slash, everything below it."""
    return any(fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)
