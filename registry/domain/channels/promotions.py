"""Judges promotions without making them; requests, judges again, completes and cancels those that wait."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from registry.database.tables import Approval, Channel, Move, Namespace, Promotion, Release
from registry.domain.access import audit, tokens
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, holds, permit
from registry.domain.catalog import releases, repositories, set_members
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import moves, pending
from registry.domain.channels.moves import Waiting
from registry.domain.channels.pending import PENDING
from registry.domain.channels.policy import judging, policies
from registry.domain.channels.policy.judging import Expected, PolicyReport, PromotionRequest, PromotionVerdict
from registry.domain.channels.serving import ChannelMove, locked_channel, serving_move, unspent_approvals
from registry.domain.jobs import evaluations, queue
from registry.domain.jobs.evaluations import WantedScore
from registry.errors import Conflict, NotAllowed, Refused, RegistryError, Stale, Unavailable
from registry.formats.references import parse_name, parse_version, refuse_ambiguous_channel

RECHECK = timedelta(seconds=15)
"""A waiting promotion is judged again at least this often: its evaluation may have failed."""


def request(session: Session, actor: Actor, wanted: PromotionRequest) -> ChannelMove | Promotion:
    """Promotes the release, or waits for what it lacks (see `moves.attempt`). A channel has one waiting promotion: a
    new one replaces an earlier one."""
    outcome = moves.attempt(session, actor, wanted)
    if isinstance(outcome, ChannelMove):
        return outcome
    earlier = pending.of_channel(session, outcome.channel_id)
    if earlier is not None:
        pending.end_replaced(session, actor, earlier, str(wanted.version))
    promotion = Promotion(
        channel=session.get_one(Channel, outcome.channel_id),
        release=outcome.release,
        state=PENDING,
        expected_move=outcome.seen,
        actor=actor.name,
        token_id=actor.token_id,
        source=actor.source,
        reason=wanted.reason,
        gates=_rows(outcome.report),
        job_id=None,
        move_id=None,
        error=None,
        created_at=actor.at,
        due_at=actor.at,
        expires_at=actor.at + timedelta(hours=outcome.report.expires_hours),
        ended_at=None,
    )
    session.add(promotion)
    session.flush()
    _wait(session, actor, promotion, outcome)
    if earlier is not None:  # not before: this promotion may need the same evaluation
        pending.cancel_evaluation(session, earlier, actor.at)
    audit.record(
        session,
        actor,
        Act.PROMOTION_REQUEST,
        wanted.subject,
        namespace=wanted.repository.namespace,
        reason=wanted.reason,
        after={"version": str(wanted.version), "move": outcome.seen, "job": promotion.job_id},
        promotion=promotion.id,
        gates=promotion.gates,
    )
    return promotion


def settle(session: Session, promotion_id: int, now: datetime) -> Promotion:
    """Judges a waiting promotion again, with the rights that its requester has now: completes it, ends it, or leaves it
    waiting. The move, if any, is recorded in this transaction, under the lock that all moves of the channel take."""
    promotion = _locked(session, promotion_id)
    if promotion.state != PENDING:
        return promotion
    wanted = _wanted(promotion)
    actor = tokens.actor_now(session, promotion.actor, promotion.token_id, promotion.source, now)
    try:
        _refuse_expired(promotion, now)
        _refuse_without_role(actor, promotion, wanted)
        with session.begin_nested():
            given_up = _given_up(session, promotion)
            outcome = moves.attempt(session, actor, wanted, completing=promotion.id, given_up=given_up)
    except Unavailable:
        raise
    except RegistryError as error:
        if error.findings:
            promotion.gates = list(error.findings)
        ended = "expired" if error.code == "promotion_expired" else "refused"
        pending.end(session, actor, promotion, "conflict" if isinstance(error, Stale) else ended, error)
        return promotion
    if isinstance(outcome, Waiting):
        _wait(session, actor, promotion, outcome)
        return promotion
    promotion.gates = [{**row, "waiting": False} for row in outcome.gates]
    pending.end(session, actor, promotion, "completed", move_id=outcome.id)
    return promotion


def cancel(session: Session, actor: Actor, promotion: Promotion) -> Promotion:
    """Cancels a waiting promotion. Raises Conflict for one that ended."""
    promotion = _locked(session, promotion.id)
    pending.refuse_ended(promotion)
    subject = pending.subject(promotion)
    error = Conflict(
        "promotion_cancelled",
        f"{actor.name} cancelled the promotion of {promotion.release.version} to {subject}.",
        subject=subject,
    )
    pending.end(session, actor, promotion, "cancelled", error)
    return promotion


def approve(session: Session, actor: Actor, release: Release, channel: str, reason: str) -> Approval:
    """Approves a release for a channel, under the lock that moves of the channel take. Raises Refused if its policy
    requires no approval, NotAllowed without the role or for one's own promotion."""
    repository = release.repository
    subject = f"{repositories.name_of(repository)}@{channel}"
    role = policies.approver(policies.in_force(session, repository, channel, actor.at))
    if role is None:
        raise Refused(
            "approval_not_needed",
            f"The policy of {subject} requires no approval.",
            subject=subject,
            next_step=f"`adaptory policy show {subject}` shows what it requires.",
        )
    permit(actor, role, repository.namespace)
    locked = moves.lock(session, repository, channel)
    own = waiting_for(session, release, channel)
    if own is not None and own.actor == actor.name:
        raise NotAllowed(
            "own_promotion",
            f"{actor.name} promotes {release.version} to {subject}, so someone else must approve it.",
            subject=subject,
            next_step=f"Ask someone else with the role {role}.",
        )
    row = session.get(Approval, (release.id, channel, actor.name))
    counts = row in unspent_approvals(session, release, channel)
    row = row or Approval(release_id=release.id, channel=channel, user=actor.name)
    if not counts or row.reason != reason:
        row.token_id, row.reason, row.at = actor.token_id, reason, actor.at
        last = select(func.max(Move.id)).where(Move.channel_id == locked.id)  # of a deleted channel too
        row.after_move = session.scalar(last) or moves.NOTHING_YET
        session.add(row)
        session.flush()
        audit.record(
            session,
            actor,
            Act.PROMOTION_APPROVE,
            subject,
            namespace=repository.namespace,
            reason=reason,
            after={"version": release.version},
        )
    return row


def withdraw(session: Session, actor: Actor, release: Release, channel: str) -> bool:
    """Withdraws the actor's own approval; returns whether there was one."""
    session.scalar(locked_channel(release.repository, channel))
    own = (Approval.release_id == release.id, Approval.channel == channel, Approval.user == actor.name)
    withdrawn = session.scalar(delete(Approval).where(*own).returning(Approval.user)) is not None
    if withdrawn:
        audit.record(
            session,
            actor,
            Act.PROMOTION_APPROVE,
            f"{repositories.name_of(release.repository)}@{channel}",
            namespace=release.repository.namespace,
            before={"version": release.version},
        )
    return withdrawn


def counting_approvals(session: Session, user: str) -> list[tuple[Approval, Release]]:
    """The approvals of a user that no move has used up, newest first."""
    query = select(Approval, Release).join(Release, Release.id == Approval.release_id)
    rows = session.execute(query.where(Approval.user == user).order_by(Approval.at.desc())).all()
    return [
        (approval, release)
        for approval, release in rows
        if approval in unspent_approvals(session, release, approval.channel)
    ]


def waiting_for(session: Session, release: Release, channel: str) -> Promotion | None:
    """The promotion of the release that the channel waits for."""
    query = select(Promotion).join(Channel, Channel.id == Promotion.channel_id)
    query = query.where(Channel.name == channel, Promotion.state == PENDING, Promotion.release_id == release.id)
    return session.scalar(query)


def _wait(session: Session, actor: Actor, promotion: Promotion, outcome: Waiting) -> None:
    """Stores the report, queues the missing measurements, and returns when to look again."""
    promotion.gates = _rows(outcome.report)
    if wanted := outcome.report.lacking:
        job = evaluations.under_way(session, wanted)
        job = job or evaluations.create(session, actor, _namespaces(session, promotion, wanted), wanted)
        promotion.job_id = job.id
    until = outcome.report.until or promotion.expires_at
    promotion.due_at = min(until, promotion.expires_at, actor.at + RECHECK)
    session.flush()


def _namespaces(session: Session, promotion: Promotion, wanted: Sequence[WantedScore]) -> set[str]:
    """The namespaces of the promotion and of the measured releases. With an input in another one, the job belongs to
    none: its error may name that input."""
    measured = select(Release).where(
        Release.id.in_([subject.release for subject in wanted if subject.release is not None])
    )
    return {
        promotion.release.repository.namespace,
        *(release.repository.namespace for release in session.scalars(measured)),
    }


def _rows(report: PolicyReport) -> list[dict[str, Any]]:
    return [result.with_waiting() for result in report.results]


def _given_up(session: Session, promotion: Promotion) -> Mapping[WantedScore, str]:
    """The measurements that the promotion's evaluation still lacked when it ended: they will not come. Has
    the errors of a job within the promotion's namespace only."""
    if promotion.job_id is None:
        return {}
    job = queue.find(session, promotion.job_id)
    if job.state not in queue.FINISHED:
        return {}
    if (
        job.state != "done" and job.created_by != promotion.actor
    ):  # a joined job, which ended for reasons of its own requester
        return {}
    why = f"job {job.id} is {job.state}"
    shown = job.namespace == promotion.release.repository.namespace
    if job.error and shown:
        why += f": {job.error['detail']}"
    row = evaluations.find(session, job.id)
    return {
        **{WantedScore(**subject): why for subject in row.wanted},
        **{WantedScore.of(result): result["error"] for result in row.results if result["error"] and shown},
    }


def _locked(session: Session, promotion_id: int) -> Promotion:
    """The promotion, read after locking its channel against moves."""
    promotion = session.get_one(Promotion, promotion_id)
    lock = select(Channel).where(Channel.id == promotion.channel_id).with_for_update()
    session.scalars(lock.execution_options(populate_existing=True)).one()
    session.refresh(promotion)
    return promotion


def _wanted(promotion: Promotion) -> PromotionRequest:
    repository = promotion.release.repository
    name, version = repositories.name_of(repository), parse_version(promotion.release.version)
    return PromotionRequest(
        name,
        version,
        promotion.channel.name,
        Kind(repository.kind),
        reason=promotion.reason,
        expected=Expected(promotion.expected_move),
    )


def _refuse_expired(promotion: Promotion, now: datetime) -> None:
    if now < promotion.expires_at:
        return
    open_rules = "; ".join(row["rule"] for row in promotion.gates if not row["passed"])
    raise Refused(
        "promotion_expired",
        f"The promotion of {promotion.release.version} has waited since {promotion.created_at:%Y-%m-%d %H:%M} UTC for: "
        f"{open_rules}.",
        subject=pending.subject(promotion),
        next_step="Promote it again once these are met; `expires_hours` in the policy says how long a promotion waits.",
        findings=[{**row, "waiting": False} for row in promotion.gates],
    )


def _refuse_without_role(actor: Actor, promotion: Promotion, wanted: PromotionRequest) -> None:
    namespace = wanted.repository.namespace
    if not holds(actor, Role.RELEASER, namespace):
        raise NotAllowed(
            "role_lost",
            f"{actor.name} requested the promotion of {promotion.release.version} with a token that no longer has the "
            f"role {Role.RELEASER} in {namespace}.",
            subject=namespace,
            next_step="Promote it with a token that has the role.",
        )


# Judging a promotion without making it.


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """`report` has the results of the rules. `error` refuses the promotion for another reason. `served` is the
    version that the channel serves, None for an empty one, `move` the id of its last move, or NOTHING_YET."""

    verdict: PromotionVerdict
    report: PolicyReport
    error: Refused | None
    served: str | None
    move: int


def judge(session: Session, actor: Actor, wanted: PromotionRequest) -> Judgement:
    """Judges the promotion as `moves.attempt` would now if `actor` requested it. Takes no lock and changes nothing. A
    channel that does not exist yet is judged as an empty one. Raises NotFound for an unknown release, and Usage or
    Conflict for a name that no channel may have."""
    release = releases.find(session, wanted.repository, wanted.version, wanted.kind)
    channel = _channel(session, release, wanted)
    current = session.get_one(Move, channel.move_id) if channel and channel.move_id else None
    if current is not None:
        actor = replace(actor, at=max(actor.at, current.at))
    in_force = policies.in_force(session, release.repository, wanted.channel, actor.at)
    report = judging.judge(session, actor, release.id, channel.id if channel else None, in_force, {})
    error = _refusal(session, release, wanted)
    verdict = report.verdict(served=current is not None and current.to_release_id == release.id)
    serving = serving_move(session, channel) if channel else None
    return Judgement(
        verdict=PromotionVerdict.REFUSED if error else verdict,
        report=report,
        error=error,
        served=serving.to_release.version if serving else None,
        move=current.id if current else moves.NOTHING_YET,
    )


def _channel(session: Session, release: Release, wanted: PromotionRequest) -> Channel | None:
    """The channel, if there is one. Raises as the promotion that would create it."""
    name = parse_name(wanted.channel, "channel")
    query = select(Channel).where(Channel.repository_id == release.repository_id, Channel.name == name)
    channel = session.scalar(query)
    if channel is None:
        refuse_ambiguous_channel(name)
        repositories.refuse_shadowed(session, wanted.repository, name)
    return channel


def _refusal(session: Session, release: Release, wanted: PromotionRequest) -> Refused | None:
    """Refusals that no policy can lift: a missing signature, or a yank."""
    namespace = session.get_one(Namespace, wanted.repository.namespace)
    named = (release.signed_by, release.signature_covers)
    try:
        moves.refuse_unsigned(session, release.id, releases.SignaturePolicy.of(namespace), named, wanted)
        judging.refuse_unpromotable(release.yank_reason if release.yanked else None, wanted)
        if wanted.kind is Kind.SET:
            set_members.refuse_withdrawn(session, release.id, wanted.release)
    except Refused as error:
        return error
    return None
