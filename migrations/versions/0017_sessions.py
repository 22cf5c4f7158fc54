"""browser sessions, which are tokens of their own kind"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.add_column("tokens", sa.Column("session", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("tokens", sa.Column("parent_id", sa.String(16)))
    op.add_column("tokens", sa.Column("session_roles", sa.JSON))
    op.create_index("ix_tokens_parent_id", "tokens", ["parent_id"])
