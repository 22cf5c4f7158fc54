"""The newest releases that have some words, read from the index of words: it has the releases of each word in order, so
that reading costs what a page costs, however many releases have a word and however old they are.

Where a release is, is a word too: so a search by somebody who may read little costs no more than one by who may read
all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import CTE, ColumnElement, bindparam, case, func, literal, select
from sqlalchemy.orm import Session

from registry.database.dialects import json_list, unnest
from registry.database.prepared import Prepared, Query, prepared
from registry.database.tables import ReleaseWord
from registry.domain.search import filters
from registry.domain.search.query import QueryShape

MANY_WORDS = 128
"""Of so many words with one beginning the newest releases are merged; with more, all are looked at in order."""
ENTRIES, MORE = 2, 4
"""Of those that meet one condition, as many times the page are tried on the others first, then as many times more."""

END = 2**63 - 1
"""Above every id."""
_ANY = 2**31 - 1
"""Above every number of words."""

_word = ReleaseWord.__table__.c


@dataclass(frozen=True, slots=True)
class TermMatches:
    """The newest `count` releases, of those before some other, that have a word that fits the condition of that number,
    or all where there are fewer.

    `words` is how many words fit, or more than `MANY_WORDS`; then no release was looked for.
    """

    number: int
    words: int
    count: int
    ids: Sequence[int]

    @property
    def are_all(self) -> bool:
        return len(self.ids) < self.count


def most_selective_term(
    session: Session, form: QueryShape, values: Mapping[str, Any]
) -> tuple[TermMatches | None, tuple[int, ...]]:
    """Of the conditions that words meet the first that few releases meet, or the one whose releases lie farthest apart;
    and those that too many words meet to read them so."""
    below = values.get("after_id") or END
    values = {**values, "below": below, "entries": ENTRIES * values["limit"], "most_words": MANY_WORDS}
    found: list[TermMatches] = []
    left: list[int] = []
    for number in range(form.entries):
        newest = _newest(session, form, number, values)
        if newest.words > MANY_WORDS:
            left.append(number)
        elif newest.are_all:
            return newest, ()
        else:
            found.append(newest)
    if not found:
        return None, tuple(left)
    first = min(newest.ids[0] for newest in found)
    for place, newest in enumerate(found):
        if newest.ids[-1] > first:  # none of these can have the others
            found[place] = _newest(session, form, newest.number, {**values, "below": first + 1, "most_words": _ANY})
            if found[place].are_all:
                return found[place], ()
    return max(found, key=lambda newest: newest.ids[0] - newest.ids[-1]), tuple(left)


def id_bounds(session: Session, values: Mapping[str, Any]) -> dict[str, int]:
    """The `lowest` and the `highest` id of the releases in the places to look in, 0 for none.

    Of more than `MANY_WORDS` places those of all releases: to ask each would take longer than it helps.
    """
    if len(values["homes"]) > MANY_WORDS:
        return {"lowest": 0, "highest": END}
    [(lowest, highest)] = _ENDS_AT_HOME.rows(session, values)
    return {"lowest": lowest or 0, "highest": highest or 0}


def iterate_matches(
    session: Session, form: QueryShape, newest: TermMatches, values: Mapping[str, Any]
) -> Iterator[Sequence[int]]:
    """All that meet that condition, more at a time, but for those that lack other words: a database skips faster."""
    yield newest.ids
    while not newest.are_all:
        span = newest.ids[0] - newest.ids[-1] + 1
        further = {"below": newest.ids[-1], "entries": newest.count * MORE, "span": span * MORE, "most_words": _ANY}
        newest = _newest(session, form, newest.number, {**values, **further}, with_others=True)
        yield newest.ids


def _newest(
    session: Session, form: QueryShape, number: int, values: Mapping[str, Any], *, with_others: bool = False
) -> TermMatches:
    if filters.ends_of(form, number) is None:
        return _newest_at_home(session, form, number, values, with_others)
    texts = _newest_of_each(form, number, with_others).column(session, values)
    return _newest_of(number, texts, values)


def _newest_of(number: int, texts: Sequence[str | None], values: Mapping[str, Any]) -> TermMatches:
    ids = {release_id for text in texts if text for release_id in orjson.loads(text)}
    return TermMatches(number, len(texts), values["entries"], sorted(ids, reverse=True)[: values["entries"]])


def _newest_at_home(
    session: Session, form: QueryShape, number: int, values: Mapping[str, Any], with_others: bool
) -> TermMatches:
    """Of many places each is read as far down as all together go: to read a page of each would take as many times as
    long as there are places."""
    homes = len(values["homes"])
    if homes > MANY_WORDS:
        return TermMatches(number, homes, values["entries"], ())
    below = min(values["below"], values["highest"] + 1)
    span = values.get("span", ENTRIES * values["entries"]) if homes > 1 else below
    while True:
        above = below - span
        texts = _newest_of_each(form, number, with_others).column(session, {**values, "below": below, "above": above})
        newest = _newest_of(number, texts, values)
        if not newest.are_all or above < values["lowest"]:
            return newest
        span *= MORE


def _ends_at_home() -> Prepared:
    """The ends of each place are looked up in the index, which its entries need not be read for."""
    home = unnest("homes")
    of_home = _word.word == home
    lowest, highest = (
        select(end(_word.release_id)).where(of_home).correlate(home.table).scalar_subquery()
        for end in (func.min, func.max)
    )
    return Prepared(select(func.min(lowest), func.max(highest)).select_from(home.table))


_ENDS_AT_HOME = _ends_at_home()


@prepared
def _newest_of_each(form: QueryShape, number: int, with_others: bool) -> Query:
    """For each word that fits: the newest releases that have it; NULL when there are many words.

    A word is found from the one before it, and of each the index has its releases in order: to read all entries of the
    beginning and to sort them would take as long as there are entries.
    """
    ends = filters.ends_of(form, number)
    entries = select(_word.release_id.label("id")).where(_word.release_id < bindparam("below"))
    entries = entries.order_by(_word.release_id.desc()).limit(bindparam("entries"))
    if not ends:
        entries = entries.where(_word.release_id > bindparam("above"))
    if with_others:
        entries = entries.where(*filters.has_other_words(form, number))
    if ends and ends[0] is ends[1]:
        of_word = entries.where(_word.word == ends[0]).subquery("newest")
        return select(json_list(of_word.c.id))
    words = _words_between(*ends) if ends else select(unnest("homes").label("word")).cte("words")
    newest = entries.where(_word.word == words.c.word).correlate(words).subquery("newest")
    ids = select(json_list(newest.c.id)).scalar_subquery()
    count = select(func.count(words.c.word)).scalar_subquery()
    return select(case((count <= bindparam("most_words"), ids))).where(words.c.word.is_not(None))


def _words_between(first: ColumnElement[str], last: ColumnElement[str]) -> CTE:
    """The different words, one more than `most_words` of them, and NULL after the last."""
    found = select(literal(1).label("number"), func.min(_word.word).label("word"))
    words = found.where(_word.word.between(first, last)).cte("words", recursive=True)
    other = ReleaseWord.__table__.alias().c
    following = select(func.min(other.word)).where(other.word > words.c.word, other.word <= last).correlate(words)
    goes_on = words.c.word.is_not(None) & (words.c.number <= bindparam("most_words"))
    return words.union_all(select(words.c.number + 1, following.scalar_subquery()).where(goes_on))
