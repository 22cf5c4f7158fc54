"""Query value -> releases that fit a base, a rank, a set of targets and scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from registry import bases
from registry.models import Release, Repository, Score, Suite, TargetSetMember
from registry.repositories import Kind
from registry.suites import Condition


@dataclass(frozen=True, slots=True)
class Query:
    """All conditions hold together. `before` is the id of the last release of the page before, 0 for the first page."""

    kind: Kind = Kind.ADAPTER
    namespace: str | None = None
    base: str | None = None
    type: str | None = None
    max_rank: int | None = None
    targets_within: Sequence[str] = ()
    targets_include: Sequence[str] = ()
    scores: Sequence[Condition] = field(default=())
    include_yanked: bool = False
    before: int = 0
    limit: int = 50


def search(session: Session, query: Query) -> list[Release]:
    """The newest release first. Raises NotFound for a base that is not registered."""
    statement = (
        select(Release.id).join(Repository, Repository.id == Release.repository_id).where(Repository.kind == query.kind)
    )
    if query.namespace:
        statement = statement.where(Repository.namespace == query.namespace)
    if query.base:
        statement = statement.where(Release.base_digest == bases.find(session, query.base).digest)
    if query.type:
        statement = statement.where(Release.type == query.type)
    if query.max_rank is not None:
        statement = statement.where(Release.rank_max <= query.max_rank)
    if not query.include_yanked:
        statement = statement.where(~Release.yanked)
    if query.before:
        statement = statement.where(Release.id < query.before)
    statement = _with_scores(_with_targets(statement, query), query)
    # Ids are sorted first and only the page's rows are read: a sort of whole rows carries the facts of every match.
    page = statement.order_by(Release.id.desc()).limit(query.limit)
    return list(session.scalars(select(Release).where(Release.id.in_(page)).order_by(Release.id.desc())))


def _with_targets(statement: Select[int], query: Query) -> Select[int]:
    if query.targets_within:
        outside = select(TargetSetMember.target_set_id).where(TargetSetMember.target.not_in(query.targets_within))
        statement = statement.where(Release.target_set_id.is_not(None), Release.target_set_id.not_in(outside))
    for target in query.targets_include:
        having = select(TargetSetMember.target_set_id).where(TargetSetMember.target == target)
        statement = statement.where(Release.target_set_id.in_(having))
    return statement


def _with_scores(statement: Select[int], query: Query) -> Select[int]:
    for condition in query.scores:
        enough = Score.value >= condition.value if condition.operator == ">=" else Score.value <= condition.value
        found = select(Score.id).join(Suite, Suite.id == Score.suite_id)
        found = found.where(Score.release_id == Release.id, Suite.name == condition.suite, Suite.current)
        statement = statement.where(found.where(Score.metric == condition.metric, enough).exists())
    return statement
