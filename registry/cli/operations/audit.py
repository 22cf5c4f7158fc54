"""The audit log: audit | audit export | checkpoint | verify."""

import json as json_module
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import Commands, root
from registry.cli.console.render import JsonFlag
from registry.errors import Invalid, Usage
from registry.formats.signatures import fingerprint

if TYPE_CHECKING:
    from registry.client.api import Api
    from registry.formats.audit_chain import ChainCheck, Checkpoint

AUDIT_ROWS = 1000
"""Default limit for a table, which people read."""
MAX_CHECKPOINT_BYTES = 64 << 10
_DAMAGED = 20
"""Damaged rows that are listed; further ones are counted."""

audit_app = typer.Typer(cls=Commands, invoke_without_command=True, rich_markup_mode=None)
root.add_typer(audit_app, name="audit")

Subject = Annotated[str | None, typer.Option(help="acme/sql:1.0.0, acme/sql@prod, or a prefix: 'acme/*'")]
Namespace = Annotated[str | None, typer.Option(help="Only in this namespace.")]
By = Annotated[str | None, typer.Option(help="The user who acted.")]
Event = Annotated[str | None, typer.Option(help="channel:rollback, release:yank, …; any other word lists all.")]
Since = Annotated[str | None, typer.Option(help="From this time on: 2026-01-31 or 2026-01-31T12:00:00Z.")]
Until = Annotated[str | None, typer.Option(help="Before this time.")]


class Format(StrEnum):
    """The formats of an export."""

    JSONL = "jsonl"
    CEF = "cef"


@audit_app.callback()
def audit(  # noqa: PLR0913
    context: typer.Context,
    subject: Subject = None,
    namespace: Namespace = None,
    by: By = None,
    event: Event = None,
    act: Annotated[str | None, typer.Option("--act", hidden=True, help="The earlier name of --event.")] = None,
    since: Since = None,
    until: Until = None,
    export: Annotated[bool, typer.Option("--jsonl", hidden=True, help="The earlier name of `audit export`.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number: 1000 by default.")] = None,
    cursor: Annotated[str | None, typer.Option("--cursor", help="`next` of the previous page.")] = None,
    json: JsonFlag = False,
) -> None:
    """Show the audit log: who changed what, from where and why; newest first.

    Its commands export it, and show whether it was tampered with.
    """
    if context.invoked_subcommand is not None:
        return
    if export and cursor:
        raise Usage("no_pages", "An export has no pages.", subject=cursor)
    query = {"subject": subject, "namespace": namespace, "by": by, "act": event or act, "since": since, "until": until}
    with connected() as connection:
        if export:
            _export(connection.api, query, limit, Format.JSONL)
            return
        events, more = connection.api.first(
            "/v1/audit", wire.work.AuditOut, limit or AUDIT_ROWS, cursor=cursor, **query
        )
    render.document({"items": events, "next": more}, json, lambda: _show_events(events))
    render.more(more, json)


@audit_app.command("export")
def export_rows(  # noqa: PLR0913
    subject: Subject = None,
    namespace: Namespace = None,
    by: By = None,
    event: Event = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number; all by default.")] = None,
    written: Annotated[Format, typer.Option("--format", help="Of each line.")] = Format.JSONL,
) -> None:
    """Print the audit log, oldest first, one line for each row. Downloads need --event release:download."""
    query = {"subject": subject, "namespace": namespace, "by": by, "act": event, "since": since, "until": until}
    with connected() as connection:
        _export(connection.api, query, limit, written)


@audit_app.command()
def checkpoint(
    key: Annotated[Path | None, typer.Option(help="Sign it with this Ed25519 key (PEM).")] = None,
) -> None:
    """Print a digest of the audit log. Keep it where those who can write to the database cannot.

    All rows are sealed first. `adaptory audit verify` compares the log with it later.
    """
    from registry.formats.attestations import public_half
    from registry.formats.audit_chain import Checkpoint

    private_key = _read(key).encode() if key is not None else None
    if private_key is not None:
        public_half(private_key)  # refuses another kind of key before anything is sealed
    with connected() as connection:
        taken = connection.api.post("/v1/audit/checkpoint", None, wire.work.CheckpointOut)
    at = taken.at.isoformat(timespec="seconds")
    print(Checkpoint(taken.number, taken.digest, at).to_text(private_key))


@audit_app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `adaptory audit checkpoint` printed.")],
    key: Annotated[
        Path | None, typer.Option(help="Accept only a checkpoint that this public key (PEM) verifies.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Compare the audit log with a checkpoint: exit with 1 if a row was changed, deleted or inserted before it.

    Reads the log from the registry, and computes each digest again.
    """
    from registry.formats.audit_chain import read_checkpoint

    public_key = _read(key) if key is not None else None
    kept = read_checkpoint(_read(file), str(file), public_key)
    with connected() as connection:
        compared = _compare(connection.api, kept, signed=public_key is not None)
    render.document(compared.to_json(), json, lambda: _show_comparison(compared))
    if not compared.matches:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The chain of the log as it was computed again, beside a checkpoint. `same` says whether the chain has its digest,
    `signed` whether a key signed it."""

    kept: "Checkpoint"
    chain: "ChainCheck"
    same: bool
    signed: bool

    @property
    def matches(self) -> bool:
        return self.same and not self.chain.damage

    def to_json(self) -> dict[str, Any]:
        return {
            "matches": self.matches,
            "checkpoint": {"number": self.kept.number, "at": self.kept.at, "matches": self.same},
            "rows": self.chain.number,
            "rewritten": [{"removal": removal, "rows": rows} for removal, rows in self.chain.rewritten.items()],
            "damage": [{"row": row.audit_id, "kind": row.kind, "message": row.message} for row in self.chain.damage],
            "signed": self.signed,
        }


def _compare(api: "Api", kept: "Checkpoint", *, signed: bool) -> _Comparison:
    """Computes the chain of the log again, as far as it goes."""
    from registry.formats.audit_chain import START, ChainCheck, Seal

    chain, at_checkpoint = ChainCheck(), START if kept.number == 0 else None
    with closing(api.lines("/v1/audit/chain")) as lines:
        for line in lines:
            link = wire.work.SealedAuditOut.read(json_module.loads(line))
            row = link.row.content if link.row is not None else None
            chain.add(Seal(link.number, link.id, link.content, link.removal, link.digest), row)
            if link.number == kept.number:
                at_checkpoint = link.digest
    return _Comparison(kept, chain, at_checkpoint == kept.digest, signed)


def _show_comparison(compared: _Comparison) -> None:
    kept, chain, damage = compared.kept, compared.chain, compared.chain.damage
    for row in damage[:_DAMAGED]:
        render.out(f"row {row.audit_id} {row.message}")
    if len(damage) > _DAMAGED:
        render.out(f"and {render.counted(len(damage) - _DAMAGED, 'further row')}")
    seals, later = f"the first {render.counted(kept.number, 'seal')}", chain.number - kept.number
    if later < 0:
        render.out(f"the checkpoint of {kept.at} has {kept.number:,} seals, the log only {chain.number:,}")
    elif not compared.same:
        render.out(f"{seals} are not those of the checkpoint of {kept.at}: computed again, or of another registry")
    elif damage:
        render.out(f"{seals} are those of the checkpoint of {kept.at}, but these rows are not as they were sealed")
    else:
        render.out(f"{seals} and their rows are those of the checkpoint of {kept.at}; {later:,} were added since")
    for removal, rows in chain.rewritten.items():
        render.out(f"row {removal} removed a user, and rewrote {render.counted(rows, 'row')}")
    if not compared.signed:
        render.out("no signature was checked: --key KEY.pub accepts only a checkpoint that this key signed")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CHECKPOINT_BYTES + 1)
        if len(content) > MAX_CHECKPOINT_BYTES:
            raise Invalid("bad_checkpoint", f"{path} is not a checkpoint: it is too long.", subject=str(path))
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise Invalid(
            "no_file", f"Cannot read {path}: {why}.", subject=str(path), next_step="Check the path and its permissions."
        ) from error


def _export(api: "Api", query: dict[str, str | None], limit: int | None, written: Format) -> None:
    from importlib.metadata import version

    from registry.formats.cef import cef_line

    product = version("adaptory")
    with closing(api.lines("/v1/audit.jsonl", **query)) as lines:
        for line in islice(lines, limit):
            row = wire.work.AuditOut.read(json_module.loads(line)) if written is Format.CEF else None
            print(render.escaped(line if row is None else cef_line(row.content, product)))


def _show_events(events: "list[wire.work.AuditOut]") -> None:
    """Shows a record for each event, with everything that it changed."""
    for row in events:
        pairs = [
            ("event", row.act),
            ("subject", row.subject),
            ("by", row.actor),
            ("from", row.source),
            *((name, value) for name, value in row.detail.items() if value not in ([], {})),
            *render.changes(_with_short_keys(row.before), _with_short_keys(row.after)),
            ("reason", row.reason),
        ]
        render.lines(f"{row.id}  {render.second(row.at)}", pairs)


def _with_short_keys(state: dict[str, Any] | None) -> dict[str, Any]:
    """The same with signing keys as fingerprints, as `signed_by` of a release: lines of PEM fit no terminal."""
    keys = (state or {}).get("signing_keys")
    return {**(state or {}), **({"signing_keys": list(map(fingerprint, keys))} if keys else {})}
