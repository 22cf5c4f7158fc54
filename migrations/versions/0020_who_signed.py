"""who signed a release, and what `main` serves

A worker's signature was stored in the transaction that published its composition. The keys of these signatures are
workers'. What they signed of releases with inputs is theirs, and everything else is a publisher's.
"""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
oldest_code = "0018"

releases = sa.table("releases", *map(sa.column, ("id", "created_at", "signed_by", "signed_as")))
signatures = sa.table("signatures", *map(sa.column, ("release_id", "created_at", "signed_by", "signed_as")))
inputs = sa.table("release_inputs", sa.column("release_id"))


def upgrade() -> None:
    op.add_column("releases", sa.Column("signed_as", sa.String(16)))
    op.add_column("signatures", sa.Column("signed_as", sa.String(16)))
    op.create_index(op.f("ix_signatures_signed_by"), "signatures", ["signed_by"])
    op.add_column("namespaces", sa.Column("main", sa.String(16)))
    made, own, composed = signatures.alias("made"), releases.alias("own"), sa.select(inputs.c.release_id)
    keys = sa.select(made.c.signed_by).join(own, own.c.id == made.c.release_id)
    keys = keys.where(made.c.created_at == own.c.created_at, own.c.id.in_(composed))
    for table, release_id in ((releases, releases.c.id), (signatures, signatures.c.release_id)):
        by_worker = sa.and_(release_id.in_(composed), table.c.signed_by.in_(keys))
        who = sa.case((by_worker, "worker"), else_="publisher")
        op.execute(sa.update(table).where(table.c.signed_by.is_not(None)).values(signed_as=who))
