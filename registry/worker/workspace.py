"""Working directories of compositions."""

import shutil
from pathlib import Path

from sqlalchemy import select

from registry.database.tables import Composition, Job
from registry.domain.jobs.queue import FINISHED
from registry.transfer.resources import Resources

_WORK = "composition-"


def work_of(resources: Resources, composition_id: int) -> Path:
    """The directory on this host for the results of a composition's steps."""
    return resources.work_directory / f"{_WORK}{composition_id}"


def sweep_work(resources: Resources) -> int:
    """Removes the directories of ended compositions and returns their number. A worker on another host may have ended a
    composition that began here, but cleaned only its own disk."""
    names = (path.name.removeprefix(_WORK) for path in resources.work_directory.glob(f"{_WORK}*"))
    there = {int(name) for name in names if name.isdecimal()}
    if not there:
        return 0
    with resources.read() as session:
        going_on = select(Composition.id).join(Job, Job.id == Composition.job_id).where(Job.state.not_in(FINISHED))
        ended = there - set(session.scalars(going_on.where(Composition.id.in_(there))))
    for composition_id in ended:
        shutil.rmtree(work_of(resources, composition_id), ignore_errors=True)
    return len(ended)
