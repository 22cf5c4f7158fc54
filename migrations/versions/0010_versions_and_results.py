"""versions and tasks of suites, and the results of each example behind a score"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("suites", sa.Column("version", sa.String(80)))
    op.add_column("suites", sa.Column("task", sa.String(32), nullable=False, server_default="teacher_forced"))
    op.create_index("uq_suites_version", "suites", ["name", "version"], unique=True)
    op.add_column("scores", sa.Column("results_sha256", sa.String(64)))
    op.create_index("ix_scores_results", "scores", ["results_sha256"])
