"""Commits and releases by clients of the Hugging Face Hub: bytes into the store first, then the rows.

A commit is lines of JSON, in which files are base64. They are decoded piece by piece into files: no file is in memory.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from composer.findings import Finding, Severity
from composer.formats.adapters.facts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.adapters.layouts import SET_FILE
from composer.formats.checkpoints.card import CARD_FILE, card_provenance
from composer.formats.checkpoints.checkpoint import read_json
from registry.domain.access.audit import Actor
from registry.domain.catalog import bases, commits, releases
from registry.domain.catalog.commits import Addition, CommitChange, Deletion
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import revisions
from registry.errors import Conflict, Invalid, NotFound, TooLarge, Usage
from registry.formats.manifest import ManifestFile, parse_manifest
from registry.formats.references import Digest, RepositoryName, Version, parse_digest
from registry.formats.signatures import SIGNATURE_FILE
from registry.storage.local import write_hashed
from registry.transfer import publishing, uploads
from registry.transfer.publishing import Push
from registry.transfer.resources import Resources
from registry.transfer.verified import read_verified

MAX_LINE_BYTES = 1 << 20
"""Maximum length of a line, without the content of its file."""
MAX_LINES = 10_000
"""Limit on the files of one commit, empty ones included: five times that of a release."""
_CONTENT = re.compile(rb'"content"\s*:\s*"')
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_MAX_DOCUMENT_BYTES = 1 << 20
_ADAPTER = {CONFIG_FILE, WEIGHTS_FILE}
_MAX_COMPARED_BYTES = 200 << 20
"""The number of bytes of a commit's files that are read to compare them with the client's before it sends them."""
_BLOCK_BYTES, _PARALLEL = 1 << 20, 8


def receive(
    resources: Resources, actor: Actor, name: RepositoryName, chunks: Iterable[bytes], revision: str = revisions.MAIN
) -> tuple[str, list[Finding]]:
    """Reads a commit, stores its files, and applies it to the last one. Returns the commit id, and doubts about an
    adapter that it adds."""
    with resources.snapshot() as session:
        revisions.refuse_no_branch(session, name, revision)
    with TemporaryDirectory(dir=resources.work_directory, prefix="upload-") as directory:
        change, added = _parse(_CommitLines(chunks, Path(directory)))
        with resources.snapshot() as session:
            commits.files_after(
                session, name, change
            )  # refuses early what it would mostly refuse later, before storing

        def store(sha256: Digest) -> None:
            uploads.store_file(resources, actor, name.namespace, sha256, Path(directory) / sha256, move=True)

        with ThreadPoolExecutor(_PARALLEL, "store") as pool:  # files of a commit may have the same content
            list(pool.map(store, {file.sha256 for file in added}))
    with resources.read() as session:
        files = commits.added_files(session, change)
        releases.refuse_absent_blobs(session, name.namespace, files)  # before their bytes are read
    publishing.refuse_pickled(resources, files)
    while True:  # a concurrent commit may result in another adapter than the one checked
        with resources.snapshot() as session:
            files = commits.files_after(session, name, change)
        findings = _check_adapter(resources, name, change, files)
        with resources.write() as session:
            made = commits.append(session, actor, name, change, files)
        if made is not None:
            return made, findings


def _check_adapter(
    resources: Resources, name: RepositoryName, change: CommitChange, files: list[ManifestFile]
) -> list[Finding]:
    """Checks an adapter as its release will be, if the change adds a part of it or the card that names its base, and
    that base is registered. Its signature may come later. Returns the findings that do not refuse it."""
    added = {operation.path for operation in change.operations if isinstance(operation, Addition)}
    if not added & {*_ADAPTER, CARD_FILE} or not {file.path for file in files} >= _ADAPTER:
        return []
    base = _stated_base(resources, files)
    with resources.read() as session:
        known = base is not None and bases.is_known(session, base)
    only_card = not added & _ADAPTER
    if base is None or not known:
        what = f"its base {base[:200]} is not registered" if base else f"{CONFIG_FILE} does not name its base"
        message = f"The adapter was not checked: {what}. It cannot be released before it is."
        return [] if only_card else [Finding("unchecked", Severity.WARNING, CONFIG_FILE, message)]
    if only_card and base == _stated_base(resources, [file for file in files if file.path != CARD_FILE]):
        return []  # the configuration names it, so the adapter was checked on arrival
    unsigned = [file for file in files if file.path != SIGNATURE_FILE]
    return publishing.prepare(
        resources, Push(repository=name, kind=Kind.ADAPTER, version=None, bump=None, base=base, files=unsigned)
    )[1]


def git_oids(resources: Resources, files: Sequence[ManifestFile]) -> dict[str, str]:
    """The names that git would give the contents, by path. They are made by reading the files, so those beyond a bound
    are left out, as are those that the store has lost: the client then sends them again."""
    compared, read_bytes = list[ManifestFile](), 0
    for file in sorted(files, key=lambda one: one.size_bytes):
        read_bytes += file.size_bytes
        if read_bytes > _MAX_COMPARED_BYTES:
            break
        compared.append(file)

    def named(file: ManifestFile) -> str | None:
        if not uploads.has_bytes(resources, file):
            return None
        digest = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
        with resources.store.open(file.sha256) as source:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    with ThreadPoolExecutor(_PARALLEL, "compare") as pool:
        oids = zip(compared, pool.map(named, compared), strict=True)
        return {file.path: oid for file, oid in oids if oid is not None}


def release(
    resources: Resources, actor: Actor, name: RepositoryName, revision: str, version: Version, notes: str
) -> list[dict[str, Any]]:
    """Publishes the files at a revision, by the function of every push; the base is the one that they name. Returns
    the findings that did not prevent it.

    `main` stays where it is, also if the revision is an older release, or a collection forgets the commit meanwhile.
    """
    with resources.snapshot() as session:
        files = parse_manifest(revisions.to_release(session, actor, name, revision).manifest)
    uploads.keep(resources, actor, name.namespace, files)  # a collection may forget the commit meanwhile
    paths = {file.path for file in files}
    kind = Kind.ADAPTER if CONFIG_FILE in paths else Kind.SET if SET_FILE in paths else Kind.MODEL
    if kind is Kind.SET:
        raise publishing.set_not_composed(name)
    push = Push(
        repository=name,
        kind=kind,
        version=version,
        bump=None,
        base=_base_of(resources, files),
        files=files,
        notes=notes,
        moves_main=False,
    )
    published = publishing.publish(resources, actor, push)
    if not published.created:
        raise Conflict(
            "version_exists",
            f"{name}:{version} exists already, with the same files.",
            subject=f"{name}:{version}",
            next_step="There is nothing to do.",
        )
    return published.warnings


def _base_of(resources: Resources, files: list[ManifestFile]) -> str:
    """The base named by the files. Raises Invalid if they name none, NotFound if it is not registered."""
    stated = _stated_base(resources, files)
    if stated is None:
        raise Invalid(
            "base_not_stated",
            f"Neither {CONFIG_FILE} nor the front matter of {CARD_FILE} names the base.",
            subject=CONFIG_FILE,
            next_step="Set base_model_name_or_path, or `base_model` in the card, to the name of a registered base.",
        )
    try:
        with resources.read() as session:
            return bases.identify(session, stated)[1]
    except NotFound as error:
        step = f"{error.next_step} To name another, set `base_model` in {CARD_FILE}."
        raise NotFound(error.code, error.detail, subject=error.subject, next_step=step) from None


def _stated_base(resources: Resources, files: list[ManifestFile]) -> str | None:
    """The base that the adapter's configuration names, or else the model card; the first that is registered, since
    trainers write directories of their machine. If none is, the first."""
    by_path = {file.path: file for file in files if file.size_bytes <= _MAX_DOCUMENT_BYTES}
    stated: list[Any] = []
    if config := by_path.get(CONFIG_FILE):
        with TemporaryDirectory(dir=resources.work_directory, prefix="inspect-") as directory:
            publishing.materialise(resources.store, [config], Path(directory))
            document = read_json(Path(directory) / CONFIG_FILE, "missing_config", "Save the adapter again with PEFT.")
        stated.append(document.get("base_model_name_or_path"))
    if card := by_path.get(CARD_FILE):
        content = read_verified(resources.store, card)
        stated.append(card_provenance(content)[0].get("base_model"))
    names = [name for name in stated if isinstance(name, str) and name]
    with resources.read() as session:
        return next((name for name in names if bases.is_known(session, name)), names[0] if names else None)


def _parse(lines: "_CommitLines") -> tuple[CommitChange, list[Addition]]:
    """The change and its files."""
    change, inline = CommitChange(""), list[Addition]()
    operations: list[Addition | Deletion] = []
    for key, value, content in lines:
        if key == "header":
            change = CommitChange(_text(value, "summary"), str(value.get("description") or ""), _parent(value))
        elif key == "file" and content is not None:
            if (encoding := value.get("encoding", "base64")) != "base64":  # its text may read as base64
                raise _bad(f"the encoding {encoding!r:.80} is not supported")
            commits.refuse_name(_text(value, "path"))
            inline.append(replace(content, path=_text(value, "path")))
            operations.append(inline[-1])
        elif key == "lfsFile":
            commits.refuse_name(_text(value, "path"))
            operations.append(Addition(_text(value, "path"), parse_digest(_text(value, "oid")), _size(value)))
        elif key in ("deletedFile", "deletedFolder"):
            operations.append(Deletion(_text(value, "path"), key == "deletedFolder"))
        else:
            raise _bad(f"{key!r} is not supported")
    return replace(change, operations=operations), inline


def _text(value: dict[str, Any], name: str) -> str:
    if not isinstance(text := value.get(name), str):
        raise _bad(f"{name} is missing")
    return text


def _parent(value: dict[str, Any]) -> str | None:
    parent = value.get("parentCommit")
    if parent is not None and not (isinstance(parent, str) and _COMMIT.fullmatch(parent)):
        raise _bad("parentCommit must be a commit: 7 to 40 hexadecimal digits")
    return parent


def _size(value: dict[str, Any]) -> int | None:
    size = value.get("size")
    if size is not None and type(size) is not int:
        raise _bad("size must be a whole number")
    return size


def _bad(why: str, next_step: str = "Use another huggingface_hub.") -> Usage:
    return Usage("bad_commit_line", f"The commit cannot be read: {why}.", next_step=next_step)


@dataclass(slots=True)
class _CommitLines:
    """The lines of a commit: key, value, and the content of a file, which is in `directory` under its sha256."""

    chunks: Iterable[bytes]
    directory: Path
    _source: Iterator[bytes] = field(init=False)
    _buffer: bytes = b""
    _start: int = 0
    """Where the unread part of the buffer starts: cutting it off after each line would copy the rest each time."""

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any], Addition | None]]:
        self._source, count = iter(self.chunks), 0
        while self._fill():
            count += 1
            if count > MAX_LINES:
                raise TooLarge(
                    "too_many_files",
                    f"The commit has more than {MAX_LINES:,} lines, one for each file.",
                    next_step="Commit fewer files at a time.",
                )
            head, content = self._head(), None
            if not head.endswith(b"\n"):
                # Base64 up to the closing quote, which stays.
                path = self.directory / "content"
                sha256, size_bytes = write_hashed(path, self._decoded(), "The commit", path.name)
                path.replace(self.directory / sha256)
                content = Addition("", sha256, size_bytes)
                head += self._until(b"\n")
            if head.strip():
                yield *_document(head), content

    def _fill(self) -> bool:
        """Reads on if the buffer is empty. Returns whether there is more."""
        while self._start == len(self._buffer) and (chunk := next(self._source, None)) is not None:
            self._buffer, self._start = chunk, 0
        return self._start < len(self._buffer)

    def _head(self) -> bytes:
        """A line with its end, or its beginning up to the content of a file."""
        while True:
            end = self._find(b"\n")
            content = _CONTENT.search(self._buffer, self._start, end if end >= 0 else len(self._buffer))
            if content is not None:
                return self._take(content.end())
            if end >= 0:
                return self._take(end + 1)
            chunk = next(self._source, None)
            if chunk is None:
                return self._take(len(self._buffer)) + b"\n"
            self._buffer, self._start = self._buffer[self._start :] + chunk, 0
            if len(self._buffer) > MAX_LINE_BYTES and not _CONTENT.search(self._buffer):
                raise _bad("a line is too long")

    def _find(self, mark: bytes) -> int:
        return self._buffer.find(mark, self._start)

    def _decoded(self) -> Iterator[bytes]:
        rest = b""
        while self._fill():
            end = self._find(b'"')
            rest += self._take(len(self._buffer) if end < 0 else end)
            usable = len(rest) if end >= 0 else len(rest) // 4 * 4
            try:
                yield base64.b64decode(rest[:usable], validate=True)
            except binascii.Error as error:
                raise _bad("the content of a file is not base64") from error
            rest = rest[usable:]
            if end >= 0:
                return
        raise _bad("it ends within a file")

    def _until(self, mark: bytes) -> bytes:
        text = b""
        while self._fill():
            end = self._find(mark)
            text += self._take(len(self._buffer) if end < 0 else end + 1)
            if end >= 0 or len(text) > MAX_LINE_BYTES:
                break
        return text

    def _take(self, end: int) -> bytes:
        """The unread bytes up to a position in the buffer."""
        taken, self._start = self._buffer[self._start : end], end
        return taken


def _document(line: bytes) -> tuple[str, dict[str, Any]]:
    if rb"\u0000" in line:
        raise _bad("it contains a NUL character", next_step="Leave it out of names and messages.")
    try:
        document = json.loads(line)
        key, value = document["key"], document["value"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad("each line must be an object with key and value") from error
    if not isinstance(key, str) or not isinstance(value, dict):
        raise _bad("each line must be an object with key and value")
    return key, cast("dict[str, Any]", value)
