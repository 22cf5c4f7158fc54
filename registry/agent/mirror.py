"""The mirror: rounds that bring directories, servers and routes into step with what channels serve."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as package_version
from itertools import product
from typing import Any, TypeVar

from registry.agent.directory import MirrorDirectory, Routes, Signer
from registry.agent.switching import Checked, KeptServer
from registry.agent.versions import ALL, ServedVersion, weights_of
from registry.client.api import Api
from registry.errors import RegistryError, Unavailable
from registry.wire.fleet import (
    MAX_CHANNEL_CHARS,
    MAX_LOADED,
    LoadedName,
    NodeChannel,
    NodeCheck,
    NodeReportIn,
    NodeServer,
)
from registry.wire.quality import FollowedOut

WAIT_S = 20.0
"""A round waits no longer for a server. One whose work takes longer is late: it keeps what it has, and the round goes
on with the others."""
CLOCK_S = 60.0
"""A clock that differs by this much from the registry's is a problem: people see times of both."""
_WEAKEST = ("proved", "unproved", "failed")
_MAX_TEXT, _MAX_URL = 1000, 500
T = TypeVar("T")
AGENT = f"adaptory {package_version('adaptory')}"


@dataclass(frozen=True, slots=True)
class Options:
    """`keep` earlier releases for each channel keep their directories, and every release for `grace_s` after its last
    need. A channel that serves nothing keeps its last version, unless `unload_empty`. `splits` says whether a front
    gives canaries their share of the requests."""

    keep: int = 2
    grace_s: float = 600.0
    unload_empty: bool = False
    splits: bool = False


@dataclass(frozen=True, slots=True)
class Duties:
    """Releases that `signer` has not signed are refused; `may_switch` is called before each switch, and `publish` with
    the routes of each round."""

    signer: Signer | None = None
    may_switch: Callable[[], bool] = lambda: True
    publish: Callable[[Routes], None] = lambda _routes: None


@dataclass(slots=True)
class _Target:
    """The versions to which a channel should be routed, the one that it serves first; empty for no route."""

    weights: Mapping[ServedVersion, int]
    error: str = ""
    move: int | None = None

    @property
    def version(self) -> ServedVersion | None:
        return next(iter(self.weights), None)


class Mirror:
    """Takes rounds. Keeps no memory that it needs: directories, routes.json and the servers' own lists are enough."""

    def __init__(
        self, api: Api, directory: MirrorDirectory, servers: Sequence[KeptServer], options: Options, duties: Duties
    ) -> None:
        self._api, self._directory, self._servers = api, directory, servers
        self._options, self._duties = options, duties
        self._state: Mapping[str, Any] | None = None
        self._routes = directory.reported_routes()  # until a round has read or written routes.json

    @property
    def waits(self) -> bool:
        """Whether the next round should come soon."""
        return any(kept.waits for kept in self._servers)

    def close(self) -> None:
        for kept in self._servers:
            kept.server.close()

    def round(self, wanted: Mapping[str, FollowedOut | None], channels: Sequence[str]) -> NodeReportIn:
        """Makes the servers and the directory what the channels want now. `wanted` has the channels that are known;
        null is one that cannot be read. If the directory cannot be written, nothing that is served changes, and the
        report says why."""
        written = self._directory.read_routes()
        self._routes = routes = written or self._routes
        targets = {channel: self._target(channel, wanted, routes) for channel in channels}
        differ = any(target.version not in (None, routes.version(channel)) for channel, target in targets.items())
        switches = differ and self._duties.may_switch()
        goals = {
            version
            for channel, target in targets.items()
            for version in target.weights
            if switches or target.version == routes.version(channel)
        }
        routed = {version for channel in channels for version in routes.weights(channel)}
        failures = self._bring(frozenset(goals | routed))
        after = self._moved(routes, targets, failures, switches=switches)
        changed = after != written and (after.channels or routes.channels)  # damaged routes stay until there are others
        if changed and (why := _unwritten(partial(self._directory.write_routes, after))):
            after = routes
            for target in targets.values():
                target.error = target.error or why
        self._routes = after
        # Nothing is unloaded before gateways have the routes without it.
        problem = _unwritten(partial(self._duties.publish, after))
        tidy = partial(self._tidy, after, targets, are_known=written is not None or bool(after.channels))
        problem = problem or _unwritten(tidy)
        problem = problem or self._wrong_clock() or next((kept.error for kept in self._servers if kept.error), "")
        report = self._report(after, targets, problem, switches=switches)
        state = {**report.model_dump(mode="json"), "by_version": self._directory.notes()}
        if state != self._state:
            if why := _unwritten(partial(self._directory.write_state, state)):
                return self._report(after, targets, problem or why, switches=switches)
            self._state = state
        return report

    def _target(self, channel: str, wanted: Mapping[str, FollowedOut | None], routes: Routes) -> _Target:
        current = routes.weights(channel)
        if channel not in wanted:
            return _Target(current, "" if current else "The registry has not answered yet.")
        served = wanted[channel]
        if served is None:
            return _Target(current, "The channel does not exist, or this token may not read it.")
        try:
            weights = weights_of(channel, served)
        except RegistryError as error:
            return _Target(current, error.detail)
        if not weights:
            if self._options.unload_empty:
                return _Target({}, move=served.move)
            error = (
                "The channel serves nothing; its last version goes on." if current else "The channel serves nothing."
            )
            return _Target(current, error, served.move)
        return _Target(weights, move=served.move)

    def _bring(self, needed: frozenset[ServedVersion]) -> Mapping[ServedVersion, str]:
        """Fetches the versions, with the members of sets, and loads and checks them on all servers. Returns why some
        cannot be used: a set needs all its members."""
        failures, members = dict[ServedVersion, str](), dict[ServedVersion, tuple[ServedVersion, ...]]()
        for version in sorted(needed):
            try:
                self._directory.fetch(self._api, version, self._duties.signer)
                members[version] = tuple(self._directory.members(version).values()) or (version,)
                for member in members[version]:
                    self._directory.fetch(self._api, member, self._duties.signer)
            except RegistryError as error:
                failures[version] = error.detail
        fetched = sorted({member for version, rows in members.items() if version not in failures for member in rows})
        for of_server in self._on_each(partial(self._bring_to, fetched)):
            for version, why in of_server.items():
                failures.setdefault(version, why)
        for kept, version in product(self._servers, fetched):  # a check may end after its round
            if why := kept.why_not(version):
                failures.setdefault(version, why)
        for version, rows in members.items():
            if why := next((failures[member] for member in rows if member in failures), ""):
                failures.setdefault(version, why)
        return failures

    def _loaded_for(self, version: ServedVersion) -> tuple[ServedVersion, ...]:
        """The versions that servers load for this one: the members of a set, or itself."""
        return tuple(self._members(version).values()) or (version,)

    def _members(self, version: ServedVersion) -> Mapping[str, ServedVersion]:
        """The members of a set by class, of one whose file is missing or damaged as it is routed; empty for no set."""
        with suppress(RegistryError):  # which is reported where the set is fetched
            if members := self._directory.members(version):
                return members
        return self._routes.members(version)

    def _has(self, kept: KeptServer, version: ServedVersion) -> bool:
        return all(map(kept.has, self._loaded_for(version)))

    def _on_each(self, work: Callable[[KeptServer], T]) -> list[T]:
        """Does the work for each server that is not late, all at once. Returns the results of those that end in
        time."""
        begun = [kept.start(work) for kept in self._servers if not kept.late]
        return [result.result() for result in wait(begun, WAIT_S).done]

    def _bring_to(self, versions: Sequence[ServedVersion], kept: KeptServer) -> Mapping[ServedVersion, str]:
        kept.look()
        if not kept.answers:
            return {}
        reasons = ((version, kept.bring(version, self._directory.path(version.commit))) for version in versions)
        return {version: why for version, why in reasons if why}

    def _moved(
        self,
        routes: Routes,
        targets: Mapping[str, _Target],
        failures: Mapping[ServedVersion, str],
        *,
        switches: bool,
    ) -> Routes:
        """The routes after this round: a channel moves once every server that answers has its version."""
        answering = [kept for kept in self._servers if kept.answers]
        ready = [kept for kept in answering if kept.ready]
        channels, since, commits = dict[str, Mapping[str, int]](), dict[str, str](), dict[str, str]()
        sets = dict[str, Mapping[str, str]]()
        now = datetime.now(UTC).isoformat()
        for channel, target in targets.items():
            version, current = target.version, routes.version(channel)
            if version is not None:
                target.error = target.error or failures.get(version, "" if answering else "No server answers.")
            if version not in (None, current) and (
                not switches or target.error or not (ready and all(self._has(kept, version) for kept in ready))
            ):
                version = current
            since[channel] = routes.since.get(channel, now) if version == current else now
            if version is not None:
                weights = self._split(target, ready, failures) if version == target.version else {version: ALL}
                channels[channel] = {each.name: weight for each, weight in weights.items()}
                commits |= {each.name: each.commit for each in weights}
                for each in weights:
                    members = self._members(each)
                    sets |= {each.name: {part: member.name for part, member in members.items()}} if members else {}
                    commits |= {member.name: member.commit for member in members.values()}
        endpoints = {
            name: [kept.server.endpoint(name) for kept in answering if kept.commit_of(name) == commit]
            for name, commit in commits.items()
        }
        servers = {name: tuple(endpoint.url for endpoint in rows) for name, rows in endpoints.items()}
        lora = {row.url: row.lora for rows in endpoints.values() for row in rows if row.lora is not None}
        bases = {row.url: row.base for rows in endpoints.values() for row in rows if row.base} if sets else {}
        stated = {name: self._directory.phrases(commit) for name, commit in commits.items()}
        phrases = {name: by_task for name, by_task in stated.items() if by_task}
        return Routes(channels, since, commits, servers, lora, sets, bases, phrases)

    def _split(
        self, target: _Target, ready: Sequence[KeptServer], failures: Mapping[ServedVersion, str]
    ) -> Mapping[ServedVersion, int]:
        """The target's weights. A canary's candidate gets requests once every server that answers has it."""
        for candidate in list(target.weights)[1:]:
            if why := failures.get(candidate, ""):
                target.error = target.error or f"The canary {candidate.version} gets no requests: {why}"
            if why or not (ready and all(self._has(kept, candidate) for kept in ready)):
                return {next(iter(target.weights)): ALL}
        return target.weights

    def _tidy(self, routes: Routes, targets: Mapping[str, _Target], *, are_known: bool) -> None:
        """Unloads versions that no route names any longer, then removes directories that no server has loaded. If the
        routes are not known, since their file was lost, fronts may still have them: what an earlier agent has loaded
        stays. Raises Unavailable if the directory cannot be written."""
        wanted = routes.versions() | {version for target in targets.values() for version in target.weights}
        wanted |= {member for version in wanted for member in self._loaded_for(version)}
        self._directory.touch(version.commit for version in wanted)
        self._directory.remove_partial({version.commit for version in wanted})
        names = frozenset(version.name for version in wanted)
        self._on_each(lambda kept: kept.retire(names if are_known else names | kept.earlier))
        if not all(kept.ready for kept in self._servers):
            return  # one that does not answer may have any directory loaded
        used = {version.commit for version in wanted}
        used |= {commit for kept in self._servers for name in kept.loaded if (commit := kept.commit_of(name))}
        self._directory.touch(commit for commit in used)
        unused = sorted(
            (last_s, commit) for commit, last_s in self._directory.old(0.0, time.time()) if commit not in used
        )
        kept_until_s = time.time() - self._options.grace_s
        removable = unused[: max(0, len(unused) - self._options.keep * len(targets))]
        for last_s, commit in removable:
            if last_s < kept_until_s:
                self._directory.remove(commit)

    def _wrong_clock(self) -> str:
        """The error of this host's clock, compared with the registry's; empty if nothing is."""
        ahead_s = self._api.ahead_s or 0.0
        if abs(ahead_s) < CLOCK_S:
            return ""
        minutes, side = f"{abs(ahead_s) / 60:,.0f} min", "ahead of" if ahead_s > 0 else "behind"
        return f"This host's clock is {minutes} {side} the registry's, and the times of its reports are wrong."

    def _report(self, routes: Routes, targets: Mapping[str, _Target], problem: str, *, switches: bool) -> NodeReportIn:
        """The report of this round. A `problem` of the node is an error of its channels; they go on following."""
        now, channels = datetime.now(UTC).isoformat(), list[NodeChannel]()
        for channel, target in targets.items():
            version = routes.version(channel)
            follows = version == target.version
            # A node that may not switch yet follows what it has: the registry sees that it is behind.
            state = "failed" if target.error else "following" if follows or not switches else "switching"
            loaded = self._loaded_for(version) if version else ()
            checks = [
                kept.checks[each.name] for kept, each in product(self._servers, loaded) if each.name in kept.checks
            ]
            weakest = max(checks, key=lambda checked: _WEAKEST.index(checked.result.verdict), default=None)
            channels.append(
                NodeChannel(
                    channel=channel,
                    state=state,
                    splits=self._options.splits,
                    version=version.version if version else None,
                    commit=version.commit if version else None,
                    move=target.move if follows else None,
                    since=datetime.fromisoformat(routes.since.get(channel, now)),
                    check=_check_of(weakest) if weakest else None,
                    error=_shown(target.error or problem, _MAX_TEXT) or None,
                )
            )
        return NodeReportIn(agent=AGENT, channels=channels, servers=list(map(_row_of, self._servers)))


def _unwritten(write: Callable[[], None]) -> str:
    """Runs `write`. Returns why it failed, or an empty string."""
    try:
        write()
    except Unavailable as error:
        return error.detail
    return ""


def _check_of(checked: Checked) -> NodeCheck:
    served = checked.result.served
    if served is None:
        return NodeCheck(verdict=checked.result.verdict, at=checked.at)
    return NodeCheck(
        verdict=checked.result.verdict,
        at=checked.at,
        share=served.share,
        worst_nats=served.worst,
        tolerance_nats=served.limits.worst,
    )


def _row_of(kept: KeptServer) -> NodeServer:
    names = sorted(kept.loaded, key=lambda name: (kept.commit_of(name) is None, name))  # our own first
    loaded = [
        LoadedName(name=_shown(name, MAX_CHANNEL_CHARS), commit=kept.commit_of(name)) for name in names[:MAX_LOADED]
    ]
    return NodeServer(
        url=_shown(kept.server.address, _MAX_URL),
        kind=kept.server.kind,
        ready=kept.ready,
        loaded=loaded,
        error=_shown(kept.error, _MAX_TEXT) or None,
    )


def _shown(text: str, most: int) -> str:
    """The beginning of a text in letters that every report can have: a server may list half a surrogate pair."""
    return text[:most].encode(errors="replace").decode()
