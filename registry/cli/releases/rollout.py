"""Rollouts: which nodes serve what a channel serves: rollout status | forget, and the wait of promote and rollback."""

from collections.abc import Sequence
from typing import Annotated
from urllib.parse import quote

import typer

from registry import wire
from registry.cli.console import complete, render
from registry.cli.console.connect import connected
from registry.cli.console.groups import group
from registry.cli.console.render import JsonFlag
from registry.errors import Refused
from registry.formats.watch import parse_duration
from registry.sdk.connection import Connection

Channel = Annotated[
    str, typer.Argument(metavar="REPO@CHANNEL", help="Such as acme/sql@prod.", autocompletion=complete.channels)
]
WaitForNodes = Annotated[
    int | None,
    typer.Option(
        "--wait",
        metavar="TIME",
        parser=parse_duration,
        help="Wait until all nodes that report follow, for 90s or 5m at most; exit with 1 if some do not.",
    ),
]

_LISTED = 10

rollout_app = group("rollout", "Which nodes serve what a channel serves.")


@rollout_app.command("status")
def show_status(channel: Channel, json: JsonFlag = False) -> None:
    """Show what each node of a channel gives users, beside what the channel serves."""
    from registry.client.rollout import rollout

    with connected() as connection:
        document = rollout(connection.api, channel)
    render.document(document, json, lambda: _show(document))


def _show(document: "wire.fleet.RolloutOut") -> None:
    render.out(_headline(document))
    if not document.nodes:
        return
    rows = [
        (
            f"{node.group}/{node.node}",
            node.state,
            node.version,
            render.second(node.since),
            render.second(node.seen_at),
            _checked(node.check),
            node.error or "",
        )
        for node in document.nodes
    ]
    render.table("", ("node", "state", "serves", "since", "reported", "check", "error"), rows)


def _headline(document: "wire.fleet.RolloutOut") -> str:
    """`acme/sql@prod serves 1.1.0 (move 17): 11 following, 1 behind; proved on 11 of 12 nodes`."""
    count = sum(document.totals.values())
    served = f"{document.repository}@{document.channel} serves {document.version or 'nothing'} (move {document.move})"
    if not count:
        return f"{served}; no node follows it"
    states = ", ".join(f"{number} {state}" for state, number in document.totals.items() if number)
    return f"{served}: {states}; proved on {document.proved} of {render.counted(count, 'node')}"


def _checked(check: "wire.fleet.NodeCheck | None") -> str:
    if check is None:
        return ""
    figures = [f"share {check.share:.3f}"] if check.share is not None else []
    figures += [f"worst {check.worst_nats:.2f} nats"] if check.worst_nats is not None else []
    return f"{check.stated} ({', '.join(figures)})" if figures else check.stated


def waited_for_nodes(connection: Connection, channel: str, wait_s: int | None) -> Refused | None:
    """Waits for the nodes of REPO@CHANNEL as long as `--wait`, and prints changes. Returns the failure."""
    if wait_s is None:
        return None
    from registry.client.rollout import wait_for_nodes

    said: list[str] = []

    def say(document: "wire.fleet.RolloutOut") -> None:
        if (line := _headline(document)) not in said[-1:]:
            said.append(line)
            render.say(line)

    try:
        wait_for_nodes(connection.api, channel, wait_s, say)
    except Refused as failure:
        if failure.code != "rollout_incomplete":
            raise
        return failure
    return None


def loaded_on(nodes: "Sequence[wire.catalog.LoadedOnOut]") -> str:
    """`prod/gpu-1, prod/gpu-2 (silent) and 3 more`; empty for none."""
    named = [f"{node.group}/{node.node}{' (silent)' * node.silent}" for node in nodes]
    more = f" and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
    return ", ".join(named[:_LISTED]) + more


def show_sets(sets: "Sequence[wire.catalog.ServingSetOut]", what: str) -> None:
    """Says what becomes of the sets with a member that is withdrawn: `acme/assistants:1.0.0, served by prod, …`."""
    for row in sets:
        serving = f"served by {', '.join(row.channels)}" if row.channels else "which no channel serves"
        render.say(f"{row.release}, {serving}, {what}")


def withdrawn_input(row: "wire.catalog.InputOut") -> str:
    """`acme/sql:1.0.0 is yanked: wrong`."""
    name = f"{row.repository}:{row.version}" if row.repository else row.commit[:12]
    state = "was taken down" if row.taken_down else "is yanked"
    return f"{name} {state}: {row.yank_reason}" if row.yank_reason else f"{name} {state}"


def end_with(failure: Refused | None) -> None:
    """Ends the command with the failure, if there is one, on stderr alone: the move is on stdout."""
    if failure is not None:
        raise typer.Exit(render.fail(failure, as_json=False))


@rollout_app.command("forget")
def forget(
    namespace: Annotated[str, typer.Argument(metavar="NAMESPACE", help="Of the channels that it followed.")],
    node: Annotated[str, typer.Argument(metavar="GROUP/NODE", help="As `rollout status` shows it.")],
    json: JsonFlag = False,
) -> None:
    """Remove a node that has ended; it comes back with its next report."""
    with connected() as connection:
        document = connection.api.delete(f"/v1/fleet/{quote(node)}", wire.fleet.ForgottenOut, namespace=namespace)
    render.document(document, json, lambda: render.out(f"removed {node} from {namespace}"))
