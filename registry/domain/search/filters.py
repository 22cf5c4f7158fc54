"""A query bound to values, and the parts of its statements: conditions on traits, on releases and on terms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import BindParameter, ColumnElement, Select, String, bindparam, select

from registry.database.dialects import in_list
from registry.database.tables import Release, ReleaseWord, Score, Traits
from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable_names
from registry.domain.catalog.search_index import MAX_WORD_CHARACTERS, namespace_terms, parse_stated, text_terms
from registry.domain.search.query import ON_RELEASES, ON_TRAITS, Filter, Query, exists_for_release, has_target
from registry.errors import Invalid

MAX_WORDS = 8
"""Maximum words in a search text."""
LAST = "\U0010ffff"
"""Sorts after every character: words that begin with `w` lie between `w` and `w` + LAST."""

_release, _score, _traits, _word = (table.__table__.c for table in (Release, Score, Traits, ReleaseWord))

Conditions = list[ColumnElement[bool]]
Values = Mapping[str, Any]


class Term(NamedTuple):
    """A condition on the terms of a release: one of them is the parameter, begins with it, or is in its list."""

    name: str
    match: Literal["exact", "prefix", "any"]

    @property
    def is_home(self) -> bool:
        """Whether it is on the release's namespace, which a search checks in its repository."""
        return self.name in ("home", "homes")

    def matches(self, word: ColumnElement[str]) -> ColumnElement[bool]:
        """A prefix is a range, which uses the index in any locale."""
        if self.match == "any":
            return in_list(word, self.name)
        first = bindparam(self.name, type_=String)
        return word == first if self.match == "exact" else word.between(first, self.last)

    @property
    def last(self) -> BindParameter[str]:
        """The last term that begins with the parameter."""
        return bindparam(f"{self.name}_end", type_=String)


class ScoreLimit(NamedTuple):
    """A condition on a score: the number of its parameters, and `>=` or `<=`."""

    number: int
    operator: str

    def conditions(self) -> Conditions:
        limit: BindParameter[Any] = bindparam(f"score_{self.number}")
        return [
            _score.suite_id == bindparam(f"suite_{self.number}"),
            _score.metric == bindparam(f"metric_{self.number}"),
            _score.value >= limit if self.operator == ">=" else _score.value <= limit,
        ]


@dataclass(frozen=True, slots=True)
class QueryShape:
    """A query without its values: which conditions it has. `filters` are names in ON_TRAITS and ON_RELEASES, `includes`
    the number of targets that must be among others."""

    filters: frozenset[str]
    includes: int = 0
    terms: tuple[Term, ...] = ()
    scores: tuple[ScoreLimit, ...] = ()

    @property
    def has_traits(self) -> bool:
        """Whether there are conditions on traits besides the kind, which almost all releases share."""
        return self.includes > 0 or not self.filters.isdisjoint(ON_TRAITS.keys() - {"kind"})


def bind(
    actor: Actor, query: Query, digests: Sequence[str], suites: Sequence[int]
) -> tuple[QueryShape, dict[str, Any]]:
    """The shape of a query, and its values by bind parameter.

    `digests` are those of the base and related ones, empty if the base is a name or None; `suites` are the suite ids of
    `query.score`. The value `namespaces` is an empty list if the actor may read none of those that the query names.
    """
    values = dict(query.values)
    if digests:
        values["base_digests"] = list(digests)
    if (namespaces := _namespaces(actor, query)) is not None:
        values["namespaces"] = namespaces
    filters = frozenset(values)
    values |= {f"include_{number}": target for number, target in enumerate(query.targets_include)}
    terms = [*_bind_stated(query, values), *_bind_words(query, values), *_bind_homes(query, values)]
    for number, (condition, suite) in enumerate(zip(query.score, suites, strict=True)):
        values |= {f"suite_{number}": suite, f"metric_{number}": condition.metric, f"score_{number}": condition.value}
    scores = [ScoreLimit(number, condition.operator) for number, condition in enumerate(query.score)]
    return QueryShape(filters, len(query.targets_include), tuple(terms), tuple(scores)), values


def _namespaces(actor: Actor, query: Query) -> list[str] | None:
    """The namespaces to search; None for all."""
    named = (query.namespace, query.repository and query.repository.namespace)
    limits = [readable_names(actor), *({name} if name else None for name in named)]
    sets = [names for names in limits if names is not None]
    return sorted(set[str].intersection(*sets)) if sets else None


def _bind_stated(query: Query, values: dict[str, Any]) -> list[Term]:
    stated = {f"stated_{number}": parse_stated(text) for number, text in enumerate(query.provenance)}
    values |= stated
    return [Term(name, "exact") for name in stated]


def _bind_words(query: Query, values: dict[str, Any]) -> list[Term]:
    words = text_terms(query.text)
    if (query.text and not words) or len(words) > MAX_WORDS:
        raise Invalid(
            "bad_text",
            f"{query.text[:80]!r} is not 1 to {MAX_WORDS} words.",
            subject=query.text[:80],
            next_step="Give prefixes of words: letters and digits.",
        )
    for number, word in enumerate(words):
        truncated = len(word) == MAX_WORD_CHARACTERS  # longer words are truncated in the index
        values |= {f"word_{number}": word, f"word_{number}_end": word if truncated else word + LAST}
    return [Term(f"word_{number}", "prefix") for number in range(len(words))]


def _bind_homes(query: Query, values: dict[str, Any]) -> list[Term]:
    """The terms that releases have for their namespace or repository."""
    name = query.repository.name if query.repository else None
    homes = [namespace_terms(namespace, name)[-1] for namespace in values.get("namespaces", [])]
    if not homes:
        return []
    values |= {"home": homes[0]} if len(homes) == 1 else {"homes": homes}
    return [Term("home", "exact") if len(homes) == 1 else Term("homes", "any")]


def matching_traits(shape: QueryShape) -> Select[*tuple[Any, ...]]:
    """The ids of the matching traits."""
    included = (has_target(bindparam(f"include_{number}")) for number in range(shape.includes))
    return select(_traits.id).where(*_conditions(shape, ON_TRAITS), *included)


def traits_match(shape: QueryShape, traits_id: ColumnElement[int]) -> ColumnElement[bool]:
    """Whether a release's traits match: checked per release, instead of listing thousands of traits for one page."""
    return matching_traits(shape).where(_traits.id == traits_id).correlate_except(Traits.__table__).offset(0).exists()


def release_conditions(shape: QueryShape) -> Conditions:
    """Conditions on releases, beyond their traits."""
    of_release = select(_word.word).where(_word.release_id == _release.id)
    scored = select(_score.id).where(_score.release_id == _release.id)
    rows = [of_release.where(term.matches(_word.word)) for term in shape.terms if not term.is_home]
    rows += [scored.where(*score.conditions()) for score in shape.scores]
    return [*_conditions(shape, ON_RELEASES), *map(exists_for_release, rows)]


def _conditions(shape: QueryShape, filters: Mapping[str, Filter]) -> Conditions:
    return [one.condition(bindparam(name)) for name, one in filters.items() if name in shape.filters]


def has_other_terms(shape: QueryShape, than: Term) -> Conditions:
    """Conditions on an entry of the term index: its release also has the other terms of the query."""
    other = ReleaseWord.__table__.alias().c
    of_it = select(other.word).where(other.release_id == _word.release_id).correlate(ReleaseWord.__table__).offset(0)
    return [of_it.where(term.matches(other.word)).exists() for term in shape.terms if term != than]
