"""Releases and channels: list, log, show, rollback, history, gate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry import wire
from registry.cli.console import complete, render
from registry.cli.console.connect import connected, resolved
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.cli.console.scores import score_table
from registry.cli.operations.changes import made_or_requested
from registry.cli.releases.rollout import (
    WaitForNodes,
    end_with,
    waited_for_nodes,
    withdrawn_input,
)
from registry.cli.releases.search import show_releases
from registry.errors import Refused, RegistryError, Usage
from registry.formats.references import parse_channel_reference, parse_repository
from registry.formats.signatures import Signed
from registry.sdk.connection import Connection

if TYPE_CHECKING:
    from registry.formats.lineage import Lineage

Ref = Annotated[
    str, typer.Argument(help="REPO, REPO:VERSION, REPO@CHANNEL or REPO#COMMIT.", autocompletion=complete.references)
]
Channel = Annotated[
    str, typer.Argument(metavar="REPO@CHANNEL", help="Such as acme/sql@prod.", autocompletion=complete.channels)
]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the history.")]


@root.command("list")
def list_repositories(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAMESPACE|REPO]", help="A namespace's repositories, or a repository's releases."),
    ] = None,
    models: Annotated[bool, typer.Option("--models", help="Only merged models.")] = False,
    json: JsonFlag = False,
) -> None:
    """List the repositories of adapters and models, or the releases of one."""
    if name and "/" in name:
        log(name, json)
        return
    with connected() as connection:
        kinds = ("models",) if models else ("adapters", "models", "sets")
        items = [
            row
            for kind in kinds
            for row in connection.api.pages(f"/v1/{kind}", wire.catalog.RepositoryOut, namespace=name)
        ]
    rows = [
        (row.repository, row.kind, row.latest, [f"{channel}={served}" for channel, served in row.channels.items()])
        for row in items
    ]
    render.listing(items, json, ("repository", "kind", "latest", "channels"), rows)


@root.command()
def log(
    repository: Annotated[str, typer.Argument(metavar="REPO", help="NAMESPACE/NAME.")], json: JsonFlag = False
) -> None:
    """List a repository's releases, highest version first."""
    with connected() as connection:
        line = connection.api.repository_path(str(parse_repository(repository)))
        items = list(connection.api.pages(f"{line}/releases", wire.catalog.ReleaseOut))
    render.document({"items": items, "next": None}, json, lambda: show_releases(items))


@root.command()
def show(
    ref: Ref,
    modules: Annotated[
        bool,
        typer.Option(
            "--modules", help="Show instead how much of its rank each module uses, and what truncation would keep."
        ),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Show a release's facts, scores, files and lineage."""
    with connected() as connection:
        path = resolved(connection, ref).path
        if modules:
            spectrum = connection.api.get(f"{path}/spectrum", wire.catalog.SpectrumOut)
            render.document(spectrum, json, lambda: _show_spectrum(ref, spectrum))
            return
        release = connection.api.get(path, wire.catalog.ReleaseOut)
        made = None if json else _made_of(connection, release)
        costs = [] if json else _guard_costs(connection, release)
    render.document(release, json, lambda: _show_release(release, made, costs))


@root.command("rollback")
def roll_back(
    channel: Channel,
    to: Annotated[
        str | None, typer.Option("--to", help="A version that it served before, and was not rolled back from since.")
    ] = None,
    reason: Reason = "",
    wait: WaitForNodes = None,
    json: JsonFlag = False,
) -> None:
    """Return a channel to the release it served before; repeat to go further back."""
    from registry.client import channel_moves

    repository, name = parse_channel_reference(channel)
    with connected() as connection:
        line = connection.api.repository_path(str(repository))
        move, since = channel_moves.roll_back(connection.api, line, name, {"to": to, "reason": reason})
        failure = waited_for_nodes(connection, channel, wait)
    render.document(move, json, lambda: show_move(move))
    warn_of_move_since(move, since)
    end_with(failure)


@root.command()
def history(channel: Channel, json: JsonFlag = False) -> None:
    """List every move of a channel, newest first."""
    repository, name = parse_channel_reference(channel)
    with connected() as connection:
        line = connection.api.repository_path(str(repository))
        moves = list(connection.api.pages(f"{line}/channels/{name}/history", wire.quality.MoveOut))
    rows = [
        (
            move.id,
            render.second(move.at),
            move.kind,
            move.from_version,
            None if move.from_version == move.to_version else move.to_version,
            move.actor,
            "forced" if move.forced else "",
            move.reason,
        )
        for move in moves
    ]
    render.listing(moves, json, ("move", "at", "kind", "from", "to", "actor", "", "reason"), rows, channel)


@root.command()
def gate(
    channel: Channel,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="'sql-exact.accuracy>=0.5' or 'guard.nll within 0.1 of base'. May be repeated."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all rules.")] = False,
    repin: Annotated[bool, typer.Option("--repin", help="Judge by the current content of the rules' suites.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show a channel's gates, or replace all of them."""
    repository, name = parse_channel_reference(channel)
    with connected() as connection:
        path = f"{connection.api.repository_path(str(repository))}/gates"
        if rule or clear or repin:
            body = {"channel": name, "rules": rule or ([] if clear else None), "repin": repin}
            change = {"kind": "gates", "scope": channel, "rules": body["rules"], "repin": repin}
            document = made_or_requested(
                connection,
                repository.namespace,
                change,
                lambda: connection.api.put(path, body, wire.quality.GatesOut),
                json=json,
            )
        else:
            document = connection.api.get(path, wire.quality.GatesOut)
    rules = document.gates.get(name, [])
    render.document(
        {"channel": channel, "rules": rules},
        json,
        lambda: render.lines(f"gates of {channel}", [("rule", text) for text in rules]),
    )


def deprecation_words(deprecated: "wire.catalog.DeprecationOut | None") -> str | None:
    """The reason for a deprecation, and the successor; None if it is not."""
    if deprecated is None:
        return None
    return deprecated.reason + (f"; use {deprecated.successor}" if deprecated.successor else "")


def license_words(licenses: "wire.catalog.LicensesOut") -> list[str] | None:
    """`base MIT`, `adapter Apache-2.0`, …; None if nothing is stated."""
    stated = [("base", licenses.base), ("adapter", licenses.adapter), *(("data", name) for name in licenses.data)]
    return [f"{part} {name}" for part, name in stated if name] or None


def _show_spectrum(ref: str, spectrum: "wire.catalog.SpectrumOut") -> None:
    ranks = [*spectrum.energy]
    rows = [
        (
            row.module,
            row.rank,
            f"{row.norm:.4g}",
            f"{row.effective_rank:.1f}",
            *(f"{row.energy[rank]:.1%}" if rank in row.energy else "" for rank in ranks),
            row.rank_95,
            row.rank_99,
            "near zero" if row.near_zero else "",
        )
        for row in spectrum.modules
    ]
    cuts = [f"at {rank}" for rank in ranks]
    render.table(ref, ("module", "rank", "norm", "effective", *cuts, "95 %", "99 %", ""), rows)
    render.out("at R: energy kept at rank R; 95 %: rank that keeps 95 % of the energy")
    for module in spectrum.left_out:
        render.out(f"  {module}: not computed")


def used_ranks(rank_95: int, rank_99: int) -> str:
    """The ranks that hold 95 % and 99 % of the energy, in words."""
    return f"95 % in rank {rank_95}, 99 % in rank {rank_99}"


def _made_of(connection: Connection, release: "wire.catalog.ReleaseOut") -> "Lineage | None":
    """The release's lineage; without its note, and with a warning, if the store has lost that."""
    from registry.client.lineage import fetch_note, of_release

    try:
        note = fetch_note(connection.api, release)
    except RegistryError as error:
        render.say(f"warning: {error.detail}")
        note = b""
    return of_release(release, note)


def _guard_costs(connection: Connection, release: "wire.catalog.ReleaseOut") -> list[tuple[str, str]]:
    """By guard, what its loss costs beside the base's on the same content."""
    from composer.formats.recipes.suite import score_cost

    losses = [score for score in release.scores if score.kind == "guard" and score.metric == "nll"]
    if not losses:
        return []
    scores = connection.api.base(release.base.digest).scores
    base = {score.suite_digest: score for score in scores if score.metric == "nll"}
    unknown = f"unknown until `adaptory eval {release.base.name}` measures the base on it"
    return [
        (score.suite, score_cost(score, base[score.suite_digest]) if score.suite_digest in base else unknown)
        for score in losses
    ]


def _adapter_lines(facts: "wire.catalog.AdapterFactsOut") -> list[tuple[str, Any]]:
    return [
        ("rank", facts.rank_max or None),
        ("alpha", facts.alpha if facts.rank_max else None),
        ("targets", facts.targets),
        ("modules", facts.modules),
        ("energy", used_ranks(facts.spectrum.rank_95, facts.spectrum.rank_99) if facts.spectrum else None),
    ]


def _show_release(release: "wire.catalog.ReleaseOut", made: "Lineage | None", costs: list[tuple[str, str]]) -> None:
    from registry.client.diff import stated_provenance

    facts = release.own_facts
    own = dict(_adapter_lines(release.adapter)) if release.adapter else {}
    if release.set:
        own |= {
            "serves": release.set.members,
            "rank": f"up to {release.set.rank_max}",
            "targets": release.set.targets,
        }
    pairs: list[tuple[str, Any]] = [
        ("commit", release.commit),
        ("base", f"{release.base.name} ({release.base.digest[:12]})"),
        ("breaking", release.breaking_reason),
        ("licenses", license_words(release.licenses)),
        ("signed by", signer(release)),
        ("type", ", ".join(dict.fromkeys([facts.type, facts.variant])) if facts else None),
        *((name, own.get(name)) for name in ("serves", "rank", "alpha", "targets", "modules")),
        ("parameters", f"{facts.parameters:,}" if facts else None),
        ("energy", own.get("energy")),
        ("servers", release.servers or None),
        ("dtype", facts.dtype if facts else None),
        ("size", render.size(sum(file.size_bytes for file in release.files))),
        ("notes", release.notes),
        ("yanked", release.yank_reason if release.yanked else None),
        ("deprecated", deprecation_words(release.deprecated)),
        ("base deprecated", deprecation_words(release.base_deprecated)),
        ("published", f"{render.second(release.created_at)} by {release.created_by}"),
        ("inputs", list(map(str, made.members)) if made else None),
        ("withdrawn", [withdrawn_input(row) for row in release.inputs if row.yanked] or None),
        ("method", made.how if made else None),
        ("rounding", made.rounding if made and release.kind == "model" else None),
    ]
    render.lines(f"{release.kind} {release.name}", pairs)
    provenance = stated_provenance(release.provenance.document)
    if stated := [(name, value) for name, value in provenance.items() if value not in (None, [])]:
        render.lines("provenance", stated)
    if release.scores:
        score_table("", release.scores)
        if costs:
            render.lines("guards", costs)
    files = [(file.path, render.size(file.size_bytes), file.sha256[:16]) for file in release.files]
    render.table("", ("file", "size", "sha256"), files)


def warn_of_move_since(move: "wire.quality.MoveOut | wire.quality.PromotionOut", since: str | None) -> None:
    """Warns that the channel was moved again after a move whose response was lost; `since` is its current version."""
    if since is not None:
        where = f"{move.repository}@{move.channel}"
        render.say(
            f"warning: a response was lost; {where} was moved as requested, and by others since: it is at {since}. "
            f"It is left there; see `adaptory history {where}`."
        )


def show_move(move: "wire.quality.MoveOut") -> None:
    """Shows a move with its time. Promoting what is served already returns the last move, and changes nothing."""
    if not move.changed:
        made = f"{move.kind}, move {move.id} at {render.second(move.at)}"
        render.out(f"{move.repository}@{move.channel} serves {move.to_version} already: no change ({made})")
        return
    forced = " (forced)" if move.forced else ""
    way = f"{move.from_version or 'nothing'} -> {move.to_version}"
    made = f"{move.kind}{forced}, move {move.id} at {render.second(move.at)}"
    render.out(f"{move.repository}@{move.channel}: {way} ({made})")
    render.gate_lines(move.gates)


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
    render.document(release, json, lambda: render.out(f"signed {release.name} {release.commit[:12]} by {signed_by}"))


def signer(release: "wire.catalog.ReleaseOut") -> str | None:
    """The signer that the registry knows, a publisher or a worker, marked if the signature covers only files."""
    if not release.signed_by:
        return None
    only = " (files only)" if release.signature_covers == "files" else ""
    by = f" by a {release.signed_as}" if release.signed_as else ""
    return f"{release.signed_by}{by}{only}"


def refuse_narrow(signed: Signed, needed: str) -> None:
    """Raises Refused if the signature covers only files but must cover the release."""
    if needed not in ("release", "files"):
        raise Usage("bad_covers", f"--signature-covers {needed} is neither release nor files.", subject=needed)
    if needed == "release" and signed.release is None:
        raise Refused(
            "signature_files_only",
            "The signature covers only the files, not their repository, version and base.",
            subject="model.sig",
        )
