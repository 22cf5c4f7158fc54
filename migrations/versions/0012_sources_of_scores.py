"""where a score comes from: a harness and its version, or the file that reports it"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("scores", sa.Column("source", sa.String(300)))
