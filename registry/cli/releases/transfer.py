"""Transfers: push, pull and verify."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composer.formats.untrusted import read_text
from registry import wire
from registry.cli.console import complete, render
from registry.cli.console.connect import connected, release_directory, resolved
from registry.cli.console.groups import refuse_idle, root
from registry.cli.console.options import StrictFlag
from registry.cli.console.render import JsonFlag
from registry.cli.releases.promotion import NewChannel, confirm_new_channel, show_outcome
from registry.cli.releases.release import Ref, SignatureCovers, refuse_narrow, warn_of_move_since
from registry.errors import Refused, RegistryError, Usage
from registry.formats.references import parse_name, parse_reference, single_version
from registry.formats.signatures import Signed
from registry.sdk.connection import Connection
from registry.sdk.fit import fitting_base
from registry.sdk.local_files import total_bytes

if TYPE_CHECKING:
    from composer.merge.rebuild import Rebuilt
    from registry.client.attestations import Attested
    from registry.client.push import ReleaseRequest

SigningKey = Annotated[Path | None, typer.Option(metavar="KEY.pem", help="Sign the release with this private key.")]
BaseName = Annotated[
    str | None,
    typer.Option(help="The base model; by default the one that the files name.", autocompletion=complete.bases),
]
Target = Annotated[
    str, typer.Argument(metavar="REPO[:VERSION]", help="Such as acme/sql:1.0.0; without a version, give --bump.")
]
Bump = Annotated[
    str | None, typer.Option(help="auto, patch, minor or major, instead of a version; auto finds the right one.")
]
AllowBreaking = Annotated[
    str | None, typer.Option(metavar="REASON", help="Allow a breaking change under a compatible version, and why.")
]


_HELP = "Leave it out, or see `adaptory verify --help`."


@root.command()
def push(  # noqa: PLR0913
    directory: Annotated[Path, typer.Argument(help="The training output, with adapter_config.json in it.")],
    target: Target,
    base: BaseName = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Further files to publish, such as '*.yaml'. May be repeated."),
    ] = None,
    kind: Annotated[str, typer.Option(help="adapter, or model for a merged checkpoint.")] = "adapter",
    bump: Bump = None,
    allow_breaking: AllowBreaking = None,
    provenance: Annotated[
        Path | None, typer.Option(help="YAML: trainer, run_url, code_commit, data, hyperparameters, license, …")
    ] = None,
    sign: SigningKey = None,
    notes: Annotated[str, typer.Option(help="Release notes.")] = "",
    channel: Annotated[str | None, typer.Option(help="Promote it to this channel afterwards.")] = None,
    new_channel: NewChannel = False,
    strict: StrictFlag = False,
    json: JsonFlag = False,
) -> None:
    """Check an adapter against its base, upload what is missing, publish a release.

    Includes the adapter's own files, tokenizer, card and licence, and lists what it leaves out, such as checkpoints.
    """
    from registry.client.selection import select_files
    from registry.client.signing import Publication
    from registry.sdk.local_files import publish

    reference, stated = single_version(target, bump), _provenance(provenance)
    if channel:
        parse_name(channel, "channel")  # before publishing, which cannot be undone
    if (selection := select_files(directory, _kind(kind), include or [])).left_out:
        render.say(f"left out: {selection.summary()} (include more with --include GLOB)")
    with connected() as connection:
        if channel:
            confirm_new_channel(connection, f"/v1/{kind}s/{reference.repository}", channel, agreed=new_channel)
        request: ReleaseRequest = {
            "version": str(reference.version) if reference.version else None,
            "bump": bump,
            "notes": notes,
            "allow_breaking": allow_breaking,
            "provenance": stated,
            "base": fitting_base(connection.api, directory, base, kind, strict=strict),
            "strict": strict,
        }
        publication = Publication(reference.repository, kind, request)
        published, sent = publish(connection.api, selection, publication, render, sign)
        show_warnings(published)
        if not json:
            show_push(published, sent)  # before the channel moves: the release is published even if that fails
        moved = _promote(connection, published.release, channel) if channel else None
    move = moved if isinstance(moved, wire.quality.MoveOut) else None
    document = {**published.document, "sent": sent, "left_out": list(selection.left_out), "move": move}
    if isinstance(moved, wire.quality.PromotionOut):
        document["promotion"] = moved
    failure = moved if isinstance(moved, RegistryError) else None
    if failure:
        document["error"] = render.problem(failure)
    render.document(document, json, lambda: _show_moved(moved), failure)


def _show_moved(moved: "wire.quality.MoveOut | wire.quality.PromotionOut | RegistryError | None") -> None:
    if moved and not isinstance(moved, RegistryError):
        show_outcome(moved)


def _promote(
    connection: Connection, release: "wire.catalog.NamedRelease", channel: str
) -> "wire.quality.MoveOut | wire.quality.PromotionOut | RegistryError":
    """Moves the channel to the published release. Returns the move, the promotion that waits, or the error."""
    from registry.client.channel_moves import promote

    try:
        answer, since = promote(connection.api, release, channel)
    except RegistryError as error:
        return error
    warn_of_move_since(answer, since)
    return answer


def _kind(text: str) -> str:
    if text not in ("adapter", "model"):
        raise Usage("bad_kind", f"--kind {text} is unknown.", subject=text)
    return text


@root.command()
def pull(
    ref: Ref,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The directory to write; by default, one in the cache.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(metavar="PUB.pem", help="Refuse the release unless this key signed it.")
    ] = None,
    signature_covers: SignatureCovers = "files",
    force: Annotated[bool, typer.Option("--force", help="Replace a different release in the directory.")] = False,
    json: JsonFlag = False,
) -> None:
    """Fetch a release, verify every file and print its directory.

    A directory that already holds the release is verified. An interrupted pull resumes where it stopped.
    """
    from registry.client import pull as client
    from registry.client.cache import BlobCache
    from registry.client.signing import read_public_key, verify_release

    key = read_public_key(verify) if verify else None
    signed: list[Signed] = []

    def check(directory: Path) -> None:
        if key:
            signed.append(verify_release(connection.api, release, parse_reference(ref), directory, key))
            refuse_narrow(signed[0], signature_covers)
            _warn_of_files_only(signed[0])

    with connected() as connection:
        release = resolved(connection, ref)
        if output is None:
            output = release_directory(connection, release)
            check(output)
        else:
            with render.progress(f"pull {ref}", total_bytes(release)) as done:
                blobs = BlobCache(connection.cache / "blobs")
                client.pull(connection.api, release, output, done, blobs, check, replace=force)
    document = {
        "repository": release.repository,
        "version": release.version,
        "commit": release.commit,
        "directory": str(output),
        **(_signature(signed[0]) if signed else {}),
    }
    render.say(f"{release.name} {release.commit}")
    render.document(document, json, lambda: print(output))


@root.command()
def verify(  # noqa: PLR0913
    what: Annotated[str, typer.Argument(metavar="DIR|REF", help="A directory or a reference.")],
    key: Annotated[
        Path | None, typer.Option(metavar="PUB.pem", help="The public key that must have signed it.")
    ] = None,
    signature_covers: SignatureCovers = "files",
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Merge a composed model from its inputs again, and compare.")
    ] = False,
    attestations: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what workers attested to DIR, for other tools.")
    ] = None,
    base_dir: Annotated[
        Path | None, typer.Option(help="The base's directory, if it is not at its registered location.")
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="For a local merge: each adapter that was merged.")
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="For a local merge made with --dequantize.")] = False,
    json: JsonFlag = False,
) -> None:
    """Verify what workers attested of a release, a signature and the signed files, or rebuild a merge and compare."""
    from registry.cli.releases.rebuild import rebuilt, rebuilt_here
    from registry.client.attestations import checked_attestations, save_attestations
    from registry.client.signing import read_public_key, verify_directory, verify_release

    if key is None and not rebuild and Path(what).is_dir():
        raise Usage("nothing_to_verify", "Nothing to verify.")
    public_key, directory = read_public_key(key) if key else None, Path(what)
    local = {"--adapter": adapter, "--dequantize": dequantize}
    if not rebuild:
        refuse_idle({"--base-dir": base_dir, **local}, "here: it is for merges that are rebuilt with --rebuild", _HELP)
    verified = _Verified(what)
    release: wire.search.ResolvedRelease | None = None
    connection: Connection | None = None
    with ExitStack() as stack:
        if not directory.is_dir():
            connection = stack.enter_context(connected())
            release = resolved(connection, what)
            refuse_idle(local, "here: it is for local merges, with DIR --rebuild", _HELP)
            verified.attested, verified.revoked = checked_attestations(connection.api, release)
            if attestations:
                save_attestations(verified.attested, attestations)
            if rebuild or public_key:
                directory = release_directory(connection, release)
            if rebuild:
                verified.rebuilt = rebuilt(connection, release, directory, base_dir)
        elif rebuild:
            verified.rebuilt = rebuilt_here(directory, base_dir, adapter or [], dequantize=dequantize)
        if public_key:
            signed = (
                verify_release(connection.api, release, parse_reference(what), directory, public_key)
                if release and connection
                else verify_directory(directory, public_key)
            )
            refuse_narrow(signed, signature_covers)
            verified.signed = signed
            _warn_of_files_only(signed)
    failure = _not_rebuilt(what, directory, verified.rebuilt) if verified.rebuilt else None
    render.document(verified.to_json(), json, verified.show, failure)


@dataclass(slots=True)
class _Verified:
    """The checks of a release or a directory that were made; None for others."""

    what: str
    attested: "list[Attested] | None" = None
    revoked: "Sequence[wire.quality.AttestationOut]" = ()
    rebuilt: "Rebuilt | None" = None
    signed: Signed | None = None

    def to_json(self) -> dict[str, object]:
        document: dict[str, object] = {"what": self.what}
        if self.attested is not None:
            document["attestations"] = [
                {
                    "kind": item.row.kind,
                    "suite": item.suite and item.suite[0],
                    "newest": item.is_newest,
                    "worker": item.row.key.worker,
                    "key": item.row.key.id,
                    "predicate": dict(item.statement.predicate),
                }
                for item in self.attested
            ]
            document["revoked"] = [
                {"kind": row.kind, "worker": row.key.worker, "key": row.key.id, "revoked_at": row.key.revoked_at}
                for row in self.revoked
            ]
        if self.rebuilt:
            document["rebuild"] = self.rebuilt.to_json()
        return document | (_signature(self.signed) if self.signed else {})

    def show(self) -> None:
        for item in self.attested or ():
            replaced = "" if item.is_newest else ", measured again since"
            by = f"worker {item.row.key.worker}, key {item.row.key.id[:12]}"
            render.out(f"{_content(item)} of {self.what} attested by {by}{replaced}")
        for row in self.revoked:
            revoked = f"was revoked by {row.key.revoked_by} at {render.minute(row.key.revoked_at)}"
            key = f"key {row.key.id[:12]} of worker {row.key.worker}"
            render.out(f"{row.kind} of {self.what} not attested: {key} {revoked}")
        if self.attested == []:
            render.out(f"no worker whose key is valid attests anything of {self.what}")
        if self.signed:
            render.out(f"{self.what} is signed by {self.signed.fingerprint}")
            if named := self.signed.release:
                render.out(f"  as {named.repository}:{named.version} {named.commit[:12]} on base {named.base[:12]}")
        if self.rebuilt:
            files = render.counted(len(self.rebuilt.same), "file")
            render.out(f"{self.what} rebuilt: {self.rebuilt.verdict}, {files} equal")
            for file in self.rebuilt.different:
                counts = f"{file.neighbours} elements by one step, {file.others} by more"
                render.out(f"  {file.file} {file.why or f'differs in {counts}'}")


def _content(attested: "Attested") -> str:
    """The kind of an attestation, the suite, and what was measured, such as `scores on sql (accuracy 0.86)`."""
    predicate, on = attested.statement.predicate, f" on {attested.suite[0]}" if attested.suite else ""
    measured = [f"{score['metric']} {score['value']:.4g}" for score in predicate.get("scores", [])]
    if examples := predicate.get("examples"):
        measured = [render.counted(len(examples), "example")]
    figures = f" ({', '.join(measured)})" if measured else ""
    return f"{attested.row.kind}{on}{figures}"


def _signature(signed: Signed) -> dict[str, object]:
    named = asdict(signed.release) if signed.release else None
    return {"signed_by": signed.fingerprint, "signature_covers": signed.covers, "signed_release": named}


def _warn_of_files_only(signed: Signed) -> None:
    if signed.release is None:
        render.say("warning: the signature covers only the files, not their repository, version and base.")


def _not_rebuilt(what: str, directory: Path, result: "Rebuilt") -> Refused | None:
    """The error when the files differ, and also when the note says that an earlier version of the method made them: a
    note can claim that of anything."""
    if result.verdict == "different":
        next_step = "Do not serve it; ask its publisher."
        if directory == Path(what):
            next_step = "Check that base and adapters are those that were merged. If they are, do not serve it."
        return Refused(
            "not_rebuilt", f"{what} differs from the result of its inputs.", subject=what, next_step=next_step
        )
    if result.verdict == "earlier":
        made = result.earlier.split()[0]
        message = f"{what} states that it was made by an earlier version of {made}, which this version cannot verify."
        next_step = "Rebuild it with the Adaptory that made it, or compose it again."
        return Refused("earlier_method", message, subject=what, next_step=next_step)
    return None


def _provenance(path: Path | None) -> Mapping[str, Any] | None:
    from composer.formats.checkpoints.card import FRONT_MATTER_BYTES, load_mapping, parse_provenance

    if path is None:
        return None
    return parse_provenance(load_mapping(read_text(path, FRONT_MATTER_BYTES), path.name), path.name)


def show_warnings(published: "wire.catalog.PublishedOut") -> None:
    """Shows what a push warns of."""
    for finding in published.warnings:
        render.say(render.finding_line(finding))


def show_push(published: "wire.catalog.PublishedOut", sent: int) -> None:
    """Shows what a push has published, or that it was there already."""
    release, done = published.release, "published"
    if not published.created:
        done = "already published, its lost files sent again:" if sent else "already published, nothing to do:"
    render.out(f"{done} {release.name} {release.commit[:12]} on {release.base.name}")
    if release.yanked:
        render.say(f"warning: it is yanked: {release.yank_reason}.")
