"""Everything about a page of releases, in one statement.

JSON stays text and nothing is validated again: pages are read many times a second, mostly to be sent on unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from sqlalchemy import FromClause, Text, cast, select
from sqlalchemy.orm import Session

from registry.database.dialects import float_text, in_list, json_list, json_rows, padded, timestamp_text
from registry.database.prepared import Prepared
from registry.database.tables import Base, Release, ReleaseInput, Repository, Revision, Score, Suite

BATCH_SIZE = 50
"""Releases per statement: with manifests of thousands of files each, they still fit in memory."""

_base, _input, _release, _repository, _revision, _score, _suite = (
    table.__table__.c for table in (Base, ReleaseInput, Release, Repository, Revision, Score, Suite)
)

_follower = Base.__table__.alias("follower")


class ReleaseRow(NamedTuple):
    """`manifest`, `facts`, `provenance` and `loading` are JSON text; times are formatted as in documents."""

    id: int
    namespace: str
    repository: str
    kind: str
    version: str
    commit: str
    manifest: str
    base_digest: str
    base_name: str
    rank_max: int | None
    facts: str
    provenance: str
    loading: str
    servers: int
    breaking_reason: str | None
    signed_by: str | None
    signature_covers: str | None
    signed_as: str | None
    notes: str
    yanked: bool
    yank_reason: str | None
    taken_down_at: str | None
    takedown_reason: str | None
    deprecated_reason: str | None
    successor: str | None
    base_deprecated_reason: str | None
    base_successor: str | None
    base_license: str | None
    created_at: str
    created_by: str
    stamp: int


ScoreRow = list[Any]
"""Release id, suite, metric, digest of the suite, value, standard error or None, n, whether higher is better, whether
it is only reported, when, task of the suite, source, kind of the suite."""
InputRow = list[Any]
"""Id of the composed release and of the input; the input's namespace, repository, version, commit, weight."""


_NAMED: FromClause = (
    Release.__table__.join(Repository.__table__, _repository.id == _release.repository_id)
    .join(Revision.__table__, _revision.id == _release.revision_id)
)  # fmt: skip
_RELEASES = (
    select(
        json_rows(
            _release.id,
            _repository.namespace,
            _repository.name,
            _repository.kind,
            _release.version,
            _revision.commit,
            _revision.manifest,
            _base.digest,
            _base.name,
            _release.rank_max,
            cast(_release.facts, Text),
            cast(_release.provenance, Text),
            cast(_release.loading, Text),
            _release.servers,
            _release.breaking_reason,
            _release.signed_by,
            _release.signature_covers,
            _release.signed_as,
            _release.notes,
            _release.yanked,
            _release.yank_reason,
            timestamp_text(_revision.taken_down_at),
            _revision.takedown_reason,
            _release.deprecated_reason,
            _release.successor,
            _base.deprecated_reason,
            _follower.c.name,
            _base.license,
            timestamp_text(_release.created_at),
            _release.created_by,
            _release.stamp,
        )
    )
    .select_from(
        _NAMED.join(Base.__table__, _base.digest == _release.base_digest).outerjoin(
            _follower, _follower.c.digest == _base.successor
        )
    )
    .where(in_list(_release.id, "ids"))
)
# `+ 0` keeps SQLite from scanning all scores of each suite.
_SCORES = (
    select(
        json_rows(
            _score.release_id,
            _suite.name,
            _score.metric,
            _suite.digest,
            float_text(_score.value),
            float_text(_score.stderr),
            _score.n,
            _score.higher_is_better,
            _score.reported,
            timestamp_text(_score.measured_at),
            _suite.task,
            _score.source,
            _suite.kind,
        )
    )
    .select_from(Score.__table__.join(Suite.__table__, _suite.id == _score.suite_id + 0))
    .where(in_list(_score.release_id, "ids"), _suite.current)
)
_INPUTS = (
    select(
        json_rows(
            _input.release_id,
            _input.input_id,
            _repository.namespace,
            _repository.name,
            _release.version,
            _revision.commit,
            float_text(_input.weight),
        )
    )
    .select_from(_NAMED.join(ReleaseInput.__table__, _input.input_id == _release.id))
    .where(in_list(_input.release_id, "ids"))
)
CURRENT_SUITES = select(json_list(_suite.id)).where(_suite.current).scalar_subquery()
_PAGE = Prepared(select(*(part.scalar_subquery() for part in (_RELEASES, _SCORES, _INPUTS)), CURRENT_SUITES))

Stamp = tuple[int, str | None]
"""The release's stamp and the current suites: details with equal stamps are equal."""


@dataclass(slots=True)
class ReleaseDetails:
    """A release, its scores on current suites by suite and metric, guards last, and its inputs. Floats are text."""

    release: ReleaseRow
    stamp: Stamp
    scores: list[ScoreRow] = field(default_factory=list[ScoreRow])
    inputs: list[InputRow] = field(default_factory=list[InputRow])


def load_details(session: Session, release_ids: Sequence[int]) -> list[ReleaseDetails]:
    """The details, in the order of the ids."""
    details: dict[int, ReleaseDetails] = {}
    for start in range(0, len(release_ids), BATCH_SIZE):
        [(*texts, suites)] = _PAGE.rows(session, {"ids": padded(release_ids[start : start + BATCH_SIZE])})
        releases, scores, inputs = (orjson.loads(text or "[]") for text in texts)
        for row in map(ReleaseRow._make, releases):
            details[row.id] = ReleaseDetails(row, (row.stamp, suites))
        for row in sorted(scores, key=lambda row: (row[0], row[-1] == "guard", row[1], row[2])):
            details[row[0]].scores.append(row)
        for row in sorted(inputs):
            details[row[0]].inputs.append(row)
    return [details[number] for number in release_ids]
