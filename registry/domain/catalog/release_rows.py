"""The columns that are read about releases, each fact declared once; a page of them in one statement. JSON stays text
and is not validated again: pages are read many times a second, mostly to be sent on unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import orjson
from sqlalchemy import JSON, ColumnElement, FromClause, Text, cast, select
from sqlalchemy.orm import Session

from registry.database.dialects import float_text, in_list, json_list, json_rows, padded, timestamp_text
from registry.database.engine import UtcDateTime
from registry.database.prepared import Prepared
from registry.database.tables import (
    Attestation,
    Base,
    Release,
    ReleaseInput,
    Repository,
    Revision,
    Score,
    SuiteVersion,
    WorkerKey,
)

BATCH_SIZE = 50
"""Releases per statement: with manifests of thousands of files each, they still fit in memory."""

_base, _input, _release, _repository, _revision, _score, _suite = (
    table.__table__.c for table in (Base, ReleaseInput, Release, Repository, Revision, Score, SuiteVersion)
)
_attestation, _key = Attestation.__table__.c, WorkerKey.__table__.c

_follower = Base.__table__.alias("follower")


def fact(column: ColumnElement[Any], *, shown: bool = False) -> Any:
    """Declares a field of `ReleaseRow` by its column. One that is `shown` is in documents as it is, by its name."""
    return field(metadata={"column": column, "shown": shown})


@dataclass(slots=True)
class ReleaseRow:
    """Everything that is read about a release: the statements here and in `resolve`, and the document, follow this
    list. In a page, JSON is text, and times are formatted as in documents."""

    id: int = fact(_release.id)
    revision_id: int = fact(_release.revision_id)
    namespace: str = fact(_repository.namespace)
    repository: str = fact(_repository.name)
    kind: str = fact(_repository.kind, shown=True)
    version: str = fact(_release.version, shown=True)
    commit: str = fact(_revision.commit, shown=True)
    manifest: str = fact(_revision.manifest)
    base_digest: str = fact(_base.digest)
    base_name: str = fact(_base.name)
    rank_max: int | None = fact(_release.rank_max)
    size_bytes: int = fact(_release.size_bytes)
    facts: str = fact(_release.facts)
    provenance: str = fact(_release.provenance)
    loading: str = fact(_release.loading)
    servers: int = fact(_release.servers)
    breaking_reason: str | None = fact(_release.breaking_reason, shown=True)
    signed_by: str | None = fact(_release.signed_by, shown=True)
    signature_covers: str | None = fact(_release.signature_covers, shown=True)
    signed_as: str | None = fact(_release.signed_as, shown=True)
    notes: str = fact(_release.notes, shown=True)
    yanked: bool = fact(_release.yanked)
    yank_reason: str | None = fact(_release.yank_reason, shown=True)
    taken_down_at: str | None = fact(_revision.taken_down_at)
    takedown_reason: str | None = fact(_revision.takedown_reason)
    deprecated_reason: str | None = fact(_release.deprecated_reason)
    successor: str | None = fact(_release.successor)
    base_deprecated_reason: str | None = fact(_base.deprecated_reason)
    base_successor: str | None = fact(_follower.c.name)
    base_license: str | None = fact(_base.license)
    created_at: str = fact(_release.created_at, shown=True)
    created_by: str = fact(_release.created_by, shown=True)
    stamp: int = fact(_release.stamp)


COLUMNS: dict[str, ColumnElement[Any]] = {declared.name: declared.metadata["column"] for declared in fields(ReleaseRow)}
SHOWN = tuple(declared.name for declared in fields(ReleaseRow) if declared.metadata["shown"])


ScoreRow = list[Any]
"""Release id, suite, metric, digest of the suite, value, standard error or None, n, whether higher is better, whether
it is only reported, when, task of the suite, source, the worker that measured it or None, who recorded it, kind of the
suite."""
InputRow = list[Any]
"""Id of the composed release and of the input; the input's namespace, repository, version, commit, weight;
whether it is yanked, why, and whether it was taken down."""


_NAMED: FromClause = (
    Release.__table__.join(Repository.__table__, _repository.id == _release.repository_id)
    .join(Revision.__table__, _revision.id == _release.revision_id)
)  # fmt: skip
NAMED: FromClause = _NAMED.join(Base.__table__, _base.digest == _release.base_digest).outerjoin(
    _follower, _follower.c.digest == _base.successor
)
"""The tables of COLUMNS."""


def _written(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """The column in the form that documents use: JSON stays text, a time is formatted."""
    if isinstance(column.type, JSON):
        return cast(column, Text)
    return timestamp_text(column) if isinstance(column.type, UtcDateTime) else column


_RELEASES = select(json_rows(*map(_written, COLUMNS.values()))).select_from(NAMED).where(in_list(_release.id, "ids"))
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
            _key.worker,
            _score.measured_by,
            _suite.kind,
        )
    )
    .select_from(
        Score.__table__.join(SuiteVersion.__table__, _suite.id == _score.suite_id + 0)
        .outerjoin(Attestation.__table__, _attestation.id == _score.attestation_id)
        .outerjoin(WorkerKey.__table__, (_key.id == _attestation.key_id) & _key.revoked_at.is_(None))
    )
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
            _release.yanked,
            _release.yank_reason,
            _revision.taken_down_at.is_not(None),
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
        for row in (ReleaseRow(*values) for values in releases):
            details[row.id] = ReleaseDetails(row, (row.stamp, suites))
        for row in sorted(scores, key=lambda row: (row[0], row[-1] == "guard", row[1], row[2])):
            details[row[0]].scores.append(row)
        for row in sorted(inputs):
            details[row[0]].inputs.append(row)
    return [details[number] for number in release_ids]
