"""Sets and reads policies of channels, and judges releases by them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Base, Channel, Gate, Release, Repository, SuiteVersion
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import metrics, repositories, suites
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import gates, requirements
from registry.domain.channels.gates import Contents, GateResult, Rule, ScoreConditions
from registry.domain.channels.requirements import Question
from registry.domain.channels.serving import POLICY, refresh_served, serving_move
from registry.domain.jobs.evaluations import WantedScore
from registry.errors import NotAllowed, Refused, Stale, Usage
from registry.formats.channel_policy import ChannelPolicy, ScoreRule, of_rules, read_policy
from registry.formats.references import RepositoryName, Version, parse_name

Pins = Mapping[str, Mapping[str, Any]]
"""What a channel's gate rules were set on, by suite: the `digest` of its content, and `higher_is_better` by metric.

A suite's author may have no role in the namespace. The author's later changes are announced, and take effect only when
an admin of the namespace accepts them.
"""


def pin_rules(session: Session, actor: Actor, rules: Sequence[Rule], kept: Pins) -> dict[str, Any]:
    """The pins of these rules: those `kept`, and the current state of each suite or metric without one. Raises NotFound
    for a suite that the actor may not name."""
    pins: dict[str, dict[str, Any]] = {}
    for rule in rules:
        before = kept.get(rule.suite)
        if rule.suite not in pins:
            digest = before["digest"] if before else suites.find(session, rule.suite, actor).digest
            pins[rule.suite] = {"digest": digest, "higher_is_better": {}}
        better = before["higher_is_better"].get(rule.metric) if before else None
        if better is None:
            better = metrics.is_higher_better(session, rule.suite, rule.metric)
        pins[rule.suite]["higher_is_better"][rule.metric] = better
    return pins


def pins_of_channel(session: Session, repository_id: int, channel: str) -> Pins:
    """The pins of a channel's policy; none for rules set by a version without pins."""
    return session.scalar(select(Gate.pins).where(Gate.repository_id == repository_id, Gate.channel == channel)) or {}


def pinned_contents(session: Session, rules: Sequence[Rule], pins: Pins) -> Contents:
    """The content and directions that the rules are judged on: pinned ones, or else the current ones."""
    names = {rule.suite for rule in rules}
    current = {
        suite.name: suite
        for suite in session.scalars(select(SuiteVersion).where(SuiteVersion.name.in_(names), SuiteVersion.current))
    }
    digests = [pin["digest"] for name, pin in pins.items() if name in names]
    pinned = {
        suite.name: suite for suite in session.scalars(select(SuiteVersion).where(SuiteVersion.digest.in_(digests)))
    }
    directions = {(name, metric): better for name, pin in pins.items() for metric, better in _directions(pin)}
    return Contents({**current, **pinned}, directions)


def changes_since(session: Session, pins: Pins) -> dict[str, str]:
    """Describes the changes since the rules were pinned, by suite."""
    now = suites.current_labels(session, pins)
    digests = [pin["digest"] for pin in pins.values()]
    pinned = {
        suite.name: suite for suite in session.scalars(select(SuiteVersion).where(SuiteVersion.digest.in_(digests)))
    }
    changed: dict[str, str] = {}
    for name, pin in pins.items():
        notes: list[str] = []
        if name in pinned and not pinned[name].current:
            notes.append(f"pinned to {name} {suites.label(pinned[name])}, which is now {now.get(name, 'gone')}")
        for metric, better in _directions(pin):
            if metrics.is_higher_better(session, name, metric) != better:
                was, is_now = ("higher", "lower") if better else ("lower", "higher")
                notes.append(f"pinned to {was} {metric} being better, which is now {is_now}")
        if notes:
            changed[name] = "; ".join(notes)
    return changed


def _directions(pin: Mapping[str, Any]) -> list[tuple[str, bool]]:
    return list(pin["higher_is_better"].items())


_HOW = {"version", "min_n", "measured", "missing", "force", "expires_hours", "on_yank"}
"""Fields of a policy that require nothing by themselves."""
_REQUIREMENTS = tuple(name for name in ChannelPolicy.model_fields if name not in _HOW)


class PromotionVerdict(StrEnum):
    """The outcome of a promotion."""

    PASSES = "passes"
    WAITS = "waits"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """The results of a policy's rules, and the scores that they wait for."""

    results: Sequence[GateResult]
    lacking: Sequence[WantedScore]

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
    def until(self) -> datetime | None:
        """The first moment at which a rule may pass without further action."""
        return min((result.until for result in self.results if result.until is not None), default=None)


def of_columns(rules: Sequence[str] | None, policy: Mapping[str, object] | None) -> ChannelPolicy:
    """The policy in the columns of `Gate`; both are None for a channel without a policy."""
    return read_policy(policy, "policy") if policy else of_rules(list(rules or ()))


def find(session: Session, repository: Repository, channel: str) -> tuple[ChannelPolicy, int]:
    """A channel's policy and its revision; 0 if none was ever set."""
    row = session.get(Gate, (repository.id, parse_name(channel, "channel")))
    return (of_columns(row.rules, row.policy), row.revision) if row else (of_rules([]), 0)


def set_policy(
    session: Session,
    actor: Actor,
    repository: Repository,
    channel: str,
    policy: ChannelPolicy,
    *,
    expected: int | None = None,
) -> int:
    """Replaces a channel's policy; returns its revision. Rules on a suite that the policy used before keep their pins.
    Raises NotFound for an unknown suite or metric, Usage for an invalid rule or one that can never pass, and Stale if
    the revision that it replaces is not `expected`."""
    rules = gates.parse_rules([row.rule for row in policy.rules])
    for soak in policy.soak:
        parse_name(soak.channel, "channel")
    revision = _store(session, actor, repository, channel, policy, rules, Act.POLICY_SET)
    if expected is not None and revision != expected + 1:  # now that the row is locked; the error undoes the write
        name = f"{repositories.name_of(repository)}@{channel}"
        message = f"The policy of {name} has changed since you looked."
        raise Stale("policy_changed", message, subject=name)
    return revision


def set_rules(
    session: Session,
    actor: Actor,
    repository: Repository,
    channel: str,
    texts: Sequence[str] | None,
    *,
    repin: bool = False,
) -> None:
    """Replaces the gate rules of a channel's policy; none removes them, None keeps them. With `repin`, they are pinned
    to what their suites are now. Raises as `set_policy`."""
    kept, _ = find(session, repository, channel)
    if texts is not None:
        rows = tuple(ScoreRule.of(str(rule)) for rule in gates.parse_rules(texts))
        kept = kept.model_copy(update={"rules": rows})
    rules = gates.parse_rules([row.rule for row in kept.rules])
    _store(session, actor, repository, channel, kept, rules, Act.GATE_SET, repin=repin)


def _store(  # noqa: PLR0913
    session: Session,
    actor: Actor,
    repository: Repository,
    channel: str,
    policy: ChannelPolicy,
    rules: Sequence[Rule],
    act: Act,
    *,
    repin: bool = False,
) -> int:
    key = (repository.id, parse_name(channel, "channel"))
    row = session.get(Gate, key, with_for_update=True)
    named = act is Act.GATE_SET
    document = policy.to_json()
    before = ({"rules": list(row.rules)} if named else of_columns(row.rules, row.policy).to_json()) if row else None
    row = row or Gate(repository_id=repository.id, channel=channel, revision=0)
    row.pins = _pins(session, actor, policy, rules, {} if repin else row.pins or {})
    row.rules, row.policy, row.revision = [str(rule) for rule in rules], document, row.revision + 1
    session.add(row)
    session.flush()
    audit.record(
        session,
        actor,
        act,
        f"{repositories.name_of(repository)}@{channel}",
        namespace=repository.namespace,
        before=before or ({"rules": []} if named else None),
        after={"rules": row.rules} if named else document,
        revision=row.revision,
        pins=row.pins,
    )
    refresh_served(session, actor, repository, POLICY, "")
    return row.revision


def _pins(session: Session, actor: Actor, policy: ChannelPolicy, rules: Sequence[Rule], kept: Pins) -> dict[str, Any]:
    """The pins of the rules. Raises for a rule on something unknown, or that can never pass."""
    for rule in rules:
        gates.refuse_unknown(session, actor, rule)
    pinned = pin_rules(session, actor, rules, kept)
    contents = pinned_contents(session, rules, pinned)
    for rule, row in zip(rules, policy.rules, strict=True):
        gates.refuse_impossible(rule, contents.suites[rule.suite], ScoreConditions(*policy.of_rule(row)))
    return pinned


def all_rules(session: Session, repository: Repository) -> dict[str, list[Rule]]:
    """The gate rules of each channel of a repository that has a policy."""
    rows = session.scalars(select(Gate).where(Gate.repository_id == repository.id).order_by(Gate.channel))
    return {row.channel: gates.parse_rules(row.rules) for row in rows}


def forced_past_approval(session: Session) -> list[str]:
    """The channels whose policy requires an approval and lets a releaser force a promotion without it."""
    query = select(Gate, Repository).join(Repository, Repository.id == Gate.repository_id)
    rows = session.execute(query.order_by(Repository.namespace, Repository.name, Gate.channel))
    asked = [(gate, repository, of_columns(gate.rules, gate.policy)) for gate, repository in rows]
    return [
        f"{repositories.name_of(repository)}@{gate.channel}"
        for gate, repository, policy in asked
        if policy.approval is not None and policy.forced_by == "releaser"
    ]


def is_empty(policy: ChannelPolicy) -> bool:
    """Whether every release passes."""
    return not any(getattr(policy, name) for name in _REQUIREMENTS)


def judge(  # noqa: PLR0913
    session: Session,
    actor: Actor,
    release_id: int,
    name: str,
    channel_id: int | None,
    policy: ChannelPolicy,
    given_up: Mapping[WantedScore, str],
) -> PolicyReport:
    """Judges a release by the policy of the channel `name`, whose id is None before its first promotion."""
    if is_empty(policy):
        return PolicyReport([], [])
    # Compare with what users get: not with a yanked release on the channel.
    channel = None if channel_id is None else session.get_one(Channel, channel_id, populate_existing=True)
    served = serving_move(session, channel) if channel else None
    question = Question(
        actor=actor,
        release=session.get_one(Release, release_id),
        channel=name,
        served=served.to_release if served else None,
        given_up=given_up,
    )
    results, lacking = _judge_scores(session, policy, question)
    return PolicyReport([*results, *requirements.judge(session, policy, question)], lacking)


def _judge_scores(
    session: Session, policy: ChannelPolicy, question: Question
) -> tuple[list[GateResult], list[WantedScore]]:
    if not policy.rules:
        return [], []
    release = question.release
    base = session.get_one(Base, release.base_digest)
    inputs = gates.inputs_of(session, release)
    rules = gates.parse_rules([row.rule for row in policy.rules])
    pinned = pins_of_channel(session, release.repository_id, question.channel)
    contents, changed = pinned_contents(session, rules, pinned), changes_since(session, pinned)
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
            command = f"adaptory gate {repositories.name_of(release.repository)}@{question.channel} --repin"
            result = replace(result, detail=f"{result.detail}; {note} (`{command}` accepts the change)")
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
    """What the caller last saw of the channel, from its ETag: the id of the last move (`NOTHING_YET` of `moves` for no
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


def gate_failed(wanted: PromotionRequest, report: PolicyReport, policy: ChannelPolicy) -> Refused:
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
            "force_not_allowed",
            f"The policy of {wanted.subject} allows {who} to force a promotion.",
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
