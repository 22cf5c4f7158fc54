"""Selects the files of a directory that a push includes.

A trainer's output directory holds optimizer states, checkpoints and logs beside the adapter. For an adapter, only files
known to belong to one are included; for a checkpoint, everything except known trainer files.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from composer.findings import Finding, Severity
from composer.formats.adapters.facts import read_adapter
from composer.formats.adapters.layouts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.checkpoints.reported import DIRECTORY, is_results_file
from registry.errors import Invalid, RegistryError, Usage
from registry.errors.translation import refuse_errors
from registry.formats.manifest import (
    check_path,
    check_paths,
    is_trainer_file,
    matches,
    refuse_hidden,
    refuse_unportable,
)
from registry.formats.pickles import ENDS_BYTES, is_zip, refuse_pickle_content, refuse_pickle_name

ADAPTER_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "new_embeddings.safetensors",
    "adaptory.json",
    "model.sig",
    # tokenizers and processors, as transformers' save_pretrained writes them
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*processor_config.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    # scores that Hugging Face keeps beside a model
    ".eval_results/*.yaml",
    ".eval_results/*.yml",
    # what people read
    "readme.md",
    "licen[sc]e*",
    "notice*",
    "copying*",
    "use_policy*",
)
"""Patterns of paths, in lower case."""

_LISTED = 6
"""Maximum number of left-out names listed; further ones are counted."""
_NUMBER = re.compile(r"(?<=[-_])\d+(?=/?$)")


@dataclass(frozen=True, slots=True)
class Selection:
    """Paths relative to `directory`, with slashes. A directory without included files is one entry of `left_out`,
    ending with a slash."""

    directory: Path
    paths: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum((self.directory / path).stat().st_size for path in self.paths)

    def summary(self) -> str:
        """The left-out files in one line; numbered names (`checkpoint-500/`, `checkpoint-1000/`) as one pattern."""
        names = list(dict.fromkeys(_NUMBER.sub("*", name) for name in self.left_out))
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return ", ".join(names[:_LISTED]) + more


def select_files(directory: Path, kind: str = "adapter", include: Sequence[str] = ()) -> Selection:
    """The files that a push of this kind includes and those it leaves out, before any of them is read.

    `include` are patterns of further paths; `*` matches slashes too. Hidden files are never included.

    Raises Usage for a pattern that matches nothing; Invalid, with a finding per file, for what a release cannot
    contain: a link out of the directory or to a directory, a pipe, a pickle, a name that is not portable.
    """
    if not directory.is_dir():
        raise Invalid(
            "missing_directory",
            f"{directory} is not a directory.",
            subject=str(directory),
            next_step="Name the training output directory.",
        )
    there = sorted(_files_below(directory))
    for pattern in include:
        if not any(matches(path, [pattern]) for path in there):
            raise Usage("nothing_included", f"--include {pattern} does not match any file.", subject=pattern)
    chosen = tuple(path for path in there if is_included(path, kind) or matches(path, include))
    _refuse_another_kind(directory, there, kind)
    problems = [problem for path in chosen if (problem := _problem(directory, path))]
    if problems:
        findings = [Finding(problem.code, Severity.ERROR, problem.subject, problem.detail) for problem in problems]
        refuse_errors(findings, str(directory), next_step=problems[0].next_step)
    if not chosen and kind == "adapter":
        read_adapter(directory)  # raises an error that names what is there instead
    check_paths(chosen)
    return Selection(directory, chosen, tuple(_collapsed(there, set(chosen))))


def is_included(path: str, kind: str) -> bool:
    """Checks whether a push of this kind includes a file of this path that is not hidden."""
    if kind == "adapter":
        return matches(path.lower(), [pattern for pattern in ADAPTER_FILES if pattern.count("/") == path.count("/")])
    return not is_trainer_file(path)


def _files_below(directory: Path) -> Iterator[str]:
    """Paths of all files and links, also links to directories, except hidden ones; but with those of Hugging Face's
    `.eval_results`."""
    yield from sorted(
        filter(is_results_file, (f"{DIRECTORY}{file.name}" for file in (directory / DIRECTORY).glob("*")))
    )
    for parent, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        links = [name for name in directories if (Path(parent) / name).is_symlink()]
        for name in (*files, *links):
            if not name.startswith("."):
                yield (Path(parent) / name).relative_to(directory).as_posix()


def _refuse_another_kind(directory: Path, there: Sequence[str], kind: str) -> None:
    """Raises Invalid for a directory that is empty, or that has adapters below it or a checkpoint instead of an
    adapter."""
    if not there:
        code, what, next_step = "empty_directory", "has no files", "Name the training output directory."
    elif kind != "adapter" or CONFIG_FILE in there or WEIGHTS_FILE in there:
        return
    elif below := sorted(
        (path.rpartition("/")[0] for path in there if path.endswith(f"/{CONFIG_FILE}")), key=_by_number
    ):
        code, what = "missing_config", f"has no {CONFIG_FILE}; {', '.join(below[:_LISTED])} below it do"
        next_step = f"Name one of them, such as the last: {directory / below[-1]}"
    elif "config.json" in there:
        code, what = "a_checkpoint", "is a checkpoint of a model, not an adapter"
        next_step = "Name the adapter's directory, or publish the model with --kind model."
    else:
        return
    raise Invalid(code, f"{directory} {what}.", subject=str(directory), next_step=next_step)


def _by_number(path: str) -> list[tuple[int, str]]:
    """A sort key that reads digits as numbers: checkpoint-500 comes before checkpoint-1000."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", path)]


def _problem(directory: Path, path: str) -> RegistryError | None:
    try:
        refuse_no_file(directory / path, Path(path), directory)
        check_path(path)
        refuse_hidden(path)
        refuse_unportable(path)
        refuse_pickle_name(path)
        if not path.lower().endswith(".safetensors"):  # the registry reads the header of those
            refuse_pickle_content(path, *_ends(directory / path))
    except RegistryError as error:
        return error
    return None


def _ends(path: Path) -> tuple[bytes, bytes]:
    """The first bytes of a file; for a zip also the last ones, where its directory is."""
    with path.open("rb") as file:
        first = file.read(ENDS_BYTES)
        if not is_zip(first):
            return first, b""
        file.seek(max(0, path.stat().st_size - ENDS_BYTES))
        return first, file.read(ENDS_BYTES)


def refuse_no_file(path: Path, relative: Path, directory: Path | None = None) -> None:
    """Raises Invalid unless the path is a file or a link to one, inside `directory` if given."""
    if directory is not None and not path.resolve().is_relative_to(directory.resolve()):
        raise _unfit(
            "link_outside", relative, f"leads out of {directory}", "Replace the link with a copy of its target."
        )
    if path.is_dir():  # links are not followed, so its files would be missing
        raise _unfit(
            "link_to_directory", relative, "is a link to a directory", "Replace the link with a copy of the directory."
        )
    if not path.is_file():
        raise _unfit("no_file", relative, "is not a regular file", "Move it away.")


def _unfit(code: str, path: Path, what: str, next_step: str) -> Invalid:
    return Invalid(code, f"{path} {what}.", subject=str(path), next_step=next_step)


def _collapsed(there: Sequence[str], chosen: set[str]) -> Iterator[str]:
    """The paths not chosen; for a top directory without chosen files, its name and a slash."""
    kept = set(map(_top, chosen))
    left = [path for path in there if path not in chosen]
    yield from dict.fromkeys(path if "/" not in path or _top(path) in kept else f"{_top(path)}/" for path in left)


def _top(path: str) -> str:
    return path.partition("/")[0]
