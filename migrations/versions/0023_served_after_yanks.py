"""channels whose last release is yanked serve what a rollback would return to, never what one has left since"""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
oldest_code = "0018"

_CHANNELS = """
    SELECT channels.id, channels.move_id, moves.to_release_id, moves.below_id FROM channels
    JOIN moves ON moves.id = channels.move_id JOIN releases ON releases.id = moves.to_release_id WHERE releases.yanked
"""
_MOVES = """
    SELECT moves.id, moves.kind, moves.from_release_id, moves.to_release_id, moves.below_id, releases.yanked,
        releases.sort_key
    FROM moves JOIN releases ON releases.id = moves.to_release_id WHERE moves.channel_id = :channel
"""


def upgrade() -> None:
    connection = op.get_bind()
    point = sa.text("UPDATE channels SET served_id = :served, served_key = :key WHERE id = :channel")
    for channel in connection.execute(sa.text(_CHANNELS)).all():
        moves = {row.id: row for row in connection.execute(sa.text(_MOVES), {"channel": channel.id})}
        left: dict[int, int] = {}
        for row in moves.values():
            if row.kind == "rollback":
                left[row.from_release_id] = max(row.id, left.get(row.from_release_id, 0))
        below, served = channel.below_id, None
        while below is not None and served is None:
            move = moves[below]
            may = not move.yanked and move.to_release_id != channel.to_release_id
            served = move if may and left.get(move.to_release_id, 0) < move.id else None
            below = move.below_id
        values = {"served": served.to_release_id, "key": served.sort_key} if served else {"served": None, "key": None}
        connection.execute(point, {**values, "channel": channel.id})
