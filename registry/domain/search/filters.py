"""Binds a query: the names of its conditions, and their values by bind parameter."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable_names
from registry.domain.catalog.search_index import MAX_WORD_CHARACTERS, namespace_terms, parse_stated, text_terms
from registry.domain.search.query import Query
from registry.errors import Invalid

MAX_WORDS = 8
"""Maximum words in a search text."""
LAST = "\U0010ffff"
"""Sorts after every character: words that begin with `w` lie between `w` and `w` + LAST."""


class Bound(NamedTuple):
    """`names` are those of ON_TRAITS, ON_RELEASES and, with a number, of LOOKUPS: queries with the same names share
    statements. `homes` is added if there are few namespaces to search."""

    names: tuple[str, ...]
    values: dict[str, Any]


def bind(actor: Actor, query: Query, digests: Sequence[str], suites: Sequence[int]) -> Bound:
    """Binds a query of an actor.

    `digests` are those of the base and related ones, empty if the base is a name or None; `suites` are the suite ids of
    `query.score`. The value `namespaces` is an empty list if the actor may read none of the query's namespaces.
    """
    filters = dict(query.values)
    if digests:
        filters["base_digests"] = list(digests)
    if (namespaces := _namespaces(actor, query)) is not None:
        filters["namespaces"] = namespaces
        name = query.repository.name if query.repository else None
        filters["homes"] = [namespace_terms(namespace, name)[-1] for namespace in namespaces]
    filters |= {f"include_{number}": target for number, target in enumerate(query.targets_include)}
    filters |= {f"stated_{number}": parse_stated(text) for number, text in enumerate(query.provenance)}
    filters |= {"channel": query.channel} if query.channel else {}
    parts: dict[str, Any] = {}
    for number, word in enumerate(_words(query)):
        truncated = len(word) == MAX_WORD_CHARACTERS  # longer words are truncated in the index
        filters[f"word_{number}"], parts[f"word_{number}_end"] = word, word if truncated else word + LAST
    for number, (condition, suite) in enumerate(zip(query.score, suites, strict=True)):
        name = f"{'at_least' if condition.operator == '>=' else 'at_most'}_{number}"
        filters[name] = condition.value
        parts |= {f"{name}_suite": suite, f"{name}_metric": condition.metric}
    return Bound(tuple(filters), filters | parts)


def _namespaces(actor: Actor, query: Query) -> list[str] | None:
    """The namespaces to search; None for all."""
    named = (query.namespace, query.repository and query.repository.namespace)
    limits = [readable_names(actor), *({name} if name else None for name in named)]
    sets = [names for names in limits if names is not None]
    return sorted(set[str].intersection(*sets)) if sets else None


def _words(query: Query) -> list[str]:
    words = text_terms(query.text)
    if (query.text and not words) or len(words) > MAX_WORDS:
        raise Invalid(
            "bad_text",
            f"{query.text[:80]!r} must have 1 to {MAX_WORDS} words.",
            subject=query.text[:80],
            next_step="Search for prefixes of words: letters and digits.",
        )
    return words
