"""Compares two to four releases of a repository side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from registry.api.http.request import ResourcesOf
from registry.api.pages.html import scores
from registry.api.pages.html.drawings import cells, in_layers, modules_of
from registry.api.pages.html.render import link, page_about, redirect
from registry.api.pages.html.wire import PageReader, PageRoute, RepositoryOf
from registry.api.routes.documents import releases_shown
from registry.domain.catalog import releases
from registry.errors import Usage
from registry.formats.references import parse_version
from registry.wire.catalog import ReleaseOut
from registry.wire.quality import ScoreOut

router = APIRouter(route_class=PageRoute)

BETWEEN = "..."
MOST = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedScore:
    """A release's score on a suite. `comparison` is its difference from the first release's, as `scores.compare` states
    it."""

    value: float
    change: float | None
    comparison: str


@router.get("/{namespace}/{name}/compare")
def choose(
    named: RepositoryOf, actor: PageReader, versions: Annotated[tuple[str, ...], Query(alias="with")] = ()
) -> Response:
    """Redirects to the comparison of the ticked releases, the lowest version first. Its address can be shared."""
    ordered = sorted(set(map(parse_version, versions)))
    if not 2 <= len(ordered) <= MOST:
        raise Usage(
            "bad_comparison",
            f"Two to {MOST} releases are compared; you selected {len(ordered)}.",
            subject=str(named),
            next_step=f"Go back and select two to {MOST}.",
        )
    return redirect(f"{link(str(named))}/compare/{BETWEEN.join(map(str, ordered))}")


@router.get("/{namespace}/{name}/compare/{versions}")
def compare(
    named: RepositoryOf, versions: str, request: Request, resources: ResourcesOf, actor: PageReader
) -> Response:
    """`versions` are two to four versions separated by `...`; the others are compared with the first."""
    wanted = versions.split(BETWEEN)
    if not 2 <= len(wanted) <= MOST or len(set(wanted)) < len(wanted):
        raise Usage(
            "bad_comparison",
            f"{versions[:200]} does not name two to {MOST} different versions.",
            subject=versions[:200],
            next_step=f"Write them with {BETWEEN} between them: 1.0.0{BETWEEN}1.1.0.",
        )
    with resources.snapshot() as session:
        rows = [releases.find(session, named, parse_version(version)) for version in wanted]
        spectra = [row.spectrum for row in rows]
        shown = releases_shown(session, actor, [row.id for row in rows])
    located = in_layers(*map(modules_of, spectra))
    sizes = [cells(spectrum, "norm", located) for spectrum in spectra]
    return page_about(
        request,
        "compare.html",
        named,
        releases=shown,
        facts=differing([_facts(release) for release in shown]),
        scores=score_rows(shown),
        sizes=sizes,
        top=max((value for norms in sizes for value in norms.values()), default=0.0),
        frame={cell for norms in sizes for cell in norms},
        files=differing([{file.path: file.sha256[:16] for file in release.files} for release in shown]),
        same_files=_same([{file.path: file.sha256 for file in release.files} for release in shown]),
        json_address=shown[0].path,
    )


def differing(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The names whose values differ, each with its value in every column; None where it has none."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name) for column in columns]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _same(columns: Sequence[Mapping[str, Any]]) -> int:
    return sum(all(column.get(name) == value for column in columns) for name, value in columns[0].items())


def score_rows(shown: Sequence[ReleaseOut]) -> list[tuple[str, list[ComparedScore | None]]]:
    """Each metric of a suite for which at least one release has a score, with the scores of all releases on the same
    content, in the order of the release with the most scores."""
    by_key = [{(score.suite_digest, score.metric): score for score in release.scores} for release in shown]
    most_first = sorted(by_key, key=len, reverse=True)
    names = {key: f"{score.suite}.{score.metric}" for column in most_first for key, score in column.items()}
    return [
        (
            name,
            [
                _measured(column.get(key), by_key[0].get(key) if number else None)
                for number, column in enumerate(by_key)
            ],
        )
        for key, name in names.items()
    ]


def _measured(score: ScoreOut | None, first: ScoreOut | None) -> ComparedScore | None:
    if score is None:
        return None
    if first is None:
        return ComparedScore(value=score.value, change=None, comparison="")
    return ComparedScore(value=score.value, change=score.value - first.value, comparison=scores.compare(score, first))


def _facts(release: ReleaseOut) -> dict[str, Any]:
    """The facts of a release, under the names that its page uses."""
    facts, adapter, stated = release.own_facts, release.adapter, release.provenance
    spectrum = adapter.spectrum if adapter else None
    listed: dict[str, Any] = {
        "Base": release.base.name,
        "Base's digest": release.base.digest[:12],
        "Type": facts and facts.type,
        "Precision": facts and facts.dtype,
        "Rank": adapter and adapter.rank_max,
        "Alpha": adapter and adapter.alpha,
        "Targets": ", ".join(adapter.targets) if adapter else "",
        "Modules": adapter and adapter.modules,
        "Parameters": facts and facts.parameters,
        "Bytes": facts and facts.size_bytes,
        "Norm": spectrum and round(spectrum.norm, 3),
        "Rank for 95 %": spectrum and spectrum.rank_95,
        "Loads in": ", ".join(release.servers),
        "Licence": release.licenses.adapter,
        "Trainer": stated.trainer,
        "Code": stated.code_commit,
        "Data": ", ".join(row.name for row in stated.data),
        "PEFT": adapter and adapter.peft_version,
        "Yanked": release.yank_reason or ("yes" if release.yanked else "no"),
        "Signed by": (release.signed_by or "")[:12],
        "Made from": ", ".join(f"{member.weight:g} x {member.commit[:12]}" for member in release.inputs),
        "Notes": release.notes,
    }
    return {**listed, **{f"{name}, trained with": value for name, value in stated.hyperparameters.items()}}
