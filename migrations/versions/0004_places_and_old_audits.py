"""in the index of words: where each release is; audit rows of schema 0001: why, before and after in their columns

Schema 0001 kept all that an act was told with in `detail`. 0002 made the columns and left them empty, so that
`adaptory audit` showed neither reason nor change of what had been done until then. `detail` stays as it was written.
"""

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

BATCH_ROWS = 1000
CHANGES = sa.JSON(none_as_null=True)

words = sa.table("release_words", sa.column("word", sa.String()), sa.column("release_id"))
releases = sa.table("releases", sa.column("id"), sa.column("repository_id"))
repositories = sa.table(
    "repositories", sa.column("id"), sa.column("namespace", sa.String()), sa.column("name", sa.String())
)
audit = sa.table(
    "audit",
    sa.column("id", sa.BigInteger()),
    sa.column("act", sa.String()),
    sa.column("detail", sa.JSON()),
    sa.column("reason", sa.String()),
    sa.column("before", CHANGES),
    sa.column("after", CHANGES),
)

Detail = Mapping[str, Any]
Change = dict[str, Any]


def upgrade() -> None:
    _place_releases()
    _split_old_audits()


def _place_releases() -> None:
    placed = releases.join(repositories, repositories.c.id == releases.c.repository_id)
    namespace = sa.literal("/") + repositories.c.namespace
    for entry in (namespace, namespace + "/" + repositories.c.name):
        of_each = sa.select(entry, releases.c.id).select_from(placed)
        op.execute(sa.insert(words).from_select(["word", "release_id"], of_each))


def _split_old_audits() -> None:
    """Rows that have none of the three: later ones have at least one, or a detail in which there is nothing to find."""
    connection = op.get_bind()
    empty = audit.c.reason.is_(None) & audit.c.before.is_(None) & audit.c.after.is_(None)
    page = sa.select(audit.c.id, audit.c.act, audit.c.detail).where(empty).order_by(audit.c.id).limit(BATCH_ROWS)
    filled = sa.update(audit).where(audit.c.id == sa.bindparam("row"))
    filled = filled.values({name: sa.bindparam(f"new_{name}", type_=audit.c[name].type) for name in _TOLD})
    last = 0
    while rows := connection.execute(page.where(audit.c.id > last)).all():
        told = [{"row": row_id, **_told(act, detail)} for row_id, act, detail in rows if detail]
        if told:
            connection.execute(filled, told)
        last = rows[-1].id


_TOLD = ("reason", "before", "after")


def _told(act: str, detail: Detail) -> dict[str, Any]:
    before, after = _CHANGES.get(act, _same)(detail)
    return {"new_reason": detail.get("reason") or None, "new_before": before, "new_after": after}


def _same(detail: Detail) -> tuple[Change | None, Change | None]:
    """Of an act that told nothing but what there was afterwards."""
    return None, {name: value for name, value in detail.items() if name != "reason"} or None


def _moved(detail: Detail) -> tuple[Change | None, Change | None]:
    """What the channel served before was not told, nor was the commit."""
    return None, {"move": detail.get("move"), "version": detail.get("to")}


def _yanked(detail: Detail) -> tuple[Change | None, Change | None]:
    return _NOT_YANKED, {"yanked": True, "yank_reason": detail.get("reason")}


def _unyanked(detail: Detail) -> tuple[Change | None, Change | None]:
    return {"yanked": True, "yank_reason": detail.get("was")}, _NOT_YANKED


def _ruled(detail: Detail) -> tuple[Change | None, Change | None]:
    return {"rules": detail.get("before")}, {"rules": detail.get("after")}


def _scored(detail: Detail) -> tuple[Change | None, Change | None]:
    """Without n, which was not told."""
    was = detail.get("before")
    return None if was is None else {"value": was}, {"value": detail.get("after")}


_NOT_YANKED: Change = {"yanked": False, "yank_reason": None}
_CHANGES: Mapping[str, Callable[[Detail], tuple[Change | None, Change | None]]] = {
    "channel:promote": _moved,
    "channel:rollback": _moved,
    "release:yank": _yanked,
    "release:unyank": _unyanked,
    "gate:set": _ruled,
    "score:record": _scored,
}
