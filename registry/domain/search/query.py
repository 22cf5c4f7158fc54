"""A search query, its shape, and the values bound to its statement.

Conditions use bind parameters, so that searches of the same shape (`QueryShape`) share statements: building one takes
longer than running it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from composer.formats.adapters.serving import Profile
from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable_names
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.search_index import (
    MAX_WORD_CHARACTERS,
    namespace_terms,
    parse_stated,
    target_set_key,
    text_terms,
)
from registry.domain.catalog.suites import Condition
from registry.errors import Invalid
from registry.formats.references import RepositoryName

MAX_WORDS = 8
"""Maximum words in a search text."""
LAST = "\U0010ffff"
"""Sorts after every character: words that begin with `w` lie between `w` and `w` + LAST."""

SAME = ("type", "variant", "dtype", "license", "alpha")
LIMITS = ("base", "base_name", "bases", "min_rank", "max_rank", "server", "server_rank", "within", "exact")
_OF_TRAITS = frozenset({*SAME, *LIMITS})


@dataclass(frozen=True, slots=True)
class Query:
    """All conditions must hold; None and () mean no condition.

    `related` also finds releases for casts and quantizations of `base`. `latest` finds only the highest stable release
    of each repository. `explain` also finds releases that `loads_in` cannot load, to show the reasons. `provenance` has
    texts `NAME:VALUE` for `search_index.parse_stated`.
    """

    kind: Kind = Kind.ADAPTER
    namespace: str | None = None
    repository: RepositoryName | None = None
    base: str | None = None
    related: bool = False
    type: str | None = None
    variant: str | None = None
    dtype: str | None = None
    license: str | None = None
    alpha: float | None = None
    min_rank: int | None = None
    max_rank: int | None = None
    targets_within: Sequence[str] = ()
    targets_include: Sequence[str] = ()
    targets_exact: Sequence[str] = ()
    max_size_bytes: int | None = None
    scores: Sequence[Condition] = field(default=())
    channel: str | None = None
    text: str = ""
    provenance: Sequence[str] = ()
    loads_in: Profile | None = None
    explain: bool = False
    include_yanked: bool = False
    stable: bool = False
    latest: bool = False


@dataclass(frozen=True, slots=True)
class QueryShape:
    """A query without its values: which conditions it has, and how often."""

    asked: frozenset[str]
    includes: int = 0
    words: int = 0
    stated: int = 0
    operators: tuple[str, ...] = ()

    @property
    def entries(self) -> int:
        """The number of conditions on the term index: provenance entries, words, and the namespaces."""
        return self.stated + self.words + ("homes" in self.asked)


def bind_values(actor: Actor, query: Query, digests: Sequence[str], suites: Sequence[int]) -> dict[str, Any]:
    """The values of a query by bind parameter; absent for conditions that are not used.

    `digests` are those of the requested base and related ones; empty if the base is looked up by name. `suites` are the
    suite ids of `query.scores`.
    """
    loading = None if query.explain else query.loads_in
    values: dict[str, Any] = {
        "base_name": None if digests else query.base or None,
        "base": digests[0] if len(digests) == 1 else None,
        "bases": list(digests) if len(digests) > 1 else None,
        "type": query.type,
        "variant": query.variant,
        "dtype": query.dtype,
        "license": query.license,
        "alpha": query.alpha,
        "min_rank": query.min_rank,
        "max_rank": query.max_rank,
        "server": loading.bit if loading else None,
        "server_rank": loading.max_rank if loading else None,
        "within": list(query.targets_within),
        "exact": target_set_key(query.targets_exact) if query.targets_exact else None,
        "size": query.max_size_bytes,
        "namespace": query.namespace,
        "owner": query.repository.namespace if query.repository else None,
        "repository": query.repository.name if query.repository else None,
        "channel": query.channel,
    }
    values = {name: value for name, value in values.items() if value is not None and value != []}
    values |= _where(query, readable_names(actor))
    for number, target in enumerate(query.targets_include):
        values[f"include_{number}"] = target
    for number, word in enumerate(_asked_words(query)):
        truncated = len(word) == MAX_WORD_CHARACTERS  # longer words are truncated in the index
        values |= {f"word_{number}": word, f"word_{number}_end": word if truncated else word + LAST}
    for number, text in enumerate(query.provenance):
        values[f"stated_{number}"] = parse_stated(text)
    for number, (condition, suite) in enumerate(zip(query.scores, suites, strict=True)):
        values |= {f"suite_{number}": suite, f"metric_{number}": condition.metric, f"score_{number}": condition.value}
    return values | {"kind": str(query.kind)}


def _where(query: Query, readable: set[str] | None) -> dict[str, list[str]]:
    """`homes` has the index entries of all namespaces to search; empty if nothing can match."""
    owner, name = (query.repository.namespace, query.repository.name) if query.repository else (None, None)
    asked = {namespace for namespace in (query.namespace, owner) if namespace}
    binds = {} if readable is None else {"readable": sorted(readable)}
    if readable is None and not asked:
        return binds
    namespaces = set[str]() if len(asked) > 1 else asked or readable or set[str]()
    reached = namespaces if readable is None else namespaces & readable
    return binds | {"homes": [namespace_terms(namespace, name)[-1] for namespace in sorted(reached)]}


def shape_of(query: Query, values: Mapping[str, Any]) -> QueryShape:
    flags = {name for name in ("include_yanked", "stable", "latest") if getattr(query, name)}
    return QueryShape(
        frozenset(values) | flags,
        len(query.targets_include),
        len(_asked_words(query)),
        len(query.provenance),
        tuple(condition.operator for condition in query.scores),
    )


def _asked_words(query: Query) -> list[str]:
    words = text_terms(query.text)
    if (query.text and not words) or len(words) > MAX_WORDS:
        raise Invalid(
            "bad_text",
            f"{query.text[:80]!r} is not 1 to {MAX_WORDS} words.",
            subject=query.text[:80],
            next_step="Give beginnings of words: letters and digits.",
        )
    return words


def asks_traits(form: QueryShape) -> bool:
    return form.includes > 0 or not form.asked.isdisjoint(_OF_TRAITS)
