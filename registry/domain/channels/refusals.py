"""What is to be promoted, and why it is refused."""

from dataclasses import dataclass

from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, holds
from registry.domain.catalog.repositories import Kind
from registry.domain.channels.policies import Report
from registry.errors import NotAllowed, Refused, Usage
from registry.formats.channel_policy import ChannelPolicy
from registry.formats.references import RepositoryName, Version


@dataclass(frozen=True, slots=True)
class Expected:
    """The id of the channel's move that the caller last saw, from its ETag; `NOTHING_YET` of `moves` for no channel."""

    move_id: int


@dataclass(frozen=True, slots=True)
class PromotionRequest:
    """The release to promote and the channel. `force` overrides failed rules, and needs a reason. If `kind` is given,
    repositories of another kind are not found."""

    repository: RepositoryName
    version: Version
    channel: str
    kind: Kind | None = None
    reason: str = ""
    force: bool = False
    expected: Expected | None = None

    @property
    def release(self) -> str:
        return f"{self.repository}:{self.version}"

    @property
    def subject(self) -> str:
        return f"{self.repository}@{self.channel}"


_FORCED_BY = {
    "releaser": "a releaser may use --force with a --reason",
    "admin": "an admin may use --force with a --reason",
    "never": "the policy lets nobody force a promotion",
}


def gate_failed(wanted: PromotionRequest, report: Report, policy: ChannelPolicy) -> Refused:
    failed = [result for result in report.failed if not result.waiting] or report.failed
    return Refused(
        "gate_failed",
        f"{wanted.release} fails {len(failed)} of {len(report.results)} gates of {wanted.subject}.",
        subject=wanted.subject,
        next_step=f"Check the numbers; {_FORCED_BY[policy.forced_by]}.",
        findings=[result.with_waiting() for result in report.results],
    )


def refuse_force(actor: Actor, policy: ChannelPolicy, wanted: PromotionRequest) -> None:
    """Raises NotAllowed if the policy does not let the actor force a promotion."""
    if policy.forced_by == "never" or not holds(actor, Role(policy.forced_by), wanted.repository.namespace):
        who = "nobody" if policy.forced_by == "never" else f"only the role {policy.forced_by}"
        raise NotAllowed(
            "force_not_allowed", f"The policy of {wanted.subject} lets {who} force a promotion.", subject=wanted.subject
        )


def refuse_unpromotable(yanked: str | None, wanted: PromotionRequest) -> None:
    if yanked is not None:
        raise Refused(
            "release_yanked",
            f"{wanted.release} is yanked: {yanked}.",
            subject=wanted.release,
            next_step="Promote another release.",
        )
    if wanted.force and not wanted.reason.strip():
        raise Usage("reason_missing", "A forced promotion needs a reason.", subject=wanted.subject)
