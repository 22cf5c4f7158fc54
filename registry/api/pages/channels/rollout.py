"""A channel's rollout on its page: how many nodes serve what it serves, and what keeps the others."""

from dataclasses import dataclass
from datetime import datetime

from registry.wire.fleet import NodeCheck, RolloutNodeOut, RolloutOut

SHOWN = 100
_WORST_FIRST = ("failed", "behind", "silent", "switching", "following")
_KINDS = {"failed": "bad", "behind": "warn", "silent": "warn", "switching": "warn", "following": "ok"}


@dataclass(frozen=True, slots=True)
class ShownNode:
    """A row of the table. `kind` is the color of its state, `check` a sentence, empty without a check."""

    node: RolloutNodeOut
    kind: str
    check: str


@dataclass(frozen=True, slots=True)
class ShownRollout:
    """`kind` and `sentence` are the answer, `following` of `count` nodes the progress; `left_out` nodes are not in the
    table, which has those with problems first."""

    kind: str
    sentence: str
    following: int
    count: int
    nodes: list[ShownNode]
    left_out: int


def shown(rollout: RolloutOut, now: datetime) -> ShownRollout | None:
    """The rollout for the page; None if no node follows the channel."""
    count = sum(rollout.totals.values())
    if not count:
        return None
    listed = sorted(rollout.nodes, key=lambda node: _WORST_FIRST.index(node.state))
    rows = [ShownNode(node, _KINDS[node.state], _check(node.check, now)) for node in listed[:SHOWN]]
    worst = next(state for state in _WORST_FIRST if rollout.totals[state])
    following = rollout.totals["following"]
    sentence = _sentence(rollout, count, now)
    return ShownRollout(_KINDS[worst], sentence, following, count, rows, max(0, len(listed) - SHOWN))


def _sentence(rollout: RolloutOut, count: int, now: datetime) -> str:
    """`1.1.0 is proved on 12 of 12 nodes, 40 s ago.`, or how many serve it and what the others do."""
    version, following = rollout.version or "nothing", rollout.totals["following"]
    nodes = f"{count} node{'s' * (count != 1)}"
    if rollout.proved == count:
        checks = [node.check.at for node in rollout.nodes if node.check]
        return f"{version} is proved on {count} of {nodes}{f', {ago(max(checks), now)}' if checks else ''}."
    proved = f", {rollout.proved} of them proved" if rollout.proved else ""
    others = [f"{number} {state}" for state in _WORST_FIRST[:-1] if (number := rollout.totals[state])]
    verb = "serves" if following == 1 else "serve"
    return f"{following} of {nodes} {verb} {version}{proved}{''.join(f'; {other}' for other in others)}."


def _check(check: NodeCheck | None, now: datetime) -> str:
    if check is None:
        return ""
    figures = f"share {check.share:.3f}, " if check.share is not None else ""
    figures += f"worst token {check.worst_nats:.2f} nats, " if check.worst_nats is not None else ""
    return f"{check.stated}: {figures}{ago(check.at, now)}"


def ago(at: datetime, now: datetime) -> str:
    """The time since `at` in its largest unit: `40 s ago`."""
    seconds = max(0.0, (now - at).total_seconds())
    for unit, unit_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds // unit_s:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
