"""what a signature covers, and signatures that came after their release

Signatures of before cover files alone, and namespaces that asked for one go on taking those: an admin raises it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

releases = sa.table("releases", *map(sa.column, ("signed_by", "signature_covers")))
namespaces = sa.table("namespaces", *map(sa.column, ("require_signature", "signature_covers")))


def upgrade() -> None:
    op.add_column("releases", sa.Column("signature_covers", sa.String(16)))
    op.add_column("namespaces", sa.Column("signature_covers", sa.String(16), nullable=False, server_default="release"))
    op.execute(sa.update(releases).where(releases.c.signed_by.is_not(None)).values(signature_covers="files"))
    op.execute(
        sa.update(namespaces).where(namespaces.c.require_signature == sa.true()).values(signature_covers="files")
    )
    op.create_table(
        "signatures",
        sa.Column("release_id", ROW_ID, nullable=False),
        sa.Column("signed_by", sa.String(64), nullable=False),
        sa.Column("bundle", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(128), nullable=False),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name=op.f("fk_signatures_release_id_releases")),
        sa.PrimaryKeyConstraint("release_id", "signed_by", name=op.f("pk_signatures")),
    )
