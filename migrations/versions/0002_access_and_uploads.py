"""namespaces, members and tokens; announced uploads; what searches, signatures and audits ask for"""

import hashlib
import json
import re
import unicodedata
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
BYTE_ORDERED = sa.String(length=200).with_variant(sa.String(length=200, collation="C"), "postgresql")
WHEN = sa.DateTime(timezone=True)
ASKED = ("yanked", "stable", "size_bytes", "repository_id")


def upgrade() -> None:
    _access()
    _uploads()
    _releases()
    _search()
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
    with op.batch_alter_table("blobs") as table:
        table.add_column(sa.Column("removing_at", WHEN, nullable=True))
        table.add_column(sa.Column("removing_by", sa.String(length=32), nullable=True))
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
            "loading": {},
        }
        connection.execute(sa.update(releases).where(releases.c.id == row_id).values(values))


def _fill_manifests() -> None:
    """As `registry.formats.manifest` writes them: a migration keeps the form of its day in its own words."""
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


def _search() -> None:
    op.create_table(
        "traits",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("base_digest", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=True),
        sa.Column("variant", sa.String(length=32), nullable=True),
        sa.Column("rank_max", sa.Integer(), nullable=True),
        sa.Column("alpha", sa.Double(), nullable=True),
        sa.Column("dtype", sa.String(length=100), nullable=True),
        sa.Column("license", sa.String(length=100), nullable=True),
        sa.Column("target_set_id", ROW_ID, nullable=True),
        sa.Column("servers", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["base_digest"], ["bases.digest"], name="fk_traits_base_digest"),
        sa.ForeignKeyConstraint(["target_set_id"], ["target_sets.id"], name="fk_traits_target_set_id"),
        sa.PrimaryKeyConstraint("id", name="pk_traits"),
        sa.UniqueConstraint("key", name="uq_traits_key"),
    )
    op.create_index("ix_traits_base", "traits", ["base_digest", "kind", "target_set_id", "rank_max"])
    op.create_table(
        "release_words",
        sa.Column("word", BYTE_ORDERED, nullable=False),
        sa.Column("release_id", ROW_ID, nullable=False),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name="fk_release_words_release_id"),
        sa.PrimaryKeyConstraint("word", "release_id", name="pk_release_words"),
    )
    op.create_index("ix_release_words_release", "release_words", ["release_id", "word"])
    for table in ("releases", "scores"):
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("traits_id", ROW_ID, nullable=True))
            batch.create_foreign_key(f"fk_{table}_traits_id", "traits", ["traits_id"], ["id"])
    _fill_search()
    with op.batch_alter_table("releases") as table:
        table.alter_column("traits_id", existing_type=ROW_ID, nullable=False)
    op.drop_index("ix_releases_compatible", "releases")
    op.drop_index("ix_releases_repository_order", "releases")
    op.create_index("ix_releases_repository_order", "releases", ["repository_id", "sort_key", "stable", "yanked"])
    op.create_index("ix_releases_traits_newest", "releases", ["traits_id", "id", *ASKED, "sort_key"])
    op.create_index("ix_releases_traits_version", "releases", ["traits_id", "sort_key", "id", *ASKED])
    op.create_index("ix_releases_newest", "releases", ["id", "traits_id", *ASKED, "sort_key"])
    op.create_index("ix_releases_version", "releases", ["sort_key", "id", "traits_id", *ASKED])
    op.create_index("ix_releases_size", "releases", ["size_bytes", "traits_id"])
    op.create_index("ix_scores_best", "scores", ["suite_id", "metric", "value", "release_id"])
    op.create_index("ix_scores_traits_best", "scores", ["suite_id", "metric", "traits_id", "value", "release_id"])
    op.create_index("ix_bases_derived_from", "bases", ["derived_from"])
    op.create_index("ix_channels_name", "channels", ["name", "repository_id"])


def _fill_search() -> None:
    """As `registry.domain.catalog.search_index` writes them."""
    connection = op.get_bind()
    facts = ("type", "variant", "rank_max", "alpha", "dtype", "license", "target_set_id", "servers")
    rows = connection.execute(
        sa.text(
            "SELECT r.id, p.namespace, p.name, r.notes, r.base_digest, p.kind, r.type, r.variant, r.rank_max, r.alpha, "
            "r.dtype, r.license, r.target_set_id, r.servers "
            "FROM releases r JOIN repositories p ON p.id = r.repository_id"
        )
    ).all()
    known: dict[str, int] = {}
    for release_id, namespace, name, notes, *traits in rows:
        key = hashlib.sha256(json.dumps(traits).encode()).hexdigest()
        if key not in known:
            values = dict(zip(("base_digest", "kind", *facts), traits, strict=True))
            table = sa.table("traits", *(sa.column(column) for column in ("key", *values)))
            connection.execute(sa.insert(table).values(key=key, **values))
            known[key] = connection.scalar(sa.text("SELECT id FROM traits WHERE key = :key"), {"key": key})
        set_traits = sa.text("UPDATE releases SET traits_id = :traits WHERE id = :id")
        connection.execute(set_traits, {"traits": known[key], "id": release_id})
        found = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", f"{namespace} {name} {notes}").casefold())
        for word in list(dict.fromkeys(word[:40] for word in found))[:500]:
            statement = sa.text("INSERT INTO release_words (word, release_id) VALUES (:word, :id)")
            connection.execute(statement, {"word": word, "id": release_id})
    connection.execute(
        sa.text(
            "UPDATE scores SET traits_id = (SELECT traits_id FROM releases WHERE releases.id = scores.release_id) "
            "WHERE release_id IS NOT NULL"
        )
    )


def _fill_audit_namespaces() -> None:
    """Rows about a repository, a release or a channel belong to its namespace; the others to the site."""
    connection = op.get_bind()
    known = {name for (name,) in connection.execute(sa.text("SELECT name FROM namespaces"))}
    for row_id, subject in connection.execute(sa.text("SELECT id, subject FROM audit")).all():
        namespace = subject.partition("/")[0]
        if namespace in known:
            statement = sa.text("UPDATE audit SET namespace = :namespace WHERE id = :id")
            connection.execute(statement, {"namespace": namespace, "id": row_id})
