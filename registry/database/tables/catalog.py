"""Bases, repositories, revisions and releases."""

from datetime import datetime
from secrets import randbits
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.database.engine import Row, UtcDateTime

Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite generates ids only for an INTEGER key


ByteOrdered = String(200).with_variant(String(200, collation="C"), "postgresql")  # a locale would have its own order


def new_stamp() -> int:
    """A random stamp that no release has had: a counter would start again in a restored database."""
    return randbits(62)


_COVERED = ("yanked", "stable", "size_bytes", "repository_id")
"""Columns of a release that a search may filter by besides its traits."""


class Base(Row):
    """The identity of a base model. `tensors` is its table: [[name, dtype, [shape], sha256], ...] sorted by name. A
    deprecated base has a reason, and perhaps the digest of its `successor`."""

    __tablename__ = "bases"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    architecture_digest: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    model_type: Mapped[str] = mapped_column(String(64))
    tied: Mapped[bool]
    parameters: Mapped[int] = mapped_column(BigInteger)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    tensor_count: Mapped[int]
    tensors: Mapped[list[Any]] = mapped_column(JSON, deferred=True)
    derived_from: Mapped[str | None] = mapped_column(ForeignKey("bases.digest"), index=True)
    relation: Mapped[str | None] = mapped_column(String(16))
    license: Mapped[str | None] = mapped_column(String(100))
    deprecated_reason: Mapped[str | None]
    successor: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))


class BaseAlias(Row):
    """Another name of a base. Looked up exactly as written, since hub ids keep their upper case."""

    __tablename__ = "base_aliases"

    alias: Mapped[str] = mapped_column(String(200), primary_key=True)
    base_digest: Mapped[str] = mapped_column(ForeignKey("bases.digest"), index=True)


class BaseLocation(Row):
    """A location from which the weights of a base can be read: `file://`, `hf://` or `s3://`."""

    __tablename__ = "base_locations"

    base_digest: Mapped[str] = mapped_column(ForeignKey("bases.digest"), primary_key=True)
    url: Mapped[str] = mapped_column(String(1000), primary_key=True)


class Repository(Row):
    """A namespace's releases of one name; all are adapters, or all models."""

    __tablename__ = "repositories"
    __table_args__ = (UniqueConstraint("namespace", "name"),)

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    namespace: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Blob(Row):
    """Verified bytes that at least one revision may name. `removing_at` is set once a collection has decided to remove
    them, and `removing_by` names its run: nobody may rely on them any more, and they can be sent again once the row is
    gone."""

    __tablename__ = "blobs"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    removing_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    removing_by: Mapped[str | None] = mapped_column(String(32))


class BlobHolder(Row):
    """A namespace that has sent a blob's bytes: knowing a digest grants no access."""

    __tablename__ = "blob_holders"

    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256", ondelete="CASCADE"), primary_key=True)
    namespace: Mapped[str] = mapped_column(String(64), primary_key=True, index=True)


class Upload(Row):
    """An announced upload: by whom, for which namespace, and until when. `multipart_id` and `part_bytes` are set if the
    store takes the file in parts. `permit_key` signs the addresses that LFS clients get, and never leaves the database;
    an upload without such addresses has no key."""

    __tablename__ = "uploads"
    __table_args__ = (UniqueConstraint("namespace", "sha256"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    namespace: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    multipart_id: Mapped[str | None] = mapped_column(String(1000))
    part_bytes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128), index=True)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    permit_key: Mapped[str | None] = mapped_column(String(64))


class XetUpload(Row):
    """A push by a client with `hf_xet`: its sender, its repository, and its expiry. Its
    token is stored as a hash; `token_id` is the user's, which it does not outlive. `sent_bytes` is the size of the
    chunks received in xorbs, `made_bytes` that of the files assembled from them."""

    __tablename__ = "xet_uploads"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    secret_sha256: Mapped[str] = mapped_column(String(64))
    namespace: Mapped[str] = mapped_column(String(64))
    repository: Mapped[str] = mapped_column(String(64))
    sent_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    made_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    token_id: Mapped[str | None] = mapped_column(String(16))


class XetXorb(Row):
    """A xorb of a push: the blob that has its bytes, and the headers of its chunks. `hash` is the client's."""

    __tablename__ = "xet_xorbs"

    upload_id: Mapped[str] = mapped_column(ForeignKey("xet_uploads.id"), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    headers: Mapped[bytes] = mapped_column(LargeBinary)


class Revision(Row):
    """The files of one commit. `manifest` is the canonical manifest; the commit is a prefix of its sha256. One that was
    taken down keeps its manifest, and has no files; if it is `barred`, the namespace may not publish them again."""

    __tablename__ = "revisions"
    __table_args__ = (
        UniqueConstraint("repository_id", "commit"),
        # Partial in the database (WHERE barred, migration 0018). Declaring it here would import both dialects.
        Index("ix_revisions_barred", "id"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    repository_id: Mapped[int] = mapped_column(ForeignKey("repositories.id"))
    commit: Mapped[str] = mapped_column(String(40))
    manifest: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    taken_down_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    takedown_reason: Mapped[str | None]
    barred: Mapped[bool] = mapped_column(default=False, server_default=false())
    files: Mapped[list["RevisionFile"]] = relationship(order_by="RevisionFile.path", lazy="raise")


class RevisionFile(Row):
    """A file of a revision, and the blob with its bytes."""

    __tablename__ = "revision_files"

    revision_id: Mapped[int] = mapped_column(ForeignKey("revisions.id"), primary_key=True)
    path: Mapped[str] = mapped_column(String(400), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)


class Commit(Row):
    """A step of a repository's `main`, made by a client of the Hugging Face Hub or by a release; rows are only added.
    The last one is the head."""

    __tablename__ = "commits"
    __table_args__ = (Index("ix_commits_repository_id", "repository_id", "id"),)

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    repository_id: Mapped[int] = mapped_column(ForeignKey("repositories.id"))
    revision_id: Mapped[int] = mapped_column(ForeignKey("revisions.id"), index=True)
    title: Mapped[str] = mapped_column(String(400))
    message: Mapped[str] = mapped_column(Text)
    author: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revision: Mapped[Revision] = relationship(lazy="joined", innerjoin=True)


class TargetSet(Row):
    """An interned set of target names, by sha256: thousands of releases share a few dozen sets."""

    __tablename__ = "target_sets"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)


class TargetSetMember(Row):
    """A module name in a target set."""

    __tablename__ = "target_set_members"

    target_set_id: Mapped[int] = mapped_column(ForeignKey("target_sets.id"), primary_key=True)
    target: Mapped[str] = mapped_column(String(200), primary_key=True, index=True)


class Traits(Row):
    """An interned combination of the facts that searches filter by, identified by a sha256 of all of them.

    Thousands of releases share a few hundred combinations. A search checks a release by its combination. If few
    releases have the matching ones, it reads only those; if none matches, it reads no release.
    """

    __tablename__ = "traits"
    __table_args__ = (Index("ix_traits_base", "base_digest", "kind", "target_set_id", "rank_max"),)

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    base_digest: Mapped[str] = mapped_column(ForeignKey("bases.digest"))
    kind: Mapped[str] = mapped_column(String(16))
    type: Mapped[str | None] = mapped_column(String(32))
    variant: Mapped[str | None] = mapped_column(String(32))
    rank_max: Mapped[int | None]
    alpha: Mapped[float | None]
    dtype: Mapped[str | None] = mapped_column(String(100))
    license: Mapped[str | None] = mapped_column(String(100))
    target_set_id: Mapped[int | None] = mapped_column(ForeignKey("target_sets.id"))
    servers: Mapped[int]


class ReleaseWord(Row):
    """A word of a release's repository or notes, or of its provenance: an inverted index, the same on both
    databases.
    """

    __tablename__ = "release_words"
    __table_args__ = (Index("ix_release_words_release", "release_id", "word"),)

    word: Mapped[str] = mapped_column(ByteOrdered, primary_key=True)
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), primary_key=True)


class Release(Row):
    """A version given to a revision. The typed columns are facts that searches use; `facts` has the rest.

    `provenance` records how it was trained, `spectrum` how its ranks are used. `servers` has a bit for each server
    of `composer.formats.adapters.serving` that loads it whatever its rank, `loading` the reasons of those that do not.
    `breaking_reason` is set when a breaking change was let through; `signed_by` is the fingerprint of the signer's key,
    `signature_covers` tells whether it signed the `release` or its `files` alone, and `signed_as` whether a `publisher`
    or a `worker` did; None where no migration could tell. A deprecated release has a reason, and perhaps the name of
    its `successor`. `stamp` changes whenever its document changes: by a yank, by a score, or with its base."""

    __tablename__ = "releases"
    __table_args__ = (
        UniqueConstraint("repository_id", "version"),
        Index("ix_releases_repository_order", "repository_id", "sort_key", "stable", "yanked"),
        # In the order of each sort, for releases with the same traits and for all (`id` is in order of publication).
        # They cover the other filters of a search, so that only the page's rows are read completely.
        Index("ix_releases_traits_newest", "traits_id", "id", *_COVERED, "sort_key"),
        Index("ix_releases_traits_version", "traits_id", "sort_key", "id", *_COVERED),
        Index("ix_releases_newest", "id", "traits_id", *_COVERED, "sort_key"),
        Index("ix_releases_version", "sort_key", "id", "traits_id", *_COVERED),
        Index("ix_releases_size", "size_bytes", "traits_id"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    repository_id: Mapped[int] = mapped_column(ForeignKey("repositories.id"))
    revision_id: Mapped[int] = mapped_column(ForeignKey("revisions.id"), index=True)
    version: Mapped[str] = mapped_column(String(100))
    sort_key: Mapped[str] = mapped_column(ByteOrdered)
    stable: Mapped[bool]
    base_digest: Mapped[str] = mapped_column(ForeignKey("bases.digest"))
    type: Mapped[str | None] = mapped_column(String(32))
    variant: Mapped[str | None] = mapped_column(String(32))
    rank_max: Mapped[int | None]
    alpha: Mapped[float | None]
    dtype: Mapped[str | None] = mapped_column(String(100))
    license: Mapped[str | None] = mapped_column(String(100))
    target_set_id: Mapped[int | None] = mapped_column(ForeignKey("target_sets.id"))
    traits_id: Mapped[int] = mapped_column(ForeignKey("traits.id"))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    facts: Mapped[dict[str, Any]] = mapped_column(JSON)
    provenance: Mapped[dict[str, Any]] = mapped_column(JSON)
    spectrum: Mapped[dict[str, Any] | None] = mapped_column(JSON, deferred=True)
    servers: Mapped[int]
    loading: Mapped[dict[str, Any]] = mapped_column(JSON)
    breaking_reason: Mapped[str | None]
    signed_by: Mapped[str | None] = mapped_column(String(64))
    signature_covers: Mapped[str | None] = mapped_column(String(16))
    signed_as: Mapped[str | None] = mapped_column(String(16))
    notes: Mapped[str]
    yanked: Mapped[bool] = mapped_column(default=False)
    yank_reason: Mapped[str | None]
    yanked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deprecated_reason: Mapped[str | None]
    successor: Mapped[str | None] = mapped_column(String(300))
    stamp: Mapped[int] = mapped_column(BigInteger, default=new_stamp, onupdate=new_stamp, server_default=text("0"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))
    repository: Mapped[Repository] = relationship(lazy="joined", innerjoin=True)
    revision: Mapped[Revision] = relationship(lazy="joined", innerjoin=True)
    base: Mapped[Base] = relationship(lazy="joined", innerjoin=True)


class Signature(Row):
    """A bundle that signs a release, one per key; includes the signature that came with the files. `signed_as` is
    `publisher` or `worker`."""

    __tablename__ = "signatures"

    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), primary_key=True)
    signed_by: Mapped[str] = mapped_column(String(64), primary_key=True, index=True)
    signed_as: Mapped[str | None] = mapped_column(String(16))
    bundle: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))
