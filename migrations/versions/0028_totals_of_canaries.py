"""totals of canaries, and figures by the user who reports them"""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
oldest_code = "0018"


def upgrade() -> None:
    with op.batch_alter_table("canaries") as table:
        table.add_column(sa.Column("totals", sa.JSON))
    with op.batch_alter_table("canary_figures") as table:
        table.add_column(sa.Column("reporter", sa.String(128), nullable=False, server_default=sa.text("''")))
        table.drop_constraint(op.f("pk_canary_figures"), type_="primary")
        table.create_primary_key(op.f("pk_canary_figures"), ["canary_id", "reporter", "source"])
