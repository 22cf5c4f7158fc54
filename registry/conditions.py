"""What a search asks, and each part of it as a condition on traits or on releases.

A condition names its value instead of holding it: searches that ask for the same things, whatever their values, share
their statements (`Form`), and to build one takes longer than to run it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Select, String, bindparam, not_, select

from composer.formats.adapters.serving import Profile
from registry import bases
from registry.access import readable_names
from registry.audit import Actor
from registry.errors import Usage
from registry.models import Channel, Release, ReleaseWord, Repository, Score, TargetSet, TargetSetMember, Traits
from registry.names import RepositoryName
from registry.repositories import Kind
from registry.statements import among, one_of
from registry.suites import Condition
from registry.terms import MAX_WORD_CHARACTERS, homes, parse_stated, target_set_key, words

MAX_WORDS = 8
"""Of a text that is searched for."""
LAST = "\U0010ffff"
"""Above every character: the words that begin with `w` lie between `w` and `w` + LAST."""

_channel, _member, _release, _repository, _score, _set, _traits, _word = (
    table.__table__.c
    for table in (Channel, TargetSetMember, Release, Repository, Score, TargetSet, Traits, ReleaseWord)
)
Conditions = list[ColumnElement[bool]]
_SAME = ("type", "variant", "dtype", "license", "alpha")
_LIMITS = ("base", "base_name", "bases", "min_rank", "max_rank", "server", "server_rank", "within", "exact")
_OF_TRAITS = frozenset({*_SAME, *_LIMITS})


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
class Form:
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


def values_of(actor: Actor, query: Query, digests: Sequence[str], suites: Sequence[int]) -> dict[str, Any]:
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
    return found | {"homes": [homes(place, name)[-1] for place in sorted(reached)]}


def form_of(query: Query, values: Mapping[str, Any]) -> Form:
    flags = {name for name in ("include_yanked", "stable", "latest") if getattr(query, name)}
    return Form(
        frozenset(values) | flags,
        len(query.targets_include),
        len(_asked_words(query)),
        len(query.provenance),
        tuple(condition.operator for condition in query.scores),
    )


def _asked_words(query: Query) -> list[str]:
    found = words(query.text)
    if (query.text and not found) or len(found) > MAX_WORDS:
        raise Usage(
            "bad_text",
            f"{query.text[:80]!r} is not 1 to {MAX_WORDS} words.",
            subject=query.text[:80],
            next_step="Give beginnings of words: letters and digits.",
        )
    return found


def asks_traits(form: Form) -> bool:
    return form.includes > 0 or not form.asked.isdisjoint(_OF_TRAITS)


def fitting(form: Form) -> Select[*tuple[Any, ...]]:
    """The ids of the traits that fit."""
    asked: Conditions = [_traits.kind == bindparam("kind")]
    asked += [_traits[name] == bindparam(name) for name in _SAME if name in form.asked]
    limits: dict[str, ColumnElement[bool]] = {
        "base": _traits.base_digest == bindparam("base"),
        "base_name": _traits.base_digest == bases.digest_of(bindparam("base_name", type_=String)),
        "bases": among(_traits.base_digest, "bases"),
        "min_rank": _traits.rank_max >= bindparam("min_rank"),
        "max_rank": _traits.rank_max <= bindparam("max_rank"),
        "server": _traits.servers.bitwise_and(bindparam("server")) != 0,
        "server_rank": _traits.rank_max <= bindparam("server_rank"),
        "within": one_of(_traits.target_set_id, _within()),
        "exact": one_of(_traits.target_set_id, select(_set.id).where(_set.key == bindparam("exact"))),
    }
    asked += [limits[name] for name in _LIMITS if name in form.asked]
    for number in range(form.includes):
        having = select(_member.target_set_id).where(_member.target == bindparam(f"include_{number}"))
        asked.append(one_of(_traits.target_set_id, having))
    return select(_traits.id).where(*asked)


def fits(form: Form, traits_id: ColumnElement[int]) -> ColumnElement[bool]:
    """Those traits fit: looked up for each release, where `fitting` would list thousands for a page of fifty."""
    return fitting(form).where(_traits.id == traits_id).correlate_except(Traits.__table__).offset(0).exists()


def _within() -> Select[*tuple[Any, ...]]:
    """Sets that have one of the names and none besides: found from the names, not by looking at every set."""
    other = TargetSetMember.__table__.alias()
    of_set = other.c.target_set_id == _member.target_set_id
    outside = select(other.c.target).where(of_set, not_(among(other.c.target, "within")))
    return select(_member.target_set_id).where(among(_member.target, "within"), ~outside.exists())


def on_release(form: Form) -> Conditions:
    """What traits do not say."""
    asked: Conditions = []
    if "include_yanked" not in form.asked or "latest" in form.asked:  # a yanked one is never the latest
        asked.append(~_release.yanked)
    if form.asked & {"stable", "latest"}:
        asked.append(_release.stable.is_(True))
    if "latest" in form.asked:
        asked.append(~_a_higher_one())
    if "size" in form.asked:
        asked.append(_release.size_bytes <= bindparam("size"))
    if "lowest" in form.asked:
        asked.append(_release.id.between(bindparam("lowest"), bindparam("highest")))
    if home := at_home(form):
        asked.append(_of_it(select(_repository.id).where(_repository.id == _release.repository_id, *home)))
    if "channel" in form.asked:
        asked.append(_is_served())
    of_release = select(_word.word).where(_word.release_id == _release.id)
    numbers = range(form.stated + form.words)  # where it is, is asked above of what says so first
    asked += [_of_it(of_release.where(is_entry(form, number, _word.word))) for number in numbers]
    asked += [
        _of_it(select(_score.id).where(_score.release_id == _release.id, *enough(number, operator)))
        for number, operator in enumerate(form.operators)
    ]
    return asked


def _of_it(rows: Select[*tuple[Any, ...]]) -> ColumnElement[bool]:
    """There are such rows of the release. Of nothing else around it: a search by a score has scores there too.

    With an offset PostgreSQL looks them up for each release that is read in order. It would rather collect and sort
    all that have them: the plan that it keeps for any word and any page takes the word for rare and the page for long.
    """
    return rows.correlate(Release.__table__).offset(0).exists()


def at_home(form: Form) -> Conditions:
    """On repositories: those asked for, and those that the actor may read."""
    limits = {
        "readable": among(_repository.namespace, "readable"),
        "namespace": _repository.namespace == bindparam("namespace"),
        "owner": _repository.namespace == bindparam("owner"),
        "repository": _repository.name == bindparam("repository"),
    }
    return [condition for name, condition in limits.items() if name in form.asked]


def is_entry(form: Form, number: int, word: ColumnElement[str]) -> ColumnElement[bool]:
    """That word of the index fits the condition of that number. A beginning is a range, which every database finds in
    an index, whatever its locale."""
    ends = ends_of(form, number)
    return word.between(*ends) if ends else among(word, "homes")


def has_other_words(form: Form, than: int) -> Conditions:
    """On an entry of the index of words: its release has the other words asked for as well."""
    other = ReleaseWord.__table__.alias().c
    of_it = select(other.word).where(other.release_id == _word.release_id).correlate(ReleaseWord.__table__).offset(0)
    numbers = (number for number in range(form.entries) if number != than)
    return [of_it.where(is_entry(form, number, other.word)).exists() for number in numbers]


def ends_of(form: Form, number: int) -> tuple[BindParameter[str], BindParameter[str]] | None:
    """The least and the greatest word that fit: first of what is stated, which is asked for whole, then of words. None
    for those of `homes`, which are no range."""
    if number < form.stated:
        stated = bindparam(f"stated_{number}", type_=String)
        return stated, stated
    number -= form.stated
    if number == form.words:
        return None
    return bindparam(f"word_{number}", type_=String), bindparam(f"word_{number}_end", type_=String)


def enough(number: int, operator: str) -> Conditions:
    limit: BindParameter[Any] = bindparam(f"score_{number}")
    compared = _score.value >= limit if operator == ">=" else _score.value <= limit
    of_metric = [_score.suite_id == bindparam(f"suite_{number}"), _score.metric == bindparam(f"metric_{number}")]
    return [*of_metric, compared]


def _a_higher_one() -> ColumnElement[bool]:
    higher = Release.__table__.alias().c
    same = (higher.repository_id == _release.repository_id) & (higher.sort_key > _release.sort_key)
    return select(higher.id).where(same, higher.stable, ~higher.yanked).exists()


def _is_served() -> ColumnElement[bool]:
    """That channel of the release's repository gives it out."""
    of_repository = (_channel.repository_id == _release.repository_id, _channel.name == bindparam("channel"))
    return _of_it(select(_channel.id).where(*of_repository, _channel.served_id == _release.id))
