"""Compositions: recipe -> lock -> durable steps, their results and lineage."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.formats.recipes.lock import Lock
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.recipe import Recipe, parse_recipe
from registry.database.tables import Base, Composition, Evaluation, Job, Namespace, Release, ReleaseInput
from registry.domain.access import audit, tokens
from registry.domain.access.audit import Act, Actor, EventQuery
from registry.domain.access.roles import EVERYWHERE, Role, granted, holds, may, may_read, permit, unknown_namespace
from registry.domain.catalog import metrics, releases, repositories, signatures, suites, versioning
from registry.domain.catalog.releases import full_name
from registry.domain.catalog.repositories import Kind
from registry.domain.channels.policy import gates
from registry.domain.compositions import checks, locking
from registry.domain.jobs import evaluations, needs, queue
from registry.domain.jobs.evaluations import WantedScore
from registry.domain.jobs.needs import EVOLUTION, WorkerNeeds, base_need
from registry.domain.jobs.queue import PLAIN, Wish
from registry.errors import Conflict, Invalid, NotAllowed, NotFound, Refused, RegistryError, Usage
from registry.formats.references import RepositoryName, Version, nearest, parse_reference
from registry.formats.signatures import fingerprint

STEPS = ("check", "combine", "evaluate", "gate", "merge", "publish")
"""Recipes are resolved and locked at the request, so that an impossible one is refused immediately. With
`optimize`, a search that chooses method and weights comes first."""


@dataclass(frozen=True, slots=True)
class _PublishedTarget:
    """A release that a recipe publishes."""

    repository: RepositoryName
    version: Version
    kind: Kind


def create(  # noqa: PLR0913
    session: Session,
    actor: Actor,
    recipe: Recipe,
    *,
    plan_only: bool,
    signer: str | None = None,
    enabled: Collection[str] = (),
    wish: Wish = PLAIN,
) -> Composition:
    """Resolves and locks the recipe and enqueues its steps; a plan has only the check, and publishes nothing.

    `signer` is the fingerprint of the workers' signing key, None without one. `enabled` are the Python
    scorers that workers run.
    """
    releases.refuse_long_notes(recipe.notes, owner(recipe))
    for name in (*recipe.evaluate, *(source.suite for source in recipe.inputs if source.suite)):
        suites.with_examples(suites.find_readable(session, name, actor))
    for rule in gates.parse_rules(recipe.gates or ()):
        suites.find_readable(session, rule.suite, actor)
    lock = locking.lock_of(session, recipe)
    for target in _targets(recipe, plan_only=plan_only):
        _check_target(session, recipe, lock, target)
        _refuse_namespace(session, actor, target.repository.namespace, signer, lock)
    for name in () if plan_only else locking.evaluated(recipe, lock):
        metrics.refuse_disabled(suites.find(session, name), enabled)
    _check_gates(session, recipe, lock)
    wanted = STEPS[:1] if plan_only else STEPS
    if recipe.optimize:
        wanted = ("optimize", *wanted)
    job = queue.enqueue(session, actor, "composition", wanted, owner(recipe), wish)
    queue.declare(session, job, needs_of(session, recipe, lock, plan_only=plan_only), wish)
    composition = Composition(
        job_id=job.id,
        plan_only=plan_only,
        recipe=recipe.to_json(),
        lock=lock.to_json(),
        conflicts=None,
        candidate_scores=None,
        gates=None,
        merge=None,
        results=[],
    )
    session.add(composition)
    session.flush()
    if not plan_only:
        audit.record(
            session,
            actor,
            Act.COMPOSITION_CREATE,
            subject(composition),
            namespace=job.namespace,
            after={"lock": lock.digest},
        )
    return composition


def owner(recipe: Recipe) -> str:
    """The namespace that a composition belongs to: its output's, or its first input's for a plan without outputs."""
    reference = next(iter(recipe.outputs), recipe.inputs[0].adapter)
    return parse_reference(reference).repository.namespace


def subject(composition: Composition) -> str:
    return f"composition/{composition.id}"


def roles_needed(recipe: Recipe) -> list[tuple[Role, str]]:
    """The roles that a composition needs, by namespace: reader for inputs, publisher for outputs and the owner."""
    inputs = [(Role.READER, source.adapter) for source in recipe.inputs]
    outputs = [(Role.PUBLISHER, output) for output in recipe.outputs]
    named = [(role, parse_reference(text).repository.namespace) for role, text in (*inputs, *outputs)]
    return [*named, (Role.PUBLISHER, owner(recipe))]


def creator(session: Session, composition: Composition, now: datetime) -> Actor:
    """The composition's creator, with the current grants of the token used then, which the audit row names. Raises
    NotAllowed if they no longer suffice."""
    asked_for = EventQuery(subject=subject(composition), act=Act.COMPOSITION_CREATE)
    (asked,) = audit.list_oldest_first(session, asked_for, limit=1)
    actor = tokens.actor_now(session, asked.actor, asked.token_id, asked.source, now)
    for role, namespace in roles_needed(parse_recipe(composition.recipe)):
        if not may(actor, role, namespace):
            raise NotAllowed(
                "role_lost",
                f"{actor.name}, who created this composition, no longer has the role {role} in {namespace}.",
                subject=namespace,
                next_step=f"Ask an admin of {namespace} for the role, and compose again.",
            )
    return actor


def find(session: Session, composition_id: int) -> tuple[Composition, Job]:
    """The composition and its job. Raises NotFound."""
    composition = session.get(Composition, composition_id)
    if composition is None:
        raise unknown(composition_id)
    return composition, queue.find(session, composition.job_id)


def find_all(session: Session, ids: Sequence[int]) -> list[tuple[Composition, Job]]:
    """The compositions with these ids, as far as they exist, and their jobs."""
    rows = session.execute(select(Composition, Job).join(Job).where(Composition.id.in_(ids)))
    return [(composition, job) for composition, job in rows]


def unknown(composition_id: int) -> NotFound:
    """The error for a composition that does not exist or that the actor may not see."""
    return NotFound("composition_unknown", f"Composition {composition_id} does not exist.", subject=str(composition_id))


def lock_choice(session: Session, composition_id: int, lock: Lock, now: datetime) -> None:
    """Writes the lock that a search completed. The audit log has its digest, but for a plan, which it does not have."""
    composition, job = find(session, composition_id)
    before, composition.lock = composition.lock["digest"], lock.to_json()
    if not composition.plan_only:
        audit.record(
            session,
            creator(session, composition, now),
            Act.COMPOSITION_LOCK,
            subject(composition),
            namespace=job.namespace,
            before={"lock": before},
            after={"lock": lock.digest},
        )


def find_by_job(session: Session, job_id: int) -> Composition:
    """The composition of a job of that kind. Raises NotFound for an unknown job."""
    job = queue.find(session, job_id)
    return session.scalars(select(Composition).where(Composition.job_id == job.id)).one()


def permit_look(actor: Actor, composition: Composition, job: Job, hidden: NotFound) -> None:
    """Raises unless the actor may see the composition and its job: both reveal names and scores of the inputs, which
    the actor must be allowed to read."""
    permit(actor, Role.PUBLISHER, job.namespace or EVERYWHERE, hidden=hidden)
    for namespace in _read(composition.lock):
        permit(actor, Role.READER, namespace, hidden=hidden)


def permit_job(session: Session, actor: Actor, job: Job, role: Role = Role.READER) -> None:
    """Raises unless the actor may see the job. An evaluation of releases in several namespaces is visible to its
    requester, with a token that has the role in all of them, and to publishers of the registry."""
    hidden = queue.unknown(job.id)
    if job.kind == checks.KIND:
        checks.permit_job(session, actor, job)
        return
    if job.kind == evaluations.KIND and evaluations.is_own(session, actor, job, role):
        return
    if job.kind == evaluations.KIND:
        if job.namespace is None and not holds(actor, Role.PUBLISHER):
            raise hidden
        permit(actor, Role.PUBLISHER, job.namespace or EVERYWHERE, hidden=hidden)
    else:
        permit_look(actor, find_by_job(session, job.id), job, hidden)


def permit_change(session: Session, actor: Actor, job: Job) -> None:
    """Raises unless the actor may cancel the job, or give it another priority."""
    permit_job(session, actor, job, Role.PUBLISHER)


def cancel_job(session: Session, actor: Actor, job: Job) -> Job:
    """Requests cancellation of a job. Raises Conflict for a finished one, and what `permit_change` raises."""
    permit_change(session, actor, job)
    if job.kind not in (evaluations.KIND, checks.KIND):
        return cancel(session, actor, find_by_job(session, job.id).id)[1]
    job = queue.request_cancel(session, job.id, actor.at)
    audit.record(session, actor, Act.JOB_CANCEL, f"job/{job.id}", namespace=job.namespace)
    return job


def list_jobs(session: Session, actor: Actor, *, before: int, limit: int) -> list[Job]:
    """Jobs, newest first, that `permit_job` allows the actor to see."""
    jobs: list[Job] = []
    while len(jobs) < limit:
        rows = queue.list_page(session, granted(actor, Role.PUBLISHER), before=before, limit=limit)
        locks = select(Composition.job_id, Composition.lock).where(Composition.job_id.in_([job.id for job in rows]))
        seen = {job for job, lock in session.execute(locks) if all(may_read(actor, name) for name in _read(lock))}
        seen |= checks.readable_jobs(session, actor, [job.id for job in rows])
        jobs += [job for job in rows if job.id in seen or job.kind == evaluations.KIND]
        if len(rows) < limit:
            break
        before = rows[-1].id
    return jobs[:limit]


def _read(lock: Mapping[str, Any]) -> set[str]:
    """The namespaces of a lock's inputs."""
    return {parse_reference(row["repository"]).repository.namespace for row in lock["inputs"]}


def cancel(session: Session, actor: Actor, composition_id: int) -> tuple[Composition, Job]:
    """Requests cancellation of the composition's job. Raises Conflict for a finished one."""
    composition, job = find(session, composition_id)
    queue.request_cancel(session, job.id, actor.at)
    audit.record(session, actor, Act.COMPOSITION_CANCEL, subject(composition), namespace=job.namespace)
    return composition, job


def inputs_of(session: Session, lock: Lock) -> list[Release]:
    """The releases that a lock names, in order; they are unchanged, but may have been yanked since."""
    releases_used: list[Release] = []
    for locked in lock.inputs:
        release = locking.release_of(session, locked)
        if release.revision.commit != locked.commit:
            raise Invalid(
                "lock_broken",
                f"{full_name(release)} is not the commit {locked.commit[:12]} that the lock names.",
                subject=full_name(release),
            )
        releases_used.append(release)
    return releases_used


def _targets(recipe: Recipe, *, plan_only: bool) -> list[_PublishedTarget]:
    """The outputs to publish, each with its version and in its own repository."""
    outputs = ((recipe.adapter, Kind.ADAPTER), (recipe.model, Kind.MODEL), (recipe.adapter_set, Kind.SET))
    if not plan_only and not recipe.outputs:
        raise Usage("no_output", "The recipe names no adapter, no model and no set to publish.")
    targets: list[_PublishedTarget] = []
    for text, kind in ((text, kind) for text, kind in outputs if text):
        reference = parse_reference(text)
        if reference.version is None:
            raise Usage("bad_output", f"{reference} is not NAMESPACE/NAME:VERSION.", subject=str(reference))
        targets.append(_PublishedTarget(reference.repository, reference.version, kind))
    if len({target.repository for target in targets}) < len(targets):
        raise Usage("one_repository", "Adapter, model and set need separate repositories.")
    return targets


def _check_target(session: Session, recipe: Recipe, lock: Lock, target: _PublishedTarget) -> None:
    """Checks a target early, so that it does not fail after an hour of merging; publishing checks it again."""
    repository = repositories.find_if_any(session, target.repository, target.kind)
    if repository is not None:
        query = select(Release).where(Release.repository_id == repository.id, Release.version == str(target.version))
        if (occupant := session.scalar(query)) is not None:
            _refuse_other_content(session, occupant, recipe, lock)
            return
        versioning.refuse_other_base(session, repository, target.version, lock.base)


def _refuse_other_content(session: Session, occupant: Release, recipe: Recipe, lock: Lock) -> None:
    """Raises Conflict unless the same recipe and lock made the release: they result in the same files, so publishing
    them again is a retry."""
    query = select(Composition).join(ReleaseInput, ReleaseInput.composition_id == Composition.id)
    made_by = session.scalars(query.where(ReleaseInput.release_id == occupant.id).limit(1)).first()
    if made_by is None or made_by.recipe != recipe.to_json() or not _same_result(made_by.lock, recipe, lock):
        raise Conflict(
            "version_exists",
            f"{full_name(occupant)} was not composed by this recipe from these inputs; a release never changes.",
            subject=full_name(occupant),
            next_step="Give a new version in the recipe.",
        )


def _same_result(earlier: Mapping[str, Any], recipe: Recipe, lock: Lock) -> bool:
    """Whether the lock has the same result as the earlier one. Before a search has chosen, equal inputs suffice, and
    publishing compares the files."""
    if recipe.optimize:
        return [row["commit"] for row in earlier["inputs"]] == [source.commit for source in lock.inputs]
    return earlier["digest"] == lock.digest


def _refuse_namespace(session: Session, actor: Actor, name: str, signer: str | None, lock: Lock) -> None:
    """Raises if the namespace requires a signature that the workers cannot or will not make, or if the actor cannot
    create it."""
    namespace = session.get(Namespace, name)
    if namespace is None:
        permit(actor, Role.ADMIN, EVERYWHERE, hidden=unknown_namespace(name))
    elif namespace.require_signature and signer not in {fingerprint(key) for key in namespace.signing_keys}:
        raise Refused(
            "unsigned",
            f"{name} accepts only releases signed by one of its keys, and the workers have none of these keys.",
            subject=name,
            next_step="Compose into another namespace, pull the result, and push it here with --sign KEY.pem; or give "
            f"the workers a key of {name} (ADAPTORY_SIGNING_KEY).",
        )
    elif namespace.require_signature:
        signatures.refuse_unsigned_inputs(session, name, namespace.signing_keys, inputs_of(session, lock))


def _check_gates(session: Session, recipe: Recipe, lock: Lock) -> None:
    base = session.get_one(Base, lock.base)
    measured = gates.scores(session, base)
    fitted_on = {row.get("suite") for row in lock.calibration}
    for rule in gates.parse_rules(recipe.gates or ()):
        measured_with_it = suites.find(session, rule.suite).kind == "guard" or rule.suite in fitted_on
        _refuse_unmeasured(rule)
        if gates.compared_with(rule) == "served":
            raise Usage(
                "no_channel",
                f"{rule}: a composition has no channel.",
                subject=str(rule),
            )
        if rule.suite not in locking.evaluated(recipe, lock):
            raise Usage(
                "not_evaluated",
                f"{rule}: the recipe does not evaluate {rule.suite}.",
                subject=str(rule),
                next_step=f"Add {rule.suite} to `evaluate`.",
            )
        gates.refuse_keeping_losses(session, rule)
        if gates.compared_with(rule) == "base" and (rule.suite, rule.metric) not in measured and not measured_with_it:
            raise Refused(
                "base_not_evaluated",
                f"{rule}: the base {base.name} has no {rule.metric} on the current {rule.suite}, so this cannot pass.",
                subject=str(rule),
                next_step=f"Run `adaptory eval {base.name} --suite {rule.suite}`, and compose again.",
            )


def _refuse_unmeasured(rule: gates.Rule) -> None:
    if rule.metric in metrics.HIGHER_IS_BETTER:
        return
    measured = " and ".join(metrics.HIGHER_IS_BETTER)
    raise NotFound(
        "metric_unknown",
        f"{rule}: a composition measures {measured}, not {rule.metric}.",
        subject=str(rule),
        next_step=nearest(
            rule.metric, metrics.HIGHER_IS_BETTER, f"Record {rule.metric} afterwards, and set the rule on the channel."
        ),
    )


def result_rows(releases_made: Sequence[Release]) -> list[dict[str, Any]]:
    """The published releases, for the composition's document."""
    return [
        {
            "repository": full_name(release).rpartition(":")[0],
            "version": release.version,
            "commit": release.revision.commit,
        }
        for release in releases_made
    ]


# The needs of compositions' jobs, and of jobs that an older version queued.


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
