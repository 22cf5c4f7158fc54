"""Directories that compositions, evaluations and conflict checks work in."""

import shutil
from pathlib import Path

from sqlalchemy import select

from registry.database.tables import Composition, Job
from registry.domain.jobs.queue import FINISHED
from registry.transfer.resources import Resources

_WORK, _EVALUATION, _CHECK = "composition-", "evaluation-", "conflicts-"


def work_of(resources: Resources, composition_id: int) -> Path:
    """Directory on this host for the results of a composition's steps."""
    return resources.work_directory / f"{_WORK}{composition_id}"


def evaluation_work_of(resources: Resources, job_id: int) -> Path:
    """Directory on this host for the releases that an evaluation measures."""
    return resources.work_directory / f"{_EVALUATION}{job_id}"


def check_work_of(resources: Resources, job_id: int) -> Path:
    """Directory on this host for the adapters that a conflict check compares."""
    return resources.work_directory / f"{_CHECK}{job_id}"


def sweep_work(resources: Resources) -> int:
    """Removes the work of compositions and other jobs that have ended, and returns how many: a worker of another host
    may have ended one that was begun here, and cleaned only its own disk."""
    composed, evaluated, checked = (_numbers(resources, prefix) for prefix in (_WORK, _EVALUATION, _CHECK))
    if not composed | evaluated | checked:
        return 0
    with resources.read() as session:
        going_on = select(Composition.id).join(Job, Job.id == Composition.job_id).where(Job.state.not_in(FINISHED))
        ended = composed - set(session.scalars(going_on.where(Composition.id.in_(composed))))
        running = select(Job.id).where(Job.id.in_(evaluated | checked), Job.state.not_in(FINISHED))
        busy = set(session.scalars(running))
    for composition_id in ended:
        shutil.rmtree(work_of(resources, composition_id), ignore_errors=True)
    left = [evaluation_work_of(resources, job_id) for job_id in evaluated - busy]
    left += [check_work_of(resources, job_id) for job_id in checked - busy]
    for directory in left:
        shutil.rmtree(directory, ignore_errors=True)
    return len(ended) + len(left)


def _numbers(resources: Resources, prefix: str) -> set[int]:
    """The ids that have a directory with this prefix here."""
    names = (path.name.removeprefix(prefix) for path in resources.work_directory.glob(f"{prefix}*"))
    return {int(name) for name in names if name.isdecimal()}
