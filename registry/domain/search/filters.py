"""Each part of a search as a condition on traits or on releases.

A condition names its value instead of holding it: searches that ask for the same things share their statements.
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
    """The ids of the traits that fit."""
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
    """Those traits fit: looked up for each release, where `fitting` would list thousands for a page of fifty."""
    return matching_traits(form).where(_traits.id == traits_id).correlate_except(Traits.__table__).offset(0).exists()


def _within() -> Select[*tuple[Any, ...]]:
    """Sets that have one of the names and none besides: found from the names, not by looking at every set."""
    other = TargetSetMember.__table__.alias()
    of_set = other.c.target_set_id == _member.target_set_id
    outside = select(other.c.target).where(of_set, not_(in_list(other.c.target, "within")))
    return select(_member.target_set_id).where(in_list(_member.target, "within"), ~outside.exists())


def release_conditions(form: QueryShape) -> Conditions:
    """What traits do not say."""
    asked: Conditions = []
    if "include_yanked" not in form.asked or "latest" in form.asked:  # a yanked one is never the latest
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
    numbers = range(form.stated + form.words)  # where it is, is asked above of what says so first
    asked += [_exists_for_release(of_release.where(is_entry(form, number, _word.word))) for number in numbers]
    asked += [
        _exists_for_release(
            select(_score.id).where(_score.release_id == _release.id, *score_threshold(number, operator))
        )
        for number, operator in enumerate(form.operators)
    ]
    return asked


def _exists_for_release(rows: Select[*tuple[Any, ...]]) -> ColumnElement[bool]:
    """There are such rows of the release. Of nothing else around it: a search by a score has scores there too.

    With an offset PostgreSQL looks them up for each release that is read in order. It would rather collect and sort
    all that have them: the plan that it keeps for any word and any page takes the word for rare and the page for long.
    """
    return rows.correlate(Release.__table__).offset(0).exists()


def at_home(form: QueryShape) -> Conditions:
    """On repositories: those asked for, and those that the actor may read."""
    limits = {
        "readable": in_list(_repository.namespace, "readable"),
        "namespace": _repository.namespace == bindparam("namespace"),
        "owner": _repository.namespace == bindparam("owner"),
        "repository": _repository.name == bindparam("repository"),
    }
    return [condition for name, condition in limits.items() if name in form.asked]


def is_entry(form: QueryShape, number: int, word: ColumnElement[str]) -> ColumnElement[bool]:
    """That word of the index fits the condition of that number. A beginning is a range, which every database finds in
    an index, whatever its locale."""
    ends = ends_of(form, number)
    return word.between(*ends) if ends else in_list(word, "homes")


def has_other_words(form: QueryShape, than: int) -> Conditions:
    """On an entry of the index of words: its release has the other words asked for as well."""
    other = ReleaseWord.__table__.alias().c
    of_it = select(other.word).where(other.release_id == _word.release_id).correlate(ReleaseWord.__table__).offset(0)
    numbers = (number for number in range(form.entries) if number != than)
    return [of_it.where(is_entry(form, number, other.word)).exists() for number in numbers]


def ends_of(form: QueryShape, number: int) -> tuple[BindParameter[str], BindParameter[str]] | None:
    """The least and the greatest word that fit: first of what is stated, which is asked for whole, then of words. None
    for those of `homes`, which are no range."""
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
    """That channel of the release's repository gives it out."""
    of_repository = (_channel.repository_id == _release.repository_id, _channel.name == bindparam("channel"))
    return _exists_for_release(select(_channel.id).where(*of_repository, _channel.served_id == _release.id))
