"""Compositions: recipe -> lock -> durable steps, their results and lineage."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.formats.recipes.calibration_sets import CalibrationSet
from composer.formats.recipes.methods import AnySettings, Regmean, parse_settings
from composer.formats.recipes.recipe import Lock, LockedInput, Recipe, parse_recipe
from composer.formats.recipes.suite import Suite as SuiteContent
from registry.database.tables import Base, Composition, Job, Namespace, Release, ReleaseInput
from registry.domain.access import audit, namespaces, tokens
from registry.domain.access.audit import Act, Actor, EventQuery
from registry.domain.access.roles import EVERYWHERE, Role, granted, may, may_read, permit, unknown_namespace
from registry.domain.catalog import bases, metrics, releases, repositories, suites, versioning
from registry.domain.catalog.releases import full_name
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import gates, resolve
from registry.domain.jobs import queue
from registry.errors import Conflict, Invalid, NotAllowed, NotFound, Refused, Usage
from registry.formats.references import RepositoryName, Version, nearest, parse_reference
from registry.formats.signatures import fingerprint

STEPS = ("check", "combine", "evaluate", "gate", "merge", "publish")
"""Resolving and locking happen with the request, so that a recipe that cannot work is refused immediately."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A release that a recipe publishes."""

    repository: RepositoryName
    version: Version
    kind: Kind


def create(
    session: Session, actor: Actor, recipe: Recipe, *, plan_only: bool, signer: str | None = None
) -> Composition:
    """Resolves and locks the recipe and enqueues its steps; a plan has only the check, and publishes nothing.

    `signer` is the fingerprint of the workers' signing key, None without one.
    """
    releases.refuse_long_notes(recipe.notes, owner(recipe))
    lock = _lock(session, recipe)
    for target in _targets(recipe, plan_only=plan_only):
        _check_target(session, recipe, lock, target)
        _refuse_namespace(session, actor, target.repository.namespace, signer)
    for name in _suite_names(recipe):
        suites.find(session, name)
    _check_gates(session, recipe, lock)
    wanted = STEPS[:1] if plan_only else STEPS
    job = queue.enqueue(session, actor, "composition", wanted, owner(recipe))
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
    reference = recipe.adapter or recipe.model or recipe.inputs[0].adapter
    return parse_reference(reference).repository.namespace


def subject(composition: Composition) -> str:
    return f"composition/{composition.id}"


def roles_needed(recipe: Recipe) -> list[tuple[Role, str]]:
    """The roles that a composition needs, by namespace: reader for inputs, publisher for outputs and the owner."""
    inputs = [(Role.READER, source.adapter) for source in recipe.inputs]
    outputs = [(Role.PUBLISHER, output) for output in (recipe.adapter, recipe.model) if output]
    named = [(role, parse_reference(text).repository.namespace) for role, text in (*inputs, *outputs)]
    return [*named, (Role.PUBLISHER, owner(recipe))]


def creator(session: Session, composition: Composition, now: datetime) -> Actor:
    """The composition's creator, with the current grants of the token used then. Raises NotAllowed if they no longer
    suffice.

    The audit row names the token; without one, it was the registry's single user, who may do everything.
    """
    asked_for = EventQuery(None, subject=subject(composition), act=Act.COMPOSITION_CREATE)
    (asked,) = audit.list_oldest_first(session, asked_for, limit=1)
    grants = tokens.grants_of(session, asked.token_id) if asked.token_id else {EVERYWHERE: Role.ADMIN.value}
    actor = Actor(asked.actor, now, grants, namespaces.public_names(session), asked.token_id, asked.source)
    for role, namespace in roles_needed(parse_recipe(composition.recipe)):
        if not may(actor, role, namespace):
            raise NotAllowed(
                "role_lost",
                f"{actor.name}, who created this composition, is no longer a {role} in {namespace}.",
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


def unknown(composition_id: int) -> NotFound:
    """The error for a composition that does not exist or that the actor may not see."""
    return NotFound(
        "composition_unknown",
        f"There is no composition {composition_id}.",
        subject=str(composition_id),
        next_step="Create one with `adaptory compose RECIPE`.",
    )


def find_by_job(session: Session, job_id: int) -> Composition:
    """The composition of a job; so far every job has one. Raises NotFound for an unknown job."""
    job = queue.find(session, job_id)
    return session.scalars(select(Composition).where(Composition.job_id == job.id)).one()


def permit_look(actor: Actor, composition: Composition, job: Job, hidden: NotFound) -> None:
    """Raises unless the actor may see the composition and its job: both reveal names and scores of the inputs, which
    the actor must be allowed to read."""
    permit(actor, Role.PUBLISHER, job.namespace or EVERYWHERE, hidden=hidden)
    for namespace in _read(composition.lock):
        permit(actor, Role.READER, namespace, hidden=hidden)


def list_jobs(session: Session, actor: Actor, *, before: int, limit: int) -> list[Job]:
    """Jobs, newest first, of the compositions that `permit_look` allows the actor to see."""
    jobs: list[Job] = []
    while len(jobs) < limit:
        rows = queue.list_page(session, granted(actor, Role.PUBLISHER), before=before, limit=limit)
        locks = select(Composition.job_id, Composition.lock).where(Composition.job_id.in_([job.id for job in rows]))
        seen = {job for job, lock in session.execute(locks) if all(may_read(actor, name) for name in _read(lock))}
        jobs += [job for job in rows if job.id in seen]
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
        release = resolve.resolve(
            session, parse_reference(f"{locked.repository}:{locked.version}"), Kind.ADAPTER
        ).release
        if release.revision.commit != locked.commit:
            raise Invalid(
                "lock_broken",
                f"{full_name(release)} is not the commit {locked.commit[:12]} that the lock names.",
                subject=full_name(release),
                next_step="Ask the registry's operators to run `adaptory fsck`.",
            )
        releases_used.append(release)
    return releases_used


def member_suites(session: Session, recipe: Recipe, inputs: Sequence[Release]) -> list[str | None]:
    """Each input's suite: named in the recipe, or the target suite on which it gained most."""
    return [
        source.suite or best_target_suite(session, release)
        for source, release in zip(recipe.inputs, inputs, strict=True)
    ]


def best_target_suite(session: Session, release: Release) -> str | None:
    """The target suite on which the release gained most over its base, in nats per token."""
    base = gates.scores(session, release.base)
    gains: list[tuple[float, str]] = []
    for score in suites.scores_of(session, release):
        before = base.get((score.suite.name, score.metric))
        if score.metric == "nll" and score.suite.kind == "target":
            gains.append((before.value - score.value if before else 0.0, score.suite.name))
    return max(gains)[1] if gains else None


def _lock(session: Session, recipe: Recipe) -> Lock:
    inputs = [
        resolve.resolve(session, parse_reference(source.adapter), Kind.ADAPTER).release for source in recipe.inputs
    ]
    _refuse_duplicates(inputs)
    base: Base = bases.find(session, recipe.base) if recipe.base else inputs[0].base
    for release in inputs:
        if release.base_digest != base.digest:
            raise Conflict(
                "base_differs",
                f"{full_name(release)} was trained on the base {release.base.name}, not on {base.name}.",
                subject=full_name(release),
                next_step="Compose adapters of the same base.",
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
            rules=source.rules,
        )
        for source, release in zip(recipe.inputs, inputs, strict=True)
    )
    settings = parse_settings(recipe.method, recipe.settings)
    own = member_suites(session, recipe, inputs)
    return Lock(
        base=base.digest,
        method=recipe.method,
        settings=settings.to_json(),
        dtype=recipe.dtype,
        inputs=locked,
        rounding=recipe.rounding,
        calibration=_calibration(session, recipe, settings, own),
        gates=_gates_to_add(recipe, own),
        method_version=settings.pipeline.version,
    )


def evaluated(recipe: Recipe, lock: Lock) -> list[str]:
    """The suites that the candidate is measured on: the recipe's, and those that the lock's gates use."""
    added = [rule.suite for rule in gates.parse_rules(lock.gates)]
    return list(dict.fromkeys([*recipe.evaluate, *added]))


def gates_against_inputs(own: Sequence[str | None]) -> list[str]:
    """Gate rules that compare the candidate with each member on the member's own suite."""
    names = list(dict.fromkeys(name for name in own if name))
    return [
        rule for name in names for rule in (f"{name}.accuracy keeps 0.9 of inputs", f"{name}.nll within 0.1 of inputs")
    ]


def _gates_to_add(recipe: Recipe, own: Sequence[str | None]) -> tuple[str, ...]:
    """The gates against the inputs to add; none if the recipe has `gates: []` or has such a gate itself. Inputs of zero
    or negative weight need not be kept."""
    rules = gates.parse_rules(recipe.gates or ())
    if recipe.gates == () or any(gates.compared_with(rule) == "inputs" for rule in rules):
        return ()
    kept = [name for source, name in zip(recipe.inputs, own, strict=True) if source.weight > 0]
    return tuple(gates_against_inputs(kept))


def _calibration(
    session: Session, recipe: Recipe, settings: AnySettings, own: Sequence[str | None]
) -> tuple[dict[str, object], ...]:
    """The examples that a fitted method uses: each input's prompts, or the first examples of its suite. Raises Refused
    if there are none, or none would be left for evaluation."""
    if not isinstance(settings, Regmean):
        return ()
    if recipe.model and not recipe.adapter:
        raise Usage(
            "no_adapter",
            f"{recipe.method} fits new factors, but the recipe publishes only a model.",
            next_step="Add `adapter: NAMESPACE/NAME:VERSION`: the model is made from it.",
        )
    sets: list[CalibrationSet] = []
    for source, name in zip(recipe.inputs, own, strict=True):
        if source.prompts:
            sets.append(CalibrationSet(prompts=source.prompts))
            continue
        if name is None:
            raise Usage(
                "needs_examples",
                f"{recipe.method} is fitted on examples, but {source.adapter} has no score on a target suite.",
                subject=source.adapter,
                next_step=f"Run `adaptory eval {source.adapter} --suite SUITE`, or give it a suite or prompts.",
            )
        suite, count = suites.find(session, name), settings.examples
        if suite.examples <= count:
            raise Refused(
                "suite_too_small",
                f"{name} has {suite.examples} examples: fitting {recipe.method} on {count} leaves none to evaluate on.",
                subject=name,
                next_step="Add examples to the suite, or set fewer (settings: {examples: N}).",
            )
        sets.append(CalibrationSet(SuiteContent.from_json(suite.content), count))
    return tuple(one.to_json() for one in sets)


def _refuse_duplicates(inputs: Sequence[Release]) -> None:
    """Raises Usage for an input named twice: lineage stores one weight per release."""
    counts = Counter(map(full_name, inputs))
    for name, count in counts.items():
        if count > 1:
            raise Usage(
                "input_twice",
                f"{name} is named {count} times among the recipe's inputs.",
                subject=name,
                next_step="Name it once, with the sum of the weights.",
            )


def _targets(recipe: Recipe, *, plan_only: bool) -> list[_Target]:
    """The outputs to publish, each with its version and in its own repository."""
    outputs = [(text, kind) for text, kind in ((recipe.adapter, Kind.ADAPTER), (recipe.model, Kind.MODEL)) if text]
    if not plan_only and not outputs:
        raise Usage(
            "no_output",
            "The recipe names neither an adapter nor a model to publish.",
            next_step="Add `adapter: NAMESPACE/NAME:VERSION`, or use --plan.",
        )
    targets: list[_Target] = []
    for text, kind in outputs:
        reference = parse_reference(text)
        if reference.version is None:
            raise Usage(
                "bad_output",
                f"{reference} is not NAMESPACE/NAME:VERSION.",
                subject=str(reference),
                next_step="Give the version to publish.",
            )
        targets.append(_Target(reference.repository, reference.version, kind))
    if len({target.repository for target in targets}) < len(targets):
        raise Usage("one_repository", "Adapter and model need separate repositories.", next_step="Rename one of them.")
    return targets


def _check_target(session: Session, recipe: Recipe, lock: Lock, target: _Target) -> None:
    """Checks a target early, so that it does not fail after an hour of merging; publishing checks it again."""
    repository = repositories.find_if_any(session, target.repository, target.kind)
    if repository is not None:
        query = select(Release).where(Release.repository_id == repository.id, Release.version == str(target.version))
        if (occupant := session.scalar(query)) is not None:
            _refuse_other_content(session, occupant, recipe, lock)
            return
        versioning.refuse_other_base(session, repository, target.version, lock.base)


def _refuse_other_content(session: Session, occupant: Release, recipe: Recipe, lock: Lock) -> None:
    """Raises Conflict unless the same recipe and lock made the release: they give the same files, so publishing those
    again is a retry."""
    query = select(Composition).join(ReleaseInput, ReleaseInput.composition_id == Composition.id)
    made_by = session.scalars(query.where(ReleaseInput.release_id == occupant.id).limit(1)).first()
    if made_by is None or made_by.lock["digest"] != lock.digest or made_by.recipe != recipe.to_json():
        raise Conflict(
            "version_exists",
            f"{full_name(occupant)} was not made by this recipe from these inputs; a release never changes.",
            subject=full_name(occupant),
            next_step="Give a new version in the recipe.",
        )


def _refuse_namespace(session: Session, actor: Actor, name: str, signer: str | None) -> None:
    """Raises if the namespace requires a signature the workers cannot make, or if the actor cannot create it."""
    namespace = session.get(Namespace, name)
    if namespace is None:
        permit(actor, Role.ADMIN, EVERYWHERE, hidden=unknown_namespace(name))
    elif namespace.require_signature and signer not in {fingerprint(key) for key in namespace.signing_keys}:
        raise Refused(
            "unsigned",
            f"{name} accepts only releases signed by one of its keys, and the workers have none of them.",
            subject=name,
            next_step="Compose into another namespace, pull the result, and push it here with --sign KEY.pem; or give "
            f"the workers a key of {name} (ADAPTORY_SIGNING_KEY).",
        )


def _check_gates(session: Session, recipe: Recipe, lock: Lock) -> None:
    base = session.get_one(Base, lock.base)
    measured = gates.scores(session, base)
    for rule in gates.parse_rules(recipe.gates or ()):
        suites.find(session, rule.suite)
        _refuse_unmeasured(rule)
        if gates.compared_with(rule) == "served":
            raise Usage(
                "no_channel",
                f"{rule}: a composition has no channel.",
                subject=str(rule),
                next_step="Compare with the base or the inputs; the channel's own gate checks the promotion.",
            )
        if rule.suite not in evaluated(recipe, lock):
            raise Usage(
                "not_evaluated",
                f"{rule}: the recipe does not evaluate {rule.suite}.",
                subject=str(rule),
                next_step=f"Add {rule.suite} to `evaluate`.",
            )
        gates.refuse_keeping_losses(session, rule)
        if gates.compared_with(rule) == "base" and (rule.suite, rule.metric) not in measured:
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


def _suite_names(recipe: Recipe) -> list[str]:
    return [*recipe.evaluate, *(source.suite for source in recipe.inputs if source.suite)]


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
