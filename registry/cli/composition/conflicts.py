"""Conflicts between adapters, judged on the strongest evidence available."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from composer.formats.untrusted import read_text
from registry.cli.composition import optimize as optimizing
from registry.cli.composition.compose import (
    Method,
    Require,
    Rules,
    Settings,
    Thorough,
    required,
    settings_of,
    with_rules,
)
from registry.cli.console import complete, render
from registry.cli.console.connect import connected
from registry.cli.console.groups import refuse_idle, root
from registry.cli.console.options import BaseDir, Device, StrictFlag
from registry.cli.console.render import JsonFlag
from registry.errors import Usage
from registry.sdk.conflicts import AdapterGroup

if TYPE_CHECKING:
    from composer.conflicts.documents import ReportDocument
    from composer.conflicts.report import ConflictReport
    from composer.findings import Verdict
    from composer.formats.recipes.policy import Policy

Probe = Annotated[
    int, typer.Option(min=0, help="Measure on this many examples of each adapter's suite; `ok` needs 8 or more.")
]
ProbeMax = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Maximum number of examples when fewer are inconclusive: 32 by default, or --probe if that is below 8.",
    ),
]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="NAME|FILE",
        help="For directories: the suite of each adapter, in order.",
        autocompletion=complete.suites,
    ),
]
Adapters = Annotated[
    list[str],
    typer.Argument(metavar="REF|DIR...", help="Two or more adapters.", autocompletion=complete.references),
]
BaseOrDirectory = Annotated[
    str | None,
    typer.Option(
        help="A registered base or a checkpoint directory; by default, the releases' own base.",
        autocompletion=complete.bases,
    ),
]
Guards = Annotated[
    list[str] | None,
    typer.Option("--guard", metavar="NAME|FILE", help="Guard suites to probe too.", autocompletion=complete.suites),
]


Budget = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=N", help="With --optimize: minutes, passes, search, confirm, evolve, seed."),
]


@root.command()
def conflicts(  # noqa: PLR0913
    adapters: Adapters,
    base: BaseOrDirectory = None,
    weights: Annotated[str | None, typer.Option(help="1,0.5,... in the order of the adapters.")] = None,
    rule: Rules = None,
    method: Method = "stack",
    set_: Settings = None,
    probe: Probe = 0,
    probe_max: ProbeMax = None,
    suite: Suites = None,
    guard: Guards = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Without suites: compare activations on these prompts, one per line.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML: the severity and threshold of each finding.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as an HTML page.")] = None,
    require: Require = None,
    strict: StrictFlag = False,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Find the method, settings and weights that keep most of each adapter.")
    ] = False,
    thorough: Thorough = False,
    budget: Budget = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the reasons for the verdict or the choice.")] = False,
    modules: Annotated[int, typer.Option(min=0, help="With --explain: number of modules shown per pair.")] = 2,
    device: Device = "auto",
    base_dir: BaseDir = None,
    json: JsonFlag = False,
) -> None:
    """Check adapters for conflicts: measured with --probe, explained from their factors.

    The verdict is ok, undecided, unmeasured, warn or refuse. Exits 1 for refuse, or for less than --require.
    """
    from composer.conflicts.render.text import document
    from composer.formats.recipes.methods import parse_settings

    given, rules = with_rules(_weights(weights, len(adapters)), rule), _policy(policy, require, strict=strict)
    with ExitStack() as stack:
        group = AdapterGroup(lambda: stack.enter_context(connected()), adapters, base, base_dir, render)
        settings = parse_settings(method, settings_of(set_))
        if optimize:
            from composer.formats.recipes.recipe import SEARCH

            idle = {"--probe": probe, "--prompts": prompts, "--html": html, "--require": require}
            refuse_idle(idle, "with --optimize, which measures on examples of its own", "Leave one of the two out.")
            evidence = group.evidence(suite or [], guard or [], (SEARCH, None), (), device)
            members = optimizing.members_of(zip(group.load(), evidence.suites, given, strict=True))
            content, effort = f"{group.content()} {device}", optimizing.effort_of(budget, thorough=thorough)
            asked = (evidence.load, members, evidence.guards, settings, rules)
            best = optimizing.search(*asked, content=content, effort=effort)
            optimizing.present(best, json, explain=explain)
            return
        refuse_idle({"--budget": budget, "--thorough": thorough}, "without --optimize", "Add it, or leave these out.")
        evidence = group.evidence(suite or [], guard or [], (probe, probe_max), _prompts(prompts), device)
        report = group.examine(given, settings, evidence, rules)
    rendered = document(report)
    if html:
        _write_page(html, cast("ReportDocument", rendered))
    render.document(rendered, json, lambda: _explain(report, modules) if explain else _show(rendered))
    _require(rules, report.verdict)


def _policy(path: Path | None, require: str | None, *, strict: bool) -> "Policy":
    from composer.formats.recipes.policy import MAX_POLICY_CHARS, Policy, parse_policy

    rules = parse_policy(read_text(path, MAX_POLICY_CHARS), str(path)) if path else Policy()
    return replace(rules, require=required(require) or rules.require, strict=strict or rules.strict)


def _prompts(path: Path | None) -> list[str]:
    from composer.conflicts.examine import parse_prompts
    from composer.formats.recipes.suite import MAX_FILE_BYTES

    return parse_prompts(read_text(path, MAX_FILE_BYTES), str(path)) if path else []


def _require(rules: "Policy", verdict: "Verdict") -> None:
    if rules.accepts(verdict):
        return
    if rules.require:
        render.say(f"error: the verdict is {verdict}, and {rules.require} is required")
    raise typer.Exit(1)


def _show(document: Mapping[str, Any]) -> None:
    """Shows the summary, which fits a screen."""
    render.summary("Verdict", document["summary"])
    render.say("--explain shows the underlying measurements and numbers; --html F writes a page.")


def _explain(report: "ConflictReport", modules: int) -> None:
    """Shows each pair's headline and its reasons, then the tables, other findings, and advice."""
    from composer.conflicts.render.text import advice, explanations, headlines, remarks, tables

    for line in headlines(report):
        render.heading(line)
    for line in explanations(report):
        render.out(line)
    for table in tables(report, worst_modules=modules):
        render.table(table.title, table.columns, table.rows)
        if table.note:
            render.out(table.note)
    for line in (*remarks(report.findings), *(f"try: {line}" for line in advice(report))):
        render.out(line)


def _write_page(path: Path, report: "ReportDocument") -> None:
    from composer.conflicts.render.html import page
    from registry.client.cache import is_regular

    staging = path.with_name(f".{path.name[:200]}.{token_hex(4)}")
    try:
        if path.is_symlink() or (path.exists() and not is_regular(path)):
            raise _unwritable(path, "it is a link, a directory or a device")
        try:
            staging.write_text(page(report), encoding="utf-8")
            staging.replace(path)  # atomic
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, str(error.strerror)) from error
    render.say(f"wrote {path}")


def _unwritable(path: Path, why: str) -> Usage:
    message, next_step = f"{path} cannot be written: {why}.", "Name a file in a writable directory."
    return Usage("page_unwritable", message, subject=str(path), next_step=next_step)


def _weights(text: str | None, count: int) -> list[float]:
    from composer.formats.recipes.weights import LARGEST, factor

    try:
        weights = [factor(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count:
        raise Usage("bad_weights", f"--weights {text} is not {count} numbers of magnitude {LARGEST:g} at most.")
    return weights
