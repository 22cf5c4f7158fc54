"""Upgrades of a base: the adapters that fit the new one, and their scores on it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from composer.formats.checkpoints.checkpoint import Architecture
from registry.database.tables import Base, Job, Release
from registry.database.tables.work import StoredFit, StoredResult, StoredUpgrade
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, administers, holds, may_read, owns
from registry.domain.catalog import bases, metrics, repositories, suites
from registry.domain.catalog.releases import full_name
from registry.domain.channels.policy import gates
from registry.domain.channels.policy.gates import GateScore
from registry.domain.jobs import evaluations, queue
from registry.domain.jobs.evaluations import WantedScore
from registry.errors import NotFound, Usage
from registry.formats.manifest import ManifestFile
from registry.transfer import publishing
from registry.transfer.resources import Resources


@dataclass(slots=True, kw_only=True)
class _Adapter:
    """An adapter on the old base; `suites` are the digests of the suites to measure it on."""

    release: int
    name: str
    files: list[ManifestFile]
    measurable: bool
    suites: list[str]
    why: str = ""


@dataclass(slots=True)
class _Plan:
    old: str
    new: str
    same: bool
    architecture: Architecture
    adapters: list[_Adapter] = field(default_factory=list[_Adapter])


def begin(
    resources: Resources, actor: Actor, old: str, new: str, suite_names: Sequence[str], *, evaluate: bool
) -> dict[str, object]:
    """Lists the adapters that use the old base and whether they fit the new one; queues the evaluation of those
    that do, and of the new base if the actor may record its scores. Returns the report. Raises NotFound, Usage
    for one base twice, and Refused for a suite whose scorer is not enabled."""
    with resources.read() as session:
        plan = _plan(session, actor, old, new, suite_names, resources.settings.enabled_scorers.names)
    for adapter in plan.adapters:
        if not plan.same:
            adapter.why = publishing.misfit(resources, adapter.name, adapter.files, plan.architecture)
    rows: list[StoredFit] = [
        {"release": planned.release, "fits": not planned.why, "why": planned.why} for planned in plan.adapters
    ]
    upgrade: StoredUpgrade = {"old": plan.old, "new": plan.new, "adapters": rows}
    fitting = [planned for planned in plan.adapters if not planned.why and planned.measurable]
    wanted = [WantedScore(planned.release, plan.new, suite) for planned in fitting for suite in planned.suites]
    if not evaluate or not wanted:
        with resources.read() as session:
            return _report(session, actor, upgrade, None, [])
    with resources.write() as session:
        base = session.get_one(Base, plan.new)
        measured = {score.suite.digest for score in suites.scores_of(session, base)}
        lacking = {subject.suite for subject in wanted} - measured if owns(actor, base.created_by) else set[str]()
        alone = [WantedScore(None, plan.new, suite) for suite in lacking]
        namespaces = {
            session.get_one(Release, planned.release).repository.namespace for planned in fitting if planned.suites
        }
        job = evaluations.create(session, actor, namespaces, [*sorted(alone, key=str), *wanted], upgrade)
        subjects = [planned.name for planned in fitting if planned.suites]
        evaluations.record_request(session, actor, job, subjects=subjects, base=plan.new, upgrade_of=plan.old)
        return _report(session, actor, upgrade, job, [])


def report(session: Session, actor: Actor, job_id: int) -> dict[str, object]:
    """The report of an upgrade, as far as it is done. Only for the user who began it, who must still read what it
    measures, and registry admins."""
    job = session.get(Job, job_id)
    row = evaluations.find(session, job_id) if job is not None and job.kind == evaluations.KIND else None
    may = row is not None and job is not None and evaluations.is_own(session, actor, job)
    if job is None or row is None or row.upgrade is None or not (may or administers(actor, job.namespace)):
        raise NotFound("upgrade_unknown", f"Upgrade {job_id} does not exist, or is not yours.", subject=str(job_id))
    return _report(session, actor, row.upgrade, queue.find(session, job_id), row.results)


def _plan(
    session: Session, actor: Actor, old: str, new: str, suite_names: Sequence[str], enabled: Collection[str]
) -> _Plan:
    """Plans the measurements. `enabled` are the Python scorers that workers run: suites with other scorers are refused
    if they are named, and left out otherwise."""
    before, after = bases.find(session, old), bases.find(session, new)
    if before.digest == after.digest:
        raise Usage("same_base", f"{old} and {new} are the same base.", subject=new)
    named = [suites.with_examples(suites.find_readable(session, name, actor)) for name in suite_names]
    for suite in named:
        metrics.refuse_disabled(suite, enabled)
    same = before.architecture_digest == after.architecture_digest and before.model_type == after.model_type
    plan = _Plan(before.digest, after.digest, same, bases.architecture(session, after.digest))
    for release in bases.adapters_on(session, actor, before):
        scored = [score.suite for score in suites.scores_of(session, release)]
        usable = [suite for suite in scored if suite.task not in suites.ELSEWHERE]
        own = dict.fromkeys(suite.digest for suite in usable if not metrics.disabled(suite, enabled))
        plan.adapters.append(
            _Adapter(
                release=release.id,
                name=full_name(release),
                files=publishing.manifest_files(session, release),
                measurable=holds(actor, Role.PUBLISHER, release.repository.namespace),
                suites=[suite.digest for suite in named] or list(own),
            )
        )
    return plan


def _report(
    session: Session, actor: Actor, upgrade: StoredUpgrade, job: Job | None, results: Sequence[StoredResult]
) -> dict[str, object]:
    old, new = session.get_one(Base, upgrade["old"]), session.get_one(Base, upgrade["new"])
    of_new = gates.scores(session, new)
    adapters: list[dict[str, object]] = []
    for row in upgrade["adapters"]:
        release = session.get_one(Release, row["release"])
        if not may_read(actor, release.repository.namespace):
            continue
        own = [result for result in results if result["release"] == release.id]
        adapters.append(
            {
                "repository": str(repositories.name_of(release.repository)),
                "version": release.version,
                "channels": bases.channels_of(session, release),
                "fits": row["fits"],
                "why": row["why"],
                "scores": _compared(gates.scores(session, release), of_new, own),
                "errors": [result["error"] for result in own if result["error"]],
            }
        )
    return {
        "old": {"digest": old.digest, "name": old.name},
        "new": {"digest": new.digest, "name": new.name},
        "job": job.id if job else None,
        "state": job.state if job else None,
        "error": job.error if job else None,
        "adapters": adapters,
    }


def _compared(before: gates.Scores, base: gates.Scores, results: Sequence[StoredResult]) -> list[dict[str, object]]:
    """Compares each score on the new base with the one on the old base and with the new base alone. `gain` is positive
    where the new one is better than the old one."""
    rows: list[dict[str, object]] = []
    for score in (score for result in results for score in result["scores"]):
        key = (score["suite"], score["metric"])
        was, alone = before.get(key), base.get(key)
        sign = 1 if score["higher_is_better"] else -1
        rows.append(
            {
                "suite": score["suite"],
                "metric": score["metric"],
                "n": score["n"],
                "old": _value(was),
                "new": score["value"],
                "base": _value(alone),
                "gain": None if was is None else sign * (score["value"] - was.value),
            }
        )
    return rows


def _value(score: GateScore | None) -> float | None:
    return None if score is None else score.value
