"""`--follow`: a bar for each step of a job on a terminal, elsewhere a line for each change, until the job ends."""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from math import ceil
from typing import Any, Protocol

from registry import wire
from registry.cli.console import render
from registry.cli.console.interrupt import interrupts
from registry.errors import Unavailable
from registry.sdk.connection import Connection

POLL_S = 0.3
RECONNECT_S = 2.0
UNFINISHED = ("queued", "running")
_NAME_CHARS, _BAR_CHARS = 14, 14


class Shown(Protocol):
    """The display of a job."""

    def show(self, job: "wire.work.JobOut") -> None:
        """Called with every state of the job."""


def follow(connection: Connection, job_id: int, *, lines: bool) -> "wire.work.JobOut":
    """Returns the job once it has ended. Polls, so that it survives an outage and works with any server. With `lines`,
    prints each change on a stderr that is not a terminal."""
    with shown_steps(f"job {job_id}", lines=lines) as shown:
        while True:
            job = _latest(connection, job_id)
            shown.show(job)
            if job.state not in UNFINISHED:
                return job
            time.sleep(POLL_S)


def goes_on(job_id: int) -> str:
    """The message of an interrupted command that follows the job."""
    return (
        f"job {job_id} continues; `adaptory jobs {job_id} --follow` follows it again, `adaptory cancel {job_id}` ends "
        "it"
    )


@contextmanager
def left_running(job_id: int) -> Generator[None]:
    """An interrupt in this block leaves the job running, with a message."""
    interrupts.kept = goes_on(job_id)
    yield
    interrupts.kept = ""


def _latest(connection: Connection, job_id: int) -> "wire.work.JobOut":
    away = False
    while True:
        try:
            job = connection.api.get(f"/v1/jobs/{job_id}", wire.work.JobOut)
        except Unavailable as error:
            if connection.resources is not None:
                raise
            if not away:
                render.say(f"{error.detail} Trying again every {RECONNECT_S:g} s; the job does not need this command.")
            away = True
            time.sleep(RECONNECT_S)
        else:
            if away:
                render.say(f"connected to {connection.api.url} again")
            return job


def amount(step: "wire.work.StepOut") -> str:
    """The progress of a step, such as `12 of 40 units, 3 redone`; empty if it has no amount."""
    if not step.total:
        return ""
    redone = f", {step.redone:,} redone" if step.redone else ""
    if step.unit == "bytes":
        return f"{render.size(step.done or 0)} of {render.size(step.total)}{redone}"
    return f"{step.done or 0:,} of {step.total:,} {step.unit}{redone}"


class _Nothing:
    def show(self, job: "wire.work.JobOut") -> None:
        pass


class _ProgressLines:
    """A line for the job's state and for each step that begins, ends or redoes something."""

    def __init__(self, label: str) -> None:
        self._label, self._said = label, dict[str, str]()

    def show(self, job: "wire.work.JobOut") -> None:
        waits = f", waits for {job.waits_for}" if job.waits_for else ""
        stalled = ", stalled: its worker fell silent" if job.stalled_since else ""
        self._say(self._label, f"{job.state}{waits}{stalled}")
        for number, step in enumerate(job.steps, start=1):
            if step.state != "waiting":
                redone = f", {step.redone:,} units redone" if step.redone else ""
                self._say(f"{number}/{len(job.steps)} {step.name}", f"{step.state}{redone}")

    def _say(self, name: str, state: str) -> None:
        if self._said.get(name) != state:
            self._said[name] = state
            render.say(f"{name}: {state}")


@contextmanager
def shown_steps(label: str, *, lines: bool) -> Generator[Shown]:
    """Shows a job's states on stderr: as bars on a terminal, elsewhere as lines, or not at all."""
    if not sys.stderr or not sys.stderr.isatty():
        yield _ProgressLines(label) if lines else _Nothing()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(_BAR_CHARS),
        TextColumn("{task.fields[said]}", markup=False),
    )
    bars = Bars(*columns, console=Console(stderr=True), transient=True)

    class Steps:
        """A bar for each step; the first names what a job that has not begun waits for."""

        def __init__(self) -> None:
            self._tasks, self._began_s = dict[str, Any](), dict[str, float]()

        def show(self, job: "wire.work.JobOut") -> None:
            for number, step in enumerate(job.steps, start=1):
                name = step.name
                if name not in self._tasks:
                    shown = render.middle(f"{number}/{len(job.steps)} {render.plain(name)}", _NAME_CHARS)
                    self._tasks[name] = bars.add_task(shown.ljust(_NAME_CHARS), total=1.0, said="")
                if step.state == "running":
                    self._began_s.setdefault(name, time.monotonic())
                waits = job.waits_for if number == 1 and step.state == "waiting" else None
                said = f"waits for {waits}" if waits else self._said(step)
                said = render.middle(render.plain(said), 80 - _NAME_CHARS - _BAR_CHARS - 3)
                bars.update(self._tasks[name], completed=step.progress, said=said)

        def _said(self, step: "wire.work.StepOut") -> str:
            if step.state != "running" or not step.total:
                return step.state
            seconds = time.monotonic() - self._began_s[step.name]
            if seconds < 1 or not step.done:
                return amount(step)
            left_s = seconds * (step.total - step.done) / step.done
            return f"{amount(step)}, {timedelta(seconds=ceil(left_s))} left"

    with bars:
        yield Steps()
