"""Compositions in the registry."""

import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from composer.formats.untrusted import read_text
from registry import wire
from registry.cli.composition import optimize as optimizing
from registry.cli.console import complete, following, render
from registry.cli.console.connect import connected, jobs_running
from registry.cli.console.groups import refuse_idle, root
from registry.cli.console.interrupt import interrupts
from registry.cli.console.options import MemoryOption, PriorityOption, StrictFlag, wishes
from registry.cli.console.render import JsonFlag
from registry.errors import Refused, RegistryError, Usage
from registry.errors.translation import of_row
from registry.sdk.connection import Connection

if TYPE_CHECKING:
    from composer.findings import Verdict
    from composer.formats.recipes.lock import LockDocument
    from composer.formats.recipes.recipe import Optimize, Recipe
    from composer.formats.recipes.weights import Weight, WeightRule

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, such as tied=auto|untie|shared|refuse."),
]
Method = Annotated[
    str,
    typer.Option(help="stack, linear, svd, ties, dare_ties, knots_ties, core_tsv, …", autocompletion=complete.methods),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="N:WHERE=WEIGHT",
        help="A different weight for the N-th adapter in some layers or modules: 2:0-9/mlp.*=0.3",
    ),
]
Accept = Annotated[
    str | None,
    typer.Option(
        "--accept",
        metavar="'worst >= 0.8'",
        help="With --optimize: if nothing keeps the limits, take the best that leaves every input this share of its "
        "gain and answers. The release says so.",
    ),
]
Require = Annotated[
    str | None,
    typer.Option(
        metavar="VERDICT", help="Exit 1 unless the verdict is this one or better: ok, undecided, unmeasured, warn."
    ),
]
Thorough = Annotated[
    bool, typer.Option("--thorough", help="With --optimize: try every candidate, even if regmean is confirmed at once.")
]

_ASKED_S = 1.2
"""How long to wait for a second interrupt: the first one ends the command within two seconds."""


@root.command()
def compose(  # noqa: PLR0913
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Resolve, lock and check for conflicts; change nothing.")
    ] = False,
    optimize: Annotated[
        bool,
        typer.Option("--optimize", help="Find method, settings and weights on examples of the inputs' suites first."),
    ] = False,
    thorough: Thorough = False,
    accept: Accept = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait until it ends; the embedded registry always does.")
    ] = False,
    require: Require = None,
    strict: StrictFlag = False,
    priority: PriorityOption = None,
    memory: MemoryOption = None,
    json: JsonFlag = False,
) -> None:
    """Combine adapters by a recipe: lock, check, evaluate, gate, merge, publish.

    A conflict verdict worse than `require` of the recipe's policy ends the composition; --require replaces it.
    """
    from composer.formats.recipes.recipe import MAX_FILE_BYTES, Optimize, load_recipe

    wanted = load_recipe(read_text(recipe, MAX_FILE_BYTES), str(recipe))
    _refuse_directories(recipe, wanted)
    if (verdict := required(require)) is not None:
        wanted = wanted.model_copy(update={"policy": {**wanted.policy, "require": str(verdict)}})
    if strict:
        wanted = wanted.model_copy(update={"policy": {**wanted.policy, "strict": True}})
    if optimize and wanted.optimize is None:
        wanted = wanted.model_copy(update={"optimize": Optimize.model_validate({})})
    if wanted.optimize is None:
        refuse_idle({"--thorough": thorough, "--accept": accept}, "without --optimize", "Add it, or leave these out.")
    else:
        wanted = wanted.model_copy(update={"optimize": with_options(wanted.optimize, thorough=thorough, accept=accept)})
        if plan:
            render.say("The plan runs the search, which measures on the base; --follow shows its progress.")
    _run({"recipe": wanted.to_json(), "plan": plan, **wishes(priority, memory)}, follow=plan or follow, json=json)


def with_options(searched: "Optimize", *, thorough: bool, accept: str | None) -> "Optimize":
    """The search with what the options add. Raises Usage for a bad acceptance."""
    from composer.formats.recipes.documents import RefusedValues
    from composer.formats.recipes.recipe import accepted_share

    if accept is not None:
        try:
            searched = searched.model_copy(update={"accept": f"worst >= {accepted_share(accept):g}"})
        except RefusedValues as error:
            raise Usage("bad_setting", f"--accept: {error}.", subject="--accept", next_step=error.next_step) from error
    return searched.model_copy(update={"thorough": True}) if thorough else searched


def _refuse_directories(path: Path, recipe: "Recipe") -> None:
    """Raises Usage for an input that is a directory beside the recipe: a composition has releases."""
    for source in recipe.inputs:
        if (path.parent / source.adapter).is_dir():
            raise Usage(
                "input_is_directory",
                f"{source.adapter} in {path} is a directory, and a composition combines releases.",
                subject=source.adapter,
                next_step=f"Push it, and name the release; `adaptory merge {path}` and `combine` take directories.",
            )


@root.command()
def tame(  # noqa: PLR0913
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="An adapter's release.", autocompletion=complete.references)
    ],
    into: Annotated[str, typer.Option("--as", metavar="NAMESPACE/NAME:VERSION", help="The release to publish.")],
    guard: Annotated[
        list[str],
        typer.Option(help="A guard suite: outside its task, the result answers as the base.", metavar="SUITE"),
    ],
    suite: Annotated[
        str | None, typer.Option(help="The adapter's task; the target suite on which it gained most by default.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base; the release's own by default.")] = None,
    set_: Settings = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait until it ends; the embedded registry always does.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Keep an adapter's answers on its task, and the base's everywhere else.

    Fits the adapter's factors to change nothing on half of each guard suite, measures both on the other half, and
    publishes the result if it keeps the adapter's answers and costs at most 0.15 nats of general ability.
    """
    from composer.formats.recipes.recipe import parse_recipe, taming
    from composer.formats.recipes.suite import check_guard

    with connected() as connection:
        for name in guard:
            known = connection.api.get(f"/v1/suites/{quote(name, safe='')}", wire.quality.SuiteOut)
            check_guard(known.name, known.kind, known.examples)
    content = taming(ref, into, guard, suite)
    content["base"] = base
    content["settings"] |= settings_of(set_)
    _run({"recipe": parse_recipe(content).to_json(), "plan": False}, follow=follow, json=json)


def _run(body: Mapping[str, object], *, follow: bool, json: bool) -> None:
    """Starts a composition and shows what came of it."""
    with connected() as connection:
        composition = connection.api.post("/v1/compositions", body, wire.work.CompositionOut)
        if follow or connection.resources is not None:
            with jobs_running(connection, composition.job):
                composition = _follow_or_cancel(connection, composition, lines=follow)
    failure = _error(composition) if composition.state in ("refused", "failed", "cancelled") else None
    render.document(composition, json, lambda: _show(composition), failure)


def with_rules(weights: Sequence[float], rules: list[str] | None) -> "list[Weight]":
    """The weights, each with the rules `N:WHERE=WEIGHT` for its number, counted from 1."""
    from composer.formats.recipes.weights import Weight, parse_rule

    own: list[list[WeightRule]] = [[] for _ in weights]
    numbers = {str(number) for number in range(1, len(weights) + 1)}
    for text in rules or []:
        number, colon, rule = text.partition(":")
        if not colon or number not in numbers:
            raise Usage(
                "bad_rule",
                f"--rule {text} does not begin with the number of an adapter, 1 to {len(weights)}.",
                subject=text,
                next_step="Write --rule 2:0-9=0.5",
            )
        own[int(number) - 1].append(parse_rule(rule))
    return [Weight(weight, tuple(added)) for weight, added in zip(weights, own, strict=True)]


def settings_of(texts: list[str] | None, *, sequential: bool = False) -> dict[str, object]:
    """Parses `--set KEY=VALUE`; the value is JSON if it parses as JSON, else text."""
    settings: dict[str, object] = {"sequential": True} if sequential else {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise Usage("bad_setting", f"--set {text} has no value.", subject=text, next_step="Write --set KEY=VALUE")
        try:
            settings[key] = json_module.loads(value)
        except (ValueError, RecursionError):
            settings[key] = value
    return settings


def _follow_or_cancel(
    connection: Connection, composition: "wire.work.CompositionOut", *, lines: bool
) -> "wire.work.CompositionOut":
    """An interrupt cancels a composition of this process; one on a server continues unless interrupted twice."""
    try:
        following.follow(connection, composition.job, lines=lines)
        return connection.api.get(f"/v1/compositions/{composition.id}", wire.work.CompositionOut)
    except KeyboardInterrupt:
        name = f"composition {composition.id}"
        if connection.resources is None:
            render.say(f"{name} continues at {connection.api.url}; interrupt again to cancel it")
            if not interrupts.wait_for_another(_ASKED_S):
                job = composition.job
                interrupts.kept = f"{name} continues: `adaptory jobs {job}` shows it, `adaptory cancel {job}` ends it"
                raise
        connection.api.post(f"/v1/compositions/{composition.id}/cancel")
        interrupts.kept = f"{name} is cancelled, and nothing was published"
        raise


def _show(composition: "wire.work.CompositionOut") -> None:
    what = "plan" if composition.plan else "composition"
    render.heading(f"{what} {composition.id}: {composition.state}")
    if composition.state == "queued":
        render.out(f"A worker of the server composes it: `adaptory jobs {composition.job}` shows its progress.")
    if optimized := composition.lock.get("optimized"):
        optimizing.show(optimized)
    _show_lock(composition.locked)
    if composition.conflicts:
        _show_conflicts(composition.conflicts)
    if scores := wire.work.candidate_scores(composition):
        render.table("scores", ("suite", "metric", "of", "value", "n"), _side_by_side(scores))
        if unjudged := _unjudged(scores, composition.locked):
            render.out(
                f"not compared on a suite of their own: {', '.join(unjudged)}. What the result keeps of them is "
                "not known: name a suite for each (`suite` of an input in the recipe)."
            )
    elif composition.results:
        render.out(
            "scores: none, so what the result keeps of its inputs is not known. Name suites under `evaluate`, or "
            "evaluate each input: its suite then has gates."
        )
    if composition.gates:
        render.gate_lines(composition.gates)
    if composition.merge:
        _show_merge(composition.merge)
    for row in composition.results:
        render.out(f"published {row.name} {row.commit[:12]}")


def _show_merge(merged: Mapping[str, Any]) -> None:
    render.out(f"merged {merged['touched_tensors']} tensors in {merged['seconds']:.1f} s on {merged['device']}")
    if proof := merged.get("proof"):
        for line in wrap(f"proof: {proof['words']}", 80):
            render.out(line)


def _unjudged(scores: "Sequence[wire.work.CandidateScore]", lock: "LockDocument") -> list[str]:
    """The inputs to be kept that the candidate was not compared with on their own suite; empty for older compositions,
    which do not record which suite is an input's own."""
    compared = [measured for score in scores for measured in score.get("inputs", [])]
    if any("own_suite" not in measured for measured in compared):
        return []
    judged = {f"{row['repository']}:{row['version']}" for row in compared if row.get("own_suite")}
    kept = [f"{member['repository']}:{member['version']}" for member in lock["inputs"] if member["weight"] > 0]
    return [name for name in kept if name not in judged]


def _side_by_side(scores: "Sequence[wire.work.CandidateScore]") -> list[tuple[Any, ...]]:
    """A row for the candidate per metric, and below it the inputs measured on the same examples."""
    rows: list[tuple[Any, ...]] = []
    for score in scores:
        value = render.with_error(score["value"], score["stderr"], score["n"])
        metric = score["metric"]
        rows.append((score["suite"], metric, "candidate", value, score["n"]))
        if phrase := score.get("phrase"):
            rows.append(("", "", f"with its phrase “{phrase}”", "", ""))
        if answers := score.get("reworded"):
            rows.append(("", "", "reworded", optimizing.reworded_words(answers), answers["answered"]))
        if on_base := score.get("base"):
            rows.append(
                ("", "", "base", render.with_error(on_base["value"], on_base["stderr"], on_base["n"]), on_base["n"])
            )
        for measured in score.get("inputs", []):
            name, value = (
                f"{measured['repository']}:{measured['version']}",
                render.with_error(measured["value"], measured["stderr"], measured["n"]),
            )
            rows.append(("", "", name, value, measured["n"]))
    return rows


def _show_lock(lock: "LockDocument") -> None:
    from registry.formats.lineage import of_lock, rule_words

    made = of_lock(lock)
    columns = (
        "input",
        "commit",
        "weight",
        *(("other weights",) if any(member.weight.rules for member in made.members) else ()),
    )
    rows = [
        (
            f"{member.name}:{member.version}",
            member.commit[:12],
            member.weight.value,
            list(map(rule_words, member.weight.rules)),
        )
        for member in made.members
    ]
    render.table(f"lock {lock['digest'][:12]}", columns, [row[: len(columns)] for row in rows])
    for name, value in (("method", made.how), ("dtype", made.dtype), ("rounding", made.rounding)):
        if value:
            render.out(f"{name} {render.plain(value)}")


def _show_conflicts(report: Mapping[str, Any]) -> None:
    if "summary" in report:  # absent before 0.2
        render.summary("conflicts", report["summary"])
    else:
        render.out(f"conflicts: {report['verdict']}")
    if words := report["whole"].get("kept_words"):
        for line in wrap(f"from the weights: the combination {words}", 80, subsequent_indent="  "):
            render.out(line)


def required(verdict: str | None) -> "Verdict | None":
    """The verdict that --require names. Raises Usage for any other word."""
    from composer.findings import Verdict

    if verdict is None:
        return None
    if verdict not in list(Verdict):
        message = f"Unknown verdict {verdict!r} in --require."
        raise Usage("bad_verdict", message, subject="--require", next_step=f"Use one of {', '.join(Verdict)}.")
    return Verdict(verdict)


def _error(composition: "wire.work.CompositionOut") -> RegistryError:
    """The error that ended it, without the findings, which the composition shows."""
    if composition.error is None:
        return Refused("composition_cancelled", "The composition was cancelled.")
    return of_row({**composition.error, "findings": []})
