"""Drift of the fleet: nodes that stay out of step with their channels, recorded once, and once more when they are back.

A node that failed is out of step at once. `PATIENCE` has the others: nodes need a moment after each move to follow it,
and after each outage of the registry to report again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.tables import FleetDrift, FleetNode
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import REGISTRY
from registry.domain.rollouts import fleet

PATIENCE = {fleet.BEHIND: timedelta(minutes=5), fleet.SILENT: fleet.LEASE}
_SHOWN = 100
_UNTRACKED = {"synchronize_session": False}

Key = tuple[int, str, str]
"""A node's id, a repository and a channel."""


@dataclass(frozen=True, slots=True)
class Drifts:
    """The differences from the recorded drift. `due` are recorded rows that are to be reported now."""

    new: Sequence[fleet.OutOfStep]
    due: Sequence[fleet.OutOfStep]
    over: Sequence[Key]

    def __bool__(self) -> bool:
        return bool(self.new or self.due or self.over)


def compare(session: Session, now: datetime) -> Drifts:
    """Compares the nodes that are out of step with those recorded."""
    known = {(row.node_id, row.repository, row.channel): row for row in session.scalars(select(FleetDrift))}
    seen = {row.key: row for row in fleet.out_of_step(session, now)}
    new = [row for key, row in seen.items() if key not in known]
    due = [row for key, row in seen.items() if key in known and not known[key].reported]
    due = [row for row in due if now - known[row.key].since >= PATIENCE.get(row.state, timedelta(0))]
    return Drifts(new, due, [key for key in known if key not in seen])


def record(session: Session, now: datetime) -> None:
    """Records what changed, with an audit row for each channel. Of several workers, one records it."""
    drifts = compare(session, now)
    reported: list[fleet.OutOfStep] = []
    for row in drifts.new:
        at_once = row.state not in PATIENCE
        values = {"node_id": row.node_id, "repository": row.repository, "channel": row.channel}
        if insert_if_absent(session, FleetDrift, **values, since=now, reported=at_once) and at_once:
            reported.append(row)
    for row in drifts.due:
        turned = update(FleetDrift).where(_is(row.key), FleetDrift.reported.is_(False)).values(reported=True)
        if session.scalar(turned.returning(FleetDrift.node_id), execution_options=_UNTRACKED) is not None:
            reported.append(row)
    _announce(session, now, Act.FLEET_DRIFT, [(row.namespace, row.key, _shown(row)) for row in reported])
    back: list[tuple[str, Key, dict[str, Any]]] = []
    for key in drifts.over:
        gone = delete(FleetDrift).where(_is(key)).returning(FleetDrift.reported)
        node = session.get(FleetNode, key[0])
        if session.scalar(gone, execution_options=_UNTRACKED) and node is not None:
            back.append((node.namespace, key, {"group": node.group, "node": node.node}))
    _announce(session, now, Act.FLEET_RECOVER, back)


def _is(key: Key) -> Any:
    return (FleetDrift.node_id == key[0]) & (FleetDrift.repository == key[1]) & (FleetDrift.channel == key[2])


def _shown(row: fleet.OutOfStep) -> dict[str, Any]:
    return {"group": row.group, "node": row.node, "state": row.state, "version": row.version, "error": row.error}


def _announce(session: Session, now: datetime, act: Act, rows: Sequence[tuple[str, Key, dict[str, Any]]]) -> None:
    """An audit row for each channel, with its nodes."""
    channels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for namespace, (_, repository, channel), shown in rows:
        channels.setdefault((namespace, f"{namespace}/{repository}@{channel}"), []).append(shown)
    for (namespace, subject), nodes in channels.items():
        detail: dict[str, Any] = {"nodes": nodes[:_SHOWN], "count": len(nodes)}
        audit.record(session, Actor(REGISTRY, now, {}), act, subject, namespace=namespace, **detail)
