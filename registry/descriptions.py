"""All that the registry says of releases: two statements for a page of them or three, however long it is.

Columns of tables, not objects, and JSON as its text: a page of fifty is read many times a second, by nobody who changes
what it shows, and mostly to be sent on as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BindParameter, Row, Text, bindparam, cast, exists, select
from sqlalchemy.orm import Session

from registry.models import Base, Release, ReleaseInput, Repository, Revision, Score, Suite

_base, _input, _release, _repository, _revision, _score, _suite = (
    table.__table__.c for table in (Base, ReleaseInput, Release, Repository, Revision, Score, Suite)
)
_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
_NAMED = (
    select(
        _release.id,
        _repository.namespace,
        _repository.name.label("repository"),
        _repository.kind,
        _release.version,
        _revision.commit,
    )
    .select_from(Release.__table__)
    .join(Repository.__table__, _repository.id == _release.repository_id)
    .join(Revision.__table__, _revision.id == _release.revision_id)
)
_RELEASES = (
    _NAMED.add_columns(
        _revision.manifest,
        _base.digest.label("base_digest"),
        _base.name.label("base_name"),
        _release.rank_max,
        cast(_release.facts, Text).label("facts"),
        cast(_release.provenance, Text).label("provenance"),
        cast(_release.loading, Text).label("loading"),
        _release.servers,
        _release.breaking_reason,
        _release.signed_by,
        _release.notes,
        _release.yanked,
        _release.yank_reason,
        _release.created_at,
        _release.created_by,
        exists().where(_input.release_id == _release.id).correlate(Release.__table__).label("composed"),
    )
    .join(Base.__table__, _base.digest == _release.base_digest)
    .where(_release.id.in_(_IDS))
)
_SCORES = (
    select(
        _score.release_id,
        _suite.name,
        _suite.digest,
        _score.metric,
        _score.value,
        _score.stderr,
        _score.n,
        _score.higher_is_better,
        _score.measured_at,
    )
    .select_from(Score.__table__)
    .join(Suite.__table__, _suite.id == _score.suite_id)
    .where(_score.release_id.in_(_IDS), _suite.current)
    .order_by(_suite.name, _score.metric)
)
_INPUTS = (
    _NAMED.add_columns(_input.release_id, _input.weight)
    .join(ReleaseInput.__table__, _input.input_id == _release.id)
    .where(_input.release_id.in_(_IDS))
    .order_by(_release.id)
)


@dataclass(frozen=True, slots=True)
class Description:
    """Rows of plain columns: the release, the scores of current suites by suite and metric, what went into it."""

    release: Row[*tuple[Any, ...]]
    scores: Sequence[Row[*tuple[Any, ...]]]
    inputs: Sequence[Row[*tuple[Any, ...]]]


def describe(session: Session, release_ids: Sequence[int]) -> list[Description]:
    """In the order of the ids."""
    if not release_ids:
        return []
    given = {"ids": release_ids}
    found = {row[0]: row for row in session.execute(_RELEASES, given).all()}
    scores: dict[int, list[Any]] = {number: [] for number in release_ids}
    for row in session.execute(_SCORES, given).all():
        scores[row[0]].append(row)
    inputs: dict[int, list[Any]] = {number: [] for number in release_ids}
    composed = [number for number, row in found.items() if row.composed]
    for row in session.execute(_INPUTS, {"ids": composed}).all() if composed else ():
        inputs[row.release_id].append(row)
    return [Description(found[number], scores[number], inputs[number]) for number in release_ids]
