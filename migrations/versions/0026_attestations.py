"""keys of workers, and what they attested"""

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
oldest_code = "0018"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "worker_keys",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("worker", sa.String(64), nullable=False),
        sa.Column("public_key", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_by", sa.String(128)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_worker_keys")),
    )
    op.create_table(
        "attestations",
        sa.Column("id", _ID, nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("predicate_type", sa.String(100), nullable=False),
        sa.Column("release_id", _ID),
        sa.Column("base_digest", sa.String(64)),
        sa.Column("suite_id", _ID),
        sa.Column("envelope", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attestations")),
        sa.ForeignKeyConstraint(["key_id"], ["worker_keys.id"], name=op.f("fk_attestations_key_id")),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name=op.f("fk_attestations_release_id")),
        sa.ForeignKeyConstraint(["base_digest"], ["bases.digest"], name=op.f("fk_attestations_base_digest")),
        sa.ForeignKeyConstraint(["suite_id"], ["suites.id"], name=op.f("fk_attestations_suite_id")),
    )
    op.create_index("ix_attestations_key_id", "attestations", ["key_id"])
    op.create_index("ix_attestations_release", "attestations", ["release_id", "predicate_type", "id"])
    op.add_column("scores", sa.Column("attestation_id", _ID))
