"""`adaptory` itself: its global options, and the command list of `--help`, grouped by task."""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from registry.cli.console import render
from registry.errors import Usage

GROUPS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "Release",
        (
            "push", "pull", "import", "export", "promote", "approve", "promotion", "rollback", "gate", "policy",
            "channel", "history", "follow", "rollout", "watch", "yank", "unyank", "deprecate", "takedown", "eval",
            "score", "sign", "verify", "evidence", "base", "suite",
        ),
        "adaptory push ./out acme/sql --bump auto --channel prod",
    ),
    (
        "Find",
        ("list", "search", "show", "log", "diff", "inspect"),
        "adaptory search --base llama --score 'sql.accuracy>=0.8'",
    ),
    (
        "Compose",
        ("conflicts", "compose", "tame", "merge", "combine", "convert", "extract", "recipe"),
        "adaptory conflicts acme/sql acme/support --probe 8",
    ),
    ("Serve", ("mirror", "route", "router"), "adaptory mirror acme/sql@prod ./served"),
    (
        "Operate",
        ("serve", "worker", "jobs", "cancel", "migrate", "gc", "fsck", "doctor", "backup", "restore", "storage"),
        "adaptory serve --host 0.0.0.0 --processes 4",
    ),
    (
        "Admin",
        (
            "login", "logout", "profile", "whoami", "token", "publisher", "worker-key", "namespace", "change",
            "inbox", "user", "audit", "webhook",
        ),
        "adaptory login https://adapters.example",
    ),
)  # fmt: skip

_LISTED = 8
"""Commands that an error lists; `--help` shows more of them better."""


class Commands(TyperGroup):
    """Lists its commands, each with its complete first sentence."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named first. An unknown name that resembles none is answered with those there are, if
        one line holds them."""
        name, known = args[0], self.list_commands(ctx)
        is_named = name in known or name.startswith("-") or get_close_matches(name, known)
        if not (is_named or ctx.resilient_parsing) and len(known) <= _LISTED:
            ctx.fail(f"No such command {name!r}. The commands are {', '.join(known)}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(self.summaries(ctx, self.list_commands(ctx)))

    def summaries(self, ctx: Any, names: Sequence[str]) -> list[tuple[str, str]]:
        known = [(name, self.get_command(ctx, name)) for name in names]
        return [
            (name, _first_sentence(command.help or "")) for name, command in known if command and not command.hidden
        ]


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."


class GroupedCommands(Commands):
    """Lists the commands by group; those in no group under `Other`."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        left = [
            name
            for name in self.list_commands(ctx)
            if name not in {grouped for _, names, _ in GROUPS for grouped in names}
        ]
        for title, names, example in (*GROUPS, ("Other", tuple(left), "")):
            rows = self.summaries(ctx, names)
            if not rows:
                continue
            with formatter.section(title):
                formatter.write_dl(rows)
                if example:
                    formatter.write(f"  Example: {example}\n")


root = typer.Typer(
    name="adaptory",
    cls=GroupedCommands,
    help="The release registry and composer for LoRA adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
"""`adaptory`, to which each module adds its commands."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"adaptory {version('adaptory')}")
        raise typer.Exit


@root.callback()
def options(
    profile: Annotated[
        str | None, typer.Option(help="Use the registry of this profile; local is the embedded one.")
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Show full tables, however wide.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """The release registry and composer for LoRA adapters."""
    render.wide = wide
    if profile is not None:
        os.environ["ADAPTORY_PROFILE"] = profile


def group(name: str, text: str) -> typer.Typer:
    """A command that only has others below it; `text` is its help."""
    added = typer.Typer(cls=Commands, help=text, no_args_is_help=True, rich_markup_mode=None)
    root.add_typer(added, name=name)
    return added


def refuse_idle(options: Mapping[str, object], why: str, next_step: str) -> None:
    """Raises Usage for the first of these options that was given. `why` completes "NAME has no effect"."""
    for name, value in options.items():
        if value:
            raise Usage("idle_option", f"{name} has no effect {why}.", subject=name, next_step=next_step)
