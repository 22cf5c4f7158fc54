"""adaptory search"""

from collections.abc import Sequence
from typing import Annotated

import typer

from registry import wire
from registry.cli.console import complete, render
from registry.cli.console.connect import connected
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag

WIRE_NAMES = {"adapter_type": "type", "license_": "license"}
"""Search parameters whose REST name differs, because Python reserves it."""


@root.command()
def search(  # noqa: PLR0913
    context: typer.Context,
    text: Annotated[list[str] | None, typer.Argument(help="Prefixes of words in the name or the notes.")] = None,
    base: Annotated[str | None, typer.Option(help="Name, alias or digest.", autocompletion=complete.bases)] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="related: also for casts and quantizations of the base. refused: also what --loads-in refuses."
        ),
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="The highest rank of any module.")] = None,
    min_rank: Annotated[int | None, typer.Option(help="Some module has at least this rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha, exactly.")] = None,
    kind: Annotated[str | None, typer.Option(help="adapter (the default), model or set.")] = None,
    adapter_type: Annotated[str | None, typer.Option("--type", help="lora, …")] = None,
    variant: Annotated[str | None, typer.Option(help="lora, rslora, dora, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="F32, BF16, F16, …")] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", help="Licence of the release: an SPDX name also matches the spellings that cards use."
        ),
    ] = None,
    base_license: Annotated[str | None, typer.Option(help="Licence of the release's base, such as Apache-2.0.")] = None,
    provenance: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:VALUE", help="trainer:axolotl, hyperparameters.epochs:3, …; may be repeated."),
    ] = None,
    targets_within: Annotated[str | None, typer.Option(help="Only these modules may be adapted: q_proj,v_proj")] = None,
    targets_include: Annotated[str | None, typer.Option(help="All of these modules are adapted.")] = None,
    targets_exact: Annotated[str | None, typer.Option(help="These modules are adapted, and no others.")] = None,
    max_size_bytes: Annotated[int | None, typer.Option(help="Maximum size of all files together.")] = None,
    score: Annotated[list[str] | None, typer.Option(help="'suite.metric>=0.8'; may be repeated.")] = None,
    loads_in: Annotated[str | None, typer.Option(help="vllm:32, sglang, lorax, llamacpp, peft.")] = None,
    channel: Annotated[str | None, typer.Option(help="Currently served by the channel of this name.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Only in this namespace.")] = None,
    repository: Annotated[str | None, typer.Option(metavar="REPO", help="Only in this repository.")] = None,
    stable: Annotated[bool, typer.Option("--stable", help="No pre-releases.")] = False,
    latest: Annotated[
        bool, typer.Option("--latest", help="The highest stable release of each repository that is not yanked.")
    ] = False,
    include_yanked: Annotated[bool, typer.Option("--include-yanked", help="Yanked releases too.")] = False,
    sort: Annotated[
        str | None, typer.Option(help="newest, version, size, rank or suite.metric (only releases that have it).")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Maximum number.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="`next` of the previous page.")] = None,
    json: JsonFlag = False,
) -> None:
    """Search releases by base, rank, targets, server and scores."""
    given = {
        WIRE_NAMES.get(name, name): value
        for name, value in context.params.items()
        if name != "json" and value is not None
    }
    given["text"] = " ".join(text or []) or None
    with connected() as connection:
        page = connection.api.get("/v1/releases", wire.search.FoundPage, **given)
    render.document(page, json, lambda: show_releases(page.items))
    render.more(page.next, json)


def show_releases(releases: "Sequence[wire.catalog.ReleaseOut]") -> None:
    """Prints releases as a table with their scores and remarks."""
    rows = [
        (
            release.name,
            release.commit[:12],
            release.base.name,
            (release.adapter.rank_max or None) if release.adapter else None,
            release.adapter.targets if release.adapter else None,
            [_score(score) for score in release.scores],
            "; ".join(_remarks(release)),
        )
        for release in releases
    ]
    render.table("", ("release", "commit", "base", "rank", "targets", "scores", "note"), rows)


def _remarks(release: "wire.catalog.ReleaseOut") -> list[str]:
    """Notes on why a release needs care: it is yanked; as a hit, also for another base, or refused by the server."""
    remarks = ["taken down" if release.taken_down else "yanked"] if release.yanked else []
    for what, deprecated in (("deprecated", release.deprecated), ("base deprecated", release.base_deprecated)):
        if deprecated:
            remarks.append(f"{what}: use {deprecated.successor}" if deprecated.successor else what)
    if not isinstance(release, wire.search.FoundOut):
        return remarks
    if release.related:
        remarks.append(f"not for {release.related.base.name}: {release.related.relation}")
    if (loading := release.loads_in) and not loading.loads:
        remarks.append(f"{loading.profile} refuses it: {', '.join(loading.reasons)}")
    return remarks


def _score(score: "wire.quality.ScoreOut") -> str:
    return f"{score.suite} {score.metric} {score.value:.3f}{' reported' if score.reported else ''}"
