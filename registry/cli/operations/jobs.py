"""Jobs: list, show, follow, order, cancel."""

from typing import Annotated

import typer

from registry import wire
from registry.cli.console import following, render
from registry.cli.console.connect import connected, jobs_running
from registry.cli.console.groups import refuse_idle, root
from registry.cli.console.render import JsonFlag
from registry.errors import Refused, RegistryError
from registry.errors.translation import of_row
from registry.formats.priority import Priority

_HELP = "adaptory jobs"


@root.command()
def jobs(
    job: Annotated[int | None, typer.Argument(metavar="[ID]", help="Show only this job.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="With ID: wait until it ends, with a bar for each step.")
    ] = False,
    priority: Annotated[
        Priority | None,
        typer.Option(help="With ID: give it another priority; high needs the role releaser in its namespace."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number.")] = 50,
    cursor: Annotated[str | None, typer.Option("--cursor", help="`next` of the previous page.")] = None,
    json: JsonFlag = False,
) -> None:
    """List jobs, newest first, or show one."""
    if job is None:
        refuse_idle({"--follow": follow, "--priority": priority}, "without the ID of a job", _HELP)
        with connected() as connection:
            items, more = connection.api.first("/v1/jobs", wire.work.JobOut, limit, cursor=cursor)
        render.document({"items": items, "next": more}, json, lambda: _table(items))
        render.more(more, json)
        return
    with connected() as connection:
        if priority is not None:
            connection.api.post(f"/v1/jobs/{job}/priority", {"priority": priority.value})
        document = connection.api.get(f"/v1/jobs/{job}", wire.work.JobOut)
        if follow and document.state in following.UNFINISHED:
            with following.left_running(job), jobs_running(connection, job):
                document = following.follow(connection, job, lines=True)
    failure = _failure(document) if follow and document.state != "done" else None
    render.document(document, json, lambda: _show(document), failure)


@root.command()
def cancel(
    job: Annotated[int, typer.Argument(metavar="ID", help="As `adaptory jobs` shows it.")], json: JsonFlag = False
) -> None:
    """Cancel a job; nothing of it is published."""
    with connected() as connection:
        document = connection.api.post(f"/v1/jobs/{job}/cancel", None, wire.work.JobOut)
    render.document(document, json, lambda: render.out(f"job {document.id}: {document.state}"))


def _failure(job: "wire.work.JobOut") -> RegistryError:
    if job.error:
        return of_row(job.error)
    named = str(job.id)
    return Refused("job_cancelled", f"Job {named} was cancelled.", subject=named)


def _show(job: "wire.work.JobOut") -> None:
    _table([job])
    if job.waits_for:
        render.out(f"It waits for {job.waits_for}.")
    if job.stalled_since:
        render.out("Its worker has stopped unexpectedly. The next worker continues it: `adaptory worker`.")
    for step in job.steps:
        if step.log:
            render.heading(f"the last lines of a unit of {step.name} that failed")
            for line in step.log:
                print(f"  {render.plain(line)}")


def _table(rows: "list[wire.work.JobOut]") -> None:
    cells = [
        (
            row.id,
            row.kind,
            _state(row),
            [f"{step.name}: {_progress(step, row.state)}" for step in row.steps],
            row.created_by,
        )
        for row in rows
    ]
    render.table("", ("job", "kind", "state", "steps", "by"), cells)


def _state(row: "wire.work.JobOut") -> str:
    """A job's state with a priority that is not normal, its cancellation, and since when its worker is silent."""
    unfinished = row.state in following.UNFINISHED
    notes = [f"{row.priority} priority"] if unfinished and row.priority is not Priority.NORMAL else []
    notes += ["to be cancelled"] if row.cancel_requested and unfinished else []
    if row.stalled_since:
        notes.append(f"stalled since {render.minute(row.stalled_since)}")
    return ", ".join([row.state, *notes])


def _progress(step: "wire.work.StepOut", of_job: str) -> str:
    if step.state == "waiting" and of_job not in following.UNFINISHED:
        return "not run"
    done = following.amount(step) if step.state in ("running", "failed") else ""
    return (done if step.state == "running" else f"failed at {done}") if done else step.state
