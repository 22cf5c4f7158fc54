"""Policies of channels: of one channel of a repository, of the channels of one name in a namespace, and exceptions.

A release must meet both policies that are in force for a channel. An exception lifts the namespace's requirements for
one repository until its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypedDict

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import (
    Channel,
    Gate,
    Namespace,
    NamespacePolicy,
    PolicyException,
    Repository,
    SuiteVersion,
)
from registry.domain.access import audit, namespaces
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, unknown_namespace
from registry.domain.catalog import metrics, repositories, suites
from registry.domain.channels.policy import gates
from registry.domain.channels.policy.gates import Contents, Rule, ScoreConditions
from registry.domain.channels.serving import POLICY, refresh_served
from registry.errors import NotFound, Stale, Usage
from registry.formats.channel_policy import ChannelPolicy, ScoreRule, of_rules, read_policy
from registry.formats.references import ALL_REPOSITORIES, PolicyScope, RepositoryName, parse_name
from registry.formats.watch import Watch

MAX_EXCEPTION = timedelta(days=366)


class Pin(TypedDict):
    """What the gate rules on a suite were set on: the digest of its content, and by metric whether more is better."""

    digest: str
    higher_is_better: dict[str, bool]


Pins = Mapping[str, Pin]
"""The pins of a channel, by suite.

A suite's author may have no role in the namespace. The author's later changes are announced, and take effect only when
an admin of the namespace accepts them.
"""


def pin_rules(session: Session, actor: Actor, rules: Sequence[Rule], kept: Pins) -> dict[str, Pin]:
    """The pins of these rules: those `kept`, and the current state of each suite or metric without one. Raises NotFound
    for a suite that the actor may not name."""
    pins: dict[str, Pin] = {}
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


def _directions(pin: Pin) -> list[tuple[str, bool]]:
    return list(pin["higher_is_better"].items())


_HOW = {"version", "min_n", "measured", "missing", "force", "expires_hours", "on_yank"}
"""Fields of a policy that require nothing by themselves."""
_REQUIREMENTS = tuple(name for name in ChannelPolicy.model_fields if name not in _HOW)


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A policy and its revision, which is 0 if none was ever set. Rules set by a version without pins have none."""

    policy: ChannelPolicy
    revision: int = 0
    pins: Pins = field(default_factory=dict[str, Pin])


InForce = Mapping[PolicyScope, ChannelPolicy]
"""The policies that a promotion to a channel must meet: the channel's own, which may be empty, and its namespace's."""


def scope_of(repository: Repository, channel: str) -> PolicyScope:
    return PolicyScope(repository.namespace, repository.name, channel)


def repin(scope: PolicyScope) -> str:
    """The command that pins a policy's rules to what their suites are now."""
    return f"adaptory policy set '{scope}' --repin" if scope.of_namespace else f"adaptory gate {scope} --repin"


def of_columns(rules: Sequence[str] | None, policy: Mapping[str, object] | None) -> ChannelPolicy:
    """The policy in the columns of `Gate`; both are None for a channel without a policy."""
    return read_policy(policy, "policy") if policy else of_rules(list(rules or ()))


def find(session: Session, scope: PolicyScope) -> StoredPolicy:
    """The policy that was set for this scope."""
    row = _row(session, scope)
    if row is None:
        return StoredPolicy(of_rules([]))
    return StoredPolicy(of_columns(_rules(row), row.policy), row.revision, row.pins or {})


def in_force(session: Session, repository: Repository, channel: str, now: datetime) -> InForce:
    """The policies in force for a channel."""
    own = scope_of(repository, channel)
    shared = None if exception_of(session, repository, channel, now) else _row(session, own.in_namespace())
    return combined(own, find(session, own).policy, shared.policy if shared else None)


def combined(own: PolicyScope, policy: ChannelPolicy, shared: Mapping[str, object] | None) -> InForce:
    """The policies in force: the channel's own, and its namespace's document, which is None without one."""
    return {own: policy} | ({own.in_namespace(): read_policy(shared, "policy")} if shared else {})


def approver(in_force: InForce) -> Role | None:
    """The lowest role whose approval counts for one of the policies; None if none requires an approval."""
    roles = [Role(policy.approval.role) for policy in in_force.values() if policy.approval is not None]
    return min(roles, key=list(Role).index, default=None)


def watch_of(session: Session, scope: PolicyScope) -> Watch | None:
    """The watch of the channel's canaries: as its own policy states or, if that does not, its namespace's."""
    return find(session, scope).policy.watch or find(session, scope.in_namespace()).policy.watch


def of_namespace(session: Session, namespace: str) -> dict[PolicyScope, StoredPolicy]:
    """The policies of a namespace, by channel."""
    query = select(NamespacePolicy).where(NamespacePolicy.namespace == namespace).order_by(NamespacePolicy.channel)
    return {
        PolicyScope(namespace, ALL_REPOSITORIES, row.channel): StoredPolicy(
            read_policy(row.policy, "policy"), row.revision, row.pins
        )
        for row in session.scalars(query)
    }


def _row(session: Session, scope: PolicyScope) -> Gate | NamespacePolicy | None:
    channel = parse_name(scope.channel, "channel")
    if scope.of_namespace:
        return session.get(NamespacePolicy, (scope.namespace, channel))
    named = (Repository.namespace == scope.namespace, Repository.name == scope.name)
    query = select(Gate).join(Repository, Repository.id == Gate.repository_id)
    return session.scalar(query.where(*named, Gate.channel == channel))


def _rules(row: Gate | NamespacePolicy) -> list[str]:
    return row.rules if isinstance(row, Gate) else []


def set_policy(
    session: Session, actor: Actor, scope: PolicyScope, policy: ChannelPolicy, *, expected: int | None = None
) -> int:
    """Replaces the policy of a scope; returns its revision. Rules on a suite that the policy used before keep their
    pins. Raises NotFound for an unknown suite or metric, Usage for an invalid rule or one that can never pass, and
    Stale if the revision that it replaces is not `expected`."""
    rules = gates.parse_rules([row.rule for row in policy.rules])
    for soak in policy.soak:
        parse_name(soak.channel, "channel")
    revision = _store(session, actor, scope, policy, rules, Act.POLICY_SET)
    if expected is not None and revision != expected + 1:  # now that the row is locked; the error undoes the write
        message = f"The policy of {scope} has changed since you looked."
        raise Stale("policy_changed", message, subject=str(scope))
    return revision


def set_rules(
    session: Session, actor: Actor, scope: PolicyScope, texts: Sequence[str] | None, *, repin: bool = False
) -> None:
    """Replaces the gate rules of a policy; none removes them, None keeps them. With `repin`, they are pinned to what
    their suites are now. Raises as `set_policy`."""
    kept = find(session, scope).policy
    if texts is not None:
        rows = tuple(ScoreRule.of(str(rule)) for rule in gates.parse_rules(texts))
        kept = kept.model_copy(update={"rules": rows})
    rules = gates.parse_rules([row.rule for row in kept.rules])
    _store(session, actor, scope, kept, rules, Act.GATE_SET, repin=repin)


def _store(  # noqa: PLR0913
    session: Session,
    actor: Actor,
    scope: PolicyScope,
    policy: ChannelPolicy,
    rules: Sequence[Rule],
    act: Act,
    *,
    repin: bool = False,
) -> int:
    namespaces.refuse_alone(actor, _lock(session, scope))
    row = _row(session, scope)
    named = act is Act.GATE_SET
    document = policy.to_json()
    stored = of_columns(_rules(row), row.policy).to_json() if row else None
    before = {"rules": _rules(row) if row else []} if named else stored
    row = row or _new_row(session, scope)
    row.pins = _pins(session, actor, policy, rules, {} if repin else row.pins or {})
    row.policy, row.revision = document, row.revision + 1
    if isinstance(row, Gate):
        row.rules = [str(rule) for rule in rules]
    session.add(row)
    session.flush()
    audit.record(
        session,
        actor,
        act,
        str(scope),
        namespace=scope.namespace,
        before=before,
        after={"rules": [str(rule) for rule in rules]} if named else document,
        revision=row.revision,
        pins=row.pins,
    )
    for repository in _repositories(session, scope, moved=(stored or {}).get("on_yank") != document.get("on_yank")):
        refresh_served(session, actor, repository, POLICY, "")
    return row.revision


def _lock(session: Session, scope: PolicyScope) -> Namespace:
    """Waits for the moves that are judged by the old policy; later ones wait for this transaction, and are judged by
    the new one. The audit log has them in this order. Moves, too, lock their channel before the namespace. Returns the
    namespace."""
    query = select(Channel.id).join(Repository).where(Repository.namespace == scope.namespace)
    if not scope.of_namespace:
        query = query.where(Repository.name == scope.name)
    session.scalars(query.order_by(Channel.id).with_for_update(of=Channel)).all()
    named = select(Namespace).where(Namespace.name == scope.namespace).execution_options(populate_existing=True)
    row = session.scalar(named.with_for_update(key_share=True))
    if row is None:
        raise unknown_namespace(scope.namespace)
    return row


def _new_row(session: Session, scope: PolicyScope) -> Gate | NamespacePolicy:
    if scope.of_namespace:
        return NamespacePolicy(namespace=scope.namespace, channel=scope.channel, revision=0)
    repository = repositories.find(session, RepositoryName(scope.namespace, scope.name))
    return Gate(repository_id=repository.id, channel=scope.channel, revision=0)


def _repositories(session: Session, scope: PolicyScope, *, moved: bool) -> list[Repository]:
    """The repositories whose channels may serve something else under a new policy; those of a namespace only if its
    rule for yanked releases has changed, since it may have thousands."""
    query = select(Repository).where(Repository.namespace == scope.namespace).order_by(Repository.id)
    if not scope.of_namespace:
        return list(session.scalars(query.where(Repository.name == scope.name)))
    if not moved:
        return []
    named = select(Channel.repository_id).where(Channel.name == scope.channel)
    return list(session.scalars(query.where(Repository.id.in_(named))))


def _pins(session: Session, actor: Actor, policy: ChannelPolicy, rules: Sequence[Rule], kept: Pins) -> dict[str, Pin]:
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
    """The policies that require an approval and let a releaser force a promotion without it."""
    query = select(Gate, Repository).join(Repository, Repository.id == Gate.repository_id)
    rows = session.execute(query.order_by(Repository.namespace, Repository.name, Gate.channel))
    asked = {scope_of(repository, gate.channel): of_columns(gate.rules, gate.policy) for gate, repository in rows}
    shared = session.scalars(select(NamespacePolicy).order_by(NamespacePolicy.namespace, NamespacePolicy.channel))
    for row in shared:
        asked[PolicyScope(row.namespace, ALL_REPOSITORIES, row.channel)] = read_policy(row.policy, "policy")
    return [
        str(scope) for scope, policy in asked.items() if policy.approval is not None and policy.forced_by == "releaser"
    ]


def is_empty(policy: ChannelPolicy) -> bool:
    """Whether every release passes."""
    return not any(getattr(policy, name) for name in _REQUIREMENTS)


# Exceptions from a namespace's policy.


def exception_of(session: Session, repository: Repository, channel: str, now: datetime) -> PolicyException | None:
    """The exception that exempts the channel from its namespace's policy now."""
    row = session.get(PolicyException, (repository.id, parse_name(channel, "channel")))
    return row if row and row.until > now else None


def grant_exception(
    session: Session, actor: Actor, repository: Repository, channel: str, until: datetime, reason: str
) -> PolicyException:
    """Exempts a channel from its namespace's policy until a time, in the place of an earlier exception. Raises NotFound
    if the namespace has no policy for channels of this name, and Usage without a reason or with an end that is past or
    more than MAX_EXCEPTION away."""
    scope = scope_of(repository, channel)
    if find(session, scope.in_namespace()).revision == 0:
        raise NotFound(
            "policy_unknown",
            f"{scope.namespace} has no policy for channels named {channel}.",
            subject=str(scope.in_namespace()),
        )
    if not reason.strip():
        raise Usage("reason_missing", f"An exception for {scope} needs a reason.", subject=str(scope))
    if not actor.at < until <= actor.at + MAX_EXCEPTION:
        raise Usage(
            "bad_exception_end",
            f"An exception for {scope} cannot end at {until:%Y-%m-%d %H:%M} UTC.",
            subject=str(scope),
            next_step=f"Name a time within the next {MAX_EXCEPTION.days} days.",
        )
    namespaces.refuse_alone(actor, _lock(session, scope))
    row = session.get(PolicyException, (repository.id, channel))
    before = _exception_facts(row) if row else None
    row = row or PolicyException(repository_id=repository.id, channel=channel)
    row.until, row.reason, row.created_at, row.created_by = until, reason, actor.at, actor.name
    session.add(row)
    session.flush()
    after = _exception_facts(row)
    _record_exception(session, actor, scope, before=before, after=after, reason=reason)
    return row


def end_exception(session: Session, actor: Actor, repository: Repository, channel: str) -> None:
    """Ends an exception before its time. Raises NotFound if none is in force."""
    scope = scope_of(repository, channel)
    namespaces.refuse_alone(actor, _lock(session, scope))
    row = exception_of(session, repository, channel, actor.at)
    if row is None:
        raise NotFound("exception_unknown", f"{scope} has no exception.", subject=str(scope))
    session.delete(row)
    _record_exception(session, actor, scope, before=_exception_facts(row), after=None, reason=None)


def exceptions_of_namespace(
    session: Session, namespace: str, now: datetime
) -> list[tuple[PolicyScope, PolicyException]]:
    """The exceptions in force in a namespace."""
    query = select(PolicyException, Repository).join(Repository, Repository.id == PolicyException.repository_id)
    query = query.where(Repository.namespace == namespace, PolicyException.until > now)
    rows = session.execute(query.order_by(Repository.name, PolicyException.channel))
    return [(scope_of(repository, row.channel), row) for row, repository in rows]


def _exception_facts(row: PolicyException) -> dict[str, Any]:
    return {"until": row.until.isoformat(), "reason": row.reason, "by": row.created_by}


def _record_exception(
    session: Session,
    actor: Actor,
    scope: PolicyScope,
    *,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    reason: str | None,
) -> None:
    audit.record(
        session,
        actor,
        Act.POLICY_EXCEPT,
        str(scope),
        namespace=scope.namespace,
        reason=reason,
        before=before,
        after=after,
    )
