"""adaptory import | export: releases from and to Hugging Face Hubs."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.cli.releases.release import Ref
from registry.cli.releases.transfer import AllowBreaking, BaseName, Bump, SigningKey, Target, show_push, show_warnings
from registry.formats.references import single_version

if TYPE_CHECKING:
    from registry.sdk.hub_export import Export

Endpoint = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The hub; by default that of HF_ENDPOINT, the only one that gets HF_TOKEN."),
]


@root.command("import")
def import_(  # noqa: PLR0913
    source: Annotated[
        str, typer.Argument(metavar="hf://ORG/NAME[@REV]", help="A repository, and a branch, tag or commit of it.")
    ],
    target: Target,
    endpoint: Endpoint = None,
    base: BaseName = None,
    bump: Bump = None,
    allow_breaking: AllowBreaking = None,
    sign: SigningKey = None,
    notes: Annotated[str, typer.Option(help="Release notes.")] = "",
    json: JsonFlag = False,
) -> None:
    """Publish a repository from a Hugging Face Hub, with all checks of a push.

    The base is the one that the model card names, or else the configuration. Scores that the repository reports are
    recorded as reported.
    """
    from registry.client.selection import Selection
    from registry.formats.addresses import parse_hub_address
    from registry.sdk.hub_import import Import, import_release

    reference = single_version(target, bump)
    version = str(reference.version) if reference.version else None
    wanted = Import(
        source=parse_hub_address(source),
        target=reference,
        request={"version": version, "bump": bump, "notes": notes, "allow_breaking": allow_breaking},
        endpoint=endpoint,
        base=base,
        key=sign,
    )
    with connected() as connection:
        imported = import_release(connection, wanted, render)
    if imported.left_out:
        render.say(f"left out: {Selection(Path(), (), imported.left_out).summary()}")
    show_warnings(imported.published)

    def show() -> None:
        show_push(imported.published, imported.sent)
        render.out(f"  from {imported.imported_from} at {imported.endpoint}")

    own = {name: getattr(imported, name) for name in ("sent", "imported_from", "endpoint", "left_out")}
    render.document({**imported.published.document, **own}, json, show)


@root.command()
def export(
    ref: Ref,
    target: Annotated[str, typer.Argument(metavar="hf://ORG/NAME", help="Created if it does not exist.")],
    endpoint: Endpoint = None,
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
    json: JsonFlag = False,
) -> None:
    """Upload a release to a Hugging Face Hub, and tag it there with its version.

    Adds base, library, licence and measured scores to the model card. The same release again changes nothing.
    """
    from registry.formats.addresses import parse_hub_address
    from registry.sdk.hub_export import export_release

    address = parse_hub_address(target)
    with connected() as connection:
        exported = export_release(connection, ref, address, endpoint, render, private=private)
    render.document(asdict(exported), json, lambda: _show_export(exported))


def _show_export(exported: "Export") -> None:
    done = "exported" if exported.created else "already exported, nothing to do:"
    render.out(f"{done} {exported.release} to {exported.exported_to} at {exported.endpoint}")
    files, scores = render.counted(len(exported.files), "file"), render.counted(exported.scores, "measured score")
    render.out(f"  tag {exported.tag}, {files}, {scores}")
