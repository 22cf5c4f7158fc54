"""The step of a conflict check: the report from the adapters' weights."""

from composer.formats.recipes.recipe import Lock
from registry.domain.catalog import bases
from registry.domain.compositions import checks, compositions
from registry.transfer import publishing
from registry.worker.node_files import share_architecture, to_rows
from registry.worker.report_units import conflict_report
from registry.worker.runner import JobKind, JobLost, JobRun


def check(held: JobRun) -> None:
    """Computes and stores the report. Hard conflicts do not fail the job: they make the report's verdict `refuse`."""
    with held.resources.read() as session:
        row = checks.find_by_job(session, held.job_id)
        if row is None:
            raise JobLost
        lock = Lock.from_json(row.lock)
        architecture = bases.architecture(session, lock.base)
        inputs = compositions.inputs_of(session, lock)
        files = [publishing.manifest_files(session, release) for release in inputs]
    members = [
        {
            "name": f"{locked.repository}:{locked.version}",
            "weight": locked.weighted.to_json(),
            "files": to_rows(listed),
        }
        for locked, listed in zip(lock.inputs, files, strict=True)
    ]
    key = share_architecture(held.engine.node, architecture)
    how = {"method": lock.method, "settings": lock.settings}
    made = conflict_report(held, {"architecture": key, "members": members, **how})
    held.check()
    with held.resources.write() as session:
        checks.keep(session, held.job_id, made["report"])


KIND = JobKind(steps={"check": check})
