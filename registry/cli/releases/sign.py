"""Signing a published release, such as one that a server composed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from registry.cli.console import render
from registry.cli.console.connect import connected, resolved
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.errors import Refused, Usage
from registry.formats.signatures import Signed

SignatureCovers = Annotated[
    str,
    typer.Option(
        metavar="release|files", help="What the signature must cover: `release` refuses one that covers only files."
    ),
]


@root.command("sign")
def sign(
    ref: Annotated[str, typer.Argument(help="A release that you published.")],
    key: Annotated[Path, typer.Option(metavar="KEY.pem", help="The private key to sign with.")],
    json: JsonFlag = False,
) -> None:
    """Sign a published release, such as one that a server composed: its name, version, base and files."""
    from registry.client.signing import sign_release

    with connected() as connection:
        release, signed_by = sign_release(connection.api, resolved(connection, ref), key)
    name = f"{release['repository']}:{release['version']}"
    render.document(release, json, lambda: render.out(f"signed {name} {release['commit'][:12]} by {signed_by}"))


def signer(release: dict[str, Any]) -> str | None:
    """The signer that the registry knows, a publisher or a worker, marked if the signature covers only files."""
    if not release["signed_by"]:
        return None
    only = " (files only)" if release["signature_covers"] == "files" else ""
    by = f" by a {release['signed_as']}" if release["signed_as"] else ""
    return f"{release['signed_by']}{by}{only}"


def refuse_narrow(signed: Signed, needed: str) -> None:
    """Raises Refused if the signature covers only files but must cover the release."""
    if needed not in ("release", "files"):
        raise Usage(
            "bad_covers",
            f"--signature-covers {needed} is neither release nor files.",
            subject=needed,
        )
    if needed == "release" and signed.release is None:
        raise Refused(
            "signature_files_only",
            "The signature covers only the files, not their repository, version and base.",
            subject="model.sig",
        )
