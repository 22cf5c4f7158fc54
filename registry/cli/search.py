"""adaptory search"""

from typing import Annotated, Any

import typer

from registry.cli import render
from registry.cli.connect import connected
from registry.cli.render import JsonFlag

Json = dict[str, Any]


def register(root: typer.Typer) -> None:
    root.command()(search)


WIRE_NAMES = {"adapter_type": "type", "license_": "license"}
"""Parameters of the search that have another name there, since Python has a use for theirs."""


def search(  # noqa: PLR0913
    context: typer.Context,
    text: Annotated[list[str] | None, typer.Argument(help="Beginnings of words of the name or the notes.")] = None,
    base: Annotated[str | None, typer.Option(help="Name, alias or digest.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="related: casts and quantizations of the base too. refused: also what --loads-in refuses."),
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="The highest rank of any module.")] = None,
    min_rank: Annotated[int | None, typer.Option(help="Some module has at least this rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha, exactly.")] = None,
    kind: Annotated[str | None, typer.Option(help="adapter (the default) or model.")] = None,
    adapter_type: Annotated[str | None, typer.Option("--type", help="lora, …")] = None,
    variant: Annotated[str | None, typer.Option(help="lora, rslora, dora, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="F32, BF16, F16, …")] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", help="As the card writes it; for any case --provenance license:…"),
    ] = None,
    provenance: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:VALUE", help="trainer:axolotl, hyperparameters.epochs:3, …; may be repeated."),
    ] = None,
    targets_within: Annotated[str | None, typer.Option(help="Only these modules may be adapted: q_proj,v_proj")] = None,
    targets_include: Annotated[str | None, typer.Option(help="All of these modules are adapted.")] = None,
    targets_exact: Annotated[str | None, typer.Option(help="These modules are adapted, and no others.")] = None,
    max_size_bytes: Annotated[int | None, typer.Option(help="Of all files together.")] = None,
    score: Annotated[list[str] | None, typer.Option(help="'suite.metric>=0.8'; may be repeated.")] = None,
    loads_in: Annotated[str | None, typer.Option(help="vllm:32, sglang, lorax, llamacpp, peft.")] = None,
    channel: Annotated[str | None, typer.Option(help="Served now by the channel of this name.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Only of this namespace.")] = None,
    repository: Annotated[str | None, typer.Option(metavar="REPO", help="Only of this repository.")] = None,
    stable: Annotated[bool, typer.Option("--stable", help="No pre-releases.")] = False,
    latest: Annotated[
        bool, typer.Option("--latest", help="The highest stable release of each repository that is not yanked.")
    ] = False,
    include_yanked: Annotated[bool, typer.Option("--include-yanked", help="Yanked releases too.")] = False,
    sort: Annotated[
        str | None, typer.Option(help="newest, version, or suite.metric: the best first, without those that lack it.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Maximum number.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="`next` of the page before.")] = None,
    json: JsonFlag = False,
) -> None:
    """Releases that fit: a base, a rank, a set of targets, a server, scores."""
    given = {
        WIRE_NAMES.get(name, name): value
        for name, value in context.params.items()
        if name != "json" and value is not None
    }
    given["text"] = " ".join(text or []) or None
    with connected() as connection:
        found = connection.api.get("/v1/releases", **given)
    render.document(found, json, lambda: show_releases(found["items"]))
    render.more(found["next"], json)


def show_releases(found: list[Json]) -> None:
    rows = [
        (
            f"{release['repository']}:{release['version']}",
            release["commit"][:12],
            release["base"]["name"],
            (release["adapter"]["rank_max"] or None) if release["adapter"] else None,
            release["adapter"]["targets"] if release["adapter"] else None,
            [f"{score['suite']} {render.metric(score['metric'])} {score['value']:.3f}" for score in release["scores"]],
            "; ".join(_remarks(release)),
        )
        for release in found
    ]
    render.table("", ("release", "commit", "base", "rank", "targets", "scores", "note"), rows)


def _remarks(release: Json) -> list[str]:
    """What is not as plainly asked for: a yanked release, another base, a server that refuses it."""
    remarks = ["yanked"] if release["yanked"] else []
    if related := release.get("related"):
        remarks.append(f"not for {related['base']['name']}: {related['relation']}")
    if (loading := release.get("loads_in")) and not loading["loads"]:
        remarks.append(f"{loading['profile']} refuses it: {', '.join(loading['reasons'])}")
    return remarks
