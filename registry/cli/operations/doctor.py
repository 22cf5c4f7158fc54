"""`adaptory doctor`: checks an installation, or the way to a server, and collects what a bug report needs."""

import json as json_text
import os
import platform
import re
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from email.utils import parsedate_to_datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.errors import Conflict, RegistryError, Usage
from registry.sdk.connection import load_settings, open_registry

if TYPE_CHECKING:
    from registry.environment.settings import Settings
    from registry.transfer.installation import Check

_OF_STRING = r'(?:[^"\\]|\\.)*'
"""What may follow in a string of JSON."""
MARKS = {"ok": "ok", "warning": "warning", "error": "ERROR"}


@root.command()
def doctor(
    contents: Annotated[
        bool, typer.Option("--contents/--no-contents", help="Check every row and the size of every blob, as fsck does.")
    ] = True,
    bundle: Annotated[
        Path | None, typer.Option(metavar="FILE.zip", help="Write the data for a bug report, without secrets.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Check this installation end to end and list the problems; exit 1 if there are any.

    With ADAPTORY_URL or a profile it checks the way to that server instead.
    """
    from registry.cli.console.connect import own_settings
    from registry.transfer.installation import check_installation

    if bundle is not None and bundle.exists():
        raise Conflict(
            "output_exists", f"{bundle} exists.", subject=str(bundle), next_step="Move it away, or name another file."
        )
    settings, remote = load_settings(), False
    try:
        own_settings()
    except Usage:
        remote = True
    if remote:
        checks = [*_check_server(settings)]
    else:
        checks = [*check_installation(settings, contents=contents, progress=lambda _count: None)]
    document = _document(checks)

    def show() -> None:
        width = max(len(check.name) for check in checks)
        for check in checks:
            render.out(f"{MARKS[check.state]:8} {check.name:{width}}  {check.detail}")
            if check.next_step:
                render.out(f"{'':8} {'':{width}}  {check.next_step}")

    render.document(document, json, show)
    if bundle is not None:
        _write_bundle(bundle, settings, checks, remote=remote)
        render.say(f"wrote {bundle}: look through it before you send it")
    if not document["healthy"]:
        raise typer.Exit(1)


def _check_server(settings: "Settings") -> "Iterator[Check]":
    """The way to a server: the connection, its readiness, its clock, the token."""
    from registry.transfer.installation import CLOCK_S, Check

    with open_registry(settings) as connection:
        api = connection.api
        try:
            began = time.perf_counter()
            api.get("/readyz")
            took_ms = (time.perf_counter() - began) * 1e3
            yield Check(name="server", state="ok", detail=f"{api.url} is ready, {took_ms:.0f} ms")
            if abs(offset := _clock_offset(api.url)) > CLOCK_S:
                detail = f"The server's clock is {offset:+.0f} s from this machine's."
                yield Check(name="clock", state="warning", detail=detail, next_step="Set both by NTP.")
            who = api.get("/v1/whoami", wire.access.WhoOut)
        except RegistryError as error:
            yield Check(name="server", state="error", detail=error.detail, next_step=error.next_step)
            return
    roles = ", ".join(f"{role} in {namespace}" for namespace, role in sorted(who.grants.items()))
    yield Check(name="token", state="ok", detail=f"{who.user}: {roles or 'reads what is public'}")


def _clock_offset(url: str) -> float:
    """Seconds by which the clock of the server, or of a proxy before it, is ahead of this machine's."""
    import httpx2

    sent = httpx2.get(f"{url}/healthz", timeout=10).headers.get("Date")
    return parsedate_to_datetime(sent).timestamp() - time.time() if sent else 0.0


def _write_bundle(path: Path, settings: "Settings", checks: Sequence["Check"], *, remote: bool) -> None:
    anonymous = [replace(check, detail="valid") if check.name == "token" else check for check in checks]
    files = {
        "checks.json": _document(anonymous),
        "versions.json": _versions(),
        "settings.json": _settings(settings),
    }
    if not remote:
        from registry.transfer.installation import summarize_database

        files["database.json"] = summarize_database(settings)
    own = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # for its owner alone
    with own, zipfile.ZipFile(own, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, json_text.dumps(content, indent=2, default=str) + "\n")


def _document(checks: Sequence["Check"]) -> dict[str, object]:
    healthy = not any(check.state == "error" for check in checks)
    return {"healthy": healthy, "checks": [asdict(check) for check in checks]}


def _versions() -> dict[str, object]:
    packages = {distribution.metadata["Name"]: distribution.version for distribution in distributions()}
    return {"python": sys.version, "platform": platform.platform(), "packages": dict(sorted(packages.items()))}


def _settings(settings: "Settings") -> dict[str, object]:
    """The settings that are not at their default: secrets and names as asterisks, addresses without user, password and
    query."""
    text = settings.model_dump_json(exclude_defaults=True)
    text = re.sub(rf"(://){_OF_STRING}@", r"\1***@", text)  # up to the last one: a password may have any character
    shown = json_text.loads(re.sub(rf"(://{_OF_STRING}?)\?{_OF_STRING}", r"\1?***", text))
    for holder, names in ((shown, ("user", "profile")), (shown.get("sign_in", {}), ("roles",))):
        holder.update({name: "***" for name in names if name in holder})
    return shown
