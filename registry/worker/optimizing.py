"""The step that searches for method, settings and weights, and writes its choice into the lock."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from composer.formats.recipes.policy import read_policy
from composer.formats.recipes.recipe import Optimize
from composer.formats.recipes.suite import Suite
from registry.domain.compositions import locking
from registry.domain.compositions.locking import Choice
from registry.errors import Refused
from registry.worker.composition import CompositionRun, ProgressCount, composition_of, store, suites_named
from registry.worker.runner import JobRun

_JOURNAL = "search.jsonl"


def optimize(held: JobRun) -> None:
    """Searches, and locks the choice with its evidence. What was measured before a crash is not measured again.

    Raises Refused if no combination stays within the limits.
    """
    work = composition_of(held)
    if work.lock.optimized is None:
        _lock_choice(held, work)
        work = composition_of(held)
    if work.lock.optimized and work.lock.optimized["choice"] is None:
        raise Refused(
            "nothing_fits",
            f"{work.lock.optimized['headline']}.",
            subject="optimize",
            next_step="Serve the adapters separately, and route each request to its own.",
        )


def _lock_choice(held: JobRun, work: CompositionRun) -> None:
    from composer.conflicts.evidence.outcome import Limits
    from composer.deltas.variants.load import load_deltas
    from composer.evaluation.model import load_model
    from composer.optimize.candidates import Candidate
    from composer.optimize.optimize import Effort, Member, Problem, expected_passes, optimize
    from composer.optimize.report import document

    suites = _by_name(held, [name for name in work.member_suites if name])
    members = [
        Member(
            adapter=replace(load_deltas(directory, work.architecture), name=f"{locked.repository}:{locked.version}"),
            suite=suites[name],
            weight=weight,
        )
        for (directory, weight), locked, name in zip(
            work.members(held), work.lock.inputs, work.member_suites, strict=True
        )
        if name
    ]
    problem = Problem(
        load=cache(lambda: load_model(work.base_checkpoint(held).path)),
        members=members,
        guards=[suite for suite in _by_name(held, work.recipe.evaluate).values() if suite.kind == "guard"],
        limits=Limits.of(read_policy(work.recipe.policy)),
        effort=Effort.of(work.recipe.optimize or Optimize.model_validate({})),
    )
    own = Candidate(
        name="the recipe's",
        family="given",
        method=work.recipe.method,
        factors=(1.0,) * len(members),
        settings=work.recipe.settings,
    )
    done = ProgressCount(held, "examples", expected_passes(problem))
    report = optimize(problem, [own], work.directory / _JOURNAL, done)
    choice, evidence = report.choice, document(report)
    if choice is None:
        lock = replace(work.lock, optimized=evidence)
    else:
        chosen = Choice(method=choice.method, settings=choice.settings, factors=choice.factors, evidence=evidence)
        with held.resources.read() as session:
            lock = locking.with_choice(session, work.recipe, work.lock, chosen)
    store(held, work, lock=lock.to_json())


def _by_name(held: JobRun, names: Sequence[str]) -> dict[str, Suite]:
    return {suite.name: suite for suite in suites_named(held, list(dict.fromkeys(names)))}
