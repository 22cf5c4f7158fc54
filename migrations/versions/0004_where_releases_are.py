"""in the index of words: the namespace and the repository of each release"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

words = sa.table("release_words", sa.column("word", sa.String()), sa.column("release_id"))
releases = sa.table("releases", sa.column("id"), sa.column("repository_id"))
repositories = sa.table(
    "repositories", sa.column("id"), sa.column("namespace", sa.String()), sa.column("name", sa.String())
)


def upgrade() -> None:
    placed = releases.join(repositories, repositories.c.id == releases.c.repository_id)
    namespace = sa.literal("/") + repositories.c.namespace
    for entry in (namespace, namespace + "/" + repositories.c.name):
        of_each = sa.select(entry, releases.c.id).select_from(placed)
        op.execute(sa.insert(words).from_select(["word", "release_id"], of_each))
