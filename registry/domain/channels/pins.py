"""Pins: the content of each suite, and the direction of each metric, that a channel's gate rules were set on.

A suite's author may have no role in the namespace. The author's later changes are announced, and take effect only when
an admin of the namespace accepts them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Gate, Suite
from registry.domain.access.audit import Actor
from registry.domain.catalog import metrics, suites
from registry.domain.channels.gates import Contents, Rule

Pins = Mapping[str, Mapping[str, Any]]
"""By suite: the `digest` of its content, and `higher_is_better` by metric."""


def pin(session: Session, actor: Actor, rules: Sequence[Rule], kept: Pins) -> dict[str, Any]:
    """The pins of these rules: those `kept`, and the current state of each suite or metric without one. Raises NotFound
    for
    a suite that the actor may not name."""
    pins: dict[str, dict[str, Any]] = {}
    for rule in rules:
        before = kept.get(rule.suite)
        if rule.suite not in pins:
            digest = before["digest"] if before else suites.find(session, rule.suite, actor).digest
            pins[rule.suite] = {"digest": digest, "higher_is_better": {}}
        better = before["higher_is_better"].get(rule.metric) if before else None
        if better is None:
            better = metrics.is_higher_better(session, rule.suite, rule.metric)
        pins[rule.suite]["higher_is_better"][rule.metric] = better
    return pins


def of_channel(session: Session, repository_id: int, channel: str) -> Pins:
    """The pins of a channel's policy; none for rules set by a version without pins."""
    return session.scalar(select(Gate.pins).where(Gate.repository_id == repository_id, Gate.channel == channel)) or {}


def contents(session: Session, rules: Sequence[Rule], pins: Pins) -> Contents:
    """The content and directions that the rules are judged on: pinned ones, or else the current ones."""
    names = {rule.suite for rule in rules}
    current = {
        suite.name: suite for suite in session.scalars(select(Suite).where(Suite.name.in_(names), Suite.current))
    }
    digests = [pin["digest"] for name, pin in pins.items() if name in names]
    pinned = {suite.name: suite for suite in session.scalars(select(Suite).where(Suite.digest.in_(digests)))}
    directions = {(name, metric): better for name, pin in pins.items() for metric, better in _directions(pin)}
    return Contents({**current, **pinned}, directions)


def announced(session: Session, pins: Pins) -> dict[str, str]:
    """Describes the changes since the rules were pinned, by suite."""
    now = suites.current_labels(session, pins)
    digests = [pin["digest"] for pin in pins.values()]
    pinned = {suite.name: suite for suite in session.scalars(select(Suite).where(Suite.digest.in_(digests)))}
    changed: dict[str, str] = {}
    for name, pin in pins.items():
        notes: list[str] = []
        if name in pinned and not pinned[name].current:
            notes.append(f"pinned to {name} {suites.label(pinned[name])}, which is now {now.get(name, 'gone')}")
        for metric, better in _directions(pin):
            if metrics.is_higher_better(session, name, metric) != better:
                was, is_now = ("higher", "lower") if better else ("lower", "higher")
                notes.append(f"pinned to {was} {metric} being better, which is now {is_now}")
        if notes:
            changed[name] = "; ".join(notes)
    return changed


def _directions(pin: Mapping[str, Any]) -> list[tuple[str, bool]]:
    return list(pin["higher_is_better"].items())
