"""namespaces, members and tokens; announced uploads; what searches, signatures and audits ask for"""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

WHEN = sa.DateTime(timezone=True)
UNKNOWN_LOADING = {"*": ["published before this was recorded: push it again as the next version"]}


def upgrade() -> None:
    _access()
    _uploads()
    _releases()
    with op.batch_alter_table("audit") as table:
        table.add_column(sa.Column("namespace", sa.String(length=64), nullable=True))
        table.add_column(sa.Column("token_id", sa.String(length=16), nullable=True))
        table.add_column(sa.Column("source", sa.String(length=200), nullable=True))
        table.add_column(sa.Column("reason", sa.String(), nullable=True))
        table.add_column(sa.Column("before", sa.JSON(), nullable=True))
        table.add_column(sa.Column("after", sa.JSON(), nullable=True))
    op.create_index("ix_audit_actor", "audit", ["actor", "id"])
    op.create_index("ix_audit_namespace", "audit", ["namespace", "id"])
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("namespace", sa.String(length=64), nullable=True))
    op.create_index("ix_jobs_namespace", "jobs", ["namespace"])
    _fill_audit_namespaces()


def _access() -> None:
    op.create_table(
        "members",
        sa.Column("user", sa.String(length=128), nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("user", "namespace", name="pk_members"),
    )
    op.create_index("ix_members_namespace", "members", ["namespace"])
    op.create_table(
        "namespaces",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("require_signature", sa.Boolean(), nullable=False),
        sa.Column("signing_keys", sa.JSON(), nullable=False),
        sa.Column("created_at", WHEN, nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_namespaces"),
    )
    op.create_index("ix_namespaces_public", "namespaces", ["public"])
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("user", sa.String(length=128), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.JSON(), nullable=False),
        sa.Column("created_at", WHEN, nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.Column("expires_at", WHEN, nullable=True),
        sa.Column("revoked_at", WHEN, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
    )
    op.create_index("ix_tokens_user", "tokens", ["user"])
    op.execute(
        "INSERT INTO namespaces (name, public, require_signature, signing_keys, created_at, created_by) "
        "SELECT namespace, false, false, '[]', min(created_at), 'migration' FROM repositories GROUP BY namespace"
    )


def _uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("multipart_id", sa.String(length=1000), nullable=True),
        sa.Column("part_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", WHEN, nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.Column("expires_at", WHEN, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
        sa.UniqueConstraint("namespace", "sha256", name="uq_uploads_namespace_sha256"),
    )
    op.create_index("ix_uploads_created_by", "uploads", ["created_by"])
    op.create_index("ix_uploads_expires_at", "uploads", ["expires_at"])
    op.create_index("ix_uploads_sha256", "uploads", ["sha256"])
    op.create_table(
        "blob_holders",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name="fk_blob_holders_sha256", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("sha256", "namespace", name="pk_blob_holders"),
    )
    op.execute(
        "INSERT INTO blob_holders (sha256, namespace) SELECT DISTINCT f.sha256, p.namespace FROM revision_files f "
        "JOIN revisions r ON r.id = f.revision_id JOIN repositories p ON p.id = r.repository_id"
    )


def _releases() -> None:
    """Columns that must have a value get one in three steps, since the tables may have rows."""
    with op.batch_alter_table("releases") as table:
        table.add_column(sa.Column("alpha", sa.Double(), nullable=True))
        table.add_column(sa.Column("dtype", sa.String(length=100), nullable=True))
        table.add_column(sa.Column("license", sa.String(length=100), nullable=True))
        table.add_column(sa.Column("provenance", sa.JSON(), nullable=True))
        table.add_column(sa.Column("spectrum", sa.JSON(), nullable=True))
        table.add_column(sa.Column("servers", sa.Integer(), nullable=True))
        table.add_column(sa.Column("loading", sa.JSON(), nullable=True))
        table.add_column(sa.Column("breaking_reason", sa.String(), nullable=True))
        table.add_column(sa.Column("signed_by", sa.String(length=64), nullable=True))
    with op.batch_alter_table("revisions") as table:
        table.add_column(sa.Column("manifest", sa.Text(), nullable=True))
    _fill_releases()
    _fill_manifests()
    with op.batch_alter_table("releases") as table:
        for column, kind in (("provenance", sa.JSON()), ("servers", sa.Integer()), ("loading", sa.JSON())):
            table.alter_column(column, existing_type=kind, nullable=False)
    with op.batch_alter_table("revisions") as table:
        table.alter_column("manifest", existing_type=sa.Text(), nullable=False)


def _fill_releases() -> None:
    releases = sa.table(
        "releases",
        sa.column("id"),
        sa.column("facts", sa.JSON()),
        *(sa.column(name) for name in ("alpha", "dtype", "servers")),
        *(sa.column(name, sa.JSON()) for name in ("provenance", "loading")),
    )
    connection = op.get_bind()
    for row_id, facts in connection.execute(sa.select(releases.c.id, releases.c.facts)).all():
        values: dict[str, Any] = {
            "alpha": facts.get("alpha"),
            "dtype": facts.get("dtype"),
            "provenance": {},
            "servers": 0,
            "loading": UNKNOWN_LOADING,
        }
        connection.execute(sa.update(releases).where(releases.c.id == row_id).values(values))


def _fill_manifests() -> None:
    """As `registry.manifest` writes them: a migration keeps the form of its day in its own words."""
    connection = op.get_bind()
    rows = connection.execute(
        sa.text("SELECT revision_id, path, sha256, size_bytes FROM revision_files ORDER BY revision_id")
    )
    files: dict[int, list[dict[str, Any]]] = {}
    for revision_id, path, sha256, size_bytes in rows:
        files.setdefault(revision_id, []).append({"path": path, "sha256": sha256, "size_bytes": size_bytes})
    for revision_id, listed in files.items():
        document = {"files": sorted(listed, key=lambda file: file["path"])}
        manifest = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        statement = sa.text("UPDATE revisions SET manifest = :manifest WHERE id = :id")
        connection.execute(statement, {"manifest": manifest, "id": revision_id})


def _fill_audit_namespaces() -> None:
    """Rows about a repository, a release or a channel belong to its namespace; the others to the site."""
    connection = op.get_bind()
    known = {name for (name,) in connection.execute(sa.text("SELECT name FROM namespaces"))}
    for row_id, subject in connection.execute(sa.text("SELECT id, subject FROM audit")).all():
        namespace = subject.partition("/")[0]
        if namespace in known:
            statement = sa.text("UPDATE audit SET namespace = :namespace WHERE id = :id")
            connection.execute(statement, {"namespace": namespace, "id": row_id})
