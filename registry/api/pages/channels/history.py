"""One metric over all versions of a repository, as a table and a plot."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from registry.api.http.request import ResourcesOf
from registry.api.pages.html import drawings, scores
from registry.api.pages.html.drawings import IntervalBar, ScorePoint
from registry.api.pages.html.render import page_about
from registry.api.pages.html.wire import PageReader, PageRoute, RepositoryOf
from registry.api.routes.views import score_view
from registry.database.tables import Score
from registry.domain.catalog import histories, repositories, suites
from registry.errors import NotFound
from registry.formats.references import nearest

router = APIRouter(route_class=PageRoute)

SHOWN = 400
"""The maximum number of versions on a page, 60 kB."""
MAX_DRAWN = 30
"""Above this number, a script that can zoom plots the versions."""
MetricQuery = Annotated[str | None, Query(max_length=150, description="SUITE.METRIC; the first one if not given.")]


@router.get("/{namespace}/{name}/history")
def show_history(
    named: RepositoryOf, request: Request, resources: ResourcesOf, actor: PageReader, metric: MetricQuery = None
) -> Response:
    with resources.snapshot() as session:
        repository = repositories.find(session, named)
        newest = histories.newest_measured(session, repository)
        measured = suites.scores_of(session, newest) if newest else []
        known = {f"{score.suite.name}.{score.metric}": score for score in measured}
        chosen = _chosen(known, metric)
        entries = histories.of_metric(session, repository, known[chosen], limit=SHOWN) if chosen else []
        stated = [score_view(entry.score) for entry in entries]
        rows = [(entry, score, scores.interval(score)) for entry, score in zip(entries, stated, strict=True)]
        kind = repository.kind
    points = [ScorePoint(entry.version, IntervalBar(score.value, *ends, "now"), score.n) for entry, score, ends in rows]
    return page_about(
        request,
        "history.html",
        named,
        metrics=list(known),
        chosen=chosen,
        rows=rows,
        full=len(rows) == SHOWN,
        drawing=drawings.history(chosen, points[::-1]) if 1 < len(points) <= MAX_DRAWN else None,
        plotted=len(points) > MAX_DRAWN,
        json_address=f"/v1/{kind}s/{named}/releases",
    )


def _chosen(known: dict[str, Score], metric: str | None) -> str:
    """The name of the metric to show; empty if there is none."""
    if metric is None:
        return next(iter(known), "")
    if metric not in known:
        raise NotFound(
            "metric_unknown",
            f"The newest measured release has no score {metric}.",
            subject=metric,
            next_step=nearest(metric, list(known), "Leave the metric out."),
        )
    return metric
