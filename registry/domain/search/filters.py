"""The parts of a search as SQL conditions on traits or releases.

Conditions use bind parameters, so that searches of the same shape share prepared statements.
"""

from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Select, String, bindparam, not_, select

from registry.database.dialects import in_list, in_subquery
from registry.database.tables import (
    Channel,
    Release,
    ReleaseWord,
    Repository,
    Score,
    TargetSet,
    TargetSetMember,
    Traits,
)
from registry.domain.catalog import bases
from registry.domain.search.query import LIMITS, SAME, QueryShape

_channel, _member, _release, _repository, _score, _set, _traits, _word = (
    table.__table__.c
    for table in (Channel, TargetSetMember, Release, Repository, Score, TargetSet, Traits, ReleaseWord)
)

Conditions = list[ColumnElement[bool]]


def matching_traits(form: QueryShape) -> Select[*tuple[Any, ...]]:
    """The ids of the matching traits."""
    asked: Conditions = [_traits.kind == bindparam("kind")]
    asked += [_traits[name] == bindparam(name) for name in SAME if name in form.asked]
    limits: dict[str, ColumnElement[bool]] = {
        "base": _traits.base_digest == bindparam("base"),
        "base_name": _traits.base_digest == bases.digest_of(bindparam("base_name", type_=String)),
        "bases": in_list(_traits.base_digest, "bases"),
        "min_rank": _traits.rank_max >= bindparam("min_rank"),
        "max_rank": _traits.rank_max <= bindparam("max_rank"),
        "server": _traits.servers.bitwise_and(bindparam("server")) != 0,
        "server_rank": _traits.rank_max <= bindparam("server_rank"),
        "within": in_subquery(_traits.target_set_id, _within()),
        "exact": in_subquery(_traits.target_set_id, select(_set.id).where(_set.key == bindparam("exact"))),
    }
    asked += [limits[name] for name in LIMITS if name in form.asked]
    for number in range(form.includes):
        having = select(_member.target_set_id).where(_member.target == bindparam(f"include_{number}"))
        asked.append(in_subquery(_traits.target_set_id, having))
    return select(_traits.id).where(*asked)


def traits_match(form: QueryShape, traits_id: ColumnElement[int]) -> ColumnElement[bool]:
    """Whether a release's traits match: checked per release, instead of listing thousands of traits for one page."""
    return matching_traits(form).where(_traits.id == traits_id).correlate_except(Traits.__table__).offset(0).exists()


def _within() -> Select[*tuple[Any, ...]]:
    """Sets that contain at least one of the names and no others; starts from the names, not from all sets."""
    other = TargetSetMember.__table__.alias()
    of_set = other.c.target_set_id == _member.target_set_id
    outside = select(other.c.target).where(of_set, not_(in_list(other.c.target, "within")))
    return select(_member.target_set_id).where(in_list(_member.target, "within"), ~outside.exists())


def release_conditions(form: QueryShape) -> Conditions:
    """Conditions on releases, beyond their traits."""
    asked: Conditions = []
    if "include_yanked" not in form.asked or "latest" in form.asked:  # a yanked release is never the latest
        asked.append(~_release.yanked)
    if form.asked & {"stable", "latest"}:
        asked.append(_release.stable.is_(True))
    if "latest" in form.asked:
        asked.append(~_newer_stable_exists())
    if "size" in form.asked:
        asked.append(_release.size_bytes <= bindparam("size"))
    if "lowest" in form.asked:
        asked.append(_release.id.between(bindparam("lowest"), bindparam("highest")))
    if home := at_home(form):
        asked.append(_exists_for_release(select(_repository.id).where(_repository.id == _release.repository_id, *home)))
    if "channel" in form.asked:
        asked.append(_is_served())
    of_release = select(_word.word).where(_word.release_id == _release.id)
    numbers = range(form.stated + form.words)  # the namespace condition is checked above
    asked += [_exists_for_release(of_release.where(is_entry(form, number, _word.word))) for number in numbers]
    asked += [
        _exists_for_release(
            select(_score.id).where(_score.release_id == _release.id, *score_threshold(number, operator))
        )
        for number, operator in enumerate(form.operators)
    ]
    return asked


def _exists_for_release(rows: Select[*tuple[Any, ...]]) -> ColumnElement[bool]:
    """Whether such rows exist for the release. Correlates only the release, since the outer query may have scores too.

    OFFSET 0 makes PostgreSQL look them up for each release read in order. Otherwise its generic plan assumes a rare
    word and a long page, and collects and sorts all matches.
    """
    return rows.correlate(Release.__table__).offset(0).exists()


def at_home(form: QueryShape) -> Conditions:
    """Conditions on repositories: the requested ones, among those that the actor may read."""
    limits = {
        "readable": in_list(_repository.namespace, "readable"),
        "namespace": _repository.namespace == bindparam("namespace"),
        "owner": _repository.namespace == bindparam("owner"),
        "repository": _repository.name == bindparam("repository"),
    }
    return [condition for name, condition in limits.items() if name in form.asked]


def is_entry(form: QueryShape, number: int, word: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether an index word matches the numbered condition. A prefix is a range, which uses the index in any locale."""
    ends = ends_of(form, number)
    return word.between(*ends) if ends else in_list(word, "homes")


def has_other_words(form: QueryShape, than: int) -> Conditions:
    """Conditions on an index entry: its release also has the other words of the query."""
    other = ReleaseWord.__table__.alias().c
    of_it = select(other.word).where(other.release_id == _word.release_id).correlate(ReleaseWord.__table__).offset(0)
    numbers = (number for number in range(form.entries) if number != than)
    return [of_it.where(is_entry(form, number, other.word)).exists() for number in numbers]


def ends_of(form: QueryShape, number: int) -> tuple[BindParameter[str], BindParameter[str]] | None:
    """The first and last matching word: numbers count provenance entries, which match exactly, then words. None for
    `homes`, which is not a range."""
    if number < form.stated:
        stated = bindparam(f"stated_{number}", type_=String)
        return stated, stated
    number -= form.stated
    if number == form.words:
        return None
    return bindparam(f"word_{number}", type_=String), bindparam(f"word_{number}_end", type_=String)


def score_threshold(number: int, operator: str) -> Conditions:
    limit: BindParameter[Any] = bindparam(f"score_{number}")
    compared = _score.value >= limit if operator == ">=" else _score.value <= limit
    of_metric = [_score.suite_id == bindparam(f"suite_{number}"), _score.metric == bindparam(f"metric_{number}")]
    return [*of_metric, compared]


def _newer_stable_exists() -> ColumnElement[bool]:
    higher = Release.__table__.alias().c
    same = (higher.repository_id == _release.repository_id) & (higher.sort_key > _release.sort_key)
    return select(higher.id).where(same, higher.stable, ~higher.yanked).exists()


def _is_served() -> ColumnElement[bool]:
    """Whether the channel of the release's repository serves it."""
    of_repository = (_channel.repository_id == _release.repository_id, _channel.name == bindparam("channel"))
    return _exists_for_release(select(_channel.id).where(*of_repository, _channel.served_id == _release.id))
