"""Access: tokens, namespaces, members, users, and the keys of workers."""

import sys
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from composer.formats.untrusted import read_text
from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import group, root
from registry.cli.console.render import JsonFlag
from registry.cli.operations.changes import made_or_requested
from registry.errors import Usage
from registry.formats.references import parse_name

tokens = group("token", "Manage access tokens.")
namespaces = group("namespace", "Manage namespaces, the unit of permission.")
users = group("user", "Manage the names of users.")
worker_keys = group("worker-key", "Manage the keys by which workers attest what they measure.")
_WORKER_KEYS = "/v1/worker-keys"
_UNLIMITED = {"*": "admin"}  # what its user may do, whatever that is
_KEY_BYTES = 10_000  # larger than any PEM key

User = Annotated[str, typer.Argument(help="A user's name.")]
NamespaceName = Annotated[
    str, typer.Argument(metavar="NAMESPACE", help="Such as acme. For roles, `*` means all namespaces.")
]


@root.command("whoami")
def who_am_i(json: JsonFlag = False) -> None:
    """Show the current user and roles."""
    with connected() as connection:
        document = connection.api.get("/v1/whoami", wire.access.WhoOut)
    limited = document.limited
    pairs = [
        (
            namespace,
            f"{role} (your role {limited[namespace]} is limited by the token's scope)"
            if namespace in limited
            else role,
        )
        for namespace, role in sorted({**dict.fromkeys(limited, "none"), **document.grants}.items())
    ]
    render.document(document, json, lambda: render.lines(document.user, pairs))


@tokens.command("create")
def create_token(
    user: Annotated[str | None, typer.Option(help="For another user; requires admin of the registry.")] = None,
    name: Annotated[str, typer.Option(help="The token's purpose.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="NAMESPACE=ROLE, its highest role there (admin: no limit). May be repeated. Unlimited by default."
        ),
    ] = None,
    expires_in_days: Annotated[
        float | None, typer.Option(help="Lifetime in days; by default, ADAPTORY_TOKEN_DAYS of the registry.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Create a token and print it once. It can do what both its user's roles and its scope allow."""
    if expires_in_days is not None and not isfinite(expires_in_days):  # JSON has no NaN or infinity
        raise Usage(
            "bad_lifetime",
            f"A token cannot last {expires_in_days} days.",
        )
    body: dict[str, Any] = {"user": user, "name": name, "expires_in_days": expires_in_days}
    if scope:
        body["scope"] = dict(_pair(text) for text in scope)
    with connected() as connection:
        document = connection.api.post("/v1/tokens", body, wire.access.NewTokenOut)
    render.document(document, json, lambda: render.out(document.token))
    if sys.stdout.isatty() and document.expires_at:  # scripts read the token
        render.say(f"valid until {document.expires_at:%Y-%m-%d}")


@tokens.command("list")
def list_tokens(json: JsonFlag = False) -> None:
    """List your tokens; a registry admin sees everyone's. Secrets are never shown again."""
    with connected() as connection:
        items = list(connection.api.pages("/v1/tokens", wire.access.TokenOut))
    rows = [
        (
            row.id,
            row.user,
            "session" if row.session else "token",
            row.name,
            "unlimited" if row.scope == _UNLIMITED else [f"{name}={role}" for name, role in row.scope.items()],
            render.second(row.expires_at),
            render.second(row.revoked_at),
            render.minute(row.last_used_at),
        )
        for row in items
    ]
    columns = ("id", "user", "kind", "name", "scope", "expires", "revoked", "last used")
    render.listing(items, json, columns, rows)


@tokens.command("revoke")
def revoke_token(
    token: Annotated[str, typer.Argument(metavar="ID", help="As `adaptory token list` shows it.")],
    json: JsonFlag = False,
) -> None:
    """Revoke a token immediately, by the id that `token list` shows (the 12 characters after adp_)."""
    with connected() as connection:
        document = connection.api.delete(f"/v1/tokens/{quote(token, safe='')}", wire.access.TokenOut)
    render.document(document, json, lambda: render.out(f"revoked {document.id} of {document.user}"))


@namespaces.command("list")
def list_namespaces(json: JsonFlag = False) -> None:
    """List the namespaces that you may read."""
    with connected() as connection:
        items = list(connection.api.pages("/v1/namespaces", wire.access.NamespaceOut))
    rows = [(row.namespace, _visibility(row), row.require_signature, row.created_by) for row in items]
    render.listing(items, json, ("namespace", "visible", "signed only", "by"), rows)


@namespaces.command("set")
def set_namespace(  # noqa: PLR0913
    namespace: NamespaceName,
    public: Annotated[bool | None, typer.Option("--public/--private", help="Who may read it.")] = None,
    require_signature: Annotated[
        bool | None, typer.Option("--require-signature/--allow-unsigned", help="Refuse unsigned releases.")
    ] = None,
    signing_key: Annotated[
        list[Path] | None,
        typer.Option(help="A public key (PEM) that may sign. Repeat for each key: the list is replaced."),
    ] = None,
    signature_covers: Annotated[
        str | None,
        typer.Option(
            metavar="release|files",
            help="What a required signature must cover; `files` also accepts those of other tools.",
        ),
    ] = None,
    main: Annotated[
        str | None,
        typer.Option(
            metavar="release|commit",
            help="What hub clients get as `main`. With `release`, the default where signatures are required, commits "
            "are drafts on `next`, which only publishers see.",
        ),
    ] = None,
    changes: Annotated[
        str | None,
        typer.Option(
            metavar="one|two",
            help="How many admins a change of policies, roles above publisher, signing keys and files needs.",
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Create a namespace, or change who may read it and which releases it accepts."""
    keys = [read_text(path, _KEY_BYTES) for path in signing_key] if signing_key else None
    body = {
        "public": public,
        "require_signature": require_signature,
        "signing_keys": keys,
        "signature_covers": signature_covers,
        "main": main,
        "changes": changes,
    }
    with connected() as connection:
        document = made_or_requested(
            connection,
            namespace,
            {"kind": "settings", "settings": {name: value for name, value in body.items() if value is not None}},
            lambda: connection.api.put(_namespace_path(namespace), body, wire.access.NamespaceOut),
            json=json,
        )
    pairs = [
        ("visible", _visibility(document)),
        ("signed only", document.require_signature),
        ("signature covers", document.signature_covers),
        ("main is", f"the last {document.main}"),
        ("changes need", "two admins" if document.changes == "two" else "one admin"),
    ]
    render.document(document, json, lambda: render.lines(f"namespace {namespace}", pairs))


@namespaces.command("usage")
def show_usage(namespace: NamespaceName, json: JsonFlag = False) -> None:
    """Show what a namespace holds, and its quota."""
    with connected() as connection:
        used = connection.api.get(f"{_namespace_path(namespace)}/usage", wire.access.UsageOut)
    pairs = [
        ("bytes", _of_quota(render.size(used.size_bytes), used.max_bytes, render.size)),
        ("releases", _of_quota(f"{used.releases:,}", used.max_releases, "{:,}".format)),
    ]
    render.document(used, json, lambda: render.lines(f"usage of {namespace}", pairs))


@namespaces.command("quota")
def set_quota(
    namespace: NamespaceName,
    max_bytes: Annotated[
        int | None, typer.Option("--bytes", min=0, help="Bytes of files; no limit if omitted.")
    ] = None,
    max_releases: Annotated[
        int | None, typer.Option("--releases", min=0, help="Releases that have files; no limit if omitted.")
    ] = None,
    unlimited: Annotated[bool, typer.Option("--unlimited", help="Remove both limits.")] = False,
    json: JsonFlag = False,
) -> None:
    """Set the quota of a namespace, as an admin of the registry. Its existing contents stay."""
    _refuse_no_limit(
        [max_bytes, max_releases], unlimited, namespace, "--bytes, --releases or both, or --unlimited alone"
    )
    body = {"max_bytes": max_bytes, "max_releases": max_releases}
    with connected() as connection:
        document = connection.api.put(f"{_namespace_path(namespace)}/quota", body)
    pairs = [
        ("bytes", render.size(max_bytes) if max_bytes is not None else "no limit"),
        ("releases", f"{max_releases:,}" if max_releases is not None else "no limit"),
    ]
    render.document(document, json, lambda: render.lines(f"quota of {namespace}", pairs))


@namespaces.command("retention")
def set_retention(  # noqa: PLR0913
    namespace: NamespaceName,
    yanked: Annotated[
        int | None, typer.Option(metavar="DAYS", min=1, help="For yanked releases; kept for good if omitted.")
    ] = None,
    prereleases: Annotated[
        int | None, typer.Option(metavar="DAYS", min=1, help="For pre-releases; kept for good if omitted.")
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DAYS", help="For what a channel served, and no channel without such a rule. May be repeated."
        ),
    ] = None,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Keep all for good.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what the next `gc` would take down.")] = False,
    json: JsonFlag = False,
) -> None:
    """Set after how many days `gc` takes down yanked releases, pre-releases, and what channels no longer serve.

    It spares what a channel serves, what a node of the fleet has loaded, what `main` has, and what another release was
    composed of.
    """
    channels = _days_by_channel(channel or ())
    limits = [yanked, prereleases, *channels.values()]
    _refuse_no_limit(limits, keep_all, namespace, "--yanked, --prereleases or --channel, or --keep-all alone")
    body = {"keep_yanked_days": yanked, "keep_prerelease_days": prereleases, "keep_channel_days": channels or None}
    with connected() as connection:
        if dry_run:
            planned = connection.api.post(
                f"{_namespace_path(namespace)}/retention/plan", body, wire.access.RetentionPlanOut
            )
            render.document(planned, json, lambda: _show_plan(planned))
            return
        path, change = f"{_namespace_path(namespace)}/retention", {"kind": "retention", "retention": body}
        document = made_or_requested(connection, namespace, change, lambda: connection.api.put(path, body), json=json)
    kept = [("yanked releases", yanked), ("pre-releases", prereleases)]
    kept += [(f"what {name} served", days) for name, days in channels.items()]
    pairs = [(what, f"{days} days" if days is not None else "kept") for what, days in kept]
    render.document(document, json, lambda: render.lines(f"retention of {namespace}", pairs))


def _days_by_channel(texts: Sequence[str]) -> dict[str, int]:
    """Raises Usage for anything but NAME=DAYS."""
    days: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not (name and number.isdecimal() and int(number[:6]) > 0 and len(number) < 6):
            raise Usage("bad_retention", f"--channel {text} is not NAME=DAYS.", subject=text[:100])
        days[parse_name(name, "channel name")] = int(number)
    return days


def _show_plan(planned: "wire.access.RetentionPlanOut") -> None:
    rows = [(row.release, render.size(row.size_bytes), row.reason, row.spared_by) for row in planned.releases]
    gone = [row for row in planned.releases if not row.spared_by]
    if rows:
        render.table("", ("release", "size", "the namespace", "stays, since"), rows)
    render.out(f"{render.counted(len(gone), 'release')} would be taken down by the next `adaptory gc`")
    if planned.more:
        render.say("There is more than these.")


@namespaces.command("members")
def list_members(namespace: NamespaceName, json: JsonFlag = False) -> None:
    """List a namespace's members and roles; `*` lists the roles that hold in every namespace."""
    with connected() as connection:
        document = connection.api.get(_members_path(namespace), wire.access.MembersOut)
    render.document(document, json, lambda: render.lines(f"members of {namespace}", list(document.members.items())))


@namespaces.command("grant")
def grant(
    namespace: NamespaceName,
    user: User,
    role: Annotated[
        str, typer.Argument(help="reader, publisher, releaser or admin; agent, or such as releaser+agent.")
    ],
    json: JsonFlag = False,
) -> None:
    """Give a user a role in a namespace, replacing any other there; in `*` it holds in all namespaces."""
    _set_member(namespace, user, role, json)


@namespaces.command("revoke")
def revoke(namespace: NamespaceName, user: User, json: JsonFlag = False) -> None:
    """Revoke a user's role in a namespace; the user's tokens lose it too."""
    _set_member(namespace, user, None, json)


@users.command("show")
def show_user(user: User, json: JsonFlag = False) -> None:
    """Show a user's roles and where they come from, tokens, sessions, and approvals that still count."""
    with connected() as connection:
        shown = connection.api.get(f"/v1/users/{quote(user, safe='')}", wire.access.UserDetailOut)
    render.document(shown, json, lambda: _show_user(shown))


def _show_user(shown: "wire.access.UserDetailOut") -> None:
    person = f", who signs in as {shown.person.subject} of {shown.person.issuer}" if shown.person else ""
    render.heading(f"{shown.user}{person}")
    render.table(
        "roles",
        ("namespace", "role", "from", "until"),
        [
            (row.namespace, row.role, f"session {row.session}" if row.session else "grant", render.minute(row.until))
            for row in shown.roles
        ],
    )
    render.table(
        "in force",
        ("id", "kind", "name", "scope", "expires"),
        [
            (
                row.id,
                "session" if row.session else "token",
                row.name,
                [f"{name}={role}" for name, role in row.scope.items()],
                render.minute(row.expires_at),
            )
            for row in shown.tokens
        ],
    )
    render.table(
        "approvals that still count",
        ("channel", "version", "given", "reason"),
        [(row.channel, row.version, render.minute(row.at), row.reason) for row in shown.approvals],
    )


@users.command("link")
def link_user(
    user: User,
    subject: Annotated[
        str, typer.Option(help="The person's identifier at the provider (`sub`), as shown in the refusal.")
    ],
    issuer: Annotated[str | None, typer.Option(help="The provider's address; by default, that of the server.")] = None,
    json: JsonFlag = False,
) -> None:
    """Let a person of the OpenID provider sign in as a user who was here before, with the user's roles."""
    body = {"subject": subject, "issuer": issuer}
    with connected() as connection:
        linked = connection.api.put(f"/v1/users/{quote(user, safe='')}/person", body, wire.access.PersonOut)
    render.document(linked, json, lambda: render.out(f"{user} signs in as {linked.subject} of {linked.issuer}"))


@users.command("remove")
def remove_user(user: User, json: JsonFlag = False) -> None:
    """Put a pseudonym in place of a user's name everywhere, also in the audit log.

    The user's tokens, sessions and roles end. The record of the user's acts stays. Free text, such as reasons, is not
    searched.
    """
    with connected() as connection:
        removed = connection.api.delete(f"/v1/users/{quote(user, safe='')}", wire.access.UserOut)
    render.document(
        removed,
        json,
        lambda: render.out(f"{user} is now {removed.user}, in {render.counted(removed.rows, 'row')}"),
    )


def _set_member(namespace: str, user: str, role: str | None, json: bool) -> None:
    body = {"user": user, "role": role}
    with connected() as connection:
        document = made_or_requested(
            connection,
            namespace,
            {"kind": "member", **body},
            lambda: connection.api.put(_members_path(namespace), body),
            json=json,
        )
    render.document(document, json, lambda: render.out(f"{user}: {role or 'no role'} in {namespace}"))


def _namespace_path(namespace: str) -> str:
    return f"/v1/namespaces/{quote(namespace, safe='')}"


def _members_path(namespace: str) -> str:
    return f"{_namespace_path(namespace)}/members"


def _refuse_no_limit(limits: list[int | None], none: bool, namespace: str, options: str) -> None:
    """Raises Usage unless there is a limit, or `none` alone: a command without options must not remove what was set."""
    if none == any(limit is not None for limit in limits):
        message = f"The limits of {namespace} are replaced as a whole, and removed only on request."
        raise Usage("limit_missing", message, subject=namespace, next_step=f"Give {options}.")


def _of_quota(used: str, limit: int | None, written: Callable[[int], str]) -> str:
    return f"{used} of {written(limit)}" if limit is not None else f"{used}, no limit"


def _visibility(row: "wire.access.NamespaceOut") -> str:
    return "public" if row.public else "private"


def _pair(text: str) -> tuple[str, str]:
    namespace, equals, role = text.partition("=")
    if not equals:
        raise Usage("bad_scope", f"Invalid scope {text!r}.", subject=text)
    return namespace, role


@worker_keys.command("list")
def list_worker_keys(json: JsonFlag = False) -> None:
    """List the keys of workers."""
    with connected() as connection:
        items = list(connection.api.pages(_WORKER_KEYS, wire.quality.WorkerKeyOut))
    rows = [
        (row.id[:12], row.worker, render.minute(row.created_at), f"by {row.revoked_by}" if row.revoked_by else "")
        for row in items
    ]
    render.listing(items, json, ("key", "worker", "registered", "revoked"), rows)


@worker_keys.command("revoke")
def revoke_worker_key(
    key: Annotated[str, typer.Argument(metavar="KEY", help="As `adaptory worker-key list` shows it.")],
    json: JsonFlag = False,
) -> None:
    """Revoke a worker's key. What it signed counts as stated from then on, and its worker measures nothing further."""
    with connected() as connection:
        row = connection.api.delete(f"{_WORKER_KEYS}/{quote(key, safe='')}", wire.quality.WorkerKeyOut)
    render.document(row, json, lambda: render.out(f"revoked {row.id[:12]} of the worker {row.worker}"))
