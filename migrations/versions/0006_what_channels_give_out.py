"""what each channel gives out, for a search to read in order instead of going through all channels of a name"""

from collections.abc import Mapping

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
BYTE_ORDERED = sa.String(200).with_variant(sa.String(200, collation="C"), "postgresql")

channels = sa.table(
    "channels", sa.column("id"), sa.column("move_id"), sa.column("served_id"), sa.column("served_key", sa.String())
)
moves = sa.table("moves", sa.column("id"), sa.column("to_release_id"), sa.column("below_id"))
releases = sa.table("releases", sa.column("id"), sa.column("sort_key", sa.String()), sa.column("yanked", sa.Boolean()))


def upgrade() -> None:
    op.add_column("channels", sa.Column("served_id", ROW_ID))
    op.add_column("channels", sa.Column("served_key", BYTE_ORDERED))
    _serve_last_moves()
    _serve_below_yanked()
    op.drop_index("ix_channels_name", "channels")
    op.create_index("ix_channels_newest", "channels", ["name", "served_id"])
    op.create_index("ix_channels_version", "channels", ["name", "served_key", "served_id"])


def _serve_last_moves() -> None:
    """As nearly all channels do: in one statement, also where there are a hundred thousand."""
    last = sa.select(moves.c.to_release_id).where(moves.c.id == channels.c.move_id).scalar_subquery()
    op.execute(sa.update(channels).values(served_id=last))
    key = sa.select(releases.c.sort_key).where(releases.c.id == channels.c.served_id).scalar_subquery()
    op.execute(sa.update(channels).values(served_key=key))


def _serve_below_yanked() -> None:
    connection = op.get_bind()
    top = sa.select(channels.c.id, channels.c.move_id).join(releases, releases.c.id == channels.c.served_id)
    for channel, move in connection.execute(top.where(releases.c.yanked)).all():
        given_out = sa.update(channels).where(channels.c.id == channel)
        connection.execute(given_out.values(**_first_below(connection, move)))


def _first_below(connection: sa.Connection, move: int | None) -> Mapping[str, object]:
    """What is not yanked, from that move down."""
    step = sa.select(moves.c.below_id, releases.c.id, releases.c.sort_key, releases.c.yanked)
    step = step.join(releases, releases.c.id == moves.c.to_release_id)
    while move is not None:
        move, release, key, yanked = connection.execute(step.where(moves.c.id == move)).one()
        if not yanked:
            return {"served_id": release, "served_key": key}
    return {"served_id": None, "served_key": None}
