"""Searches for the best combination, and shows what was found."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import typer

from composer.formats.recipes.policy import THRESHOLDS
from composer.formats.recipes.suite import guard_cost
from composer.formats.sets.router import SEPARABLE
from composer.formats.untrusted import cut
from registry.cli.console import render
from registry.errors import Usage

if TYPE_CHECKING:
    from composer.conflicts.documents import IntervalDocument
    from composer.deltas.variants.load import LoadedAdapter
    from composer.evaluation.model import LoadedModel
    from composer.formats.recipes.methods import AnySettings
    from composer.formats.recipes.policy import Policy
    from composer.formats.recipes.suite import Suite
    from composer.formats.recipes.weights import Weight
    from composer.optimize.problem import SearchEffort, SearchMember
    from composer.optimize.report import MeasuredMember, OptimizeDocument
    from registry.wire.work import RewordedAnswers


def search(  # noqa: PLR0913
    load: "Callable[[], LoadedModel]",
    members: "Sequence[SearchMember]",
    guards: "Sequence[Suite]",
    method: "AnySettings",
    policy: "Policy",
    *,
    content: str,
    effort: "SearchEffort",
    as_adapter: bool = False,
) -> "OptimizeDocument":
    """Searches, with the given method among the candidates, and returns the report. `as_adapter`: for a combination
    that one adapter can hold.

    `content` names the contents of the base and the adapters: a search of the same resumes where one was interrupted.
    """
    from composer.optimize.candidates import Candidate
    from composer.optimize.optimize import expected_passes, optimize
    from composer.optimize.problem import SearchProblem
    from registry.sdk.connection import load_settings
    from registry.transfer.collect import evaluation_journal

    stated = method.model_dump(by_alias=True, exclude_unset=True)
    own = Candidate(
        name="as given", family="given", method=method.method, factors=(1.0,) * len(members), settings=stated
    )
    problem = SearchProblem(
        load=load, members=members, guards=guards, settings=own.settings, effort=effort, as_adapter=as_adapter
    )
    problem = problem.under(policy)
    journal = evaluation_journal(load_settings(), f"search {content} {problem.name}")
    with render.progress("optimize", expected_passes(problem, [own]), "examples") as bar:
        return optimize(problem, [own], journal, bar).to_json()


def members_of(rows: "Iterable[tuple[LoadedAdapter, Suite | None, Weight]]") -> "list[SearchMember]":
    """The adapters with their suites and weights, which a search combines."""
    from composer.optimize.problem import SearchMember

    return [SearchMember(adapter=adapter, suite=suite, weight=weight) for adapter, suite, weight in rows if suite]


def effort_of(texts: list[str] | None, *, thorough: bool) -> "SearchEffort":
    """Parses `--budget KEY=VALUE`, the keys of `optimize` in a recipe. Raises Usage naming the key."""
    from pydantic import ValidationError

    from composer.formats.recipes.documents import problem_of
    from composer.formats.recipes.recipe import Optimize
    from composer.optimize.problem import SearchEffort

    pairs = [text.partition("=") for text in texts or []]
    try:
        asked = Optimize.model_validate({"thorough": thorough, **{key: _number(value) for key, _, value in pairs}})
    except ValidationError as error:
        problem = problem_of(error)
        names = ", ".join(Optimize.model_fields)
        raise Usage(
            "bad_setting",
            f"--budget: {problem.at('optimize')}: {problem.why}.",
            subject=problem.path,
            next_step=problem.next_step or f"Write KEY=NUMBER with one of {names}.",
        ) from error
    return SearchEffort.of(asked)


def _number(text: str) -> object:
    """Parses a number; returns any other text unchanged, and the check of its key refuses it."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def present(report: "OptimizeDocument", json: bool, *, explain: bool) -> None:
    """Shows the report, with `explain` also what was tried. Exits 1 if nothing fits."""

    def both() -> None:
        show(report)
        if explain:
            _show_tried(report)

    render.document(report, json, both)
    if report["choice"] is None:
        raise typer.Exit(1)


def _show_tried(report: "OptimizeDocument") -> None:
    """A line for each combination that was tried or left out."""
    rows = [
        (
            combination["name"],
            str(combination["k"]),
            "" if combination["worst_kept"] is None else f"{combination['worst_kept']:.0%}",
        )
        for combination in report["tried"]
    ]
    if rows:
        render.table("Tried", ("combination", "examples", "worst member keeps"), rows)
    for name, why in report["left_out"].items():
        render.out(f"left out: {name}: {why}")


def show(report: "OptimizeDocument") -> None:
    """The answer, the best combinations on unseen examples, and how many were tried."""
    render.heading(f"optimize: {report['headline']}")
    show_separability(report)
    _show_routing(report)
    for best in report["best"]:
        render.out(f"{best['name']}: {best['verdict']} on at least {best['examples']} unseen examples a suite")
        for member, phrase in zip(best["members"], best.get("phrases", []), strict=False):
            render.out(f"  {cut(member['member'], 30):<30}  with the phrase “{phrase}”")
        for member in best["members"]:
            name, loss = cut(member["member"], 30), _spread(member["loss"], member["loss_interval"])
            answers = f"{member['still_answered']} of {member['answered']}" if member["answered"] else "none alone"
            render.out(f"  {name:<30}  {answers:<10}  {member['kept_share']:>4.0%}  {loss}")
        for guard in best["guards"]:
            render.out(f"  {cut(guard['suite'], 30):<30}  {guard_cost(guard['combined'], guard['base'])}")
    for member in report.get("reworded", []):  # a lock of an earlier version has none
        answers = f"{member['still_answered']} of {member['answered']}" if member["answered"] else "none alone"
        few = "; warning: it loses answers when prompts are worded otherwise" if _is_fragile(member) else ""
        render.out(f"reworded: {cut(member['member'], 30)}: {answers}, {member['kept_share']:.0%}{few}")
    for member in report.get("without_phrases", []):
        answers = f"{member['still_answered']} of {member['answered']}" if member["answered"] else "none alone"
        render.out(f"without its phrase: {cut(member['member'], 30)}: {answers}, {member['kept_share']:.0%}")
    if report["tried"]:
        render.out("Columns: exact match retained, gain kept, loss in nats a token.")
        seconds = report["seconds"]
        took = f"in {seconds['search']:.0f} s, the best confirmed in {seconds['confirm']:.0f} s"
        render.out(f"{len(report['tried'])} combinations tried {took}; seed {report['seed']}")
        if before := report["passes"] - report["run"]:
            render.out(f"resumed: {before} of {report['passes']} examples were measured by an earlier run.")
    for offer in report.get("offers", []):
        render.out(f"fix: {offer}")


def show_separability(report: "OptimizeDocument") -> None:
    """Members that prompts do not tell apart, with the figure."""
    for pair in report.get("separability", []):  # a lock of an earlier version has none
        if pair["share"] < SEPARABLE:
            names = f"{cut(pair['a'], 30)} and {cut(pair['b'], 30)}"
            render.out(f"not separable: {names}")
            render.out(f"  prompts tell which is meant in {pair['share']:.0%}; {SEPARABLE:.0%} are needed")


def _show_routing(report: "OptimizeDocument") -> None:
    """Prints how well a set's router assigns unseen prompts."""
    for row in report.get("routed", []):
        render.out(f"a set's router is right: {cut(row['name'], 30)}: {row['right']} of {row['count']}")


def reworded_words(answers: "RewordedAnswers") -> str:
    """`15 of 16`, with a warning if too few answers are left."""
    kept = f"{answers['still_answered']} of {answers['answered']}" if answers["answered"] else "none alone"
    return f"{kept}: warning" if _is_fragile(answers) else kept


def _is_fragile(member: "MeasuredMember | RewordedAnswers") -> bool:
    """Whether fewer answers are left on reworded prompts than the limit asks for by default."""
    return member["still_answered"] < (THRESHOLDS["probe_answers"] or 0.0) * member["answered"]


def _spread(value: float, sure: "IntervalDocument | None") -> str:
    return f"{value:+.2f} ({sure['low']:+.2f} to {sure['high']:+.2f})" if sure else f"{value:+.2f}"
