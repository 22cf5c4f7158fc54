"""Bytes in and out: push and pull."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composer.formats.untrusted import read_text
from registry.cli import render
from registry.cli.connect import Connection, connected, release_directory, resolved, total_bytes
from registry.cli.fit import fitting_base
from registry.cli.release import Ref, show_move, warn_of_move_since
from registry.cli.render import JsonFlag
from registry.cli.sign import SignatureCovers, refuse_narrow
from registry.errors import Refused, RegistryError, Usage
from registry.formats.references import Reference, parse_name, parse_reference
from registry.formats.signatures import Signed

if TYPE_CHECKING:
    from registry.client.selection import Selection

Json = dict[str, Any]


def register(root: typer.Typer) -> None:
    for command in (push, pull, verify):
        root.command()(command)


def push(  # noqa: PLR0913
    directory: Annotated[Path, typer.Argument(help="What training wrote, with adapter_config.json in it.")],
    target: Annotated[
        str, typer.Argument(metavar="REPO[:VERSION]", help="Such as acme/sql:1.0.0; without a version give --bump.")
    ],
    base: Annotated[str | None, typer.Option(help="The base it was trained on, if its config names none.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Further files to publish, such as '*.yaml'. May be repeated."),
    ] = None,
    kind: Annotated[str, typer.Option(help="adapter, or model for a merged checkpoint.")] = "adapter",
    bump: Annotated[
        str | None, typer.Option(help="auto, patch, minor or major, instead of a version; auto finds what it needs.")
    ] = None,
    allow_breaking: Annotated[
        str | None, typer.Option(metavar="REASON", help="Why a breaking change may have a number that promises none.")
    ] = None,
    provenance: Annotated[
        Path | None, typer.Option(help="YAML: trainer, run_url, code_commit, data, hyperparameters, license, …")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY.pem", help="Sign the release with this private key.")
    ] = None,
    notes: Annotated[str, typer.Option(help="What is new in this release.")] = "",
    channel: Annotated[str | None, typer.Option(help="Promote it to this channel afterwards.")] = None,
    json: JsonFlag = False,
) -> None:
    """Check an adapter against its base, upload what is missing, publish a release.

    Takes the adapter's own files, tokenizer, card and licence; says what it leaves out, such as checkpoints.
    """
    from registry.client.selection import select_files

    reference = _single_version(target, bump)
    if channel:
        parse_name(channel, "channel")  # before a release is out that cannot be taken back
    request = {
        "version": str(reference.version) if reference.version else None,
        "bump": bump,
        "notes": notes,
        "allow_breaking": allow_breaking,
        "provenance": _provenance(provenance) if provenance else None,
    }
    selection = select_files(directory, _kind(kind), include or [])
    if selection.left_out:
        render.say(f"left out: {selection.summary()} (take more with --include GLOB)")
    with connected() as connection:
        request["base"] = fitting_base(connection, directory, base, kind)
        published = _publish(connection, selection, reference, request, (kind, sign))
        for finding in published["warnings"]:
            render.say(f"{finding['severity']}: {finding['message']}")
        if not json:
            _show_push(published)  # before the channel moves: whatever comes of that, the release is out
        document: Json = {**published, "left_out": list(selection.left_out), "move": None}
        failure = _promote(connection, document, channel) if channel else None
    render.document(document, json, lambda: show_move(document["move"]) if document["move"] else None)
    if failure is not None:
        raise typer.Exit(render.fail(failure, as_json=False))


def _promote(connection: Connection, document: Json, channel: str) -> RegistryError | None:
    """Moves the channel to the published release and enters the move, or what failed, into the document."""
    from registry.client.channel_moves import promote

    try:
        document["move"], since = promote(connection.api, document["release"], channel)
        warn_of_move_since(document["move"], since)
    except RegistryError as error:
        document["error"] = render.problem(error)
        return error
    return None


def _publish(
    connection: Connection, selection: "Selection", reference: Reference, request: Json, how: tuple[str, Path | None]
) -> Json:
    """Hashes, signs and sends the files, and publishes the release; `how` is its kind and the key that signs it."""
    from registry.client import push as client
    from registry.client.signing import Publication, push_signed

    kind, key = how
    with TemporaryDirectory() as staging:
        with render.progress("hash", selection.size_bytes) as done:
            files = client.collect(selection, done)
        with render.progress(f"push {reference}", sum(file.manifest.size_bytes for file in files)) as done:
            if key:
                publication = Publication(reference.repository, kind, request)
                return push_signed(connection.api, files, publication, key, Path(staging), done)
            return client.push(connection.api, files, reference.repository, kind, request, done)


def _kind(text: str) -> str:
    if text not in ("adapter", "model"):
        raise Usage("bad_kind", f"--kind {text} is unknown.", subject=text, next_step="Use adapter or model.")
    return text


def pull(
    ref: Ref,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The directory to write; one in the cache when left out.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(metavar="PUB.pem", help="Refuse it unless this key has signed the release.")
    ] = None,
    signature_covers: SignatureCovers = "files",
    force: Annotated[bool, typer.Option("--force", help="Replace another release in the directory.")] = False,
    json: JsonFlag = False,
) -> None:
    """Fetch a release, verify every file and print its directory.

    A directory that holds the release already is verified. An interrupted pull goes on where it stopped.
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

    with connected() as connection:
        release = resolved(connection, ref)
        if output is None:
            output = release_directory(connection, release)
            check(output)
        else:
            with render.progress(f"pull {ref}", total_bytes(release)) as done:
                blobs = BlobCache(connection.cache / "blobs")
                client.pull(connection.api, release, output, done, blobs, check, replace=force)
    told = {
        "repository": release["repository"],
        "version": release["version"],
        "commit": release["commit"],
        "directory": str(output),
        **_signature(signed[0] if signed else None),
    }
    render.say(f"{release['repository']}:{release['version']} {release['commit']}")
    render.document(told, json, lambda: print(output))


def verify(  # noqa: PLR0913
    what: Annotated[str, typer.Argument(metavar="DIR|REF", help="A directory or a reference.")],
    key: Annotated[
        Path | None, typer.Option(metavar="PUB.pem", help="The public key that must have signed it.")
    ] = None,
    signature_covers: SignatureCovers = "files",
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Merge a composed model again from its inputs, and compare.")
    ] = False,
    base_dir: Annotated[Path | None, typer.Option(help="Where the base is, if not where the registry says.")] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Of a local merge: each adapter that was merged.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Of a local merge: its base was merged as the values it stands for.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Whether a key has signed it, and it is still what was signed; whether a merge gives the same again."""
    from registry.cli.rebuild import rebuilt, rebuilt_here
    from registry.client.signing import read_public_key, verify_directory, verify_release

    if key is None and not rebuild:
        raise Usage("nothing_to_verify", "There is nothing to verify.", next_step="Add --key PUB.pem or --rebuild.")
    public_key, directory = read_public_key(key) if key else None, Path(what)
    local = {"--adapter": adapter, "--dequantize": dequantize}
    if not rebuild:
        _refuse_idle({"--base-dir": base_dir, **local}, "merges that are made again with --rebuild")
    told: Json = {"what": what}
    release: Json | None = None
    connection: Connection | None = None
    with ExitStack() as stack:
        if not directory.is_dir():
            connection = stack.enter_context(connected())
            release = resolved(connection, what)
            _refuse_idle(local, "merges in a directory of this machine, with DIR --rebuild")
            directory = release_directory(connection, release)
            if rebuild:
                told["rebuild"] = rebuilt(connection, release, directory, base_dir)
        elif rebuild:
            told["rebuild"] = rebuilt_here(directory, base_dir, adapter or [], dequantize=dequantize)
        if public_key:
            signed = (
                verify_release(connection.api, release, parse_reference(what), directory, public_key)
                if release and connection
                else verify_directory(directory, public_key)
            )
            refuse_narrow(signed, signature_covers)
            told |= _signature(signed)
    render.document(told, json, lambda: _show_verified(told))
    if rebuild:
        _refuse_not_rebuilt(what, directory, told["rebuild"])


def _refuse_not_rebuilt(what: str, directory: Path, found: Json) -> None:
    """Also for what an earlier version of its method made: a note may say that of anything."""
    if found["verdict"] == "different":
        next_step = "Do not serve it; ask who published it."
        if directory == Path(what):
            next_step = "See that base and adapters are those that were merged. If they are, do not serve it."
        raise Refused("not_rebuilt", f"{what} is not what its inputs give.", subject=what, next_step=next_step)
    if found["verdict"] == "earlier":
        made = found["earlier"].split()[0]
        message = f"{what} was made by an earlier version of {made}, as it says: this one cannot verify it."
        next_step = "Rebuild it with the Adaptory that made it, or compose it again."
        raise Refused("earlier_method", message, subject=what, next_step=next_step)


def _refuse_idle(options: Mapping[str, object], what: str) -> None:
    """What would be passed over in silence, since it is for `what`."""
    idle = [name for name, value in options.items() if value]
    if idle:
        raise Usage(
            "idle_option",
            f"{idle[0]} says nothing here: it is for {what}.",
            subject=idle[0],
            next_step=f"Leave {idle[0]} out, or see `adaptory verify --help`.",
        )


def _signature(signed: Signed | None) -> Json:
    """Whose it is and what it covers; files alone with a warning, since they verify under any name, number and base."""
    if signed is None:
        return {}
    if signed.release is None:
        render.say("warning: the signature covers files only, not the repository, version and base that they go by.")
    named = asdict(signed.release) if signed.release else None
    return {"signed_by": signed.fingerprint, "signature_covers": signed.covers, "signed_release": named}


def _show_verified(told: Json) -> None:
    if "signed_by" in told:
        render.out(f"{told['what']} is signed by {told['signed_by']}")
        if named := told["signed_release"]:
            render.out(
                f"  as {named['repository']}:{named['version']} {named['commit'][:12]} on base {named['base'][:12]}"
            )
    if "rebuild" in told:
        found = told["rebuild"]
        render.out(f"{told['what']} made again: {found['verdict']}, {len(found['same'])} files are the same")
        for row in found["different"]:
            counts = f"{row['neighbours']} elements by one step, {row['others']} by more"
            render.out(f"  {row['file']} {row['why'] or f'differs in {counts}'}")


def _single_version(target: str, bump: str | None) -> Reference:
    reference = parse_reference(target)
    if reference.range or reference.channel or reference.commit or bool(reference.version) == bool(bump):
        both = f" and --bump {bump} name" if bump else " names"
        raise Usage(
            "bad_target",
            f"{target}{both} no single version.",
            subject=target,
            next_step="Write REPO:VERSION, or REPO and --bump.",
        )
    return reference


def _provenance(path: Path) -> Json:
    from composer.formats.checkpoints.card import FRONT_MATTER_BYTES, load_mapping, parse_provenance

    return parse_provenance(load_mapping(read_text(path, FRONT_MATTER_BYTES), path.name), path.name)


def _show_push(published: Json) -> None:
    release, done = published["release"], "published"
    if not published["created"]:
        done = "already there, its lost bytes sent again:" if published["sent"] else "already there, nothing to do:"
    render.out(
        f"{done} {release['repository']}:{release['version']} {release['commit'][:12]} on {release['base']['name']}"
    )
    if release["yanked"]:
        render.say(f"warning: it is yanked: {release['yank_reason']}.")
