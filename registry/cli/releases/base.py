"""adaptory base add | list | show | unalias | deprecate | upgrade"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from registry import wire
from registry.cli.console import complete, render
from registry.cli.console.connect import connected, jobs_running
from registry.cli.console.groups import group
from registry.cli.console.interrupt import interrupts
from registry.cli.console.render import JsonFlag
from registry.cli.evaluation import queued_evaluation
from registry.cli.releases.release import deprecation_words
from registry.cli.releases.withdrawal import Undo, WhyDeprecated, deprecation_body, show_deprecation
from registry.errors import NotAllowed, NotFound, Usage
from registry.sdk.connection import Connection, load_settings

if TYPE_CHECKING:
    from composer.formats.checkpoints.checkpoint import Checkpoint
    from composer.formats.checkpoints.hashing import BaseIdentity

_POLL_S = 0.5
KnownBase = Annotated[str, typer.Argument(help="Name, alias or digest.", autocompletion=complete.bases)]

app = group("base", "Manage base models, which adapters are trained on.")


@app.command()
def add(  # noqa: PLR0913
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR|hf://ORG/NAME[@REV]|s3://BUCKET/PREFIX",
            help="A Hugging Face checkpoint: its directory, on the hub, or in a bucket.",
        ),
    ],
    name: Annotated[str, typer.Option(help="Short name, such as smollm2.")],
    alias: Annotated[list[str] | None, typer.Option(help="Another name, such as the hub id. May be repeated.")] = None,
    derived_from: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="The registered base that it was derived from.", autocompletion=complete.bases
        ),
    ] = None,
    relation: Annotated[
        str | None, typer.Option(help="How it was derived: cast, quantized, finetuned or merged.")
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", help="Licence of the base, such as apache-2.0; that of its README.md by default."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Hash a checkpoint and register it. No weights are uploaded.

    One on the hub is downloaded into the hub's own cache, which transformers reads too, and its commit becomes the
    location: workers download it from there. The hub is the one of HF_ENDPOINT.

    One in a bucket is read from there. Workers merge it from there, in the S3 service of the registry's store or in
    that of boto3's own settings.

    Only an admin of the registry may add a directory or a bucket to a base's locations. For others, a base in a
    directory is registered without.
    """
    from composer.formats.checkpoints.hashing import hash_checkpoint

    with TemporaryDirectory(prefix="adaptory-base-") as texts:
        checkpoint, location, hub_name = _checkpoint_of(source, Path(texts))
        total = sum(header.size_bytes for header in checkpoint.shards.values())
        with render.progress(f"hash {hub_name or checkpoint.path.name}", total) as done:
            identity = hash_checkpoint(checkpoint, done)
        stated = license_ or _license_of(checkpoint.path)
    with connected() as connection:
        names = [*(alias or []), *_free_name(connection, hub_name, identity.weights_digest)]
        request = base_request(checkpoint, identity, name, names, location)
        request |= {"derived_from": derived_from, "relation": relation, "license": stated}
        document = _registered(connection, request)
    render.document(document, json, lambda: _show(document))


def _checkpoint_of(source: str, texts: Path) -> tuple["Checkpoint", str, str | None]:
    """The checkpoint, its location, and its name on the hub if it is from there. `texts` is an empty directory, for the
    small files of one in a bucket."""
    from composer.formats.checkpoints.checkpoint import open_checkpoint
    from registry.formats.addresses import HUB_SCHEME, S3_SCHEME, parse_hub_address, parse_s3_address
    from registry.storage.hub.bases import download_base

    if source.startswith(S3_SCHEME):
        from registry.transfer.bases import Bases

        return Bases(load_settings()).open_in_bucket(source, texts), str(parse_s3_address(source)), None
    if not source.startswith(HUB_SCHEME):
        directory = Path(source)
        return open_checkpoint(directory), directory.resolve().as_uri(), None
    address = parse_hub_address(source)
    with render.progress(f"download {address.repository}", None):
        pinned, directory = download_base(address)
    return open_checkpoint(directory), str(pinned), address.repository


def _free_name(connection: Connection, hub_name: str | None, digest: str) -> list[str]:
    """The name on the hub as an alias, by which adapters name their base; nothing if another base has it."""
    if hub_name is None:
        return []
    try:
        known = connection.api.base(hub_name)
    except NotFound:
        return [hub_name]
    if known.digest == digest:
        return [hub_name]
    render.say(f"note: {hub_name} remains an alias of {known.name}, whose weights differ.")
    return []


@app.command("list")
def list_bases(json: JsonFlag = False) -> None:
    """List the registered bases."""
    with connected() as connection:
        items = list(connection.api.pages("/v1/bases", wire.catalog.BaseOut))
    rows = [(base.name, base.digest[:12], base.model_type, f"{base.parameters:,}", base.aliases) for base in items]
    render.listing(items, json, ("base", "digest", "type", "parameters", "aliases"), rows)


@app.command()
def show(base: KnownBase, json: JsonFlag = False) -> None:
    """Show a base and its scores."""
    with connected() as connection:
        document = connection.api.base(base)
    render.document(document, json, lambda: _show(document))


@app.command()
def unalias(alias: Annotated[str, typer.Argument(help="As `base list` shows it.")], json: JsonFlag = False) -> None:
    """Remove an alias from its base; only for the base's creator and registry admins."""
    with connected() as connection:
        document = connection.api.delete(f"/v1/bases/aliases/{quote(alias)}", wire.catalog.BaseOut)
    render.document(document, json, lambda: render.out(f"{alias} no longer names a base; {document.name} stays"))


@app.command()
def deprecate(
    base: KnownBase,
    reason: WhyDeprecated = None,
    successor: Annotated[
        str | None, typer.Option(metavar="BASE", help="What to use instead.", autocompletion=complete.bases)
    ] = None,
    undo: Undo = False,
    json: JsonFlag = False,
) -> None:
    """Mark a base as deprecated: its releases say so too, and nothing is blocked. Only for its creator and admins."""
    body = deprecation_body(base, reason, successor, undo=undo)
    with connected() as connection:
        document = connection.api.post(f"/v1/bases/{quote(base)}/deprecate", body, wire.catalog.BaseOut)
    render.document(document, json, lambda: show_deprecation(document.name, document.deprecated))


@app.command()
def upgrade(
    old: Annotated[str, typer.Argument(help="The base that the adapters use now.", autocompletion=complete.bases)],
    new: Annotated[
        str | None,
        typer.Argument(
            metavar="[NEW]",
            help="The base to follow it; by default its successor, if it is deprecated.",
            autocompletion=complete.bases,
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure on this suite instead of each adapter's own. May be repeated.", autocompletion=complete.suites
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only list the adapters, and which of them fit.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the evaluation, and report.")] = True,
    json: JsonFlag = False,
) -> None:
    """List the adapters on a base that still fit a new one, measure them there, and report.

    Their scores on the new base are only reported: a release stays on the base that it was made for.
    """
    with connected() as connection:
        following = new or _successor(connection, old)
        body = {"old": old, "new": following, "suites": suite or [], "evaluate": not plan}
        document = connection.api.post("/v1/upgrades", body, wire.work.UpgradeOut)
        if document.job is not None and wait:
            with jobs_running(connection, document.job):
                document = _followed(connection, document, document.job)
    failure = queued_evaluation.error_of(document.job, document.state, document.error) if wait else None
    render.document(document, json, lambda: _show_upgrade(document), failure)


def _successor(connection: Connection, old: str) -> str:
    """The successor of a deprecated base. Raises Usage if it has none."""
    deprecated = connection.api.base(old).deprecated
    if not deprecated or not deprecated.successor:
        raise Usage(
            "successor_missing",
            f"{old} has no successor.",
            subject=old,
            next_step=f"Name the new base: `adaptory base upgrade {old} NEW`.",
        )
    return deprecated.successor


def _followed(connection: Connection, document: "wire.work.UpgradeOut", job: int) -> "wire.work.UpgradeOut":
    """Waits until the upgrade's evaluation ends; returns the complete report."""
    interrupts.kept = f"job {job} continues; `adaptory jobs {job}` shows it"
    with render.progress("upgrade", None) as bar:
        while document.state in ("queued", "running"):
            time.sleep(_POLL_S)
            bar.show_running(connection.api.get(f"/v1/jobs/{job}", wire.work.JobOut).steps)
            document = connection.api.get(f"/v1/upgrades/{job}", wire.work.UpgradeOut)
    return document


def _show_upgrade(document: "wire.work.UpgradeOut") -> None:
    fitting = sum(adapter.fits for adapter in document.adapters)
    render.heading(f"{len(document.adapters)} adapters on {document.old.name}, {fitting} fit {document.new.name}")
    rows = [
        (
            f"{adapter.repository}:{adapter.version}",
            adapter.channels,
            "fits" if adapter.fits else "does not fit",
            adapter.why or "; ".join(adapter.errors),
        )
        for adapter in document.adapters
    ]
    render.table("", ("adapter", "channels", "", "why"), rows)
    scores = [
        (
            f"{adapter.repository}:{adapter.version}",
            *(score.suite, score.metric, score.old, score.new, score.gain, score.base, score.n),
        )
        for adapter in document.adapters
        for score in adapter.scores
    ]
    if scores:
        columns = ("adapter", "suite", "metric", "old", "new", "gain", "base", "n")
        render.table("scores", columns, scores)
    elif document.job is not None:
        render.out(f"job {document.job} is {document.state}")


def _registered(connection: Connection, request: dict[str, Any]) -> "wire.catalog.BaseOut":
    """Registers the base. If it belongs to someone else, who alone may add locations, or if its location is a
    directory, which only admins of the registry may add, retries without the location."""
    try:
        return connection.api.post("/v1/bases", request, wire.catalog.BaseOut)
    except NotAllowed as error:
        [location] = request["locations"]
        if error.code == "not_yours":
            request = {**request, "license": None}
        elif error.code != "role_missing" or not location.startswith("file://"):
            raise
        document = connection.api.post("/v1/bases", {**request, "locations": []}, wire.catalog.BaseOut)
        render.say(f"note: {error.detail} {location} was not added to its locations.")
        return document


def _license_of(directory: Path) -> str | None:
    """The licence that the checkpoint's model card states."""
    from composer.formats.checkpoints.card import CARD_FILE, card_provenance

    card = directory / CARD_FILE
    return card_provenance(card.read_bytes())[0].get("license") if card.is_file() else None


def base_request(
    checkpoint: "Checkpoint", identity: "BaseIdentity", name: str, aliases: list[str], location: str
) -> dict[str, Any]:
    """The body that registers the checkpoint in `POST /v1/bases`."""
    architecture = checkpoint.architecture
    return {
        "name": name,
        "model_type": architecture.model_type,
        "tied": architecture.tied,
        "weights_digest": identity.weights_digest,
        "tensors": [
            {"name": tensor, "dtype": spec.dtype, "shape": list(spec.shape), "sha256": identity.tensor_hashes[tensor]}
            for tensor, spec in architecture.tensors.items()
        ],
        "aliases": aliases,
        "locations": [location],
    }


def _show(base: "wire.catalog.BaseOut") -> None:
    pairs = [
        ("digest", base.digest),
        ("architecture", base.architecture_digest),
        ("aliases", base.aliases or None),
        ("model type", base.model_type),
        ("license", base.license),
        ("deprecated", deprecation_words(base.deprecated)),
        ("tensors", base.tensor_count),
        ("parameters", f"{base.parameters:,}"),
        ("size", render.size(base.size_bytes)),
        ("locations", base.locations),
        ("made from", f"{base.derived_from.name} ({base.relation})" if base.derived_from else None),
    ]
    render.lines(f"base {base.name}", pairs)
    for score in base.scores:
        value = render.with_error(score.value, score.stderr, score.n)
        notes = filter(None, [f"n={score.n}" if score.n else "", "reported" if score.reported else "", score.source])
        render.out(f"  {score.suite} {score.metric}  {value}  ({', '.join(notes)})")
