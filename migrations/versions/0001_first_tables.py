"""the first tables"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
BYTE_ORDERED = sa.String(200).with_variant(sa.String(200, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("act", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=300), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_subject", "audit", ["subject", "id"], unique=False)

    op.create_table(
        "bases",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("architecture_digest", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("model_type", sa.String(length=64), nullable=False),
        sa.Column("tied", sa.Boolean(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("tensor_count", sa.Integer(), nullable=False),
        sa.Column("tensors", sa.JSON(), nullable=False),
        sa.Column("derived_from", sa.String(length=64), nullable=True),
        sa.Column("relation", sa.String(length=16), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(["derived_from"], ["bases.digest"], name="fk_bases_derived_from"),
        sa.PrimaryKeyConstraint("digest", name="pk_bases"),
        sa.UniqueConstraint("name", name="uq_bases_name"),
    )
    op.create_index("ix_bases_architecture_digest", "bases", ["architecture_digest"], unique=False)

    op.create_table(
        "blobs",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_blobs"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("steps", sa.JSON(), nullable=False),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("worker", sa.String(length=64), nullable=True),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_state", "jobs", ["state", "id"], unique=False)

    op.create_table(
        "repositories",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_repositories"),
        sa.UniqueConstraint("namespace", "name", name="uq_repositories_namespace_name"),
    )
    op.create_table(
        "suites",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("examples", sa.Integer(), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.Column("current", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_suites"),
        sa.UniqueConstraint("digest", name="uq_suites_digest"),
    )
    op.create_index(
        "uq_suites_name",
        "suites",
        ["name"],
        unique=True,
        sqlite_where=sa.text("current"),
        postgresql_where=sa.text("current"),
    )

    op.create_table(
        "target_sets",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_target_sets"),
        sa.UniqueConstraint("key", name="uq_target_sets_key"),
    )
    op.create_table(
        "base_aliases",
        sa.Column("alias", sa.String(length=200), nullable=False),
        sa.Column("base_digest", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["base_digest"], ["bases.digest"], name="fk_base_aliases_base_digest"),
        sa.PrimaryKeyConstraint("alias", name="pk_base_aliases"),
    )
    op.create_index("ix_base_aliases_base_digest", "base_aliases", ["base_digest"], unique=False)

    op.create_table(
        "base_locations",
        sa.Column("base_digest", sa.String(length=64), nullable=False),
        sa.Column("url", sa.String(length=1000), nullable=False),
        sa.ForeignKeyConstraint(["base_digest"], ["bases.digest"], name="fk_base_locations_base_digest"),
        sa.PrimaryKeyConstraint("base_digest", "url", name="pk_base_locations"),
    )
    op.create_table(
        "channels",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("repository_id", ROW_ID, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("move_id", ROW_ID, nullable=True),
        sa.ForeignKeyConstraint(["repository_id"], ["repositories.id"], name="fk_channels_repository_id"),
        sa.PrimaryKeyConstraint("id", name="pk_channels"),
        sa.UniqueConstraint("repository_id", "name", name="uq_channels_repository_id_name"),
    )
    op.create_table(
        "compositions",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("job_id", ROW_ID, nullable=False),
        sa.Column("plan_only", sa.Boolean(), nullable=False),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("lock", sa.JSON(), nullable=False),
        sa.Column("conflicts", sa.JSON(), nullable=True),
        sa.Column("candidate_scores", sa.JSON(), nullable=True),
        sa.Column("gates", sa.JSON(), nullable=True),
        sa.Column("merge", sa.JSON(), nullable=True),
        sa.Column("results", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_compositions_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_compositions"),
        sa.UniqueConstraint("job_id", name="uq_compositions_job_id"),
    )
    op.create_table(
        "gates",
        sa.Column("repository_id", ROW_ID, nullable=False),
        sa.Column("channel", sa.String(length=64), nullable=False),
        sa.Column("rules", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["repository_id"], ["repositories.id"], name="fk_gates_repository_id"),
        sa.PrimaryKeyConstraint("repository_id", "channel", name="pk_gates"),
    )
    op.create_table(
        "revisions",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("repository_id", ROW_ID, nullable=False),
        sa.Column("commit", sa.String(length=40), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["repository_id"], ["repositories.id"], name="fk_revisions_repository_id"),
        sa.PrimaryKeyConstraint("id", name="pk_revisions"),
        sa.UniqueConstraint("repository_id", "commit", name="uq_revisions_repository_id_commit"),
    )
    op.create_table(
        "target_set_members",
        sa.Column("target_set_id", ROW_ID, nullable=False),
        sa.Column("target", sa.String(length=200), nullable=False),
        sa.ForeignKeyConstraint(["target_set_id"], ["target_sets.id"], name="fk_target_set_members_target_set_id"),
        sa.PrimaryKeyConstraint("target_set_id", "target", name="pk_target_set_members"),
    )
    op.create_index("ix_target_set_members_target", "target_set_members", ["target"], unique=False)

    op.create_table(
        "releases",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("repository_id", ROW_ID, nullable=False),
        sa.Column("revision_id", ROW_ID, nullable=False),
        sa.Column("version", sa.String(length=100), nullable=False),
        sa.Column("sort_key", BYTE_ORDERED, nullable=False),
        sa.Column("stable", sa.Boolean(), nullable=False),
        sa.Column("base_digest", sa.String(length=64), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=True),
        sa.Column("variant", sa.String(length=32), nullable=True),
        sa.Column("rank_max", sa.Integer(), nullable=True),
        sa.Column("target_set_id", ROW_ID, nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("notes", sa.String(), nullable=False),
        sa.Column("yanked", sa.Boolean(), nullable=False),
        sa.Column("yank_reason", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(["base_digest"], ["bases.digest"], name="fk_releases_base_digest"),
        sa.ForeignKeyConstraint(["repository_id"], ["repositories.id"], name="fk_releases_repository_id"),
        sa.ForeignKeyConstraint(["revision_id"], ["revisions.id"], name="fk_releases_revision_id"),
        sa.ForeignKeyConstraint(["target_set_id"], ["target_sets.id"], name="fk_releases_target_set_id"),
        sa.PrimaryKeyConstraint("id", name="pk_releases"),
        sa.UniqueConstraint("repository_id", "version", name="uq_releases_repository_id_version"),
    )
    op.create_index(
        "ix_releases_compatible",
        "releases",
        ["base_digest", "yanked", "rank_max", "target_set_id", "repository_id"],
        unique=False,
    )
    op.create_index("ix_releases_repository_order", "releases", ["repository_id", "sort_key"], unique=False)
    op.create_index("ix_releases_revision_id", "releases", ["revision_id"], unique=False)

    op.create_table(
        "revision_files",
        sa.Column("revision_id", ROW_ID, nullable=False),
        sa.Column("path", sa.String(length=400), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["revision_id"], ["revisions.id"], name="fk_revision_files_revision_id"),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name="fk_revision_files_sha256"),
        sa.PrimaryKeyConstraint("revision_id", "path", name="pk_revision_files"),
    )
    op.create_index("ix_revision_files_sha256", "revision_files", ["sha256"], unique=False)

    op.create_table(
        "moves",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("channel_id", ROW_ID, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("from_release_id", ROW_ID, nullable=True),
        sa.Column("to_release_id", ROW_ID, nullable=False),
        sa.Column("below_id", ROW_ID, nullable=True),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("forced", sa.Boolean(), nullable=False),
        sa.Column("gates", sa.JSON(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["below_id"], ["moves.id"], name="fk_moves_below_id"),
        sa.ForeignKeyConstraint(["channel_id"], ["channels.id"], name="fk_moves_channel_id"),
        sa.ForeignKeyConstraint(["from_release_id"], ["releases.id"], name="fk_moves_from_release_id"),
        sa.ForeignKeyConstraint(["to_release_id"], ["releases.id"], name="fk_moves_to_release_id"),
        sa.PrimaryKeyConstraint("id", name="pk_moves"),
    )
    op.create_index("ix_moves_channel_id", "moves", ["channel_id"], unique=False)

    op.create_table(
        "release_inputs",
        sa.Column("release_id", ROW_ID, nullable=False),
        sa.Column("input_id", ROW_ID, nullable=False),
        sa.Column("composition_id", ROW_ID, nullable=True),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["composition_id"], ["compositions.id"], name="fk_release_inputs_composition_id"),
        sa.ForeignKeyConstraint(["input_id"], ["releases.id"], name="fk_release_inputs_input_id"),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name="fk_release_inputs_release_id"),
        sa.PrimaryKeyConstraint("release_id", "input_id", name="pk_release_inputs"),
    )
    op.create_index("ix_release_inputs_input_id", "release_inputs", ["input_id"], unique=False)

    op.create_table(
        "scores",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("release_id", ROW_ID, nullable=True),
        sa.Column("base_digest", sa.String(length=64), nullable=True),
        sa.Column("suite_id", ROW_ID, nullable=False),
        sa.Column("metric", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("stderr", sa.Double(), nullable=True),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("higher_is_better", sa.Boolean(), nullable=False),
        sa.Column("provenance", sa.JSON(), nullable=False),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("measured_by", sa.String(length=128), nullable=False),
        sa.CheckConstraint("(release_id IS NULL) <> (base_digest IS NULL)", name="ck_scores_one_subject"),
        sa.ForeignKeyConstraint(["base_digest"], ["bases.digest"], name="fk_scores_base_digest"),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name="fk_scores_release_id"),
        sa.ForeignKeyConstraint(["suite_id"], ["suites.id"], name="fk_scores_suite_id"),
        sa.PrimaryKeyConstraint("id", name="pk_scores"),
        sa.UniqueConstraint("base_digest", "suite_id", "metric", name="uq_scores_base_digest_suite_id_metric"),
        sa.UniqueConstraint("release_id", "suite_id", "metric", name="uq_scores_release_id_suite_id_metric"),
    )
    op.create_index("ix_scores_of_release", "scores", ["release_id", "suite_id", "metric", "value"], unique=False)
