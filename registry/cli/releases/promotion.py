"""Channels, promotions that wait, and approvals: channel delete, promote, promotion list | cancel, approve."""

import sys
from contextlib import suppress
from typing import Annotated

import typer

from registry import wire
from registry.cli.console import complete, render
from registry.cli.console.connect import connected, jobs_running, resolved
from registry.cli.console.groups import group, refuse_idle, root
from registry.cli.console.interrupt import interrupts
from registry.cli.console.render import JsonFlag
from registry.cli.releases.canary import parse_share, show_canary
from registry.cli.releases.release import Channel, Ref, show_move
from registry.cli.releases.rollout import WaitForNodes, end_with, waited_for_nodes
from registry.errors import NotFound, Usage
from registry.formats.references import parse_channel_reference
from registry.sdk.connection import Connection

NewChannel = Annotated[
    bool, typer.Option("--new-channel", help="The channel may be new, though the repository has others.")
]
_LISTED = 10

channel_app = group("channel", "Channels of a repository.")
promotion_app = group("promotion", "Promotions that wait, or have waited.")


@root.command()
def promote(  # noqa: PLR0913
    ref: Ref,
    to: Annotated[str, typer.Option("--to", help="The channel.", autocompletion=complete.channel_names)],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the history.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Promote even if a gate fails; requires --reason.")] = False,
    wait: WaitForNodes = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not wait for what the release lacks, such as a score or an approval.")
    ] = False,
    new_channel: NewChannel = False,
    canary: Annotated[
        int | None,
        typer.Option(
            metavar="SHARE", parser=parse_share, help="Give the release this share of the requests first, such as 10%."
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Move a channel to a release; evaluates and prints every gate.

    A release that lacks only what may still come waits for it: the promotion then completes or fails automatically.
    """
    refuse_idle({"--wait": no_wait and wait}, "with --no-wait", "Leave one of the two out.")
    others = {"--force": force, "--wait": wait, "--no-wait": no_wait, "--new-channel": new_channel}
    refuse_idle(others if canary is not None else {}, "with --canary", "A canary begins where every gate passes.")
    from registry.cli.releases.release import warn_of_move_since
    from registry.client import channel_moves

    with connected() as connection:
        release = resolved(connection, ref)
        if canary is not None:
            body = {"version": release.version, "weight": canary, "reason": reason}
            begun = connection.api.put(f"{release.line}/channels/{to}/canary", body, wire.fleet.CanaryOut)
            render.document(begun, json, lambda: show_canary(begun))
            return
        confirm_new_channel(connection, release.line, to, agreed=new_channel)
        answer, since = channel_moves.promote(connection.api, release, to, reason, force=force)
        if isinstance(answer, wire.quality.PromotionOut) and not no_wait:
            with jobs_running(connection, answer.job):
                answer = _followed(connection, release, answer)
        failure = waited_for_nodes(connection, f"{release.repository}@{to}", wait)
    render.document(answer, json, lambda: show_outcome(answer))
    warn_of_move_since(answer, since)
    end_with(failure)


def show_outcome(answer: "wire.quality.MoveOut | wire.quality.PromotionOut") -> None:
    """Shows the move of a promotion, or the promotion that waits."""
    if isinstance(answer, wire.quality.MoveOut):
        show_move(answer)
    else:
        show_promotion(answer)


def _followed(
    connection: Connection, release: "wire.catalog.NamedRelease", promotion: "wire.quality.PromotionOut"
) -> "wire.quality.MoveOut":
    """Waits until the promotion ends, with its evaluation's bar; returns its move."""
    from registry.client import channel_moves

    render.say(_headline(promotion))
    for line in promotion.missing:
        render.say(f"  {line}")
    try:
        with render.progress("promote", None) as bar:
            return channel_moves.wait_for(
                connection.api, promotion, release.kind, lambda seen: _show_job(connection, seen, bar)
            )
    except KeyboardInterrupt:
        where = f"{promotion.repository}@{promotion.channel}"
        interrupts.kept = f"promotion {promotion.id} keeps waiting; `adaptory promotion cancel {where}` cancels it"
        raise


def _show_job(connection: Connection, promotion: "wire.quality.PromotionOut", bar: render.StepProgress) -> None:
    """Moves the bar to the running step of the promotion's evaluation."""
    if promotion.job is None or promotion.state != "pending":
        return
    with suppress(NotFound):  # another namespace's job, which measures the same
        bar.show_running(connection.api.get(f"/v1/jobs/{promotion.job}", wire.work.JobOut).steps)


def _headline(promotion: "wire.quality.PromotionOut") -> str:
    where = f"{promotion.repository}@{promotion.channel}"
    until = render.minute(promotion.expires_at)
    return f"promotion {promotion.id} of {promotion.version} to {where} waits, until {until} at most:"


def show_promotion(promotion: "wire.quality.PromotionOut") -> None:
    where = f"{promotion.repository}@{promotion.channel}"
    if promotion.state == "pending":
        render.out(_headline(promotion))
    else:
        render.out(f"promotion {promotion.id} of {promotion.version} to {where}: {promotion.state}")
    render.gate_lines(promotion.gates)
    if promotion.state == "pending" and promotion.job is not None:
        render.out(f"A worker measures what is missing: `adaptory jobs {promotion.job}` shows its progress.")
    if promotion.error:
        render.out(promotion.error["detail"])


@promotion_app.command("list")
def list_promotions(channel: Channel, json: JsonFlag = False) -> None:
    """List the promotions to a channel that wait or have waited, newest first."""
    repository, name = parse_channel_reference(channel)
    with connected() as connection:
        path = f"{connection.api.repository_path(str(repository))}/channels/{name}/promotions"
        items = list(connection.api.pages(path, wire.quality.PromotionOut))
    rows = [
        (
            row.id,
            row.version,
            row.state,
            row.actor,
            render.second(row.created_at),
            row.move,
            row.missing if row.state == "pending" else [row.error["detail"] if row.error else ""],
        )
        for row in items
    ]
    columns = ("promotion", "version", "state", "by", "at", "move", "")
    render.listing(items, json, columns, rows, channel)


@promotion_app.command()
def cancel(channel: Channel, json: JsonFlag = False) -> None:
    """Cancel the promotion that a channel waits for."""
    repository, name = parse_channel_reference(channel)
    with connected() as connection:
        path = f"{connection.api.repository_path(str(repository))}/channels/{name}/promotions"
        waiting = next(
            (row for row in connection.api.pages(path, wire.quality.PromotionOut) if row.state == "pending"), None
        )
        if waiting is None:
            raise NotFound(
                "promotion_unknown",
                f"{channel} waits for no promotion.",
                subject=channel,
                next_step=f"`adaptory promotion list {channel}` shows those that have waited.",
            )
        document = connection.api.post(f"{path}/{waiting.id}/cancel", None, wire.quality.PromotionOut)
    render.document(document, json, lambda: show_promotion(document))


@root.command()
def approve(
    ref: Ref,
    to: Annotated[str, typer.Option("--to", help="The channel.", autocompletion=complete.channel_names)],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the audit log.")] = "",
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Withdraw your approval instead.")] = False,
    json: JsonFlag = False,
) -> None:
    """Approve a release for a channel whose policy requires it; a promotion that waits for it may complete."""
    with connected() as connection:
        release = resolved(connection, ref)
        path = f"{release.line}/channels/{to}/approvals"
        if withdraw:
            undone = connection.api.delete(f"{path}/{release.version}", wire.quality.WithdrawnApprovalOut)
            line = f"approval of {release.name} for {to} withdrawn" if undone.withdrawn else "no approval to withdraw"
            render.document(undone, json, lambda: render.out(line))
            return
        given = connection.api.post(path, {"version": release.version, "reason": reason}, wire.quality.ApprovalOut)

    def show() -> None:
        render.out(f"{given.user} approves {release.name} for {to}")
        if given.promotion:
            show_promotion(given.promotion)

    render.document(given, json, show)


def confirm_new_channel(connection: Connection, line: str, channel: str, *, agreed: bool) -> None:
    """Reports a promotion that creates its channel; `line` is the repository's route. Where the repository has other
    channels, the name may be misspelt: prompts on a terminal and raises Usage elsewhere, unless `agreed`."""
    known: list[str] = []
    with suppress(NotFound):
        connection.api.get(f"{line}/channels/{channel}", wire.quality.ChannelOut)
        return  # also if it serves nothing now
    with suppress(NotFound):
        known = sorted(connection.api.get(line, wire.catalog.RepositoryOut).channels)
    if known:
        policy = connection.api.get(f"{line}/channels/{channel}/policy", wire.quality.PolicyOut)
        if policy.revision or policy.shared:
            return  # somebody has set its policy
    listed = ", ".join(known[:_LISTED]) + (", …" if len(known) > _LISTED else "")
    message = f"creates channel {channel}" + (f"; channels here: {listed}" if known else "")
    if known and not agreed and not _agrees(message):
        raise Usage("channel_new", f"This {message}.", subject=channel)
    render.say(message)


def _agrees(message: str) -> bool:
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty()):
        return False
    return typer.confirm(f"This {message}. Go on?", err=True)


@channel_app.command()
def delete(
    channel: Channel,
    serving: Annotated[
        str | None, typer.Option("--serving", metavar="VERSION", help="The release that it serves, if it serves one.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the history and the audit log.")] = "",
    json: JsonFlag = False,
) -> None:
    """Delete a channel without a policy, such as one with a misspelt name.

    A channel that serves a release is refused: its clients would find nothing. If it has none, an admin may delete it
    with --serving and --reason.
    """
    repository, name = parse_channel_reference(channel)
    with connected() as connection:
        path = f"{connection.api.repository_path(str(repository))}/channels/{name}"
        document = connection.api.delete(path, wire.quality.ChannelDeleted, serving=serving, reason=reason)
    served = f", which served {document.served}" if document.served else ""
    render.document(document, json, lambda: render.out(f"deleted {channel}{served}"))
