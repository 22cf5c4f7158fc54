"""changes of a namespace that need a second admin"""

import sqlalchemy as sa
from alembic import op

revision = "0032"
down_revision = "0031"
oldest_code = "0018"
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.add_column("namespaces", sa.Column("changes", sa.String(8), nullable=False, server_default="one"))
    op.create_table(
        "change_requests",
        sa.Column("id", Id, primary_key=True),
        sa.Column("namespace", sa.String(64), sa.ForeignKey("namespaces.name"), nullable=False),
        sa.Column("change", sa.JSON, nullable=False),
        sa.Column("before", sa.JSON, nullable=False),
        sa.Column("after", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("token_id", sa.String(16)),
        sa.Column("source", sa.String(200)),
        sa.Column("ended_by", sa.String(128)),
        sa.Column("error", sa.JSON),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
    )
    op.create_index("ix_change_requests_namespace", "change_requests", ["namespace", "state"])
