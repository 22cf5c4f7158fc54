"""uploads by clients with hf_xet, and the xorbs that they have sent"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.create_table(
        "xet_uploads",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("repository", sa.String(64), nullable=False),
        sa.Column("sent_bytes", sa.BigInteger(), nullable=False),
        sa.Column("made_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(128), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_xet_uploads")),
    )
    op.create_index("ix_xet_uploads_expires_at", "xet_uploads", ["expires_at"])
    op.create_table(
        "xet_xorbs",
        sa.Column("upload_id", sa.String(32), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("headers", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["upload_id"], ["xet_uploads.id"], name=op.f("fk_xet_xorbs_upload_id_xet_uploads")),
        sa.PrimaryKeyConstraint("upload_id", "hash", name=op.f("pk_xet_xorbs")),
    )
