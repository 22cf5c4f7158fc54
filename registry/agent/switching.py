"""One server in step: what it lists is compared with what is wanted, and only the difference is done."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from registry.agent.directory import MirrorDirectory
from registry.agent.servers.protocol import CheckResult, Server
from registry.agent.versions import ServedVersion, parse_served
from registry.errors import RegistryError
from registry.formats.evidence import EvidenceExample

QUIET_LOOKS = 3
"""The number of successive looks without a request after which a name is unloaded: a metric lags by one step, and a
request may be on its way from a front."""
LOOK_S = 1.0
"""The least time between two looks that count."""

T = TypeVar("T")
Busy = Callable[[], Set[str]]
Evidence = Callable[[ServedVersion], Sequence[EvidenceExample] | None]
"""Returns the attested evidence of a version, None without any."""
CHECK_AGAIN_S = {"unproved": 60.0, "failed": 10.0}


@dataclass(slots=True)
class _Idle:
    """A loaded name that nothing routes to."""

    since_s: float
    looks: int = 0
    looked_s: float = field(default=float("-inf"))


@dataclass(frozen=True, slots=True)
class Checked:
    """The check of a version on a server, and its time."""

    commit: str
    result: CheckResult
    at: datetime = field(default_factory=partial(datetime.now, UTC))
    _at_s: float = field(default_factory=time.monotonic)  # a clock that does not jump

    @property
    def failed(self) -> bool:
        return self.result.verdict == "failed"

    @property
    def is_due(self) -> bool:
        """Whether it failed long enough ago to be repeated: there may be other evidence, or the server less busy."""
        again_s = CHECK_AGAIN_S.get(self.result.verdict)
        return again_s is not None and time.monotonic() - self._at_s > again_s


class KeptServer:
    """A server, and what its agent knows of it. Its tasks run one at a time, so that a switch and an unload never
    overlap."""

    def __init__(
        self,
        server: Server,
        directory: MirrorDirectory,
        busy_in_front: Busy | None,
        grace_s: float,
        evidence: Evidence = lambda _version: None,
    ) -> None:
        self.server, self._directory, self._evidence = server, directory, evidence
        self._busy_in_front, self._grace_s = busy_in_front, grace_s
        self.loaded: Mapping[str, str] = {}
        self._commits: Mapping[str, str] = {}
        self.answers, self.error = False, ""
        self.checks = dict[str, Checked]()
        self._idle, self._ours = dict[str, _Idle](), set[str]()
        self._work = Future[object]()
        self._work.set_result(None)

    @property
    def late(self) -> bool:
        """Whether work that was started has not ended."""
        return not self._work.done()

    @property
    def ready(self) -> bool:
        """Whether the server answered at the last look, and waits for work."""
        return self.answers and not self.late

    def start(self, work: Callable[["KeptServer"], T]) -> Future[T]:
        """Does the work in a thread that does not outlive the process: a server may never end its answer. Only for a
        server that is not late."""
        result = Future[T]()
        self._work = result

        def run() -> None:
            try:
                result.set_result(work(self))
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, name=f"server {self.server.address}", daemon=True).start()
        return result

    @property
    def waits(self) -> bool:
        """Whether a name is to be unloaded as soon as no request uses it."""
        return self.answers and bool(self._idle)

    @property
    def earlier(self) -> Set[str]:
        """The names that were loaded before this agent began."""
        return self.loaded.keys() - self._ours

    def look(self) -> None:
        """Reads what the server has loaded. Nothing is done to a server that does not answer."""
        self.answers = False
        try:
            self._list()
        except RegistryError as error:
            self.error = error.detail
            return
        self.answers, self.error = True, self.server.problem
        self.checks = {name: check for name, check in self.checks.items() if name in self.loaded}
        self._idle = {name: idle for name, idle in self._idle.items() if name in self.loaded}
        self._ours &= self.loaded.keys()

    def has(self, version: ServedVersion) -> bool:
        """Whether the server has the version loaded, from this agent's directory, and answers under its name."""
        checked = self.checks.get(version.name)
        is_loaded = self.answers and self.commit_of(version.name) == version.commit
        return is_loaded and checked is not None and checked.commit == version.commit and not checked.failed

    def commit_of(self, name: str) -> str | None:
        """The commit that a loaded name stands for; None if it was loaded from elsewhere, or not at all."""
        return self._commits.get(name)

    def _list(self) -> None:
        """Reads the names that the server has loaded. Their commits are computed once, since it may list a great
        many."""
        self.loaded = self.server.loaded()
        commits = {name: self._directory.commit_of(path) for name, path in self.loaded.items() if path}
        self._commits = {name: commit for name, commit in commits.items() if commit}

    def bring(self, version: ServedVersion, path: Path) -> str:
        """Loads and checks the version, unless that has been done. Returns why it cannot be used, or an empty text."""
        name = version.name
        try:
            if name in self.loaded and (why := self._not_replaced(version)):
                return why
            if name not in self.loaded:
                self.server.load(version, path)
                self._list()
                self.checks.pop(name, None)
                self._ours.add(name)
            if self.commit_of(name) != version.commit:
                return f"{self.server.address} does not list {name} as loaded."
            checked = self.checks.get(name)
            if checked is None or checked.commit != version.commit or checked.is_due:
                result = self.server.check(name, self._evidence(version))
                self.checks[name] = Checked(version.commit, result)
        except RegistryError as error:
            return error.detail
        return self.why_not(version)

    def why_not(self, version: ServedVersion) -> str:
        """The reason why the last check of the version failed; empty if it passed."""
        checked = self.checks.get(version.name)
        failed = self.answers and checked is not None and checked.commit == version.commit and checked.failed
        return checked.result.why if checked and failed else ""

    def _not_replaced(self, version: ServedVersion) -> str:
        """The reason why a loaded name still refers to something other than the version, or an empty text. A name that
        this agent loaded always refers to the same version; one that was loaded from elsewhere is replaced once."""
        name, commit = version.name, self.commit_of(version.name)
        if commit == version.commit:
            return ""
        if commit is not None:
            return f"{name} is loaded as {commit[:12]}, and the registry says {version.commit[:12]}. Unload it by hand."
        if name in self._ours:
            return f"{name} was loaded here, and then from elsewhere: two agents must not share {self.server.address}."
        if self._unload_quiet(name):
            return ""
        return f"{name} was loaded from elsewhere; it is replaced when no request uses it."

    def retire(self, wanted: Set[str]) -> None:
        """Unloads the names of this agent's versions that are not wanted and that no request uses. Does nothing to a
        server that does not answer."""
        if not self.answers:
            return
        for name in [name for name in self._idle if name in wanted and self.commit_of(name)]:
            del self._idle[name]
        try:
            for name in sorted(self.loaded.keys() - wanted):
                if parse_served(name) and self.commit_of(name):
                    self._unload_quiet(name)
        except RegistryError as error:
            self.error = error.detail

    def _unload_quiet(self, name: str) -> bool:
        """Unloads the name if no request has used it at the last looks. Returns whether it is unloaded."""
        now_s = time.monotonic()
        idle = self._idle.setdefault(name, _Idle(now_s))
        if now_s - idle.looked_s < LOOK_S:
            return False
        busy = self.server.busy()
        in_front = self._busy_in_front() if self._busy_in_front else frozenset[str]()
        if name in in_front or name in (busy or ()):
            self._idle[name] = _Idle(now_s, 0, now_s)
            return False
        idle.looks, idle.looked_s = idle.looks + 1, now_s
        if idle.looks < QUIET_LOOKS or (busy is None and now_s - idle.since_s < self._grace_s):
            return False
        self.server.unload(name)
        self._list()
        return name not in self.loaded
