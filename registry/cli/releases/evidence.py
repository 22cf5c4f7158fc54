"""`evidence`: what a server's answers are compared with, to prove that it applies a release."""

from collections.abc import Sequence
from typing import Annotated

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.cli.evaluation import queued_evaluation
from registry.cli.releases.transfer import resolved
from registry.errors import Refused
from registry.sdk.connection import Connection
from registry.sdk.suites import fetch_suite


@root.command()
def evidence(
    ref: Annotated[str, typer.Argument(metavar="REF", help="A release.")],
    suite: Annotated[
        list[str] | None, typer.Option(help="Let a worker make it on this suite, which states `evidence: true`.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Show the evidence of a release, or let a worker make it with --suite.

    It has the token ids of up to 8 examples, and their log-probabilities under the release and its base. The agent
    compares a server's answers with it before it routes requests to the release.
    """
    from registry.formats.attestations import unverified

    with connected() as connection:
        release = resolved(connection, ref)
        made: Sequence[str] = suite or ()
        for name in made:
            _refuse_unless_allowed(connection, name)
        if made:
            report = queued_evaluation.queue(connection, [release.name], made, {}, wait=True)
            if error := queued_evaluation.error_of(report.job, report.state, report.error):
                raise error
        document = connection.api.get(f"{release.path}/evidence", wire.quality.AttestationOut)
    examples = unverified(document.envelope).predicate["examples"]
    tokens = sum(len(example["release"]) for example in examples)
    shown = f"{render.counted(len(examples), 'example')}, {render.counted(tokens, 'completion token')}"
    by = f"attested by worker {document.key.worker} at {render.minute(document.created_at)}"
    render.document(document, json, lambda: render.out(f"evidence of {release.name}: {shown}, {by}"))


def _refuse_unless_allowed(connection: Connection, suite: str) -> None:
    """Raises Refused for a suite whose examples servers may not be asked."""
    if not fetch_suite(connection, suite).evidence:
        raise Refused("evidence_not_allowed", f"{suite} does not state `evidence: true`.", subject=suite)
