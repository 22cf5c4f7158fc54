"""Policies of namespaces, for channels of one name in every repository."""

from typing import Any

from fastapi import APIRouter

from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import Admin, Reader
from registry.api.routes.views import exception_view, shared_policy_view
from registry.database.engine import Session
from registry.domain.access import namespaces
from registry.domain.access.audit import Actor
from registry.domain.channels.policy import policies
from registry.errors import NotFound
from registry.formats.channel_policy import read_policy
from registry.formats.references import ALL_REPOSITORIES, PolicyScope
from registry.wire.quality import NamespacePoliciesOut, NamespacePolicyOut

router = APIRouter(prefix="/v1", tags=["channels"], route_class=Route)

POLICIES = "/namespaces/{namespace}/policies"


@router.get(POLICIES)
def list_policies(namespace: str, resources: ResourcesOf, actor: Reader) -> NamespacePoliciesOut:
    """List the policies of the namespace, each with the exceptions from it that are in force."""
    with resources.read() as session:
        namespaces.find(session, namespace)
        scopes = policies.of_namespace(session, namespace)
        return NamespacePoliciesOut(policies=[_view(session, actor, scope) for scope in scopes])


@router.get(POLICIES + "/{channel}")
def show_policy(namespace: str, channel: str, resources: ResourcesOf, actor: Reader) -> NamespacePolicyOut:
    scope = _scope(namespace, channel)
    with resources.read() as session:
        namespaces.find(session, namespace)
        if policies.find(session, scope).revision == 0:
            message = f"{namespace} has no policy for channels named {channel}."
            raise NotFound("policy_unknown", message, subject=str(scope))
        return _view(session, actor, scope)


@router.put(POLICIES + "/{channel}")
def set_policy(
    namespace: str, channel: str, body: dict[str, Any], resources: ResourcesOf, actor: Admin
) -> NamespacePolicyOut:
    """Replace the policy for channels of this name. Promotions that wait are judged by the new one."""
    policy, scope = read_policy(body, "policy"), _scope(namespace, channel)
    with resources.write() as session:
        policies.set_policy(session, actor, scope, policy)
        return _view(session, actor, scope)


@router.post(POLICIES + "/{channel}/pins")
def pin_rules(namespace: str, channel: str, resources: ResourcesOf, actor: Admin) -> NamespacePolicyOut:
    """Pin the policy's rules to the current content of their suites."""
    scope = _scope(namespace, channel)
    with resources.write() as session:
        policies.set_rules(session, actor, scope, None, repin=True)
        return _view(session, actor, scope)


def _scope(namespace: str, channel: str) -> PolicyScope:
    return PolicyScope(namespace, ALL_REPOSITORIES, channel)


def _view(session: Session, actor: Actor, scope: PolicyScope) -> NamespacePolicyOut:
    rows = policies.exceptions_of_namespace(session, scope.namespace, actor.at)
    granted = [exception_view(of, row) for of, row in rows if of.channel == scope.channel]
    return shared_policy_view(session, scope, granted)
