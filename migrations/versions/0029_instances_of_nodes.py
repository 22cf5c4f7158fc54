"""processes that report as one node of the fleet"""

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
oldest_code = "0018"


def upgrade() -> None:
    with op.batch_alter_table("fleet_nodes") as table:
        table.add_column(sa.Column("instances", sa.JSON))
        table.add_column(sa.Column("shared_until", sa.DateTime(timezone=True)))
