"""The statement of a search: it reads releases, or scores, in the requested order and checks the conditions on each
until the page is full.

The cost depends on the page, not on the number of releases, unless few releases match or all matches come late in the
order. Hence one shortcut: `rarest` finds a condition that few releases meet, and the statement then reads only those.
"""

from typing import Any

from sqlalchemy import ColumnElement, Integer, Select, Subquery, bindparam, func, literal_column, select, tuple_
from sqlalchemy.orm import Session

from registry.database.dialects import float_text, in_list, in_subquery, json_rows
from registry.database.prepared import Query as Selection
from registry.database.prepared import prepared
from registry.database.tables import Release, ReleaseWord, Score, Traits
from registry.domain.catalog.release_rows import CURRENT_SUITES
from registry.domain.search.ordering import SortKey
from registry.domain.search.query import LOOKUPS, ON_RELEASES, ON_TRAITS, Lookup, exists_for_release, has_target

FEW = 5_000
"""A condition that at most this many releases meet is looked up first. Reading and sorting that many takes 10 ms on
SQLite and 30 on PostgreSQL."""

_release, _score, _traits, _word = (table.__table__.c for table in (Release, Score, Traits, ReleaseWord))

Names = tuple[str, ...]
"""Names of conditions, which are those of their bind parameters."""


def rarest(session: Session, names: Names, values: dict[str, Any]) -> tuple[str | None, int]:
    """The condition that the fewest releases meet, and their number; None and FEW + 1 if it is more than FEW."""
    lookups = [name for name in names if _kind(name) in LOOKUPS or name == "homes"]
    if any(_kind(name) == "include" or name in ON_TRAITS.keys() - {"kind"} for name in names):
        lookups.append("traits")
    if not lookups:
        return None, FEW + 1
    [counts] = _counts(names, tuple(lookups), FEW + 1).rows(session, values)
    number, name = min(zip(counts, lookups, strict=True))
    return (name, number) if number <= FEW else (None, number)


@prepared
def _counts(names: Names, lookups: Names, most: int) -> Selection:
    """The number of each lookup's releases, counted up to `most`, a literal: PostgreSQL expects a bound limit to
    be a tenth of the rows."""
    limit = literal_column(str(most), Integer)
    each = (_lookup(names, name).limit(limit).subquery(f"of_{name}") for name in lookups)
    return select(*(select(func.count()).select_from(ids).scalar_subquery() for ids in each))


@prepared
def page(names: Names, by: SortKey, first: str | None) -> Selection:
    """The page as JSON rows of key, id and stamp, and the current suites. `first` names the condition to look up first,
    or None."""
    hits = _hits(names, by, first).c
    # Looked up for the page alone: the index that is read in order does not have it.
    stamp = select(_release.stamp).where(_release.id == hits.id).scalar_subquery()
    key = float_text(hits.key) if by.column == "value" else hits.key
    return select(json_rows(key, hits.id, stamp), CURRENT_SUITES)


@prepared
def count(names: Names, by: SortKey, first: str | None) -> Selection:
    """The number of releases on the page."""
    return select(func.count()).select_from(_hits(names, by, first))


def _hits(names: Names, by: SortKey, first: str | None) -> Subquery:
    of_score = by.column == "value"
    key, release_id = (_score.value, _score.release_id) if of_score else (_release[by.column], _release.id)
    rows = select(key.label("key"), _release.id.label("id"))
    if of_score:
        rows = rows.select_from(Score.__table__.join(Release.__table__, _release.id == release_id))
        # `+ 0` keeps SQLite from reading all scores of the metric where few releases are looked up first.
        suite_id = _score.suite_id + 0 if first else _score.suite_id
        rows = rows.where(suite_id == bindparam("by_suite"), _score.metric == bindparam("by_metric"))
    rows = rows.where(*_conditions(names, first))
    if first:
        rows = rows.where(in_subquery(release_id, _lookup(names, first)))
    if by.column == "rank_max":
        rows = rows.where(key.is_not(None))
    columns: list[ColumnElement[Any]] = [key] if by.column == "id" else [key, release_id]
    if by.goes_on:
        ends: list[ColumnElement[Any]] = [bindparam("after_key"), bindparam("after_id")]
        reached, end = tuple_(*columns), tuple_(*ends[-len(columns) :])
        rows = rows.where(reached < end if by.descending else reached > end)
    ordered = [column.desc() if by.descending else column.asc() for column in columns]
    return rows.order_by(*ordered).limit(bindparam("limit")).subquery("hits")


def _conditions(names: Names, first: str | None) -> list[ColumnElement[bool]]:
    conditions = [ON_RELEASES[name].condition(bindparam(name)) for name in names if name in ON_RELEASES]
    for name in names:
        if _kind(name) in LOOKUPS and name != first:
            rows = _lookup(names, name)
            conditions.append(exists_for_release(rows.where(rows.selected_columns[0] == _release.id)))
    of_traits = _matching_traits(names).where(_traits.id == _release.traits_id)
    conditions.append(of_traits.correlate_except(Traits.__table__).offset(0).exists())
    return conditions


def _lookup(names: Names, name: str) -> Lookup:
    """The ids of the releases that meet a condition, those on traits together."""
    if name == "traits":
        other = Release.__table__.alias().c
        return select(other.id).where(in_subquery(other.traits_id, _matching_traits(names)))
    if name == "homes":  # the entries of the namespaces among the words
        return select(_word.release_id).where(in_list(_word.word, name))
    return LOOKUPS[_kind(name)](bindparam(name))


def _matching_traits(names: Names) -> Select[*tuple[Any, ...]]:
    included = [has_target(bindparam(name)) for name in names if _kind(name) == "include"]
    conditions = [ON_TRAITS[name].condition(bindparam(name)) for name in names if name in ON_TRAITS]
    return select(_traits.id).where(*conditions, *included)


def _kind(name: str) -> str:
    """The name of a condition without its number."""
    return name.rstrip("_0123456789")
