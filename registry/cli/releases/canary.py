"""Canaries: watch, which shows a channel's canary live, and what promote --canary shows."""

import time
from typing import Annotated

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import refuse_idle, root
from registry.cli.console.render import JsonFlag
from registry.cli.releases.rollout import Channel
from registry.errors import Usage
from registry.formats.references import parse_channel_reference

_LOOK_S = 2.0


@root.command()
def watch(
    channel: Channel,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="Stop the canary: all requests go to the served release.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why it is stopped; kept in the audit log.")] = "",
    json: JsonFlag = False,
) -> None:
    """Show a channel's canary until it ends: its share, the requests so far, and each rule with its figures.

    Exits with 1 if live figures rolled it back.
    """
    refuse_idle({"--reason": reason and not stop}, "without --stop", "Leave it out.")
    repository, name = parse_channel_reference(channel)
    with connected() as connection:
        path = f"{connection.api.repository_path(str(repository))}/channels/{name}/canary"
        if stop:
            ended = connection.api.delete(path, wire.fleet.CanaryOut, reason=reason)
            render.document(ended, json, lambda: show_canary(ended))
            return
        shown = connection.api.get(path, wire.fleet.CanaryOut)
        said = ""
        while not once and shown.state == "running":
            if not json and (line := _headline(shown)) != said:
                show_canary(shown)
                said = line
            time.sleep(_LOOK_S)
            shown = connection.api.get(path, wire.fleet.CanaryOut)
    render.document(shown, json, lambda: show_canary(shown))
    if shown.state == "rolled_back":
        raise typer.Exit(1)


def parse_share(text: str) -> int:
    """The per cent of `10%` or `10`. Raises Usage for anything but 1 to 99."""
    number = text.strip().removesuffix("%")
    if not number.isdecimal() or not 1 <= int(number) <= 99:
        raise Usage("bad_share", f"{text[:20]!r} is not a share from 1% to 99%.", subject=text[:20])
    return int(number)


def show_canary(canary: "wire.fleet.CanaryOut") -> None:
    render.out(_headline(canary))
    if canary.why:
        render.out(canary.why)
    rows = [
        (rule.rule, _figure(rule.candidate), _figure(rule.served), "broken" if rule.broken else "")
        for rule in canary.rules
    ]
    if rows:
        render.table("", ("rule", "candidate", "served", ""), rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _headline(canary: "wire.fleet.CanaryOut") -> str:
    """`acme/sql@prod canary 1.1.0 beside 1.0.0: 10 % running, 120 and 1,080 requests; then 50 %`."""
    counted = ", {:,} and {:,} requests".format(*canary.requests) if canary.requests else ""
    follows = f"; then {canary.next_weight} %" if canary.next_weight else ""
    return (
        f"{canary.repository}@{canary.channel} canary {canary.version} beside {canary.served}: {canary.weight} % "
        f"{canary.state.replace('_', ' ')}{counted}{follows}"
    )
