"""Rollouts: which nodes serve what a channel serves, and the wait until all of them do."""

import time
from collections.abc import Callable, Sequence

from registry.client.api import Api
from registry.client.retries import pauses, with_retries
from registry.errors import Refused
from registry.formats.references import parse_channel_reference
from registry.wire.fleet import RolloutNodeOut, RolloutOut

_POLL_S = 1.0


def rollout(api: Api, channel: str) -> RolloutOut:
    """The release that REPO@CHANNEL serves, and the states of its nodes."""
    return api.get(_path(api, channel), RolloutOut)


def _path(api: Api, channel: str) -> str:
    repository, name = parse_channel_reference(channel)
    return f"{api.repository_path(str(repository))}/channels/{name}/rollout"


def wait_for_nodes(
    api: Api, channel: str, wait_s: float, seen: Callable[[RolloutOut], None] = lambda _rollout: None
) -> RolloutOut:
    """Waits until every node that reports now follows what REPO@CHANNEL serves; `seen` gets the rollout at each look.
    Nodes that leave the fleet are not waited for. Raises Refused after `wait_s`, with a finding for each node that does
    not follow."""
    until, path = time.monotonic() + wait_s, _path(api, channel)
    look = api.get(path, RolloutOut)
    awaited = {(node.group, node.node) for node in look.nodes if node.state != "silent"}
    while True:
        seen(look)
        left = [node for node in look.nodes if (node.group, node.node) in awaited and node.state != "following"]
        if not left:
            return look
        if (left_s := until - time.monotonic()) <= 0:
            raise _incomplete(channel, wait_s, len(awaited), left)
        time.sleep(min(_POLL_S, left_s))
        look = with_retries(lambda: api.get(path, RolloutOut), pauses())


def _incomplete(channel: str, wait_s: float, count: int, left: Sequence[RolloutNodeOut]) -> Refused:
    findings = [
        {
            "code": f"node_{node.state}",
            "severity": "error",
            "subject": f"{node.group}/{node.node}",
            "message": why(node),
        }
        for node in left
    ]
    verb = "does" if len(left) == 1 else "do"
    detail = f"{len(left)} of {count} nodes {verb} not follow {channel} after {wait_s:g} s."
    return Refused("rollout_incomplete", detail, subject=channel, findings=findings)


def why(node: RolloutNodeOut) -> str:
    """A node with its state, what it serves, and its error."""
    text = f"{node.group}/{node.node} is {node.state} and serves {node.version or 'nothing'}"
    return f"{text}: {node.error}" if node.error else text
