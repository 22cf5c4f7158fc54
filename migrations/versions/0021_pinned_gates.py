"""what gate rules ask is pinned, approvals know their move, and policies with an approval state who may force"""

import re
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
oldest_code = "0018"

_RULE = re.compile(r"\s*([a-z0-9][a-z0-9._-]*)\.([a-z_][a-z0-9_]*)(?=\s|>=|<=)")
_BUILT_IN = {"nll": False, "accuracy": True}


def upgrade() -> None:
    op.add_column("gates", sa.Column("pins", sa.JSON))
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("approvals", sa.Column("after_move", number, nullable=False, server_default="0"))
    # Times decided until now: an approval counted if it came after the last move to its release.
    op.execute(
        "UPDATE approvals SET after_move = COALESCE((SELECT MAX(moves.id) FROM moves"
        " JOIN channels ON channels.id = moves.channel_id"
        " JOIN releases ON releases.repository_id = channels.repository_id"
        " WHERE releases.id = approvals.release_id AND channels.name = approvals.channel"
        " AND moves.at < approvals.at), 0)"
    )
    connection = op.get_bind()
    gates = sa.table("gates", *map(sa.column, ("repository_id", "channel")), sa.column("rules", sa.JSON),
                     sa.column("policy", sa.JSON(none_as_null=True)), sa.column("pins", sa.JSON))  # fmt: skip
    for row in connection.execute(sa.select(gates)).all():
        values: dict[str, Any] = {"pins": _pins(connection, row.rules)}
        if row.policy and row.policy.get("approval") is not None and "force" not in row.policy:
            values["policy"] = {**row.policy, "force": "releaser"}  # as it was without stating it
        this = (gates.c.repository_id == row.repository_id) & (gates.c.channel == row.channel)
        connection.execute(gates.update().where(this).values(**values))


def _pins(connection: sa.Connection, rules: list[str]) -> dict[str, Any]:
    """The present content of each suite that the rules name, and the present directions of their metrics."""
    pins: dict[str, Any] = {}
    for suite, metric in (match.groups() for rule in rules if (match := _RULE.match(rule))):
        current = sa.text("SELECT digest FROM suites WHERE name = :suite AND current")
        digest = connection.scalar(current, {"suite": suite})
        if digest is None:
            continue
        pin = pins.setdefault(suite, {"digest": digest, "higher_is_better": {}})
        better = _direction(connection, suite, metric)
        if better is not None:
            pin["higher_is_better"][metric] = better
    return pins


def _direction(connection: sa.Connection, suite: str, metric: str) -> bool | None:
    if metric in _BUILT_IN:
        return _BUILT_IN[metric]
    named = {"suite": suite, "metric": metric}
    stated = "SELECT higher_is_better FROM suite_metrics WHERE suite = :suite AND metric = :metric"
    first = (
        "SELECT scores.higher_is_better FROM scores JOIN suites ON suites.id = scores.suite_id"
        " WHERE suites.name = :suite AND scores.metric = :metric ORDER BY scores.id LIMIT 1"
    )
    for query in (stated, first):
        better = connection.scalar(sa.text(query), named)
        if better is not None:
            return bool(better)
    return None
