"""policies of namespaces, and exceptions from them"""

import sqlalchemy as sa
from alembic import op

revision = "0030"
down_revision = "0029"
oldest_code = "0018"
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "namespace_policies",
        sa.Column("namespace", sa.String(64), sa.ForeignKey("namespaces.name"), primary_key=True),
        sa.Column("channel", sa.String(64), primary_key=True),
        sa.Column("policy", sa.JSON, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("pins", sa.JSON, nullable=False),
    )
    op.create_table(
        "policy_exceptions",
        sa.Column(
            "repository_id",
            Id,
            sa.ForeignKey("repositories.id"),
            primary_key=True,
        ),
        sa.Column("channel", sa.String(64), primary_key=True),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reason", sa.String(1000), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(128), nullable=False),
    )
