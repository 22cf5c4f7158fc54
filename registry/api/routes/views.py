"""Renders rows for the API. Call inside the transaction that read or wrote the rows."""

from collections.abc import Mapping, Sequence

from registry.api.routes.documents import move_document
from registry.api.schemas.catalog import BaseOut, BaseRef, RepositoryOut, TensorRow
from registry.api.schemas.quality import ChannelOut, MoveOut, ScoreOut, SuiteOut
from registry.api.schemas.work import AuditOut, CompositionOut, JobOut, ResultRow, StepOut
from registry.database.engine import Session
from registry.database.tables import AuditRow, Base, Channel, Composition, Job, Repository, Score, Suite
from registry.domain.catalog import bases, metrics, repositories, suites
from registry.domain.channels import moves, resolve
from registry.domain.channels.moves import ChannelMove
from registry.formats.references import RepositoryName


def score_view(row: Score) -> ScoreOut:
    return ScoreOut(
        suite=row.suite.name,
        suite_digest=row.suite.digest,
        metric=row.metric,
        value=row.value,
        stderr=row.stderr,
        n=row.n,
        higher_is_better=row.higher_is_better,
        measured=row.measured_at,
    )


def base_view(session: Session, row: Base, *, tensors: bool = False) -> BaseOut:
    [view] = base_page(session, [row])
    return view.model_copy(update={"tensors": _tensor_table(row)}) if tensors else view


def base_page(session: Session, rows: Sequence[Base]) -> list[BaseOut]:
    """Renders bases with four queries, whatever the page length."""
    aliases, locations = bases.aliases(session, *rows), bases.locations(session, *rows)
    origins, scores = bases.origins(session, *rows), suites.scores_of_bases(session, *rows)
    return [
        BaseOut(
            digest=row.digest,
            architecture_digest=row.architecture_digest,
            name=row.name,
            aliases=aliases[row.digest],
            locations=locations[row.digest],
            model_type=row.model_type,
            tied=row.tied,
            parameters=row.parameters,
            size_bytes=row.size_bytes,
            tensor_count=row.tensor_count,
            created_at=row.created_at,
            created_by=row.created_by,
            scores=[score_view(score) for score in scores[row.digest]],
            derived_from=BaseRef(digest=row.derived_from, name=origins[row.derived_from]) if row.derived_from else None,
            relation=row.relation,
        )
        for row in rows
    ]


def _tensor_table(row: Base) -> list[TensorRow]:
    return [TensorRow(name=name, dtype=dtype, shape=shape, sha256=sha) for name, dtype, shape, sha in row.tensors]


def repository_page(session: Session, rows: Sequence[Repository]) -> list[RepositoryOut]:
    """Renders repositories with two queries, whatever the page length."""
    heads = resolve.heads(session, *rows)
    return [
        RepositoryOut(
            repository=str(repositories.name_of(row)),
            kind=row.kind,
            latest=heads[row.id].latest,
            channels=heads[row.id].channels,
            created_at=row.created_at,
        )
        for row in rows
    ]


def suite_page(session: Session, rows: Sequence[Suite]) -> list[SuiteOut]:
    """Renders suites with one query for all their metrics."""
    stated = metrics.stated(session, rows)
    return [_suite_view(row, stated[row.name]) for row in rows]


def suite_view(session: Session, row: Suite) -> SuiteOut:
    """A suite with its examples."""
    [view] = suite_page(session, [row])
    return view.model_copy(update={"content": row.content})


def _suite_view(row: Suite, stated: Mapping[str, bool]) -> SuiteOut:
    return SuiteOut(
        name=row.name,
        digest=row.digest,
        kind=row.kind,
        examples=row.examples,
        current=row.current,
        metrics={metric: "higher" if better else "lower" for metric, better in stated.items()},
        created_at=row.created_at,
        created_by=row.created_by,
    )


def channel_view(session: Session, row: Channel, repository: Repository) -> ChannelOut:
    move, served = moves.current_of(session, row), moves.effective_move(session, row)
    return ChannelOut(
        repository=str(repositories.name_of(repository)),
        channel=row.name,
        version=served.to_release.version if served else None,
        commit=served.to_release.revision.commit if served else None,
        passes_over=None if served == move else move.to_release.version,
        moved_at=move.at,
        moved_by=move.actor,
        move=move.id,
    )


def move_view(moved: ChannelMove, repository: RepositoryName, channel: str) -> MoveOut:
    return MoveOut.model_validate(move_document(moved, repository, channel))


def job_view(row: Job) -> JobOut:
    return JobOut(
        id=row.id,
        kind=row.kind,
        namespace=row.namespace,
        state=row.state,
        steps=[StepOut(**step) for step in row.steps],
        error=row.error,
        created_at=row.created_at,
        created_by=row.created_by,
        finished_at=row.finished_at,
    )


def composition_view(row: Composition, job: Job) -> CompositionOut:
    results = [ResultRow(**result) for result in row.results]
    return CompositionOut(
        id=row.id,
        job=job.id,
        state=job.state,
        plan=row.plan_only,
        recipe=row.recipe,
        lock=row.lock,
        conflicts=row.conflicts,
        candidate_scores=row.candidate_scores,
        gates=row.gates,
        merge=row.merge,
        result=results[0] if results else None,
        results=results,
        steps=[StepOut(**step) for step in job.steps],
        error=job.error,
    )


def audit_view(row: AuditRow) -> AuditOut:
    return AuditOut(
        id=row.id,
        at=row.at,
        actor=row.actor,
        token=row.token_id,
        source=row.source,
        act=row.act,
        subject=row.subject,
        namespace=row.namespace,
        reason=row.reason,
        before=row.before,
        after=row.after,
        detail=row.detail,
    )
