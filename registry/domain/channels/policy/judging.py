"""Judges a promotion by the policies that are in force for its channel, and words their refusals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from functools import cache

from sqlalchemy.orm import Session

from registry.database.tables import Base, Channel, Release
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import metrics, suites
from registry.domain.catalog.repositories import Kind
from registry.domain.channels.policy import gates, policies, requirements
from registry.domain.channels.policy.gates import Contents, GateResult, Rule, ScoreConditions
from registry.domain.channels.policy.policies import InForce
from registry.domain.channels.policy.requirements import Question
from registry.domain.channels.serving import serving_move
from registry.domain.jobs.evaluations import WantedScore
from registry.errors import NotAllowed, Refused, Usage
from registry.formats.channel_policy import ChannelPolicy
from registry.formats.references import PolicyScope, RepositoryName, Version


class PromotionVerdict(StrEnum):
    """The outcome of a promotion."""

    PASSES = "passes"
    WAITS = "waits"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """The results of the policies' rules, and the scores that they wait for."""

    in_force: InForce
    results: Sequence[GateResult] = ()
    lacking: Sequence[WantedScore] = ()

    @property
    def failed(self) -> list[GateResult]:
        """The results that do not pass, those that wait included."""
        return [result for result in self.results if not result.passed]

    @property
    def waits(self) -> bool:
        """Whether every rule that does not pass yet may pass without further action."""
        return bool(self.failed) and all(result.waiting for result in self.failed)

    def verdict(self, *, served: bool) -> PromotionVerdict:
        """The outcome of a promotion without force. `served`: the last move is to the release, which then
        waits for nothing."""
        if self.failed and not self.waits:
            return PromotionVerdict.REFUSED
        return PromotionVerdict.WAITS if self.failed and not served else PromotionVerdict.PASSES

    @property
    def expires_hours(self) -> float:
        """The time that the promotion may wait, by the policy that allows least."""
        return min(policy.expires_hours for policy in self.in_force.values())

    @property
    def until(self) -> datetime | None:
        """The first moment at which a rule may pass without further action."""
        return min((result.until for result in self.results if result.until is not None), default=None)


def judge(
    session: Session,
    actor: Actor,
    release_id: int,
    channel_id: int | None,
    in_force: InForce,
    given_up: Mapping[WantedScore, str],
) -> PolicyReport:
    """Judges a release by each policy in force for a channel, whose id is None before its first promotion."""
    if all(policies.is_empty(policy) for policy in in_force.values()):
        return PolicyReport(in_force)
    # Compare with what users get: not with a yanked release on the channel.
    channel = None if channel_id is None else session.get_one(Channel, channel_id, populate_existing=True)
    served = serving_move(session, channel) if channel else None
    results: list[GateResult] = []
    lacking: dict[WantedScore, None] = {}
    for scope, policy in in_force.items():
        question = Question(
            actor=actor,
            release=session.get_one(Release, release_id),
            channel=scope.channel,
            served=served.to_release if served else None,
            given_up=given_up,
        )
        of_scores, lacks = _judge_scores(session, scope, policy, question)
        lacking |= dict.fromkeys(lacks)
        source = str(scope) if scope.of_namespace else ""
        judged = [*of_scores, *requirements.judge(session, policy, question)]
        results += [replace(result, policy=source) for result in judged]
    return PolicyReport(in_force, results, list(lacking))


def _judge_scores(
    session: Session, scope: PolicyScope, policy: ChannelPolicy, question: Question
) -> tuple[list[GateResult], list[WantedScore]]:
    if not policy.rules:
        return [], []
    release = question.release
    base = session.get_one(Base, release.base_digest)
    inputs = gates.inputs_of(session, release)
    rules = gates.parse_rules([row.rule for row in policy.rules])
    pinned = policies.find(session, scope).pins
    contents, changed = policies.pinned_contents(session, rules, pinned), policies.changes_since(session, pinned)
    own, of_base = gates.scores(session, release, contents), gates.scores(session, base, contents)
    served = gates.scores(session, question.served, contents) if question.served else None
    of_inputs = None if inputs is None else [gates.scores(session, source, contents) for source in inputs]
    hidden = inputs is not None and gates.hides(session, release, inputs)
    guards = {name for name, suite in contents.suites.items() if suite.kind == "guard"}
    sides = {"candidate": release, "base": base, **({"served": question.served} if question.served else {})}
    others = cache(lambda: {side: gates.others(session, subject, contents) for side, subject in sides.items()})
    results: list[GateResult] = []
    lacking: dict[WantedScore, None] = {}
    for rule, row in zip(rules, policy.rules, strict=True):
        needs = ScoreConditions(*policy.of_rule(row))
        best = None if of_inputs is None else gates.best_of([needs.counting(scores) for scores in of_inputs])
        against = gates.Baselines(base=of_base, served=served, inputs=best, guards=guards, hides_inputs=hidden)
        result = gates.judge_rule(rule, own, against, needs)
        if result.lacks:  # the score may be there, on another content of the suite
            result = gates.judge_rule(rule, own, replace(against, others=others()), needs)
        if result.lacks and policy.missing == "evaluate":
            named = gates.lacking(rule, own, against, needs)
            subjects = [subject for name in named for subject in _subjects(question, name, inputs or ())]
            result, lacks = _awaited(question, rule, needs, result, subjects, contents)
            lacking |= dict.fromkeys(lacks)
        if note := changed.get(rule.suite):
            result = replace(result, detail=f"{result.detail}; {note} (`{policies.repin(scope)}` accepts the change)")
        results.append(result)
    return results, list(lacking)


def _awaited(
    question: Question,
    rule: Rule,
    needs: ScoreConditions,
    result: GateResult,
    subjects: Sequence[tuple[int | None, str]],
    contents: Contents,
) -> tuple[GateResult, list[WantedScore]]:
    """The result, waiting if the missing scores of the subjects can still come, and the measurements that it needs."""
    suite = contents.suites.get(rule.suite)
    if suite is None or suite.task == suites.REPORTED:  # nobody can measure it
        return result, []
    if suite.examples < needs.min_n:
        why = f"{result.detail}; {suite.name} has {suite.examples} examples, and {needs.min_n} are needed"
        return replace(result, detail=why), []
    lacks = [WantedScore(release_id, base, suite.digest) for release_id, base in subjects]
    if over := next((question.given_up[lack] for lack in lacks if lack in question.given_up), ""):
        return replace(result, detail=f"{result.detail} ({over})"), []
    if not lacks:
        return result, []
    missing = f"a score of {rule.metric} on {contents.named(rule.suite)} is missing"
    if rule.metric not in metrics.HIGHER_IS_BETTER or suite.task in suites.ELSEWHERE:
        return replace(result, waiting=True, detail=f"{missing}: to be recorded"), []
    return replace(result, waiting=True, detail=f"{missing}: to be measured"), lacks


def _subjects(question: Question, lacks: str, inputs: Sequence[Release]) -> list[tuple[int | None, str]]:
    """The subjects whose score is missing: (release id, base digest). None for inputs whose scores the actor may not
    record."""
    release = question.release
    if lacks == "base":
        return [(None, release.base_digest)]
    if lacks == "inputs":
        may = all(holds(question.actor, Role.PUBLISHER, source.repository.namespace) for source in inputs)
        return [(source.id, source.base_digest) for source in inputs] if may else []
    one = question.served if lacks == "served" else release
    return [(one.id, one.base_digest)] if one is not None else []


# The request of a promotion, and the errors that refuse it.


SERVES_NOTHING = "none"
"""In an ETag, in the place of a version."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The channel as the caller last saw it, from its ETag: the id of the last move (`NOTHING_YET` of `moves` for no
    channel), and what it served (SERVES_NOTHING, or a version). A move's own ETag leaves that out."""

    move_id: int
    served: str | None = None


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
    "never": "the policy allows nobody to force a promotion",
}


def _forced_by(report: PolicyReport) -> tuple[PolicyScope, str]:
    """The lowest role that may force the promotion, and the policy that demands it: the strictest of those that fail,
    or that state a role."""
    failed = {result.policy for result in report.failed}
    counted = {
        scope: policy.forced_by
        for scope, policy in report.in_force.items()
        if policy.force is not None or (str(scope) if scope.of_namespace else "") in failed
    }
    strictest = list(_FORCED_BY)
    return max(counted.items(), key=lambda item: strictest.index(item[1]))


def gate_failed(wanted: PromotionRequest, report: PolicyReport) -> Refused:
    failed = [result for result in report.failed if not result.waiting] or report.failed
    return Refused(
        "gate_failed",
        f"{wanted.release} fails {len(failed)} of {len(report.results)} gates of {wanted.subject}.",
        subject=wanted.subject,
        next_step=f"Check the numbers; {_FORCED_BY[_forced_by(report)[1]]}.",
        findings=[result.with_waiting() for result in report.results],
    )


def refuse_force(actor: Actor, report: PolicyReport, wanted: PromotionRequest) -> None:
    """Raises NotAllowed if a policy does not let the actor force a promotion."""
    scope, role = _forced_by(report)
    if role == "never" or not holds(actor, Role(role), wanted.repository.namespace):
        who = "nobody" if role == "never" else f"only the role {role}"
        raise NotAllowed(
            "force_not_allowed",
            f"The policy of {scope} allows {who} to force a promotion.",
            subject=wanted.subject,
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
