"""a number that changes with what is told of a release"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("releases", sa.Column("stamp", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
