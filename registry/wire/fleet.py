"""Documents of the fleet: what the nodes that serve channels report, and what a channel's rollout has reached."""

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from registry.wire.document import MAX_INT32, MAX_INT64, Moment, Wire, WireIn

LEASE_S = 60
"""How long a report counts. A node without a report in that time is silent."""
MAX_CHANNELS, MAX_SERVERS, MAX_LOADED, MAX_LOADED_BY_ALL = 1_000, 100, 1_000, 10_000
MAX_CHANNEL_CHARS = 200
_COMMIT = r"^[0-9a-f]{40}$"

Text = Annotated[str, Field(max_length=1000)]


class NodeCheck(Wire):
    """A served check: whether the server applies the release. `share` is 1 where the release is applied and 0 where the
    base answers, `worst_nats` the largest difference of a token, and `tolerance_nats` the largest one that proves a
    release. They are null if the check measured nothing."""

    verdict: Literal["proved", "unproved", "failed"]
    at: Moment
    share: float | None = Field(default=None, allow_inf_nan=False)
    worst_nats: float | None = Field(default=None, allow_inf_nan=False)
    tolerance_nats: float | None = Field(default=None, allow_inf_nan=False)

    @property
    def stated(self) -> str:
        """The verdict in words: `proved within 0.3 nats`."""
        within = f" within {self.tolerance_nats:g} nats" if self.tolerance_nats is not None else ""
        return f"proved{within}" if self.verdict == "proved" else self.verdict


class NodeChannel(Wire):
    """A channel that a node follows, such as `acme/sql@prod`. `version`, `commit` and `move` are what the node's routes
    give users now, null for nothing, `since` is when this began, and `error` what is wrong with the channel or its
    node. `splits` says whether the node gives a canary its share of the requests."""

    channel: str = Field(min_length=1, max_length=MAX_CHANNEL_CHARS)
    state: Literal["following", "switching", "failed"]
    splits: bool = False
    version: str | None = Field(default=None, max_length=100)
    commit: str | None = Field(default=None, pattern=_COMMIT)
    move: int | None = Field(default=None, ge=1, le=MAX_INT64)
    since: Moment
    check: NodeCheck | None = None
    error: Text | None = None


class LoadedName(Wire):
    """A name that a server has loaded, such as `acme/sql@1.2.0`. `commit` is null if the node does not know it."""

    name: str = Field(min_length=1, max_length=MAX_CHANNEL_CHARS)
    commit: str | None = Field(default=None, pattern=_COMMIT)


class NodeServer(Wire):
    """A server of a node. `url` is its address, or what its kind has instead."""

    url: str = Field(min_length=1, max_length=500)
    kind: str = Field(min_length=1, max_length=40)
    ready: bool
    loaded: list[LoadedName] = Field(default=[], max_length=MAX_LOADED)
    error: Text | None = None


class SwitchIn(Wire):
    """A request to switch now, if fewer than `max_unavailable` other nodes of the group may."""

    max_unavailable: int = Field(ge=1, le=MAX_INT32)


class NodeReportIn(WireIn):
    """The report of a node. `agent` is the program that reports, with its version. `instance` is a random text of its
    process: while two of them report in turn as one node, its channels have failed. Without `switch`, the node gives an
    earlier permission back."""

    agent: str = Field(min_length=1, max_length=100)
    instance: str | None = Field(default=None, min_length=1, max_length=64)
    channels: list[NodeChannel] = Field(default=[], max_length=MAX_CHANNELS)
    servers: list[NodeServer] = Field(default=[], max_length=MAX_SERVERS)
    switch: SwitchIn | None = None

    @model_validator(mode="after")
    def _refuse_twice(self) -> Self:
        if len({channel.channel for channel in self.channels}) < len(self.channels):
            raise ValueError("channels names one twice")
        if sum(len(server.loaded) for server in self.servers) > MAX_LOADED_BY_ALL:
            raise ValueError(f"the servers have more than {MAX_LOADED_BY_ALL:,} names loaded")
        return self


class NodeReportOut(Wire):
    """The report counts for `lease_s` seconds, 46 to 60; `switch` says whether the node may switch now."""

    lease_s: int
    switch: bool


class ForgottenOut(Wire):
    """The node that was removed."""

    namespace: str
    group: str
    node: str


class NodeOut(Wire):
    """A node of a group with its channels, and the names that its servers have loaded, of one namespace. It is `silent`
    if its last report, of `seen_at`, no longer counts; `switch_until` is set while it has the permission to switch."""

    namespace: str
    group: str
    node: str
    agent: str
    seen_at: datetime
    silent: bool
    switch_until: datetime | None
    channels: list[NodeChannel]
    servers: list[NodeServer]


RolloutState = Literal["following", "switching", "behind", "failed", "silent"]


class RolloutNodeOut(Wire):
    """A node that follows the channel. `version`, `commit` and `move` are live: what it gives users now, or gave when
    it reported last."""

    group: str
    node: str
    state: RolloutState
    version: str | None
    commit: str | None
    move: int | None
    since: datetime
    seen_at: datetime
    check: NodeCheck | None
    error: str | None


class RolloutOut(Wire):
    """The release that a channel serves, which every node should, and what each node serves. `totals` counts the nodes
    by state; `proved` is the number of those that follow and whose last check proved the release. `nodes` is empty for
    a caller without a role in the namespace, who reads the channel because the namespace is public.

    A node's state is the first that applies: `silent` without a report in the last 60 seconds; `failed` or `switching`
    if it says so; `following` if it gives users the version and commit that the channel serves; otherwise `behind`.
    """

    repository: str
    channel: str
    move: int
    version: str | None
    commit: str | None
    totals: dict[str, int]
    proved: int
    nodes: list[RolloutNodeOut]


class VersionFiguresIn(Wire):
    """The counts of a version by one source since it started. `errors` are the requests that failed by the server's
    fault. `seconds` counts requests by the time to the end of the answer, by index into the bounds 0.01 x 1.1^i
    seconds, i from 0 to 115; 116 stands for all above. `metrics` are [n, sum] of values from 0 to 1."""

    requests: int = Field(ge=0, le=MAX_INT64)
    errors: int = Field(default=0, ge=0, le=MAX_INT64)
    seconds: dict[Annotated[int, Field(ge=0, le=116)], Annotated[int, Field(ge=0, le=MAX_INT64)]] = Field(default={})
    metrics: dict[
        Annotated[str, Field(min_length=1, max_length=100)],
        tuple[Annotated[int, Field(ge=0, le=MAX_INT64)], Annotated[float, Field(ge=0, allow_inf_nan=False)]],
    ] = Field(default={}, max_length=50)

    @model_validator(mode="after")
    def _refuse_more_than_all(self) -> Self:
        if self.errors > self.requests or sum(self.seconds.values()) > self.requests:
            raise ValueError("errors or seconds count more than there are requests")
        if any(total > n for n, total in self.metrics.values()):
            raise ValueError("a metric's sum is larger than n: its values are from 0 to 1")
        return self


class FrontFigures(Wire):
    """The counts of a front since it started, by the channel that was requested, such as acme/sql@prod, and the
    model that answered, such as acme/sql@1.2.0. `source` is new after a restart."""

    source: str = Field(min_length=1, max_length=100)
    channels: dict[str, dict[str, VersionFiguresIn]]


class WatchIn(WireIn):
    """Figures of one source, by version. They only grow while `source` is the same; name it anew after a restart."""

    source: str = Field(min_length=1, max_length=200)
    versions: dict[Annotated[str, Field(min_length=1, max_length=100)], VersionFiguresIn] = Field(max_length=100)


class CanaryIn(WireIn):
    """The release that is to get `weight` per cent of the channel's requests."""

    version: str = Field(max_length=100)
    weight: int = Field(ge=1, le=99)
    reason: str = Field(default="", max_length=1000)


class StandingOut(Wire):
    """A rule, and the figures of both releases; null before there are any. It is `broken` once the evidence
    suffices."""

    rule: str
    candidate: float | None
    served: float | None
    broken: bool


class CanaryOut(Wire):
    """A channel's last canary. `state` is running, promoted, rolled_back, stopped or replaced; `why` says how it ended,
    or what holds it. `requests` counts those of the candidate and those of the served version; it is null, and `rules`
    empty, for a caller without a role in the namespace, who reads the channel because the namespace is public.
    `next_weight` is null for a canary that is not watched: somebody promotes or stops it."""

    id: int
    repository: str
    channel: str
    version: str
    served: str
    weight: int
    next_weight: int | None
    state: str
    why: str
    actor: str
    reason: str
    requests: tuple[int, int] | None
    rules: list[StandingOut]
    created_at: datetime
    step_at: datetime
    figures_at: datetime | None
    ended_at: datetime | None
