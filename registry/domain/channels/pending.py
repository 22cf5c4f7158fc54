"""Waiting promotions and running canaries: listed, and ended within the transaction that decides about them."""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Canary, Channel, Job, Promotion, Release, Repository
from registry.database.tables.fleet import RUNNING
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.catalog import repositories
from registry.domain.jobs import queue
from registry.errors import Conflict, NotFound, RegistryError, Stale

PENDING = "pending"


def find(session: Session, repository: Repository, channel: str, promotion_id: int) -> Promotion:
    """The channel's promotion with this id. Raises NotFound."""
    row = session.get(Promotion, promotion_id)
    if row is None or row.channel.repository_id != repository.id or row.channel.name != channel:
        subject = f"{repositories.name_of(repository)}@{channel}"
        raise NotFound(
            "promotion_unknown",
            f"{subject} has no waiting promotion {promotion_id}.",
            subject=subject,
            next_step=f"`adaptory promotion list {subject}` shows those that wait or have waited.",
        )
    return row


def of_channel(session: Session, channel_id: int) -> Promotion | None:
    """The promotion that the channel waits for."""
    return session.scalar(select(Promotion).where(Promotion.channel_id == channel_id, Promotion.state == PENDING))


def of_name(session: Session, repository: Repository, channel: str) -> Promotion | None:
    """The promotion that the channel of this name waits for, which may be its first."""
    query = select(Promotion).join(Channel, Channel.id == Promotion.channel_id)
    query = query.where(Channel.repository_id == repository.id, Channel.name == channel)
    return session.scalar(query.where(Promotion.state == PENDING))


def list_page(session: Session, repository: Repository, channel: str, *, before: int, limit: int) -> list[Promotion]:
    """The channel's promotions that wait or have waited, newest first."""
    query = select(Promotion).join(Channel, Channel.id == Promotion.channel_id)
    query = query.where(Channel.repository_id == repository.id, Channel.name == channel)
    if before:
        query = query.where(Promotion.id < before)
    return list(session.scalars(query.order_by(Promotion.id.desc()).limit(limit)))


def due(session: Session, now: datetime) -> list[int]:
    """The promotions that are due to be judged again."""
    query = select(Promotion.id).where(Promotion.state == PENDING, Promotion.due_at <= now)
    return list(session.scalars(query.order_by(Promotion.due_at)))


def overdue(session: Session, repository: Repository, channel: str, now: datetime) -> int | None:
    """The channel's promotion that still waits though its time is up."""
    query = select(Promotion.id).join(Channel, Channel.id == Promotion.channel_id)
    query = query.where(Channel.repository_id == repository.id, Channel.name == channel)
    return session.scalar(query.where(Promotion.state == PENDING, Promotion.expires_at <= now))


def on_base(session: Session, digest: str) -> list[int]:
    """The waiting promotions whose rules may use scores measured on this base."""
    query = select(Promotion.id).join(Release, Release.id == Promotion.release_id)
    return list(session.scalars(query.where(Promotion.state == PENDING, Release.base_digest == digest)))


def refuse_ended(promotion: Promotion) -> None:
    """Raises Conflict for a promotion that no longer waits."""
    if promotion.state != PENDING:
        named = subject(promotion)
        raise Conflict(
            "promotion_ended",
            f"Promotion {promotion.id} of {named} is already {promotion.state}.",
            subject=named,
            next_step=f"There is nothing to do: `adaptory promotion list {named}` shows how it ended.",
        )


def subject(promotion: Promotion) -> str:
    return f"{repositories.name_of(promotion.release.repository)}@{promotion.channel.name}"


def end(
    session: Session,
    actor: Actor,
    promotion: Promotion,
    state: str,
    error: RegistryError | None = None,
    move_id: int | None = None,
) -> None:
    """Ends the promotion, and its evaluation if nobody else needs that. Its channel must be locked."""
    promotion.state, promotion.ended_at, promotion.move_id = state, actor.at, move_id
    promotion.error = None if error is None else error.to_row()
    session.flush()
    audit.record(
        session,
        actor,
        Act.PROMOTION_CANCEL if state == "cancelled" else Act.PROMOTION_END,
        subject(promotion),
        namespace=promotion.release.repository.namespace,
        before={"state": PENDING},
        after={"state": state, **({"move": move_id} if move_id else {})},
        promotion=promotion.id,
        version=promotion.release.version,
        error=error.to_row() if error else None,
    )
    if state not in ("completed", "replaced"):
        cancel_evaluation(session, promotion, actor.at)


def cancel_evaluation(session: Session, ended: Promotion, at: datetime) -> None:
    """Cancels what an ended promotion had queued to be measured, unless another one waits for it."""
    others = select(Promotion.id).where(Promotion.job_id == ended.job_id, Promotion.state == PENDING)
    if ended.job_id is None or session.scalars(others.limit(1)).first() is not None:
        return
    job = queue.find(session, ended.job_id)
    if job.state not in queue.FINISHED and _began_by_promotion(session, job):
        queue.request_cancel(session, job.id, at)


def _began_by_promotion(session: Session, job: Job) -> bool:
    """Whether a promotion queued the evaluation, rather than a user whose evaluation a promotion joined later."""
    began = (Promotion.job_id == job.id, Promotion.actor == job.created_by, Promotion.created_at <= job.created_at)
    return session.scalar(select(Promotion.id).where(*began).limit(1)) is not None


def end_moved(session: Session, actor: Actor, promotion_id: int) -> None:
    """Ends a promotion whose channel was moved first."""
    promotion = session.get_one(Promotion, promotion_id)
    named = subject(promotion)
    error = Stale(
        "channel_moved",
        f"{named} was moved by {actor.name} while the promotion of {promotion.release.version} waited.",
        subject=named,
        next_step=f"Look at `adaptory history {named}`, and decide.",
    )
    end(session, actor, promotion, "conflict", error)


def end_replaced(session: Session, actor: Actor, promotion: Promotion, version: str) -> None:
    """Ends a promotion that a newer request replaces. The new one may go on with its evaluation, so `cancel_evaluation`
    is left to the caller."""
    named = subject(promotion)
    error = Conflict(
        "promotion_replaced",
        f"{actor.name} asked for {version} on {named} while the promotion of {promotion.release.version} waited.",
        subject=named,
        next_step=f"`adaptory promotion list {named}` shows both.",
    )
    end(session, actor, promotion, "replaced", error)


ROLLED_BACK = "rolled_back"


def running_canary(session: Session, channel_id: int) -> Canary | None:
    """The canary that the channel runs."""
    return session.scalar(select(Canary).where(Canary.channel_id == channel_id, Canary.state == RUNNING))


def refuse_running_canary(session: Session, channel_id: int, subject: str) -> None:
    """Raises Conflict if the channel runs a canary. A rollback would change what all other requests get."""
    if canary := running_canary(session, channel_id):
        raise Conflict(
            "canary_running",
            f"{subject} runs a canary of {canary.release.version}, and still serves what it served before.",
            subject=subject,
            next_step=f"`adaptory watch {subject} --stop` ends it; then roll back if you still want to.",
        )


def end_canary(session: Session, channel_id: int, reached: int | None, at: datetime) -> None:
    """Ends the canary of a channel that has moved to the release with the id `reached`, or was deleted."""
    canary = running_canary(session, channel_id)
    if canary is None:
        return
    if canary.release_id == reached:
        close_canary(canary, "promoted", "", at)
        canary.weight = 100
    else:
        why = "The channel moved to another release." if reached else "The channel was deleted."
        close_canary(canary, "replaced", why, at)


def end_canaries_by_yank(session: Session, actor: Actor, repository: Repository) -> None:
    """Ends the canaries whose release was yanked, and those whose channels serve another release since. Nobody may
    report figures any more that would end them."""
    query = select(Canary, Channel).join(Channel, Channel.id == Canary.channel_id)
    query = query.where(Channel.repository_id == repository.id, Canary.state == RUNNING)
    for canary, channel in session.execute(query).all():
        subject = f"{repositories.name_of(repository)}@{channel.name}"
        if canary.release.yanked:
            why = f"{canary.release.version} was yanked."
        elif channel.served_id != canary.served_id:
            why = f"{subject} serves another release now."
        else:
            continue
        close_canary(canary, ROLLED_BACK, why, actor.at)
        record_canary(session, actor, canary, subject, Act.CHANNEL_WATCH, why)


def close_canary(canary: Canary, state: str, why: str, at: datetime) -> None:
    canary.state, canary.why, canary.ended_at = state, why, at


def record_canary(session: Session, actor: Actor, canary: Canary, subject: str, act: Act, reason: str) -> None:
    """Adds an audit row with the standing of the canary's rules."""
    audit.record(
        session,
        actor,
        act,
        subject,
        namespace=subject.partition("/")[0],
        reason=reason,
        after={"version": canary.release.version, "weight": canary.weight, "state": canary.state},
        canary=canary.id,
        figures=canary.report,
    )
