"""What a promotion would lead to, without making it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Channel, Move, Namespace, Release
from registry.domain.access.audit import Actor
from registry.domain.catalog import releases, repositories
from registry.domain.channels import moves, policies, refusals
from registry.domain.channels.gates import GateResult
from registry.domain.channels.policies import Verdict
from registry.domain.channels.refusals import PromotionRequest
from registry.errors import Refused
from registry.formats.references import parse_name, refuse_ambiguous_channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """`results` are those of the policy's rules. `error` is what refuses the promotion besides them. `served` is the
    version that the channel serves, None for an empty one, `move` the id of its last move, or NOTHING_YET."""

    verdict: Verdict
    results: Sequence[GateResult]
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
    policy, _ = policies.find(session, release.repository, wanted.channel)
    report = moves.judge(session, actor, release.id, wanted.channel, channel.id if channel else None, policy, {})
    error = _refusal(session, release, wanted)
    verdict = report.verdict(served=current is not None and current.to_release_id == release.id)
    given = moves.effective_move(session, channel) if channel else None
    return Judgement(
        verdict=Verdict.REFUSED if error else verdict,
        results=report.results,
        error=error,
        served=given.to_release.version if given else None,
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
    """What refuses the promotion whatever the policy says: a missing signature, or a yank."""
    namespace = session.get_one(Namespace, wanted.repository.namespace)
    named = (release.signed_by, release.signature_covers)
    try:
        moves.refuse_unsigned(session, release.id, namespace, named, wanted)
        refusals.refuse_unpromotable(release.yank_reason if release.yanked else None, wanted)
    except Refused as error:
        return error
    return None
