"""Searches for the best combination, and shows what was found."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from composer.formats.untrusted import cut
from registry.cli import render

if TYPE_CHECKING:
    from composer.conflicts.examine import Evidence
    from composer.deltas.variants.load import LoadedAdapter
    from composer.formats.recipes.methods import AnySettings
    from composer.formats.recipes.policy import Policy
    from composer.formats.recipes.weights import Weight

Json = Mapping[str, Any]


def run(
    evidence: "Evidence",
    weighted: "Sequence[tuple[LoadedAdapter, Weight]]",
    method: "AnySettings",
    policy: "Policy",
    *,
    content: str,
    json: bool,
) -> None:
    """Searches, with the given method among the candidates, and shows the report. Exits 1 if nothing fits.

    `content` names the contents of the base and the adapters: a search of the same resumes where one was interrupted.
    """
    from composer.optimize.candidates import Candidate
    from composer.optimize.optimize import expected_passes, optimize
    from composer.optimize.problem import Member, Problem
    from composer.optimize.report import document
    from registry.sdk.connection import load_settings
    from registry.transfer.collect import evaluation_journal

    stated = method.model_dump(by_alias=True, exclude_unset=True)
    own = Candidate(
        name="as given", family="given", method=method.method, factors=(1.0,) * len(weighted), settings=stated
    )
    members = [
        Member(adapter=adapter, suite=suite, weight=weight)
        for (adapter, weight), suite in zip(weighted, evidence.suites, strict=True)
        if suite is not None
    ]
    problem = Problem(load=evidence.load, members=members, guards=evidence.guards, settings=own.settings)
    problem = problem.under(policy)
    journal = evaluation_journal(load_settings(), f"search {content} {problem.name}")
    with render.progress("optimize", expected_passes(problem, [own]), "examples") as bar:
        report = document(optimize(problem, [own], journal, bar))
    render.document(report, json, lambda: show(report))
    if report["choice"] is None:
        raise typer.Exit(1)


def show(report: Json) -> None:
    """The answer, the best combinations on unseen examples, and how many were tried."""
    render.heading(f"optimize: {report['headline']}")
    for best in report["best"]:
        render.out(f"{best['name']}: {best['verdict']} on {best['examples']} unseen examples a suite")
        for member in best["members"]:
            render.out(_line(member["member"], _answers(member), f"{member['kept_share']:.0%}", _loss(member)))
        for guard in best["guards"]:
            render.out(_line(guard["suite"], "guard", "", _spread(guard["rise"], guard["rise_interval"])))
    if report["tried"]:
        render.out("Columns: exact match retained, gain kept, loss (a guard's rise) in nats a token.")
        seconds = report["seconds"]
        took = f"in {seconds['search']:.0f} s, the best confirmed in {seconds['confirm']:.0f} s"
        render.out(f"{len(report['tried'])} combinations tried {took}; seed {report['seed']}")
        if before := report["passes"] - report["run"]:
            render.out(f"resumed: {before} of {report['passes']} examples were measured by an earlier run.")
    if report["choice"] is None:
        render.out("fix: Serve them separately, and route each request to its adapter.")


def _line(name: str, answers: str, kept: str, loss: str) -> str:
    return f"  {cut(name, 30):<30}  {answers:<10}  {kept:>4}  {loss}"


def _answers(member: Json) -> str:
    return f"{member['still_answered']} of {member['answered']}" if member["answered"] else "none alone"


def _loss(member: Json) -> str:
    return _spread(member["loss"], member["loss_interval"])


def _spread(value: float, sure: Json | None) -> str:
    return f"{value:+.2f} ({sure['low']:+.2f} to {sure['high']:+.2f})" if sure else f"{value:+.2f}"
