"""The step of a conflict check: the report from the adapters' weights."""

import shutil
from dataclasses import replace

from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.recipe import Lock
from registry.domain.catalog import bases
from registry.domain.compositions import checks, compositions
from registry.transfer import publishing
from registry.worker.runner import JobKind, JobLost, JobRun
from registry.worker.workspace import check_work_of


def check(held: JobRun) -> None:
    """Computes the report and keeps it. Hard conflicts do not fail the job: the report's verdict is `refuse`."""
    from composer.conflicts.render.text import document
    from composer.conflicts.report import conflicts
    from composer.deltas.variants.load import LoadedAdapter, load_deltas

    with held.resources.read() as session:
        row = checks.find_by_job(session, held.job_id)
        if row is None:
            raise JobLost
        lock = Lock.from_json(row.lock)
        architecture = bases.architecture(session, lock.base)
        inputs = compositions.inputs_of(session, lock)
        files = [publishing.manifest_files(session, release) for release in inputs]
    loaded: list[LoadedAdapter] = []
    for number, (locked, listed) in enumerate(zip(lock.inputs, files, strict=True)):
        held.check()
        directory = check_work_of(held.resources, held.job_id) / str(number)
        publishing.materialise(held.resources.store, listed, directory)
        loaded.append(replace(load_deltas(directory, architecture), name=f"{locked.repository}:{locked.version}"))
        held.progress((number + 1) / (len(files) + 1))
    weights, settings = [locked.weighted for locked in lock.inputs], parse_settings(lock.method, lock.settings)
    report = document(conflicts(loaded, weights, settings))
    held.check()
    with held.resources.write() as session:
        checks.keep(session, held.job_id, report)


def clean(held: JobRun) -> None:
    """Deletes the adapters' files."""
    shutil.rmtree(check_work_of(held.resources, held.job_id), ignore_errors=True)


KIND = JobKind(steps={"check": check}, clean=clean)
