"""suites of a namespace, which are private like it"""

import sqlalchemy as sa
from alembic import op

revision = "0033"
down_revision = "0032"
oldest_code = "0018"


def upgrade() -> None:
    op.add_column("suites", sa.Column("namespace", sa.String(64)))
    op.add_column("suites", sa.Column("shared", sa.Boolean, nullable=False, server_default=sa.true()))
