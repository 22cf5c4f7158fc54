"""Locks: a recipe's inputs, method, calibration examples and gates, resolved."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from composer.formats.recipes.lock import CalibrationDocument, Lock, LockedInput, SearchDocument
from composer.formats.recipes.methods import AnySettings, Regmean, parse_settings
from composer.formats.recipes.phrases import fit_without_phrase
from composer.formats.recipes.recipe import Recipe, accepted_share
from composer.formats.recipes.suite import CalibrationSet, Suite, guard_sets
from registry.database.tables import Base, Release
from registry.domain.catalog import bases, releases, suites
from registry.domain.catalog.releases import full_name
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import resolve
from registry.domain.channels.policy import gates
from registry.errors import Conflict, Refused, Usage
from registry.formats.references import parse_reference

ROUTER_EXAMPLES = 32
"""The most examples of each suite to fit a router on, and at most half of the suite."""


def lock_of(session: Session, recipe: Recipe) -> Lock:
    """The recipe with every input resolved. With `optimize`, method and weights are only a first choice.

    Raises Usage, Conflict or Refused for inputs that cannot be combined, and for a method without examples.
    """
    base, inputs = resolve_inputs(session, recipe)
    plain = lock_inputs(session, recipe, base, inputs)
    own = member_suites(session, recipe, inputs)
    if recipe.optimize:
        _refuse_unsearchable(recipe, own)
    _refuse_shared_suite(recipe, own)
    _refuse_several_tasks(session, recipe, inputs)
    _refuse_phrased_inputs(recipe, inputs, own)
    return replace(
        plain,
        dtype=recipe.dtype,
        rounding=recipe.rounding,
        calibration=()
        if recipe.optimize
        else _calibration(session, recipe, parse_settings(recipe.method, recipe.settings), own),
        gates=gates_to_add(recipe, own),
        is_set=recipe.makes_only_a_set,
    )


def resolve_inputs(session: Session, recipe: Recipe) -> tuple[Base, list[Release]]:
    """The base and the releases that the recipe combines. Raises Usage, Conflict or Refused for those that cannot be
    combined."""
    inputs = [resolve.resolve(session, parse_reference(source.adapter), Kind.ADAPTER) for source in recipe.inputs]
    for name, count in Counter(map(full_name, inputs)).items():  # lineage stores one weight per release
        if count > 1:
            raise Usage("input_twice", f"{name} is named {count} times among the recipe's inputs.", subject=name)
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
                "release_yanked", f"{full_name(release)} is yanked: {release.yank_reason}.", subject=full_name(release)
            )
    return base, inputs


def lock_inputs(session: Session, recipe: Recipe, base: Base, inputs: Sequence[Release]) -> Lock:
    """The facts that determine a combination in memory: its inputs with weights, its method and the method's
    settings."""
    settings = parse_settings(recipe.method, recipe.settings)
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
    return Lock(
        base=base.digest,
        method=recipe.method,
        settings=settings.to_json(),
        dtype=None,
        inputs=locked,
        method_version=settings.version,
    )


def _refuse_unsearchable(recipe: Recipe, own: Sequence[str | None]) -> None:
    """Raises Usage for a search with fewer than two inputs, with a model or a set but no adapter to publish, or for an
    input without a suite, by which it would be judged."""
    if len(recipe.inputs) < 2:
        message, step = "A search needs at least two inputs.", "Add an input, or leave out optimize."
        raise Usage("too_few", message, subject="optimize", next_step=step)
    if recipe.outputs and not recipe.adapter:
        message = "A search looks for one adapter, from which a model is made, and for which a set stands in."
        raise Usage("no_adapter", message, subject="optimize", next_step="Add `adapter: NAMESPACE/NAME:VERSION`.")
    for source, name in zip(recipe.inputs, own, strict=True):
        if source.weight <= 0:
            message = f"{source.adapter} has the weight {source.weight:g}: a search preserves the effect of each input."
            raise Usage("bad_weight", message, subject=source.adapter, next_step="Give it a positive weight.")
        if name is None:
            raise _without_suite(source.adapter, "A search is judged by each input's suite", "a suite")


def _refuse_shared_suite(recipe: Recipe, own: Sequence[str | None]) -> None:
    """Raises Usage if two inputs with phrases have one suite: a release names its phrases by suite."""
    for source, name in zip(recipe.inputs, own, strict=True):
        if source.phrase and name and own.count(name) > 1:
            message = f"{source.adapter} has a phrase, and another input has the same suite, {name}."
            raise Usage("phrase_suite", message, subject=source.adapter)


def _refuse_several_tasks(session: Session, recipe: Recipe, inputs: Sequence[Release]) -> None:
    """Raises Usage for one adapter that is fitted anew without a stated suite, if it has scores on several target
    suites: the fit would keep the answers on one of them. Of two tasks, one kept 24 of 24 and the other 1 of 32."""
    if len(inputs) > 1 or recipe.method != "regmean" or recipe.inputs[0].suite or recipe.inputs[0].prompts:
        return
    names = sorted(_target_scores(session, inputs[0]))
    if len(names) > 1:
        adapter = recipe.inputs[0].adapter
        message = f"{adapter} has scores on {', '.join(names)}, and the fit keeps its answers on one suite."
        raise Usage("several_tasks", message, subject=adapter)


def _refuse_phrased_inputs(recipe: Recipe, inputs: Sequence[Release], own: Sequence[str | None]) -> None:
    """Raises Usage for an input that answers its suite only after a phrase, if it is fitted or searched."""
    if recipe.method != "regmean" and not recipe.optimize:
        return
    for source, release, name in zip(recipe.inputs, inputs, own, strict=True):
        if name and not source.prompts and (phrase := release.provenance.get("phrases", {}).get(name)):
            message = fit_without_phrase(source.adapter, name, phrase)
            raise Usage("phrased_input", message, subject=source.adapter)


def _without_suite(adapter: str, why: str, missing: str) -> Usage:
    return Usage(
        "needs_examples",
        f"{why}, but {adapter} has no score on a target suite.",
        subject=adapter,
        next_step=f"Run `adaptory eval {adapter} --suite SUITE`, or give it {missing}.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchChoice:
    """The result of a search: `factors` multiply the inputs' weights, `calibration` are the examples that the method is
    fitted on, `evidence` is the search's report."""

    method: str
    settings: Mapping[str, object]
    factors: Sequence[float]
    calibration: Sequence[CalibrationDocument]
    evidence: SearchDocument


def with_choice(lock: Lock, choice: SearchChoice) -> Lock:
    """The lock with the method, settings and weights that a search chose, and its evidence."""
    settings = parse_settings(choice.method, choice.settings)
    weighted = [source.weighted.times(factor) for source, factor in zip(lock.inputs, choice.factors, strict=True)]
    inputs = [
        replace(source, weight=weight.value, rules=weight.rules)
        for source, weight in zip(lock.inputs, weighted, strict=True)
    ]
    return replace(
        lock,
        method=choice.method,
        settings=settings.to_json(),
        inputs=tuple(inputs),
        calibration=tuple(choice.calibration),
        method_version=settings.version,
        optimized=choice.evidence,
    )


def with_set(lock: Lock, calibration: Sequence[CalibrationDocument], evidence: SearchDocument) -> Lock:
    """The lock of a set, which a search chose since no single adapter fits; `calibration` are its router's examples."""
    return replace(lock, is_set=True, calibration=tuple(calibration), optimized=evidence)


def release_of(session: Session, locked: LockedInput) -> Release:
    """The release that a locked input names. Raises NotFound."""
    return resolve.resolve(session, parse_reference(f"{locked.repository}:{locked.version}"), Kind.ADAPTER)


def member_suites(session: Session, recipe: Recipe, inputs: Sequence[Release]) -> list[str | None]:
    """Each input's suite: named in the recipe, or the target suite on which it gained most."""
    return [
        source.suite or best_target_suite(session, release)
        for source, release in zip(recipe.inputs, inputs, strict=True)
    ]


def evaluated(recipe: Recipe, lock: Lock, own: Sequence[str | None] = ()) -> list[str]:
    """The suites that the candidate is measured on: the recipe's, those that the lock's gates use, and with `gates: []`
    the inputs' `own`."""
    added = [rule.suite for rule in gates.parse_rules(lock.gates)]
    unjudged = [suite for suite in own if suite] if recipe.gates is not None and not recipe.gates else []
    return list(dict.fromkeys([*recipe.evaluate, *added, *unjudged]))


def best_target_suite(session: Session, release: Release) -> str | None:
    """The target suite on which the release gained most over its base, in nats per token. If the base lacks a score on
    one of them, gains cannot be compared, and it is the suite on which the release is best."""
    base = gates.scores(session, release.base)
    own = _target_scores(session, release)
    before = {name: base[name, "nll"].value for name in own if (name, "nll") in base}
    compared = before if len(before) == len(own) else {}
    return max(own, key=lambda name: (compared.get(name, 0.0) - own[name], name), default=None)


def _target_scores(session: Session, release: Release) -> dict[str, float]:
    """The release's nats per token, by target suite."""
    return {
        score.suite.name: score.value
        for score in suites.scores_of(session, release)
        if not score.reported and score.suite.task not in suites.ELSEWHERE
        if score.metric == "nll" and score.suite.kind == "target"
    }


def gates_against_inputs(own: Sequence[str | None], accept: str | None = None) -> list[str]:
    """Gate rules that compare the candidate with each member on the member's own suite. An acceptance that a search has
    used replaces the limits: its share of answers is to be left, and the search has measured the share of the gain."""
    names = list(dict.fromkeys(name for name in own if name))
    if accept:
        return [f"{name}.accuracy keeps {accepted_share(accept):g} of inputs" for name in names]
    return [
        rule for name in names for rule in (f"{name}.accuracy keeps 0.9 of inputs", f"{name}.nll within 0.1 of inputs")
    ]


def gates_to_add(recipe: Recipe, own: Sequence[str | None], accept: str | None = None) -> tuple[str, ...]:
    """The gates against the inputs to add; none if the recipe has `gates: []` or has such a gate itself. Inputs of zero
    or negative weight need not be kept. `accept` is the acceptance that a search has used."""
    rules = gates.parse_rules(recipe.gates or ())
    if recipe.gates == () or any(gates.compared_with(rule) == "inputs" for rule in rules):
        return ()
    kept = [name for source, name in zip(recipe.inputs, own, strict=True) if source.weight > 0]
    return tuple(gates_against_inputs(kept, accept))


def _calibration(
    session: Session, recipe: Recipe, settings: AnySettings, own: Sequence[str | None]
) -> tuple[CalibrationDocument, ...]:
    """The examples that a fitted method uses: each input's prompts, or the first examples of its suite, and after them
    those of the guard suites that the recipe evaluates. Raises Refused if an input has none, or if none would be left
    for evaluation."""
    if not recipe.makes_only_a_set and not isinstance(settings, Regmean):
        return ()
    if recipe.model and not recipe.adapter:
        raise Usage(
            "no_adapter",
            f"{recipe.method} fits new factors, but the recipe publishes only a model.",
            next_step="Add `adapter: NAMESPACE/NAME:VERSION`: the model is made from it.",
        )
    what = recipe.method if isinstance(settings, Regmean) else "a router"
    sets: list[CalibrationSet] = []
    for source, name in zip(recipe.inputs, own, strict=True):
        if source.prompts:
            sets.append(CalibrationSet(prompts=source.prompts))
            continue
        if name is None:
            raise _without_suite(source.adapter, f"{what} is fitted on examples", "a suite or prompts")
        suite = suites.find(session, name)
        count = settings.examples if isinstance(settings, Regmean) else min(ROUTER_EXAMPLES, suite.examples // 2)
        if suite.examples <= count:
            raise Refused(
                "suite_too_small",
                f"{name} has {suite.examples} examples: fitting {what} on {count} leaves none to evaluate on.",
                subject=name,
                next_step="Add examples to the suite, or set fewer (settings: {examples: N}).",
            )
        of = CalibrationSet.of_member if isinstance(settings, Regmean) else CalibrationSet
        sets.append(of(Suite.from_json(suite.content), count, phrase=source.phrase or ""))
    named = [suites.find(session, name) for name in recipe.evaluate]
    guards = [Suite.from_json(suite.content) for suite in named if suite.kind == "guard"]
    return tuple(examples.to_json() for examples in (*sets, *guard_sets(guards, most=recipe.guard_examples)))
