"""The needs of compositions' jobs, and of jobs that an older version queued."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.recipe import Lock, Recipe, parse_recipe
from registry.database.tables import Base, Composition, Evaluation, Job
from registry.domain.catalog import suites
from registry.domain.compositions import locking
from registry.domain.jobs import evaluations, needs, queue
from registry.domain.jobs.evaluations import WantedScore
from registry.domain.jobs.needs import EVOLUTION, WorkerNeeds, base_need
from registry.errors import RegistryError


def needs_of(session: Session, recipe: Recipe, lock: Lock, *, plan_only: bool) -> WorkerNeeds:
    """The needs of a composition. A search, a probe, a fit and an evaluation load the base; a merge only reads it;
    combining adapters alone does not need it."""
    own = locking.member_suites(session, recipe, [locking.release_of(session, source) for source in lock.inputs])
    measured = [] if plan_only else locking.evaluated(recipe, lock, own)
    fitted = parse_settings(lock.method, lock.settings).pipeline.fitted
    loads = bool(recipe.optimize or fitted or measured or (recipe.probe and all(own)))
    names = {need for name in measured for need in evaluations.suite_needs(suites.find(session, name))}
    if loads or (recipe.model and not plan_only):
        names.add(base_need(lock.base))
    if recipe.optimize and recipe.optimize.evolve:
        names.add(EVOLUTION)
    return WorkerNeeds(frozenset(names), memory_bytes=session.get_one(Base, lock.base).size_bytes if loads else 0)


def declare_missing(session: Session) -> None:
    """Declares the needs of some jobs that an older version queued. A job whose needs can no longer be determined,
    since its subjects have changed, gets none: its worker reports why it fails."""
    for job in needs.undeclared(session):
        try:
            needed = _needs_of_job(session, job)
        except RegistryError:
            needed = WorkerNeeds()
        queue.declare(session, job, needed)


def _needs_of_job(session: Session, job: Job) -> WorkerNeeds:
    if job.kind == evaluations.KIND:
        row = session.get_one(Evaluation, job.id)
        return evaluations.needs_of(session, [WantedScore(**subject) for subject in row.wanted])
    composition = session.scalar(select(Composition).where(Composition.job_id == job.id))
    if composition is None:  # a conflict check, which reads weights of adapters alone
        return WorkerNeeds()
    recipe, lock = parse_recipe(composition.recipe), Lock.from_json(composition.lock)
    return needs_of(session, recipe, lock, plan_only=composition.plan_only)
