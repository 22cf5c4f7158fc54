"""What a search asks, its shape, and the values that its statement is run with.

A condition names its value instead of holding it: searches that ask for the same things, whatever their values, share
their statements (`QueryShape`), and to build one takes longer than to run it.
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
"""Of a text that is searched for."""
LAST = "\U0010ffff"
"""Above every character: the words that begin with `w` lie between `w` and `w` + LAST."""

SAME = ("type", "variant", "dtype", "license", "alpha")
LIMITS = ("base", "base_name", "bases", "min_rank", "max_rank", "server", "server_rank", "within", "exact")
_OF_TRAITS = frozenset({*SAME, *LIMITS})


@dataclass(frozen=True, slots=True)
class Query:
    """All conditions hold together; None and () ask nothing.

    `related` also finds releases for casts and quantizations of `base`. `latest` asks for the highest stable release of
    each repository. `explain` finds what does not load in `loads_in` too, for its reasons to be told. `provenance` has
    texts `NAME:VALUE`, as `terms.parse_stated` reads them.
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
        """How many conditions the index of words answers: what is stated, words, and where to look."""
        return self.stated + self.words + ("homes" in self.asked)


def bind_values(actor: Actor, query: Query, digests: Sequence[str], suites: Sequence[int]) -> dict[str, Any]:
    """The values of a query by the names that conditions give them; what is not asked is not there.

    `digests` are of the base asked for and of those related to it, or none: then it is asked for by its name. `suites`
    are ids: of those of `query.scores`.
    """
    loading = None if query.explain else query.loads_in
    found: dict[str, Any] = {
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
    found = {name: value for name, value in found.items() if value is not None and value != []}
    found |= _where(query, readable_names(actor))
    for number, target in enumerate(query.targets_include):
        found[f"include_{number}"] = target
    for number, word in enumerate(_asked_words(query)):
        whole = len(word) == MAX_WORD_CHARACTERS  # longer ones were cut when they were kept
        found |= {f"word_{number}": word, f"word_{number}_end": word if whole else word + LAST}
    for number, text in enumerate(query.provenance):
        found[f"stated_{number}"] = parse_stated(text)
    for number, (condition, suite) in enumerate(zip(query.scores, suites, strict=True)):
        found |= {f"suite_{number}": suite, f"metric_{number}": condition.metric, f"score_{number}": condition.value}
    return found | {"kind": str(query.kind)}


def _where(query: Query, readable: set[str] | None) -> dict[str, list[str]]:
    """`homes` has the entries in the index of words of all places to look in, none when nothing can be found."""
    owner, name = (query.repository.namespace, query.repository.name) if query.repository else (None, None)
    asked = {namespace for namespace in (query.namespace, owner) if namespace}
    found = {} if readable is None else {"readable": sorted(readable)}
    if readable is None and not asked:
        return found
    places = set[str]() if len(asked) > 1 else asked or readable or set[str]()
    reached = places if readable is None else places & readable
    return found | {"homes": [namespace_terms(place, name)[-1] for place in sorted(reached)]}


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
    found = text_terms(query.text)
    if (query.text and not found) or len(found) > MAX_WORDS:
        raise Invalid(
            "bad_text",
            f"{query.text[:80]!r} is not 1 to {MAX_WORDS} words.",
            subject=query.text[:80],
            next_step="Give beginnings of words: letters and digits.",
        )
    return found


def asks_traits(form: QueryShape) -> bool:
    return form.includes > 0 or not form.asked.isdisjoint(_OF_TRAITS)
