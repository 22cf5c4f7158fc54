"""Reads the newest releases with given terms from the term index. It has each term's releases in order, so the cost
depends on the page, not on how many releases have a term or how old they are.

Namespaces are terms too, so a search by an actor who may read little costs no more than one by an admin.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import orjson
from sqlalchemy import CTE, bindparam, case, func, literal, select
from sqlalchemy.orm import Session

from registry.database.dialects import json_list, unnest
from registry.database.prepared import Prepared, Query, prepared
from registry.database.tables import ReleaseWord
from registry.domain.search.filters import QueryShape, Term, Values, has_other_terms

MANY_WORDS = 128
"""Up to this many words with one prefix are merged; beyond it, all releases are read in order."""
ENTRIES, MORE = 2, 4
"""The first batch of candidates is ENTRIES times the page; each further batch is MORE times larger."""

END = 2**63 - 1
"""Greater than every id."""
_ANY = 2**31 - 1
"""Greater than every number of words."""

_word = ReleaseWord.__table__.c


@dataclass(frozen=True, slots=True)
class TermMatches:
    """The newest releases, at most `count`, below an id that have a word matching the term.

    `words` is the number of matching words; if it exceeds `MANY_WORDS`, no releases were read.
    """

    term: Term
    words: int
    count: int
    ids: Sequence[int]

    @property
    def are_all(self) -> bool:
        """Whether `ids` are all matches, not only the newest ones."""
        return len(self.ids) < self.count


def most_selective_term(
    session: Session, shape: QueryShape, values: Values
) -> tuple[TermMatches | None, tuple[Term, ...]]:
    """The most selective term: the first that matches few releases, else the one whose newest matches are sparsest.
    Also the terms that match too many words to read this way."""
    below = values.get("after_id") or END
    values = {**values, "below": below, "entries": ENTRIES * values["limit"], "most_words": MANY_WORDS}
    candidates: list[TermMatches] = []
    left: list[Term] = []
    for term in shape.terms:
        newest = _newest(session, shape, term, values)
        if newest.words > MANY_WORDS:
            left.append(term)
        elif newest.are_all:
            return newest, ()
        else:
            candidates.append(newest)
    if not candidates:
        return None, tuple(left)
    first = min(newest.ids[0] for newest in candidates)
    for index, newest in enumerate(candidates):
        if newest.ids[-1] > first:  # these releases cannot match the other terms
            candidates[index] = _newest(session, shape, newest.term, {**values, "below": first + 1, "most_words": _ANY})
            if candidates[index].are_all:
                return candidates[index], ()
    return max(candidates, key=lambda newest: newest.ids[0] - newest.ids[-1]), tuple(left)


def id_bounds(session: Session, values: Values) -> dict[str, int]:
    """The `lowest` and `highest` id of the releases in the namespaces of the list `homes`, 0 for none.

    With more than `MANY_WORDS` namespaces, the bounds of all ids: querying each would cost more than it saves.
    """
    if len(values["homes"]) > MANY_WORDS:
        return {"lowest": 0, "highest": END}
    [(lowest, highest)] = _ENDS_AT_HOME.rows(session, values)
    return {"lowest": lowest or 0, "highest": highest or 0}


def iterate_matches(
    session: Session, shape: QueryShape, newest: TermMatches, values: Values
) -> Iterator[Sequence[int]]:
    """All matches of the term in growing batches, without releases that lack other terms: the database skips those
    faster."""
    yield newest.ids
    while not newest.are_all:
        span = newest.ids[0] - newest.ids[-1] + 1
        further = {"below": newest.ids[-1], "entries": newest.count * MORE, "span": span * MORE, "most_words": _ANY}
        newest = _newest(session, shape, newest.term, {**values, **further}, with_others=True)
        yield newest.ids


def _newest(
    session: Session, shape: QueryShape, term: Term, values: Values, *, with_others: bool = False
) -> TermMatches:
    statement = _newest_of_each(shape, term, with_others)
    if term.match == "any":
        return _newest_at_home(session, statement, term, values)
    return _newest_of(term, statement.column(session, values), values)


def _newest_of(term: Term, texts: Sequence[str | None], values: Values) -> TermMatches:
    ids = {release_id for text in texts if text for release_id in orjson.loads(text)}
    return TermMatches(term, len(texts), values["entries"], sorted(ids, reverse=True)[: values["entries"]])


def _newest_at_home(session: Session, statement: Prepared, term: Term, values: Values) -> TermMatches:
    """Reads all namespaces down to the same id: reading a page of each would multiply the cost by their number."""
    homes = len(values["homes"])
    if homes > MANY_WORDS:
        return TermMatches(term, homes, values["entries"], ())
    below = min(values["below"], values["highest"] + 1)
    span = values.get("span", ENTRIES * values["entries"])
    while True:
        above = below - span
        newest = _newest_of(term, statement.column(session, {**values, "below": below, "above": above}), values)
        if not newest.are_all or above < values["lowest"]:
            return newest
        span *= MORE


def _ends_at_home() -> Prepared:
    """The statement for the id bounds of the namespaces, which looks up only the ends of each in the index."""
    home = unnest("homes")
    of_home = _word.word == home
    lowest, highest = (
        select(end(_word.release_id)).where(of_home).correlate(home.table).scalar_subquery()
        for end in (func.min, func.max)
    )
    return Prepared(select(func.min(lowest), func.max(highest)).select_from(home.table))


_ENDS_AT_HOME = _ends_at_home()


@prepared
def _newest_of_each(shape: QueryShape, term: Term, with_others: bool) -> Query:
    """For each matching word, the newest releases that have it; NULL if there are many words.

    Each word is found from the previous one, and the index has each word's releases in order. Reading and sorting all
    entries of the prefix would take time proportional to their number.
    """
    entries = select(_word.release_id.label("id")).where(_word.release_id < bindparam("below"))
    entries = entries.order_by(_word.release_id.desc()).limit(bindparam("entries"))
    if term.match == "any":
        entries = entries.where(_word.release_id > bindparam("above"))
    if with_others:
        entries = entries.where(*has_other_terms(shape, term))
    if term.match == "exact":
        return select(json_list(entries.where(term.matches(_word.word)).subquery("newest").c.id))
    words = _words_of(term) if term.match == "prefix" else select(unnest(term.name).label("word")).cte("words")
    newest = entries.where(_word.word == words.c.word).correlate(words).subquery("newest")
    ids = select(json_list(newest.c.id)).scalar_subquery()
    count = select(func.count(words.c.word)).scalar_subquery()
    return select(case((count <= bindparam("most_words"), ids))).where(words.c.word.is_not(None))


def _words_of(term: Term) -> CTE:
    """The distinct words of a prefix, at most `most_words` + 1, and NULL after the last."""
    least = select(literal(1).label("number"), func.min(_word.word).label("word"))
    words = least.where(term.matches(_word.word)).cte("words", recursive=True)
    other = ReleaseWord.__table__.alias().c
    following = select(func.min(other.word)).where(other.word > words.c.word, other.word <= term.last).correlate(words)
    goes_on = words.c.word.is_not(None) & (words.c.number <= bindparam("most_words"))
    return words.union_all(select(words.c.number + 1, following.scalar_subquery()).where(goes_on))
