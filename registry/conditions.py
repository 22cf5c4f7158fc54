"""What a search asks, and each part of it as a condition on traits or on releases."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Select, select, true
from sqlalchemy.orm import Session, aliased

from composer.formats.serving import Profile
from registry.access import readable
from registry.audit import Actor
from registry.models import (
    Channel,
    Move,
    Release,
    ReleaseWord,
    Repository,
    Score,
    Suite,
    TargetSet,
    TargetSetMember,
    Traits,
)
from registry.names import RepositoryName
from registry.repositories import Kind
from registry.suites import Condition
from registry.terms import MAX_WORD_CHARACTERS, target_set_key, words

RARE = 500
"""A condition that so few releases meet is looked up first, and the others are tried on those."""


@dataclass(frozen=True, slots=True)
class Query:
    """All conditions hold together; None and () ask nothing.

    `related` also finds releases for casts and quantizations of `base`. `latest` asks for the highest stable release of
    each repository. `explain` finds what does not load in `loads_in` too, for its reasons to be told.
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
    loads_in: Profile | None = None
    explain: bool = False
    include_yanked: bool = False
    stable: bool = False
    latest: bool = False


def on_traits(query: Query, bases: Sequence[str]) -> list[ColumnElement[bool]]:
    """`bases` are the digests of the base asked for and of those related to it; none asks for no base."""
    asked = [Traits.kind == query.kind]
    if bases:
        asked.append(Traits.base_digest.in_(bases))
    for column, value in (
        (Traits.type, query.type),
        (Traits.variant, query.variant),
        (Traits.dtype, query.dtype),
        (Traits.license, query.license),
        (Traits.alpha, query.alpha),
    ):
        if value is not None:
            asked.append(column == value)
    if query.min_rank is not None:
        asked.append(Traits.rank_max >= query.min_rank)
    if query.max_rank is not None:
        asked.append(Traits.rank_max <= query.max_rank)
    if query.loads_in is not None and not query.explain:
        asked.append(Traits.servers.bitwise_and(query.loads_in.bit) != 0)
        if query.loads_in.max_rank is not None:
            asked.append(Traits.rank_max <= query.loads_in.max_rank)
    return asked + _on_targets(query)


def _on_targets(query: Query) -> list[ColumnElement[bool]]:
    asked: list[ColumnElement[bool]] = []
    if query.targets_within:
        other = aliased(TargetSetMember)
        outside = (
            select(other.target)
            .where(other.target_set_id == TargetSetMember.target_set_id, other.target.not_in(query.targets_within))
            .exists()
        )
        within = select(TargetSetMember.target_set_id).where(TargetSetMember.target.in_(query.targets_within), ~outside)
        asked.append(Traits.target_set_id.in_(within))
    if query.targets_exact:
        exact = select(TargetSet.id).where(TargetSet.key == target_set_key(query.targets_exact))
        asked.append(Traits.target_set_id.in_(exact))
    for target in query.targets_include:
        having = select(TargetSetMember.target_set_id).where(TargetSetMember.target == target)
        asked.append(Traits.target_set_id.in_(having))
    return asked


def on_release(actor: Actor, query: Query, suites: Sequence[Suite]) -> list[ColumnElement[bool]]:
    """What traits do not say. `suites` are the current ones of the conditions on scores, in their order."""
    asked: list[ColumnElement[bool]] = []
    if not query.include_yanked:
        asked.append(~Release.yanked)
    if query.stable or query.latest:
        asked.append(Release.stable.is_(True))
    if query.latest:
        asked.append(~_a_higher_one())
    if query.max_size_bytes is not None:
        asked.append(Release.size_bytes <= query.max_size_bytes)
    if (home := _on_repository(actor, query)) is not None:
        asked.append(select(Repository.id).where(Repository.id == Release.repository_id, home).exists())
    if query.channel:
        asked.append(Release.id == _served(query.channel))
    asked += [
        select(ReleaseWord.word).where(ReleaseWord.release_id == Release.id, _begins(word)).exists()
        for word in words(query.text)
    ]
    asked += [
        select(Score.id).where(Score.release_id == Release.id, *_enough(condition, suite)).exists()
        for condition, suite in zip(query.scores, suites, strict=True)
    ]
    return asked


def _on_repository(actor: Actor, query: Query) -> ColumnElement[bool] | None:
    asked = readable(actor, Repository.namespace)
    if query.namespace:
        asked &= Repository.namespace == query.namespace
    if query.repository:
        asked &= (Repository.namespace == query.repository.namespace) & (Repository.name == query.repository.name)
    return None if asked.compare(true()) else asked


def _a_higher_one() -> ColumnElement[bool]:
    higher = aliased(Release)
    same = (higher.repository_id == Release.repository_id) & (higher.sort_key > Release.sort_key)
    return select(higher.id).where(same, higher.stable, ~higher.yanked).exists()


def _served(channel: str) -> ColumnElement[int]:
    """What that channel of the release's repository gives out: the first move from the current one down whose release
    is not yanked."""
    start = select(Channel.move_id).where(Channel.repository_id == Release.repository_id, Channel.name == channel)
    moves = start.correlate(Release).cte("served", recursive=True, nesting=True)
    yanked, given = aliased(Release), aliased(Release)
    below = (
        select(Move.below_id)
        .join(moves, moves.c.move_id == Move.id)
        .join(yanked, yanked.id == Move.to_release_id)
        .where(yanked.yanked)
    )
    moves = moves.union_all(below)
    found = select(given.id).join(Move, Move.to_release_id == given.id).join(moves, moves.c.move_id == Move.id)
    return found.where(~given.yanked).limit(1).correlate(Release).scalar_subquery()


def _begins(word: str) -> ColumnElement[bool]:
    """A range, which every database finds in an index, whatever its locale."""
    if len(word) == MAX_WORD_CHARACTERS:
        return ReleaseWord.word == word
    return ReleaseWord.word.between(word, word + "\U0010ffff")


def _enough(condition: Condition, suite: Suite) -> list[ColumnElement[bool]]:
    enough = Score.value >= condition.value if condition.operator == ">=" else Score.value <= condition.value
    return [Score.suite_id == suite.id, Score.metric == condition.metric, enough]


def rarest(
    session: Session, actor: Actor, query: Query, suites: Sequence[Suite], fits: Select[Any]
) -> Sequence[int] | None:
    """The ids of releases that meet a condition which few meet, None when there is no such condition.

    Each is looked up in its own index, and given up after `RARE` entries. `fits` selects the traits that fit.
    """
    lists: list[Select[Any]] = [select(ReleaseWord.release_id).where(_begins(word)) for word in words(query.text)]
    if query.channel:
        of_channel = select(Release.id).join(Channel, Channel.repository_id == Release.repository_id)
        lists.append(of_channel.where(Channel.name == query.channel))
    if (home := _on_repository(actor, query)) is not None:
        lists.append(select(Release.id).join(Repository, Repository.id == Release.repository_id).where(home))
    for condition, suite in zip(query.scores, suites, strict=True):
        scored = select(Score.release_id).where(*_enough(condition, suite), Score.traits_id.in_(fits))
        lists.append(scored)
    for one in lists:
        found = session.scalars(one.limit(RARE + 1)).all()
        if len(found) <= RARE:
            return found
    return None
