"""Units of work: the parts of a step that can run on any node, and the code that runs one."""

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Generic, TypedDict, TypeVar

from registry.environment.home import close_directory
from registry.environment.settings import Settings
from registry.errors import Invalid, Unavailable
from registry.storage.blobs import MAX_RESULT_BYTES, BlobStore, UnitResults
from registry.transfer.bases import Bases
from registry.transfer.resources import open_store
from registry.worker.engine.stores import DirectStore, UnitBases, UnitDocuments, UnitStore

Count = Callable[[int], None]
"""Called by a unit with the amount just done, often 0; may raise to stop the unit."""
Kept = TypeVar("Kept")
Result = dict[str, Any]
"""A unit's result as JSON, such as digests of blobs or measurements."""
ResultT = TypeVar("ResultT", bound=Mapping[str, Any])
_WORK = "unit-"
_RELEASE = version("adaptory")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_DEAD_HOST_S = 30 * 24 * 3600.0
"""The age at which another host's leftovers in a shared work directory are removed; its processes are not visible
here."""


class BaseHints(TypedDict):
    """The places where a unit finds its base."""

    locations: list[str]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A part of a step's work. `content` determines and names the result; `hints` help to make it, such as the
    locations of a base. Both are JSON. `name` is for people. Units with the same `near` are quicker in a process that
    ran one of them."""

    name: str
    content: Mapping[str, Any]
    hints: Mapping[str, Any] = field(default_factory=dict[str, Any])
    near: str = ""

    def __post_init__(self) -> None:
        """Turns enumerations into strings and tuples into lists now, so that every process sees the same values."""
        object.__setattr__(self, "content", json.loads(json.dumps(self.content)))
        object.__setattr__(self, "hints", json.loads(json.dumps(self.hints)))


@dataclass(frozen=True, slots=True)
class Node:
    """A unit's environment on its host: settings, blobs, shared documents, a directory and bases. It has no database;
    the worker that holds the job writes rows."""

    settings: Settings
    store: UnitStore
    documents: UnitDocuments
    work_directory: Path
    bases: UnitBases
    check: Count = lambda _done: None
    """Called often during the current unit's work; may raise to stop it."""
    _kept: dict[str, tuple[str, Any]] = field(default_factory=dict[str, tuple[str, Any]])
    _id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """Distinguishes the nodes of one process, which has several if threads use an embedded registry."""

    @contextmanager
    def scratch(self) -> Generator[Path]:
        """Makes a directory for one unit and removes it at the end. The next `open_node` removes those of killed
        processes."""
        directory = self.own_directory()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def own_directory(self) -> Path:
        """Makes a directory that the caller must remove; see `scratch`."""
        return Path(mkdtemp(prefix=f"{_WORK}{_HOST}-{os.getpid()}-", dir=self.work_directory))

    def kept(self, role: str, key: str, make: Callable[[], Kept]) -> Kept:
        """Returns what an earlier unit of this process made for the same key, such as a loaded base. Keeps one per
        role."""
        if self._kept.get(role, ("", None))[0] != key:
            self.drop(role)  # there may not be room for two bases
            self._kept[role] = key, make()
        return self._kept[role][1]

    def drop(self, role: str) -> None:
        """Frees what is kept for the role, if there is something."""
        self._kept.pop(role, None)

    def forget(self) -> None:
        """Drops everything kept, with its files."""
        self._kept.clear()
        self.bases.release()
        shutil.rmtree(self._kept_files, ignore_errors=True)

    @property
    def _kept_files(self) -> Path:
        return self.work_directory / f"{_WORK}{_HOST}-{os.getpid()}-kept-{self._id}"

    def kept_directory(self, name: str) -> Path:
        """Makes a directory for files that this process keeps using, such as mapped ones."""
        directory = self._kept_files / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def shared(self, key: str) -> bytes:
        """Reads the document under that key. Raises Unavailable if the store lacks it."""
        document = self.documents.read(key)
        if document is None or hashlib.sha256(document).hexdigest() != key:
            raise Unavailable(
                "store_wrong", f"The store did not keep {key}, which a unit needs.", subject=key, next_step="Try again."
            )
        return document


@dataclass(frozen=True, slots=True)
class HostNode(Node):
    """The node of a process with the store's credentials. It also keeps the results of units."""

    results: UnitResults = field(kw_only=True)

    def share(self, document: bytes) -> str:
        """Stores a document for units to read. Returns its key, the SHA-256 of its content. Raises Invalid if it is too
        large."""
        key = hashlib.sha256(document).hexdigest()
        _refuse_too_large("What all units of a step read", document)
        self.results.write(key, document)
        return key


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Generic[ResultT]):
    """The functions that run a kind of unit, at module level so that other processes can import them. Raise `version`
    when the same content yields another result; each release of adaptory keeps its own results anyway. `intact` checks
    that the blobs that a kept result names are still stored."""

    name: str
    version: int
    run: Callable[[Node, Unit, Count], ResultT]
    intact: Callable[[Node, ResultT], bool]

    def key(self, unit: Unit) -> str:
        """The name of the unit's result, 64 hex digits, equal on every host."""
        made = [_RELEASE, self.name, self.version, unit.content]
        named = json.dumps(made, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(named.encode()).hexdigest()


def always_intact(_node: Node, _result: object) -> bool:
    """The `intact` of tasks whose results name no blobs."""
    return True


def open_node(settings: Settings, store: BlobStore | None = None) -> HostNode:
    """Opens this host's node, with the given store or the one that the settings name. Removes what killed units left in
    the work directory.

    Raises Unavailable or Invalid as opening the store does."""
    work = settings.work_directory
    close_directory(settings.home_directory)
    close_directory(settings.home_directory / "cache")
    close_directory(work)
    for directory in work.glob(f"{_WORK}*"):
        if _is_left(directory):
            shutil.rmtree(directory, ignore_errors=True)
    own = store or open_store(settings, None)
    results = own.unit_results()
    return HostNode(settings, DirectStore(own), results, work, Bases(settings), results=results)


def _is_left(directory: Path) -> bool:
    """Whether the process that made a unit's directory has ended. Hosts that share a store often share homes too."""
    host, process_id, *_ = [*directory.name.removeprefix(_WORK).split("-"), ""]
    if host == _HOST:
        return not Path(f"/proc/{process_id}").exists()
    try:
        return time.time() - directory.stat().st_mtime > _DEAD_HOST_S
    except FileNotFoundError:  # its process has just removed it
        return False


def finished(node: HostNode, task: Task[ResultT], unit: Unit) -> ResultT | None:
    """Returns the unit's kept result if it is intact; None if the unit must run."""
    content = node.results.read(task.key(unit))
    if content is None or len(content) >= MAX_RESULT_BYTES:
        return None
    try:
        result: ResultT = json.loads(content)["result"]
    except (ValueError, KeyError, TypeError):  # not a result: run the unit again
        return None
    return result if task.intact(node, result) else None


def run_unit(node: HostNode, task: Task[ResultT], unit: Unit, count: Count = lambda _done: None) -> ResultT:
    """Runs the unit, keeps its result and returns it. Raises what the task, `count` and `keep_result` raise."""
    began_s = time.monotonic()
    result = task.run(replace(node, check=count), unit, count)
    keep_result(node, task, unit, result, by=os.getpid(), seconds=time.monotonic() - began_s)
    return result


def keep_result(node: HostNode, task: Task[ResultT], unit: Unit, result: ResultT, *, by: int, seconds: float) -> None:
    """Keeps a unit's result with the id of its process and the seconds it took. Raises Invalid if it is too large."""
    made = {"by": f"{socket.gethostname()} {by}", "seconds": seconds}
    document = json.dumps({"unit": unit.name, **made, "result": result}).encode()
    _refuse_too_large(f"The result of {unit.name}", document)
    node.results.write(task.key(unit), document)


def _refuse_too_large(what: str, document: bytes) -> None:
    if len(document) >= MAX_RESULT_BYTES:
        raise Invalid(
            "too_large",
            f"{what} has {len(document):,} bytes, and at most {MAX_RESULT_BYTES - 1:,} are kept.",
            subject="suites",
            next_step="Request less at a time: fewer or smaller suites.",
        )
