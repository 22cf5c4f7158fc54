"""Jobs and compositions: their progress, why they ended, and their results beside the inputs."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from markupsafe import Markup

from composer.conflicts.view import DEFAULT_MEASURE
from registry.api.http.pagination import Cursor, decode_number, first_rows
from registry.api.http.request import ResourcesOf, RowId
from registry.api.pages.html import drawings, gates, scores
from registry.api.pages.html.drawings import IntervalBar
from registry.api.pages.html.forms import FormOf
from registry.api.pages.html.render import page, redirect
from registry.api.pages.html.wire import PageCaller, PageContributor, PageRoute
from registry.api.pages.jobs import report
from registry.api.pages.jobs.recipe_form import as_yaml, choice_of, recipe_used
from registry.api.routes.views import composition_view, job_page, job_view
from registry.domain.compositions import compositions
from registry.domain.jobs import queue
from registry.domain.jobs.queue import FINISHED
from registry.formats.lineage import of_lock, rule_words
from registry.wire.quality import GateResultOut
from registry.wire.work import CandidateScore, MeasuredValue, candidate_scores

router = APIRouter(route_class=PageRoute)

SHOWN = 25
COMPOSITION = "composition"
"""The kind of job for which the composition's page is shown; the page of other jobs shows their steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRow:
    """A score of a composition's candidate; below it, an input's or the base's on the same examples."""

    name: str
    subject: str
    address: str | None
    value: float
    n: int
    drawing: Markup


@router.get("/jobs")
def list_jobs(request: Request, resources: ResourcesOf, actor: PageContributor, cursor: Cursor = None) -> Response:
    """The jobs that REST lists, newest first."""
    with resources.read() as session:
        rows = compositions.list_jobs(session, actor, before=decode_number(cursor), limit=SHOWN + 1)
        listed, more = first_rows(rows, SHOWN, lambda row: row.id)
        views = job_page(session, listed)
    return page(request, "jobs.html", jobs=views, more=more, first=cursor is None, json_address="/v1/jobs")


@router.get("/jobs/{job_id}")
def show_job(job_id: RowId, request: Request, resources: ResourcesOf, actor: PageCaller) -> Response:
    """A job; for a composition, redirects to its page."""
    with resources.read() as session:
        row = queue.find(session, job_id)
        compositions.permit_job(session, actor, row)
        if row.kind == COMPOSITION:
            made = compositions.find_by_job(session, job_id).id
            return redirect(f"/compositions/{made}")
        view = job_view(session, row)
    return page(request, "job.html", job=view, finished=view.state in FINISHED, json_address=f"/v1/jobs/{job_id}")


@router.post("/jobs/{job_id}/cancel")
def cancel_job(job_id: RowId, resources: ResourcesOf, actor: PageCaller, form: FormOf) -> Response:
    """Cancel as REST does, then redirect to the job's page."""
    with resources.write() as session:
        row = queue.find(session, job_id)
        compositions.permit_job(session, actor, row)
        compositions.cancel_job(session, actor, row)
    return redirect(f"/jobs/{job_id}")


@router.get("/compositions/{composition_id}")
def show_composition(composition_id: RowId, request: Request, resources: ResourcesOf, actor: PageCaller) -> Response:
    with resources.read() as session:
        pair = compositions.find(session, composition_id)
        compositions.permit_look(actor, *pair, hidden=compositions.unknown(composition_id))
        view, job = composition_view(*pair), job_view(session, pair[1])
    lock = view.locked
    made, stated, choice = of_lock(lock), view.conflicts, choice_of(lock)
    judged = [GateResultOut.read(gate) for gate in view.gates or []]
    return page(
        request,
        "composition.html",
        made=view,
        job=job,
        finished=view.state in FINISHED,
        members=[(member, [rule_words(rule) for rule in member.weight.rules]) for member in made.members],
        how=made.how,
        search=lock.get("optimized"),
        report=report.read(stated, report.options_for(view.id)) if stated else None,
        compared=list(map(_compared, candidate_scores(view))),
        reworded=[score for score in candidate_scores(view) if "reworded" in score],
        gate_lines=gates.lines(judged),
        passed=gates.summary(judged),
        recipe=as_yaml(view.recipe),
        used=as_yaml(recipe_used(view.recipe, lock, choice)) if choice else None,
        refits=len(lock.get("calibration", ())) > len(lock["inputs"]),
        json_address=f"/v1/compositions/{composition_id}",
    )


@router.get("/compositions/{composition_id}/conflicts")
def show_conflicts_of_composition(
    composition_id: RowId,
    request: Request,
    resources: ResourcesOf,
    actor: PageCaller,
    show: Annotated[str, Query(max_length=40)] = DEFAULT_MEASURE,
) -> Response:
    """The complete conflict report of a composition: losses, pairs, maps and findings."""
    with resources.read() as session:
        pair = compositions.find(session, composition_id)
        compositions.permit_look(actor, *pair, hidden=compositions.unknown(composition_id))
        stated = pair[0].conflicts
    path = f"/compositions/{composition_id}/conflicts"
    return page(
        request,
        "composition_conflicts.html",
        composition_id=composition_id,
        **report.shown(stated, report.options_for(composition_id), show, lambda name: f"{path}?show={name}"),
        json_address=f"/v1/compositions/{composition_id}",
    )


def _compared(score: CandidateScore) -> list[ComparedRow]:
    """The candidate's score of a suite's metric, and below it the others on the same axis."""
    named = f"{score['suite']}.{score['metric']}"
    rows: list[tuple[str, str | None, MeasuredValue, str]] = [("result", None, score, "now")]
    for measured in score.get("inputs", []):
        address = f"/{measured['repository']}/{measured['version']}"
        rows.append((f"{measured['repository']} {measured['version']}", address, measured, "before"))
    if on_base := score.get("base"):
        rows.append(("base", None, on_base, "base"))
    bars = [
        IntervalBar(
            measured["value"], *scores.ends(score["metric"], measured["value"], measured["stderr"], measured["n"]), kind
        )
        for _, _, measured, kind in rows
    ]
    low, high = scores.axis(score["metric"], bars)
    return [
        ComparedRow(
            name=named,
            subject=subject,
            address=address,
            value=measured["value"],
            n=measured["n"],
            drawing=drawings.intervals(f"{named} of {subject}", [bar], low, high),
        )
        for (subject, address, measured, _), bar in zip(rows, bars, strict=True)
    ]
