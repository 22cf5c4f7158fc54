"""Trusted publishers: publisher add | list | remove."""

from typing import Annotated
from urllib.parse import quote

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import group
from registry.cli.console.render import JsonFlag
from registry.formats.references import parse_repository

publisher_app = group("publisher", "Let jobs of continuous integration publish without a secret.")
Repository = Annotated[str, typer.Argument(metavar="REPO", help="Such as acme/sql; it need not exist yet.")]


@publisher_app.command("add")
def add(  # noqa: PLR0913
    repository: Repository,
    issuer: Annotated[str, typer.Option(help="github, gitlab, or the address of another issuer of ID tokens.")],
    project: Annotated[str, typer.Option(help="Such as acme/training; for other issuers, the subject (sub).")],
    ref: Annotated[str | None, typer.Option(help="Such as refs/heads/main; a * at its end matches anything.")] = None,
    environment: Annotated[str | None, typer.Option(help="The job's environment, such as release.")] = None,
    workflow: Annotated[
        str | None, typer.Option(help="The file of the job, such as release.yml; GitHub needs it.")
    ] = None,
    project_id: Annotated[
        str | None, typer.Option(help="The issuer's number of the project; by default, the first job's.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Let jobs of a project publish in a repository; each gets a token for an hour. Requires --ref, --environment or
    both, and on GitHub --workflow."""
    body = {
        "issuer": issuer,
        "project": project,
        "project_id": project_id,
        "ref": ref,
        "environment": environment,
        "workflow": workflow,
    }
    with connected() as connection:
        document = connection.api.post(_path(repository), body, wire.access.PublisherOut)
    render.document(document, json, lambda: render.out(_line(document)))
    if not document.exchanges:
        render.warn("this registry exchanges no ID tokens, so no job can use it yet: set ADAPTORY_OIDC_AUDIENCE there")


@publisher_app.command("list")
def list_publishers(repository: Repository, json: JsonFlag = False) -> None:
    """List a repository's trusted publishers."""
    with connected() as connection:
        items = list(connection.api.pages(_path(repository), wire.access.PublisherOut))
    rows = [
        (
            row.id,
            row.issuer,
            row.project,
            row.project_id or "",
            row.ref or "any",
            row.environment or "any",
            row.workflow or "any",
        )
        for row in items
    ]
    render.listing(items, json, ("publisher", "issuer", "project", "number", "ref", "environment", "workflow"), rows)


@publisher_app.command("remove")
def remove(
    repository: Repository,
    publisher: Annotated[str, typer.Argument(metavar="ID", help="As `adaptory publisher list` shows it.")],
    json: JsonFlag = False,
) -> None:
    """Remove a trusted publisher; the tokens of its jobs end too."""
    with connected() as connection:
        document = connection.api.delete(f"{_path(repository)}/{quote(publisher, safe='')}", wire.access.PublisherOut)
    render.document(document, json, lambda: render.out(f"removed {document.id} from {document.repository}"))


def _path(repository: str) -> str:
    return f"/v1/publishers/{parse_repository(repository)}"


def _line(row: "wire.access.PublisherOut") -> str:
    stated = (("", row.ref), ("environment ", row.environment), ("workflow ", row.workflow))
    where = ", ".join(f"{what}{value}" for what, value in stated if value)
    return f"{row.id} {row.project} of {row.issuer} ({where}) may publish in {row.repository}"
