"""Recipe -> lock -> durable steps; what they found, and lineage."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.recipe import Lock, LockedInput, Recipe
from composer.settings import parse_settings
from registry import audit, bases, gates, jobs, releases, repositories, resolve, suites
from registry.audit import Act, Actor
from registry.errors import Invalid, NotFound, Refused, Usage
from registry.gates import Within
from registry.models import Base, Composition, Job, Release
from registry.names import parse_reference
from registry.releases import full_name
from registry.repositories import Kind

STEPS = ("check", "combine", "evaluate", "gate", "merge", "publish")
"""resolving and locking happen with the request, so that a recipe that cannot work is refused at once."""


def create(session: Session, actor: Actor, recipe: Recipe, *, plan_only: bool) -> Composition:
    """Resolves and locks the recipe and enqueues its steps; a plan has only the check, and changes no repository."""
    lock = _lock(session, recipe)
    _check_outputs(session, recipe, plan_only=plan_only)
    _check_gates(recipe)
    for name in _suite_names(recipe):
        suites.find(session, name)
    wanted = STEPS[:1] if plan_only else STEPS
    job = jobs.enqueue(session, actor, "composition", wanted, owner(recipe))
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
            f"composition/{composition.id}",
            namespace=job.namespace,
            after={"lock": lock.digest},
        )
    return composition


def owner(recipe: Recipe) -> str:
    """The namespace that a composition belongs to: its output's, or for a plan without one its first input's."""
    reference = recipe.adapter or recipe.model or recipe.inputs[0].adapter
    return parse_reference(reference).repository.namespace


def find(session: Session, composition_id: int) -> tuple[Composition, Job]:
    composition = session.get(Composition, composition_id)
    if composition is None:
        raise unknown(composition_id)
    return composition, jobs.find(session, composition.job_id)


def unknown(composition_id: int) -> NotFound:
    return NotFound(
        "composition_unknown",
        f"There is no composition {composition_id}.",
        subject=str(composition_id),
        next_step="Create one with `adaptory compose RECIPE`.",
    )


def of_job(session: Session, job_id: int) -> Composition:
    """Raises NotFound for a job that there is not; every job is a composition's so far."""
    job = jobs.find(session, job_id)
    return session.scalars(select(Composition).where(Composition.job_id == job.id)).one()


def cancel(session: Session, actor: Actor, composition_id: int) -> tuple[Composition, Job]:
    composition, job = find(session, composition_id)
    jobs.request_cancel(session, job.id, actor.at)
    audit.record(session, actor, Act.COMPOSITION_CANCEL, f"composition/{composition.id}", namespace=job.namespace)
    return composition, job


def inputs_of(session: Session, lock: Lock) -> list[Release]:
    """The releases that a lock names, in its order; they cannot have changed, but they may have been yanked since."""
    found: list[Release] = []
    for locked in lock.inputs:
        release = resolve.resolve(
            session, parse_reference(f"{locked.repository}:{locked.version}"), Kind.ADAPTER
        ).release
        if release.revision.commit != locked.commit:
            raise Invalid(
                "lock_broken",
                f"{full_name(release)} is not the commit {locked.commit[:12]} that the lock names.",
                subject=full_name(release),
            )
        found.append(release)
    return found


def member_suites(session: Session, recipe: Recipe, inputs: Sequence[Release]) -> list[str | None]:
    """For each input the suite that stands for it: named in the recipe, or the target suite it gained most on."""
    return [source.suite or own_suite(session, release) for source, release in zip(recipe.inputs, inputs, strict=True)]


def own_suite(session: Session, release: Release) -> str | None:
    """The target suite that the release gained most on over its base, in nats per token."""
    base = gates.scores(session, release.base)
    gains: list[tuple[float, str]] = []
    for score in suites.scores_of(session, release):
        before = base.get((score.suite.name, score.metric))
        if score.metric == "nll" and score.suite.kind == "target":
            gains.append((before.value - score.value if before else 0.0, score.suite.name))
    return max(gains)[1] if gains else None


def _lock(session: Session, recipe: Recipe) -> Lock:
    found = [
        resolve.resolve(session, parse_reference(source.adapter), Kind.ADAPTER).release for source in recipe.inputs
    ]
    base: Base = bases.find(session, recipe.base) if recipe.base else found[0].base
    for release in found:
        if release.base_digest != base.digest:
            raise Refused(
                "base_differs",
                f"{full_name(release)} was made for the base {release.base.name}, not for {base.name}.",
                subject=full_name(release),
                next_step="Compose adapters of one base.",
            )
        if release.yanked:
            raise Refused(
                "release_yanked",
                f"{full_name(release)} is yanked: {release.yank_reason}.",
                subject=full_name(release),
                next_step="Choose another version.",
            )
    locked = tuple(
        LockedInput(
            repository=full_name(release).rpartition(":")[0],
            version=release.version,
            commit=release.revision.commit,
            weight=source.weight,
            files={file.path: file.sha256 for file in releases.files_of(session, release)[release.revision_id]},
        )
        for source, release in zip(recipe.inputs, found, strict=True)
    )
    return Lock(base.digest, recipe.method, parse_settings(recipe.method, recipe.settings), recipe.dtype, locked)


def _check_outputs(session: Session, recipe: Recipe, *, plan_only: bool) -> None:
    """What can be known now must not fail after an hour of merging."""
    outputs = [(text, kind) for text, kind in ((recipe.adapter, Kind.ADAPTER), (recipe.model, Kind.MODEL)) if text]
    if not plan_only and not outputs:
        raise Usage(
            "no_output",
            "The recipe names neither an adapter nor a model to publish.",
            next_step="Add `adapter: NAMESPACE/NAME:VERSION`, or use --plan.",
        )
    named = [(parse_reference(text), kind) for text, kind in outputs]
    for reference, kind in named:
        if reference.version is None:
            raise Usage(
                "bad_output",
                f"{reference} is not NAMESPACE/NAME:VERSION.",
                subject=str(reference),
                next_step="Give the version that is to be published.",
            )
        repositories.refuse_other_kind(session, reference.repository, kind)
    if len({reference.repository for reference, _ in named}) < len(named):
        raise Usage(
            "one_repository", "Adapter and model need two repositories.", next_step="Give one of them another name."
        )


def _check_gates(recipe: Recipe) -> None:
    for rule in gates.parse_rules(recipe.gates):
        if isinstance(rule, Within) and rule.other == "served":
            raise Usage(
                "no_channel",
                f"{rule}: a composition has no channel.",
                subject=str(rule),
                next_step="Compare with the base; the channel's own gate judges the promotion.",
            )
        if rule.suite not in recipe.evaluate:
            raise Usage(
                "not_evaluated",
                f"{rule}: the recipe does not evaluate {rule.suite}.",
                subject=str(rule),
                next_step=f"Add {rule.suite} to `evaluate`.",
            )


def _suite_names(recipe: Recipe) -> list[str]:
    return [*recipe.evaluate, *(source.suite for source in recipe.inputs if source.suite)]


def result_rows(releases_made: Sequence[Release]) -> list[dict[str, Any]]:
    return [
        {
            "repository": full_name(release).rpartition(":")[0],
            "version": release.version,
            "commit": release.revision.commit,
        }
        for release in releases_made
    ]
