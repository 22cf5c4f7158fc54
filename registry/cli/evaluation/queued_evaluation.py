"""`eval --queue`: a worker of the server measures, in one job."""

from collections.abc import Mapping, Sequence
from typing import Any

from registry import wire
from registry.cli.console import following, render
from registry.cli.console.connect import jobs_running
from registry.cli.console.following import UNFINISHED
from registry.cli.evaluation.quality import release_or_base
from registry.errors import Refused, RegistryError
from registry.errors.translation import of_row
from registry.sdk.connection import Connection
from registry.sdk.suites import refuse_bad_suite_name


def queue(
    connection: Connection, what: Sequence[str], suites: Sequence[str], wish: Mapping[str, object], *, wait: bool
) -> "wire.work.EvaluationOut":
    """Requests the evaluation and, with `wait`, follows it to its end. Returns its report."""
    for name in suites:
        refuse_bad_suite_name(name)
    releases: list[str] = []
    bases: list[str] = []
    for name in what:
        release, base = release_or_base(connection, name)
        if release is None:
            bases.append(base.digest)
        else:
            releases.append(release.name)
    body = {"releases": releases, "bases": bases, "suites": list(suites), **wish}
    document = connection.api.post("/v1/evaluations", body, wire.work.EvaluationOut)
    if not wait:
        return document
    job = document.job
    with jobs_running(connection, job):
        with following.left_running(job):
            following.follow(connection, job, lines=True)
        return connection.api.get(f"/v1/evaluations/{job}", wire.work.EvaluationOut)


def show(document: "wire.work.EvaluationOut") -> None:
    """Shows the scores of each pair that is measured, and why others were not."""
    render.heading(f"evaluation {document.job}: {document.state}")
    if document.state in UNFINISHED:
        render.out(f"A worker of the server measures it: `adaptory jobs {document.job}` shows its progress.")
    rows: list[tuple[Any, ...]] = []
    for item in document.items:
        subject = f"{item.repository}:{item.version}" if item.repository else item.base.name
        for score in item.scores or ():
            value = render.with_error(score.value, score.stderr, score.n)
            rows.append((subject, item.suite, score.metric, value, score.n))
        if item.error:
            rows.append((subject, item.suite, "", item.error, ""))
    if rows:
        render.table("", ("subject", "suite", "metric", "value", "n"), rows)


def error_of(job: int | None, state: str | None, error: dict[str, Any] | None) -> RegistryError | None:
    """The error of a job that failed or was cancelled; None for any other."""
    if error is not None:
        return of_row(error)
    if state == "cancelled":
        return Refused("evaluation_cancelled", f"Job {job} was cancelled.", subject=str(job))
    return None
