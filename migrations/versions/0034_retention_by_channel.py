"""retention of releases that a channel no longer serves"""

import sqlalchemy as sa
from alembic import op

revision = "0034"
down_revision = "0033"
oldest_code = "0018"


def upgrade() -> None:
    op.add_column("namespaces", sa.Column("keep_channel_days", sa.JSON))
