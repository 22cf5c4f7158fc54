"""The step that searches for a method, settings and weights, and writes its choice into the lock."""

from dataclasses import replace
from typing import NoReturn

from composer.formats.recipes.lock import Lock
from composer.formats.recipes.policy import read_policy
from composer.formats.recipes.recipe import Optimize
from registry.domain.compositions import compositions, locking
from registry.domain.compositions.locking import SearchChoice
from registry.errors import Refused
from registry.transfer.collect import evaluation_journal
from registry.worker.composition import CompositionRun, ProgressCount, composition_of, suites_named
from registry.worker.pass_units import search_passes
from registry.worker.runner import JobRun


def optimize(held: JobRun) -> None:
    """Runs the search and locks its choice with the evidence. Measurements made before a crash are reused.

    Raises Refused if no combination stays within the limits.
    """
    work = composition_of(held)
    if work.lock.optimized is None and work.recipe.optimize is not None:
        lock = _searched(held, work, work.recipe.optimize)
        with held.resources.write() as session:
            compositions.lock_choice(session, work.composition_id, lock, held.resources.clock())
        work = composition_of(held)
    if work.lock.optimized and work.lock.optimized["choice"] is None:
        offered = " ".join(work.lock.optimized.get("offers", []))  # a lock of an earlier version has none
        raise Refused(
            "nothing_fits", f"{work.lock.optimized['headline']}.", subject="optimize", next_step=offered or None
        )


def _searched(held: JobRun, work: CompositionRun, asked: Optimize) -> Lock:
    """Runs the search. Returns the lock with its choice and evidence, or with the evidence alone if nothing was
    chosen."""
    from composer.optimize.candidates import Candidate
    from composer.optimize.optimize import expected_passes, optimize
    from composer.optimize.problem import SearchEffort, SearchMember, SearchProblem

    suites = suites_named(held, [name or "" for name in work.member_suites])
    guards = [suite for suite in suites_named(held, work.recipe.evaluate) if suite.kind == "guard"]
    members = [
        SearchMember(adapter=name, suite=suite, weight=locked.weighted, phrase=source.phrase or "")
        for name, locked, suite, source in zip(work.names, work.lock.inputs, suites, work.recipe.inputs, strict=True)
    ]
    problem = SearchProblem(
        load=_no_base,
        members=members,
        guards=guards,
        effort=SearchEffort.of(asked),
        as_adapter=True,
        settings=work.recipe.settings,
        may_be_set=work.recipe.adapter_set is not None,
    ).under(read_policy(work.recipe.policy))
    own = Candidate(
        name="the recipe's",
        family="given",
        method=work.recipe.method,
        factors=(1.0,) * len(members),
        settings=work.recipe.settings,
    )
    done = ProgressCount(held, "examples", expected_passes(problem, [own]))
    content = f"search {work.lock.base} {[locked.commit for locked in work.lock.inputs]} {problem.name}"
    journal = evaluation_journal(held.resources.settings, content)
    report = optimize(problem, [own], journal, done, search_passes(held, work, problem, done))
    choice, lock, evidence = report.choice, work.lock, report.to_json()
    if choice is None:
        return replace(lock, optimized=evidence)
    if choice.is_set:
        router = [problem.splits[suite.digest].to_json() for suite in (*suites, *problem.other_guards)]
        return locking.with_set(lock, router, evidence)
    if report.accepted:
        lock = replace(lock, gates=locking.gates_to_add(work.recipe, work.member_suites, asked.accept))
    fitted_on = (*suites, *problem.other_guards) if choice.is_fitted else ()
    phrases = dict(zip((suite.digest for suite in suites), choice.phrases, strict=bool(choice.phrases)))
    return locking.with_choice(
        lock,
        SearchChoice(
            method=choice.method,
            settings=choice.settings,
            factors=choice.factors,
            calibration=[
                replace(problem.splits[suite.digest].searched, phrase=phrases.get(suite.digest, "")).to_json()
                for suite in fitted_on
            ],
            evidence=evidence,
        ),
    )


def _no_base() -> NoReturn:
    raise AssertionError("a search loads no base: its passes do")
