"""Renders rows for the API. Call inside the transaction that read or wrote the rows."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from registry.api.routes.documents import deprecation, move_document
from registry.database.engine import Session, database_now
from registry.database.tables import (
    AuditRow,
    Base,
    Canary,
    Channel,
    Composition,
    ConflictCheck,
    Job,
    PolicyException,
    Promotion,
    Repository,
    Score,
    SuiteVersion,
    WebhookDelivery,
)
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import bases, metrics, repositories, suites
from registry.domain.channels import resolve
from registry.domain.channels.policy import policies
from registry.domain.channels.policy.judging import PromotionRequest
from registry.domain.channels.promotions import Judgement
from registry.domain.channels.serving import ChannelMove, ChannelName, current_move, serving_move
from registry.domain.compositions import compositions
from registry.domain.jobs import needs, queue
from registry.domain.rollouts import canaries, fleet
from registry.formats.audit_chain import Seal
from registry.formats.priority import Priority
from registry.formats.references import PolicyScope, RepositoryName
from registry.formats.watch import Watch
from registry.formats.webhooks import message_id
from registry.wire.catalog import BaseOut, BaseRef, BaseTensor, RepositoryOut
from registry.wire.fleet import CanaryOut, RolloutNodeOut, RolloutOut, StandingOut
from registry.wire.quality import (
    ChannelOut,
    ExceptionOut,
    JudgementOut,
    MoveOut,
    NamespacePolicyOut,
    PinOut,
    PolicyOut,
    PromotionOut,
    ScoreOut,
    SuiteOut,
)
from registry.wire.webhooks import DeliveryOut
from registry.wire.work import AuditOut, CheckedInput, CompositionOut, ConflictsOut, JobOut, SealedAuditOut


def score_view(row: Score, phrases: Mapping[str, str] | None = None) -> ScoreOut:
    """A score; `phrases` are those of its release, which every evaluation puts before the prompts of their suites."""
    suite = row.suite
    phrase = None if row.reported or row.source else (phrases or {}).get(suite.name)
    named = {"suite": suite.name, "suite_digest": suite.digest, "kind": suite.kind, "task": suite.task}
    by = {"measured_by": row.worker, "stated_by": None if row.worker else row.measured_by}
    return ScoreOut.of(row, **named, **by, measured=row.measured_at, phrase=phrase)


def base_view(session: Session, row: Base, *, tensors: bool = False) -> BaseOut:
    [view] = base_page(session, [row])
    if not tensors:
        return view
    table = [BaseTensor(name=name, dtype=dtype, shape=shape, sha256=sha) for name, dtype, shape, sha in row.tensors]
    return view.model_copy(update={"tensors": table})


def base_page(session: Session, rows: Sequence[Base]) -> list[BaseOut]:
    """Renders bases with four queries, whatever the page length."""
    aliases, locations = bases.aliases(session, [row.digest for row in rows]), bases.locations(session, *rows)
    origins, scores = bases.origins(session, *rows), suites.scores_of_bases(session, *rows)
    return [
        BaseOut.of(
            row,
            aliases=aliases[row.digest],
            locations=locations[row.digest],
            scores=[score_view(score) for score in scores[row.digest]],
            tensors=None,
            deprecated=deprecation(row.deprecated_reason, origins[row.successor] if row.successor else None),
            derived_from=BaseRef(digest=row.derived_from, name=origins[row.derived_from]) if row.derived_from else None,
        )
        for row in rows
    ]


def repository_page(session: Session, rows: Sequence[Repository]) -> list[RepositoryOut]:
    """Renders repositories with two queries, whatever the page length."""
    heads = resolve.heads(session, *rows)
    return [
        RepositoryOut.of(
            row,
            repository=str(repositories.name_of(row)),
            latest=heads[row.id].latest,
            channels=heads[row.id].channels,
        )
        for row in rows
    ]


def suite_page(session: Session, rows: Sequence[SuiteVersion]) -> list[SuiteOut]:
    """Renders suites, without their examples, with one query for all their metrics."""
    stated = metrics.stated(session, rows)
    return [
        SuiteOut.of(
            row,
            metrics={metric: "higher" if better else "lower" for metric, better in stated[row.name].items()},
            content=None,
        )
        for row in rows
    ]


def suite_view(session: Session, row: SuiteVersion) -> SuiteOut:
    """A suite with its examples."""
    [view] = suite_page(session, [row])
    return view.model_copy(update={"content": row.content})


def channel_view(session: Session, row: Channel, repository: Repository) -> ChannelOut:
    """The channel with the release that it serves; `passes_over` is the version of its last move if that one is
    yanked."""
    move, served = current_move(session, row), serving_move(session, row)
    return ChannelOut(
        repository=str(repositories.name_of(repository)),
        channel=row.name,
        version=served.to_release.version if served else None,
        commit=served.to_release.revision.commit if served else None,
        passes_over=None if served == move else move.to_release.version,
        yanked=served is not None and served.to_release.yanked,
        moved_at=move.at,
        moved_by=move.actor,
        move=move.id,
    )


def rollout_view(session: Session, actor: Actor, row: Channel, repository: Repository) -> RolloutOut:
    """The release that the channel serves, and the states of its nodes. Only members of the namespace see which nodes
    there are."""
    named, served = repositories.name_of(repository), serving_move(session, row)
    nodes = fleet.nodes_of(session, ChannelName(named, row.name), actor.at)
    return RolloutOut(
        repository=str(named),
        channel=row.name,
        move=current_move(session, row).id,
        version=served.to_release.version if served else None,
        commit=served.to_release.revision.commit if served else None,
        totals=fleet.totals(nodes),
        proved=sum(node.is_proved for node in nodes),
        nodes=[RolloutNodeOut.of(node) for node in nodes] if holds(actor, Role.READER, str(named)) else [],
    )


def canary_view(session: Session, actor: Actor, canary: Canary, repository: RepositoryName, channel: str) -> CanaryOut:
    """Only members of the namespace see live figures."""
    is_member = holds(actor, Role.READER, str(repository))
    own, served = canaries.figures(session, canary)
    watch = Watch.model_validate(canary.watch) if canary.watch and canary.ended_at is None else None
    return CanaryOut.of(
        canary,
        repository=str(repository),
        channel=channel,
        version=canary.release.version,
        served=canary.served.version,
        next_weight=watch.after(canary.weight) if watch else None,
        why=canaries.why(canary, actor.at),
        requests=(own.requests, served.requests) if is_member else None,
        rules=[StandingOut.model_validate(row) for row in canary.report if is_member],
    )


def move_view(moved: ChannelMove, repository: RepositoryName, channel: str) -> MoveOut:
    return MoveOut.model_validate(move_document(moved, repository, channel))


def judgement_view(judgement: Judgement, wanted: PromotionRequest) -> JudgementOut:
    return JudgementOut.model_validate(
        {
            "repository": str(wanted.repository),
            "channel": wanted.channel,
            "version": str(wanted.version),
            "verdict": str(judgement.verdict),
            "served": judgement.served,
            "move": judgement.move,
            "gates": [result.with_waiting() for result in judgement.report.results],
            "error": judgement.error.to_row() if judgement.error else None,
        }
    )


def promotion_view(row: Promotion) -> PromotionOut:
    return PromotionOut.of(
        row,
        repository=str(repositories.name_of(row.release.repository)),
        channel=row.channel.name,
        version=row.release.version,
        move=row.move_id,
        job=row.job_id,
    )


def job_view(session: Session, row: Job) -> JobOut:
    return _job_views(session, [row])[0]


def job_documents(session: Session, ids: Sequence[int]) -> dict[int, JobOut]:
    """The jobs with these ids, as far as they exist, with the same queries whatever their number."""
    return {view.id: view for view in _job_views(session, queue.find_all(session, ids))}


def composition_documents(session: Session, ids: Sequence[int]) -> dict[int, CompositionOut]:
    """The compositions with these ids, as far as they exist, in one query."""
    return {row.id: composition_view(row, job) for row, job in compositions.find_all(session, ids)}


def job_page(session: Session, rows: Sequence[Job]) -> list[JobOut]:
    """Renders jobs without the logs of their steps, with the same queries whatever the page length."""
    views = _job_views(session, rows)
    return [
        view.model_copy(update={"steps": [step.model_copy(update={"log": []}) for step in view.steps]})
        for view in views
    ]


def _job_views(session: Session, rows: Sequence[Job]) -> list[JobOut]:
    now = database_now(session)
    needed, waiting = needs.needs_of(session, rows), needs.waiting(session, rows, now)
    return [
        JobOut.of(
            row,
            priority=Priority.of(row.priority),
            needs=sorted(needed[row.id].names),
            waits_for=waiting.get(row.id),
            stalled_since=queue.stalled_since(row, now),
        )
        for row in rows
    ]


def composition_view(row: Composition, job: Job) -> CompositionOut:
    return CompositionOut.of(
        row,
        job=job.id,
        state=job.state,
        plan=row.plan_only,
        result=row.results[0] if row.results else None,
        steps=job.steps,
        error=job.error,
    )


def conflicts_view(session: Session, row: ConflictCheck) -> ConflictsOut:
    job, lock = queue.find(session, row.job_id or 0), row.lock
    named = CheckedInput.model_fields.keys()
    return ConflictsOut.model_validate(
        {
            "id": row.id,
            "job": job.id,
            "state": job.state,
            "base": {"digest": lock["base"], "name": session.get_one(Base, lock["base"]).name},
            "inputs": [{name: member[name] for name in named if name in member} for member in lock["inputs"]],
            "method": lock["method"],
            "settings": lock["settings"],
            "report": row.report,
            "steps": job.steps,
            "error": job.error,
        }
    )


def audit_view(row: AuditRow) -> AuditOut:
    return AuditOut.of(row, token=row.token_id)


def sealed_view(seal: Seal, row: Mapping[str, Any] | None) -> SealedAuditOut:
    return SealedAuditOut(
        number=seal.number,
        id=seal.audit_id,
        content=seal.content,
        removal=seal.removal,
        digest=seal.digest,
        row=AuditOut(**row) if row is not None else None,
    )


def delivery_view(row: WebhookDelivery) -> DeliveryOut:
    next_at = max(row.due_at, row.created_at) if row.due_at else None
    return DeliveryOut.of(row, message_id=message_id(row.audit_id), next_at=next_at)


def policy_view(session: Session, repository: Repository, channel: str, now: datetime) -> PolicyOut:
    """A channel's own policy, and its namespace's, if that has one."""
    scope = policies.scope_of(repository, channel)
    own, shared = policies.find(session, scope), None
    if policies.find(session, scope.in_namespace()).revision:
        row = policies.exception_of(session, repository, channel, now)
        shared = shared_policy_view(session, scope.in_namespace(), [exception_view(scope, row)] if row else [])
    pins = _pins_view(session, own.pins)
    return PolicyOut(channel=channel, revision=own.revision, policy=own.policy.to_json(), pins=pins, shared=shared)


def shared_policy_view(session: Session, scope: PolicyScope, exceptions: Sequence[ExceptionOut]) -> NamespacePolicyOut:
    """A namespace's policy, with exceptions from it."""
    stored = policies.find(session, scope)
    return NamespacePolicyOut(
        namespace=scope.namespace,
        channel=scope.channel,
        revision=stored.revision,
        policy=stored.policy.to_json(),
        pins=_pins_view(session, stored.pins),
        exceptions=list(exceptions),
    )


def exception_view(scope: PolicyScope, row: PolicyException) -> ExceptionOut:
    return ExceptionOut.of(row, repository=f"{scope.namespace}/{scope.name}")


def _pins_view(session: Session, pins: policies.Pins) -> dict[str, PinOut]:
    changed = policies.changes_since(session, pins)
    return {name: PinOut.model_validate({**pin, "changed": changed.get(name)}) for name, pin in pins.items()}
