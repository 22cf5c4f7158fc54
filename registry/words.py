"""The newest releases that have some words, read from the index of words: it has the releases of each word in order, so
that reading costs what a page costs, however many releases have a word and however old they are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson
from sqlalchemy import CTE, ColumnElement, bindparam, case, func, literal, select
from sqlalchemy.orm import Session

from registry import conditions
from registry.conditions import Form
from registry.models import ReleaseWord
from registry.statements import Prepared, json_list

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
class Newest:
    """The newest `count` releases, of those before some other, that have a word with the beginning of that number.

    `words` is how many there are, or more than `MANY_WORDS`; then no release was looked for.
    """

    number: int
    words: int
    count: int
    ids: Sequence[int]

    @property
    def are_all(self) -> bool:
        return len(self.ids) < self.count


def thinnest_of(session: Session, form: Form, values: Mapping[str, Any]) -> tuple[Newest | None, tuple[int, ...]]:
    """Of the words asked for the first that few releases have, or the one whose releases lie farthest apart; and those
    that are the beginning of too many words to read them so."""
    below = values.get("after_id") or END
    values = {**values, "below": below, "entries": ENTRIES * values["limit"], "most_words": MANY_WORDS}
    found: list[Newest] = []
    left: list[int] = []
    for number in range(form.stated + form.words):
        newest = _newest(session, form, number, values)
        if newest.words > MANY_WORDS:
            left.append(number)
        elif newest.are_all:
            return newest, ()
        else:
            found.append(newest)
    if not found:
        return None, tuple(left)
    widest = max(found, key=lambda newest: newest.ids[0] - newest.ids[-1])
    first = min(newest.ids[0] for newest in found)
    if widest.ids[-1] > first:
        widest = _newest(session, form, widest.number, {**values, "below": first + 1, "most_words": _ANY})
    return widest, tuple(left)


def read_on(session: Session, form: Form, newest: Newest, values: Mapping[str, Any]) -> Iterator[Sequence[int]]:
    """All with that beginning, more at a time, but for those that lack other words, which a database skips faster."""
    yield newest.ids
    while not newest.are_all:
        further = {"below": newest.ids[-1], "entries": newest.count * MORE, "most_words": _ANY}
        newest = _newest(session, form, newest.number, {**values, **further}, with_others=True)
        yield newest.ids


def _newest(
    session: Session, form: Form, number: int, values: Mapping[str, Any], *, with_others: bool = False
) -> Newest:
    texts = _newest_of_each(form, number, with_others).column(session, values)
    ids = {release_id for text in texts if text for release_id in orjson.loads(text)}
    return Newest(number, len(texts), values["entries"], sorted(ids, reverse=True)[: values["entries"]])


@lru_cache(512)
def _newest_of_each(form: Form, number: int, with_others: bool) -> Prepared:
    """For each word with that beginning: the newest releases that have it; NULL when there are many words.

    A word is found from the one before it, and of each the index has its releases in order: to read all entries of the
    beginning and to sort them would take as long as there are entries.
    """
    first, last = conditions.ends_of(form, number)
    entries = select(_word.release_id.label("id")).where(_word.release_id < bindparam("below"))
    entries = entries.order_by(_word.release_id.desc()).limit(bindparam("entries"))
    if with_others:
        entries = entries.where(*conditions.has_other_words(form, number))
    if first is last:
        of_word = entries.where(_word.word == first).subquery("newest")
        return Prepared(select(json_list(of_word.c.id)))
    words = _words_between(first, last)
    newest = entries.where(_word.word == words.c.word).correlate(words).subquery("newest")
    ids = select(json_list(newest.c.id)).scalar_subquery()
    count = select(func.count(words.c.word)).scalar_subquery()
    return Prepared(select(case((count <= bindparam("most_words"), ids))).where(words.c.word.is_not(None)))


def _words_between(first: ColumnElement[str], last: ColumnElement[str]) -> CTE:
    """The different words, one more than `most_words` of them, and NULL after the last."""
    found = select(literal(1).label("number"), func.min(_word.word).label("word"))
    words = found.where(_word.word.between(first, last)).cte("words", recursive=True)
    other = ReleaseWord.__table__.alias().c
    following = select(func.min(other.word)).where(other.word > words.c.word, other.word <= last).correlate(words)
    goes_on = words.c.word.is_not(None) & (words.c.number <= bindparam("most_words"))
    return words.union_all(select(words.c.number + 1, following.scalar_subquery()).where(goes_on))
