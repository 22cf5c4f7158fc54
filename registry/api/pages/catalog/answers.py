"""The answer at the top of a release's page: whether it is served, or could be promoted now."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from registry.api.pages.html import gates
from registry.api.pages.html.gates import GateLine
from registry.api.routes.views import judgement_view, move_view
from registry.database.engine import Session
from registry.database.tables import Release
from registry.domain.access.audit import Actor
from registry.domain.channels import moves, promotions
from registry.domain.channels.serving import moves_of_release
from registry.formats.references import RepositoryName, parse_repository, parse_version
from registry.wire.quality import ChannelOut, MoveOut

FIRST_CHOICE = "prod"
"""The channel for which a promotion is judged, if the repository has one of this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBlock:
    """`kind` selects the block's edge and mark. For a served release, `move` is the move by which `channel` serves it,
    and `judged` the promotion whose gates are shown; otherwise `report` is today's judgement, and `next` what to do.
    `others` are other channels to judge it for."""

    kind: str
    sentence: str
    channel: str | None = None
    move: MoveOut | None = None
    judged: MoveOut | None = None
    report: Sequence[GateLine] = ()
    other: str | None = None
    detail: str = ""
    next: str = ""
    others: Sequence[str] = field(default=())


@dataclass(frozen=True, slots=True)
class Channels:
    """A repository's channels, those that serve the release, and the one that the address names."""

    names: Sequence[str]
    serving: Sequence[ChannelOut]
    asked: str | None

    @property
    def preferred(self) -> list[str]:
        """The channels in order of preference for a judgement: prod first."""
        return sorted(self.names, key=lambda name: name != FIRST_CHOICE)


def moves_of(session: Session, named: RepositoryName, release: Release, limit: int) -> list[MoveOut]:
    """The moves to a release and away from it, newest first."""
    rows = moves_of_release(session, release, before=0, limit=limit)
    return [move_view(move, named, channel) for channel, move in rows]


def answer(
    session: Session, actor: Actor, release: Release, channels: Channels, moved: Sequence[MoveOut]
) -> AnswerBlock:
    """The answer for the requested channel; without one, for a channel that serves the release, for prod, or for the
    first channel, in this order. `moved` are the release's moves, newest first."""
    if release.revision.taken_down_at is not None:
        why = release.revision.takedown_reason or ""
        return AnswerBlock(kind="bad", sentence="This release was taken down.", detail=why)
    if release.yanked:
        return AnswerBlock(kind="bad", sentence="This release is yanked.", detail=release.yank_reason or "")
    serving = [served.channel for served in channels.serving]
    channel = channels.asked or next(iter((*serving, *channels.preferred)), None)
    if channel is None:
        return AnswerBlock(kind="", sentence="No channel serves this release; there is none yet.")
    others = [name for name in channels.names if name != channel]
    if channel in serving:
        return _served(release.version, channel, moved, others)
    return _judged(session, actor, release, channel, others)


def _served(version: str, channel: str, moved: Sequence[MoveOut], others: Sequence[str]) -> AnswerBlock:
    own = [move for move in moved if move.channel == channel and move.to_version == version]
    judged = next((move for move in own if move.kind == "promote"), None)
    report = gates.lines(judged.gates) if judged else []
    failed = sum(line.kind != "ok" for line in report)
    passed = "" if not report else f" It passed all {len(report)} gates." if len(report) > 1 else " It passed its gate."
    if failed:
        passed = f" It was forced: {failed} of {len(report)} gates failed."
    return AnswerBlock(
        kind="warn" if failed else "ok",
        sentence=f"{channel} serves this release.{passed}",
        channel=channel,
        move=own[0] if own else None,
        judged=judged,
        report=report,
        other=judged.from_version if judged else None,
        others=others,
    )


def _judged(session: Session, actor: Actor, release: Release, channel: str, others: Sequence[str]) -> AnswerBlock:
    named = parse_repository(f"{release.repository.namespace}/{release.repository.name}")
    asked = moves.PromotionRequest(named, parse_version(release.version), channel, None)
    view = judgement_view(promotions.judge(session, actor, asked), asked)
    report = gates.lines(view.gates)
    sentences = {
        "passes": ("ok", f"It can be promoted to {channel}{': all gates pass' if report else ''}."),
        "waits": ("warn", f"A promotion to {channel} would wait."),
        "refused": ("bad", f"It cannot be promoted to {channel}: {_failed(report)}."),
    }
    kind, sentence = sentences[view.verdict]
    error = view.error
    return AnswerBlock(
        kind=kind,
        sentence=sentence if not error else f"It cannot be promoted to {channel}.",
        channel=channel,
        report=report,
        other=view.served,
        detail=error["detail"] if error else "",
        next=error["next"] if error else "",
        others=others,
    )


def _failed(report: Sequence[GateLine]) -> str:
    failed = sum(line.kind != "ok" for line in report)
    verb = "fails" if failed == 1 else "fail"
    return f"{failed} of {len(report)} gates {verb}" if len(report) > 1 else "its gate fails"
