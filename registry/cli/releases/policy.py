"""Policies of channels, of namespaces, and exceptions: policy set | show | list | except."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import group
from registry.cli.console.render import JsonFlag
from registry.cli.operations.changes import made_or_requested
from registry.cli.releases.release import Channel
from registry.errors import Usage
from registry.formats.references import PolicyScope, parse_channel_reference, parse_policy_scope
from registry.sdk.connection import Connection

policy_app = group("policy", "What a promotion to a channel needs.")

Scope = Annotated[
    str,
    typer.Argument(metavar="SCOPE", help="REPO@CHANNEL, or 'NAMESPACE/*@CHANNEL' for all its repositories."),
]


@policy_app.command("set")
def set_policy(
    scope: Scope,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The policy in YAML.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all rules instead.")] = False,
    repin: Annotated[
        bool, typer.Option("--repin", help="Keep the policy, and pin its rules to what their suites are now.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Replace the policy of a channel, its gate rules included, or of a namespace's channels.

    The policy of 'NAMESPACE/*@CHANNEL' holds for every repository of the namespace, also one that is made later. A
    release must meet both that policy and its repository's.
    """
    if [file is not None, clear, repin].count(True) != 1:
        message, step = "Name the policy's file, --clear or --repin.", "Name one of the three."
        raise Usage("policy_missing", message, subject=scope, next_step=step)
    parsed, document = parse_policy_scope(scope), _document(file)
    with connected() as connection:
        if repin:
            change: dict[str, Any] = {"kind": "gates", "scope": scope, "repin": True}
        else:
            change = {"kind": "policy", "scope": scope, "policy": document}
        made_or_requested(
            connection, parsed.namespace, change, lambda: _set(connection, parsed, document, repin=repin), json=json
        )
        _show(connection, parsed, json=json)


def _document(file: Path | None) -> dict[str, Any]:
    from composer.formats.untrusted import read_text
    from registry.formats.channel_policy import MAX_CHARS, parse_policy

    return parse_policy(read_text(file, 4 * MAX_CHARS), str(file)).to_json() if file else {"version": 1}


def _set(connection: Connection, scope: PolicyScope, document: dict[str, Any], *, repin: bool) -> None:
    if repin:
        _pin(connection, scope)
        return
    model = wire.quality.NamespacePolicyOut if scope.of_namespace else wire.quality.PolicyOut
    connection.api.put(_path(connection, scope), document, model)


def _pin(connection: Connection, scope: PolicyScope) -> None:
    if scope.of_namespace:
        connection.api.post(f"{_path(connection, scope)}/pins", None, wire.quality.NamespacePolicyOut)
        return
    line = connection.api.repository_path(f"{scope.namespace}/{scope.name}")
    connection.api.put(f"{line}/gates", {"channel": scope.channel, "repin": True}, wire.quality.GatesOut)


def _path(connection: Connection, scope: PolicyScope) -> str:
    if scope.of_namespace:
        return f"/v1/namespaces/{scope.namespace}/policies/{scope.channel}"
    return f"{connection.api.repository_path(f'{scope.namespace}/{scope.name}')}/channels/{scope.channel}/policy"


@policy_app.command()
def show(scope: Scope, json: JsonFlag = False) -> None:
    """Show a policy in YAML, in the form for `policy set`; for a channel, also its namespace's, as a comment."""
    parsed = parse_policy_scope(scope)
    with connected() as connection:
        _show(connection, parsed, json=json)


def _show(connection: Connection, scope: PolicyScope, *, json: bool) -> None:
    path = _path(connection, scope)
    if scope.of_namespace:
        shared = connection.api.get(path, wire.quality.NamespacePolicyOut)
        render.document(shared, json, lambda: _print_shared(shared))
    else:
        own = connection.api.get(path, wire.quality.PolicyOut)
        render.document(own, json, lambda: _print_own(scope, own))


def _print_own(scope: PolicyScope, own: "wire.quality.PolicyOut") -> None:
    _print(str(scope), own, f"adaptory gate {scope} --repin")
    if own.shared is None:
        return
    named = f"{own.shared.namespace}/*@{own.shared.channel}"
    if own.shared.exceptions:
        [granted] = own.shared.exceptions
        until = render.second(granted.until)
        render.out(f"# {named} does not apply until {until}: {granted.reason} ({granted.created_by})")
        return
    render.out(f"# and {named}, revision {own.shared.revision}:")
    for line in _yaml(own.shared.policy):
        render.out(f"#   {line}")


def _print_shared(shared: "wire.quality.NamespacePolicyOut") -> None:
    named = f"{shared.namespace}/*@{shared.channel}"
    _print(named, shared, f"adaptory policy set '{named}' --repin")
    for granted in shared.exceptions:
        until = render.second(granted.until)
        render.out(f"# not {granted.repository} until {until}: {granted.reason} ({granted.created_by})")


def _print(named: str, policy: "wire.quality.PolicyOut | wire.quality.NamespacePolicyOut", repin: str) -> None:
    render.out(f"# {named}, revision {policy.revision}")
    for suite, pin in policy.pins.items():
        changed = f": {pin.changed} (`{repin}` accepts the change)" if pin.changed else ""
        render.out(f"# {suite} is {pin.digest[:12]}{changed}")
    for line in _yaml(policy.policy):
        render.out(line)


def _yaml(policy: dict[str, Any]) -> list[str]:
    import yaml

    return yaml.safe_dump(policy, sort_keys=False, allow_unicode=True).splitlines()


@policy_app.command("list")
def list_policies(
    namespace: Annotated[str, typer.Argument(metavar="NAMESPACE", help="The namespace.")], json: JsonFlag = False
) -> None:
    """List a namespace's policies and the exceptions from them."""
    with connected() as connection:
        listed = connection.api.get(f"/v1/namespaces/{namespace}/policies", wire.quality.NamespacePoliciesOut)
    rows = [
        (f"{namespace}/*@{policy.channel}", f"revision {policy.revision}", "", "", "") for policy in listed.policies
    ] + [
        (
            f"{granted.repository}@{granted.channel}",
            "exempt until",
            render.second(granted.until),
            granted.created_by,
            granted.reason,
        )
        for policy in listed.policies
        for granted in policy.exceptions
    ]
    render.listing(listed.policies, json, ("policy", "", "until", "by", "reason"), rows, namespace)


@policy_app.command("except")
def grant_exception(
    channel: Channel,
    until: Annotated[
        datetime | None,
        typer.Option("--until", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], help="When the exception ends, in UTC."),
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the audit log.")] = "",
    end: Annotated[bool, typer.Option("--end", help="End the exception now instead.")] = False,
    json: JsonFlag = False,
) -> None:
    """Exempt a repository's channel from its namespace's policy until a time; only an admin may."""
    if end is (until is not None):
        step = "Write --until DATE --reason TEXT, or --end."
        raise Usage("bad_exception_end", "An exception needs its end.", subject=channel, next_step=step)
    repository, name = parse_channel_reference(channel)
    scope = PolicyScope(repository.namespace, repository.name, name)
    with connected() as connection:
        path = f"{_path(connection, scope)}/exception"
        ends = None if until is None else until.replace(tzinfo=UTC).isoformat()
        change = {"kind": "exception", "scope": channel, "until": ends, "reason": reason}
        document = made_or_requested(
            connection, scope.namespace, change, lambda: _except(connection, path, ends, reason), json=json
        )
    render.document(document, json, lambda: _print_own(scope, document))


def _except(connection: Connection, path: str, until: str | None, reason: str) -> "wire.quality.PolicyOut":
    if until is None:
        return connection.api.delete(path, wire.quality.PolicyOut)
    return connection.api.put(path, {"until": until, "reason": reason}, wire.quality.PolicyOut)
