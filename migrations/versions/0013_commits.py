"""the commits of a repository, which clients of the Hugging Face Hub make before a release"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"

number = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "commits",
        sa.Column("id", number, primary_key=True),
        sa.Column("repository_id", number, sa.ForeignKey("repositories.id"), nullable=False),
        sa.Column("revision_id", number, sa.ForeignKey("revisions.id"), nullable=False),
        sa.Column("title", sa.String(400), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("author", sa.String(128), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_commits_repository_id", "commits", ["repository_id", "id"])
    op.create_index("ix_commits_revision_id", "commits", ["revision_id"])
