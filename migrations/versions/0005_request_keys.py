"""releases and moves keep the key of the request that made them, so that it can be repeated"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    for table, scope in (("releases", "repository_id"), ("moves", "channel_id")):
        op.add_column(table, sa.Column("request_key", sa.String(64), nullable=True))
        keyed = sa.text("request_key IS NOT NULL")
        op.create_index(
            f"uq_{table}_request_key",
            table,
            [scope, "request_key"],
            unique=True,
            sqlite_where=keyed,
            postgresql_where=keyed,
        )
