"""The kinds of change that may need a second admin: what each replaces, and how it is made."""

import json
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import PolicyException, Release, Revision
from registry.domain.access import namespaces, quotas
from registry.domain.access.audit import Actor
from registry.domain.access.namespaces import NamespaceChange
from registry.domain.access.quotas import RetentionPolicy
from registry.domain.access.roles import Role
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.releases import full_name
from registry.domain.channels import withdrawals
from registry.domain.channels.policy import policies
from registry.errors import Usage
from registry.formats.channel_policy import read_policy
from registry.formats.references import (
    PolicyScope,
    RepositoryName,
    Version,
    parse_policy_scope,
    single_version,
)
from registry.wire.changes import (
    Change,
    ExceptionChange,
    GatesChange,
    MemberChange,
    PolicyChange,
    RetentionChange,
    SettingsChange,
    TakedownChange,
)


def apply(session: Session, actor: Actor, namespace: str, change: Change) -> None:
    """Makes the change; raises what the same change without a second admin raises."""
    match change:
        case PolicyChange():
            policy = read_policy(change.policy, "policy")
            policies.set_policy(session, actor, _scope(namespace, change.scope), policy)
        case GatesChange():
            scope = _scope(namespace, change.scope)
            policies.set_rules(session, actor, scope, change.rules, repin=change.repin)
        case ExceptionChange():
            scope = _scope(namespace, change.scope)
            repository = repositories.find(session, RepositoryName(scope.namespace, scope.name))
            if change.until is None:
                policies.end_exception(session, actor, repository, scope.channel)
            else:
                policies.grant_exception(session, actor, repository, scope.channel, change.until, change.reason)
        case MemberChange():
            role = Role(change.role) if change.role else None
            namespaces.set_member(session, actor, namespace, change.user, role)
        case SettingsChange():
            namespaces.change(session, actor, namespace, NamespaceChange(**change.settings.model_dump()))
        case RetentionChange():
            row = namespaces.find(session, namespace)
            quotas.set_limits(session, actor, row, RetentionPolicy(**change.retention.model_dump()))
        case TakedownChange():
            withdrawals.take_down(session, actor, _release(session, namespace, change), change.reason)


def replaced(session: Session, namespace: str, change: Change) -> dict[str, Any]:
    """The state that the change replaces: taken before and after a trial, it shows what an approval approves."""
    match change:
        case PolicyChange() | GatesChange():
            stored = policies.find(session, _scope(namespace, change.scope))
            state = {"revision": stored.revision, "policy": stored.policy.to_json(), "pins": stored.pins}
        case ExceptionChange():
            state = _exception(session, _scope(namespace, change.scope))
        case MemberChange():
            state = {"role": namespaces.members(session, namespace).get(change.user)}
        case SettingsChange():
            row = namespaces.find(session, namespace)
            state = {name: getattr(row, name) for name in change.settings.model_dump(exclude_none=True)}
        case RetentionChange():
            row = namespaces.find(session, namespace)
            state = {name: getattr(row, name) for name in change.retention.model_dump()}
        case TakedownChange():
            state = _files(session, _release(session, namespace, change))
    return cast("dict[str, Any]", json.loads(json.dumps(state)))


def summary(namespace: str, change: Change) -> str:
    """The change in a few words."""
    match change:
        case PolicyChange():
            return f"policy of {change.scope}"
        case GatesChange():
            return f"{'pins of the' if change.repin else ''} gate rules of {change.scope}".strip()
        case ExceptionChange(until=None):
            return f"end of the exception of {change.scope}"
        case ExceptionChange():
            return f"exception of {change.scope} until {change.until:%Y-%m-%d %H:%M} UTC: {change.reason}"
        case MemberChange():
            return f"{change.user}: {change.role or 'no role'} in {namespace}"
        case SettingsChange():
            return f"{', '.join(change.settings.model_dump(exclude_none=True))} of {namespace}"
        case RetentionChange():
            return f"retention of {namespace}"
        case TakedownChange():
            return f"takedown of {change.release}: {change.reason}"


def _scope(namespace: str, text: str) -> PolicyScope:
    scope = parse_policy_scope(text)
    _refuse_outside(namespace, scope.namespace, text)
    return scope


def _release(session: Session, namespace: str, change: TakedownChange) -> Release:
    reference = single_version(change.release, None)
    _refuse_outside(namespace, reference.repository.namespace, change.release)
    return releases.find(session, reference.repository, cast(Version, reference.version))


def _refuse_outside(namespace: str, named: str, text: str) -> None:
    if named != namespace:
        message = f"{text} is not in the namespace {namespace}."
        raise Usage("bad_change", message, subject=text)


def _exception(session: Session, scope: PolicyScope) -> dict[str, Any]:
    repository = repositories.find(session, RepositoryName(scope.namespace, scope.name))
    row = session.get(PolicyException, (repository.id, scope.channel))
    shared = policies.find(session, scope.in_namespace()).revision
    granted = {"until": row.until.isoformat(), "reason": row.reason, "by": row.created_by} if row else None
    return {"exception": granted, "policy_revision": shared}


def _files(session: Session, release: Release) -> dict[str, Any]:
    """The versions that a takedown withdraws, and the reason of one that was made."""
    query = select(Release).where(Release.revision_id == release.revision_id).order_by(Release.id)
    reason = session.scalar(select(Revision.takedown_reason).where(Revision.id == release.revision_id))
    return {"releases": [full_name(version) for version in session.scalars(query)], "taken_down": reason}
