"""Findings of checks, as lines with what to do about them; and the option that makes warnings errors."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.console import render

if TYPE_CHECKING:
    from composer.findings import Finding

StrictFlag = Annotated[bool, typer.Option("--strict", help="Make warnings errors: nothing is written or published.")]


def warn(findings: "Iterable[Finding]", *, strict: bool = False) -> None:
    """Prints findings to stderr. `strict`: raises the error of the first warning."""
    from registry.errors.translation import refuse_errors, strictly

    seen = list(findings)
    if strict:
        refuse_errors(strictly(seen), "adapters")
    for finding in seen:
        render.say(line(finding.to_json()))


def line(finding: Mapping[str, Any]) -> str:
    """A finding's message, with its fix if it needs one."""
    from composer.findings import next_step

    fix = next_step(finding["code"], "") if finding["severity"] != "notice" else ""
    return f"{finding['severity']}: {finding['message']} {fix}".rstrip()
