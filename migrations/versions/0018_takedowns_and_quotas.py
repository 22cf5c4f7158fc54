"""releases that were taken down, and quotas and retention of namespaces"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.add_column("revisions", sa.Column("taken_down_at", sa.DateTime(timezone=True)))
    op.add_column("revisions", sa.Column("takedown_reason", sa.String))
    op.add_column("revisions", sa.Column("barred", sa.Boolean, nullable=False, server_default=sa.false()))
    barred = sa.text("barred")
    op.create_index("ix_revisions_barred", "revisions", ["id"], postgresql_where=barred, sqlite_where=barred)
    op.add_column("releases", sa.Column("yanked_at", sa.DateTime(timezone=True)))
    # When earlier releases were yanked is in the audit alone: their time begins now.
    op.execute("UPDATE releases SET yanked_at = CURRENT_TIMESTAMP WHERE yanked")
    for name in ("max_bytes", "max_releases"):
        op.add_column("namespaces", sa.Column(name, sa.BigInteger))
    for name in ("keep_yanked_days", "keep_prerelease_days"):
        op.add_column("namespaces", sa.Column(name, sa.Integer))
    op.create_index("ix_blob_holders_namespace", "blob_holders", ["namespace"])
