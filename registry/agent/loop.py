"""The loop of an agent: follows its channels in a thread, takes a round at each change and every few seconds, and
reports to the registry in another thread, so that a slow server does not make it silent."""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from registry.agent.front import FIGURES
from registry.agent.health import Health
from registry.agent.mirror import AGENT, Mirror
from registry.agent.servers.protocol import HttpServer
from registry.agent.switching import LOOK_S
from registry.client.api import Api, read
from registry.client.follow import follow
from registry.errors import Conflict, RegistryError
from registry.formats.references import parse_channel_reference
from registry.wire.fleet import CanaryOut, FrontFigures, NodeReportIn, NodeReportOut, SwitchIn, WatchIn
from registry.wire.quality import FollowedOut

ROUND_S = 5.0
REPORT_S, WATCH_S = 20.0, 5.0
_REFUSED_S = 10.0
"""The pause after an error that only an operator can fix, such as a revoked token."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class GroupNode:
    """The name under which an agent reports, and how many nodes of its group may switch at a time; None for all."""

    group: str
    name: str
    max_unavailable: int | None


class Followed:
    """The registry's last answer about the channels. `changed` is set at each change."""

    def __init__(self, api: Api, channels: Sequence[str], health: Health, say: Say) -> None:
        self._api, self.channels, self._health, self._say = api, channels, health, say
        self.states = dict[str, FollowedOut | None]()
        self.changed = threading.Event()

    def run(self) -> None:
        """Follows until the process ends. Repeats requests that the registry refuses: an admin may grant them later."""
        while True:
            try:
                for change in follow(self._api, self.channels, self._outage):
                    self._outage(None)
                    self.states = {**self.states, change.channel: change.now}
                    if len(self.states) == len(self.channels):
                        self.changed.set()
            except RegistryError as error:
                self._outage(error)
            time.sleep(_REFUSED_S)

    def _outage(self, error: RegistryError | None) -> None:
        text = error.detail if error else ""
        if text:
            self._say(f"{text} Servers keep their current releases.")
        self._health.record_error("registry", text)


class Reporter:
    """Reports to the registry, from a thread of its own. An error is shown in the agent's health, and the next report
    is sent all the same."""

    def __init__(self, api: Api, node: GroupNode, health: Health) -> None:
        self._api, self._node, self._health = api, node, health
        self._path = f"/v1/fleet/{quote(node.group)}/{quote(node.name)}"
        self._instance = secrets.token_hex(8)
        self._report: NodeReportIn | None = None
        self._due = threading.Event()

    def run(self) -> None:
        while True:
            self._due.wait(REPORT_S)
            self._due.clear()
            if self._report is not None:
                self._send(self._report)

    def record(self, report: NodeReportIn) -> None:
        """Sends the report now if it differs from the last one, else at its time."""
        changed = report != self._report
        self._report = report
        if changed:
            self._due.set()

    def may_switch(self) -> bool:
        """Whether this node may switch now. Without an answer, it may not: others of its group may be switching."""
        if self._node.max_unavailable is None:
            return True
        asked = (self._report or NodeReportIn(agent=AGENT)).model_copy(
            update={"switch": SwitchIn(max_unavailable=self._node.max_unavailable)}
        )
        answer = self._send(asked)
        return answer is not None and answer.switch

    def _send(self, report: NodeReportIn) -> NodeReportOut | None:
        body = report.model_copy(update={"instance": self._instance}).model_dump(mode="json")
        try:
            answer = self._api.put(self._path, body, NodeReportOut)
        except RegistryError as error:
            self._health.record_error("report", f"The registry did not accept the report: {error.detail}")
            return None
        self._health.record_error("report", "")
        return answer


class Watcher:
    """Reports the fronts' figures by version, while a followed channel has a canary."""

    def __init__(self, api: Api, followed: Followed, fronts: Sequence[HttpServer], name: str, health: Health) -> None:
        self._api, self._followed, self._fronts, self._name, self._health = api, followed, fronts, name, health

    def run(self) -> None:
        while True:
            problems = list[str]()
            for front in self._fronts:
                try:
                    problems += self._report(front)
                except RegistryError as error:
                    problems.append(error.detail)
            text = f"Figures of canaries were not reported: {' '.join(problems)}" if problems else ""
            self._health.record_error("watch", text)
            time.sleep(WATCH_S)

    def _report(self, front: HttpServer) -> list[str]:
        """Reports about each channel that has a canary, and returns why some reports failed. Raises the error of a
        front that does not answer."""
        problems = list[str]()
        watched = {name: state for name, state in self._followed.states.items() if state and state.candidate}
        if not watched:
            return problems
        counted = read(FrontFigures, FIGURES, front.document(FIGURES))
        for channel, state in watched.items():
            repository, name = parse_channel_reference(channel)
            by_model = counted.channels.get(channel, {})
            versions = {
                version: by_model[model]
                for version in (state.version, state.candidate and state.candidate.version)
                if version and (model := f"{repository}@{version}") in by_model
            }
            body = WatchIn(source=f"{self._name}/{counted.source}", versions=versions).model_dump(mode="json")
            path = f"{self._api.repository_path(str(repository))}/channels/{name}/watch"
            try:
                self._api.post(path, body, CanaryOut)
            except Conflict:
                pass  # it has ended: the next event says so
            except RegistryError as error:
                problems.append(f"{channel}: {error.detail}")
        return problems


def run(mirror: Mirror, followed: Followed, reporter: Reporter | None, watcher: Watcher | None, health: Health) -> None:
    """Runs until interrupted. A round that cannot write the directory changes nothing and is tried again."""
    for thread in filter(None, (followed, reporter, watcher)):
        threading.Thread(target=thread.run, name=type(thread).__name__, daemon=True).start()
    while True:
        try:
            report, problem = mirror.round(followed.states, followed.channels), ""
            health.record(report)
            if reporter is not None:
                reporter.record(report)
        except RegistryError as error:
            problem = error.detail
        health.record_error("round", problem)
        followed.changed.wait(LOOK_S if mirror.waits else ROUND_S)
        followed.changed.clear()
