"""adaptory inspect"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.console import complete, render
from registry.cli.console.connect import connected, release_directory, resolved
from registry.cli.console.findings import StrictFlag, line
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.cli.releases.release import used_ranks

if TYPE_CHECKING:
    from composer.formats.checkpoints.checkpoint import Architecture

Json = dict[str, Any]
"""What was seen in a directory."""

PROFILES = ("vllm:16", "vllm:64", "sglang", "llamacpp", "peft")
"""The servers that `inspect` checks by default."""


@root.command()
def inspect(
    what: Annotated[
        str,
        typer.Argument(
            metavar="DIR|REF",
            autocompletion=complete.references,
            help="An adapter's directory or file, or a reference.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|BASE",
            help="Check the fit to this base: a checkpoint directory or a registered base.",
            autocompletion=complete.bases,
        ),
    ] = None,
    server: Annotated[
        list[str] | None, typer.Option("--loads-in", help="vllm:32, sglang, lorax, llamacpp, peft.")
    ] = None,
    strict: StrictFlag = False,
    json: JsonFlag = False,
) -> None:
    """Show an adapter's facts and faults, and which servers can load it."""
    from composer.checks.bases import names_of
    from composer.formats.adapters.layouts import PEFT, recognise
    from composer.formats.checkpoints.checkpoint import open_checkpoint

    directory, architecture, names = Path(what), None, list[str]()
    layout = recognise(directory).layout if directory.exists() else PEFT
    in_directory = base is not None and Path(base).is_dir()
    if (base and not in_directory) or not directory.exists():
        with connected() as connection:
            if not directory.exists():
                release = resolved(connection, what)
                directory, base = release_directory(connection, release), base or release.base.digest
            if not in_directory:
                known = connection.api.base(base or "")
                architecture, names = connection.api.architecture(known.digest), [known.name, *known.aliases]
    if in_directory:
        checkpoint = open_checkpoint(Path(base or ""), dequantize=True)
        architecture, names = checkpoint.architecture, names_of(checkpoint.path, checkpoint.config)
    look = _look if layout == PEFT else _look_at_another
    document: Json = {**look(directory, (architecture, names), server or PROFILES), "layout": layout}
    render.document(document, json, lambda: _show_inspection(what, document))
    severities = {finding["severity"] for finding in document["findings"]}
    if "error" in severities or (strict and "warning" in severities):
        raise typer.Exit(6)


def _look(directory: Path, base: "tuple[Architecture | None, list[str]]", servers: Sequence[str]) -> Json:
    from composer.checks.check import check_one
    from composer.formats.adapters.inspection import inspect as look
    from composer.formats.adapters.spectrum import spectrum

    architecture, names = base
    seen = look(directory, architecture)
    findings = check_one(seen, names)
    used = None if any(finding.severity == "error" for finding in findings) else spectrum(seen.adapter, seen.placed)
    return {
        "adapter": seen.facts.to_json() | {"spectrum": used.summary() if used else None},
        "findings": [finding.to_json() for finding in [*findings, *(used.hints(seen.findings) if used else [])]],
        "loads_in": [seen.loads_in(profile) for profile in servers],
    }


def _look_at_another(path: Path, base: "tuple[Architecture | None, list[str]]", servers: Sequence[str]) -> Json:
    """Inspects an adapter that is not in PEFT's layout, the only one that servers are known to load."""
    from composer.formats.adapters.inspection import inspect_foreign
    from composer.formats.adapters.serving import Loading, parse_profile

    facts, findings = inspect_foreign(path, base[0])
    way_out = (f"adaptory convert {path} --base BASE -o OUT",)
    loading = [Loading(str(parse_profile(name)), False, ("not PEFT's layout",), way_out) for name in servers]
    return {
        "adapter": facts.to_json() | {"spectrum": None},
        "findings": [finding.to_json() for finding in findings],
        "loads_in": [server.to_json() for server in loading],
    }


def _show_inspection(what: str, document: Json) -> None:
    facts = document["adapter"]
    named = facts | {"rank": facts["rank_max"], "base": facts["base_model_name_or_path"]}
    names = (
        "type", "variant", "rank", "alpha", "targets", "modules", "parameters", "dtype", "modules_to_save", "base",
    )  # fmt: skip
    own = render.fields({name: named[name] for name in names}, *(() if named["rank"] else ("rank", "alpha")))
    size = ("size", render.size(facts["size_bytes"]))
    used = facts["spectrum"]
    energy = used_ranks(used["rank_95"], used["rank_99"]) if used else None
    render.lines(f"adapter {what}", [("layout", document["layout"]), *own, size, ("energy", energy)])
    for finding in document["findings"]:
        render.out(f"  {line(finding)}")
    rows = [
        (
            server["profile"],
            "yes" if server["loads"] else "no",
            "; ".join(server["reasons"]),
            "; ".join(server["way_out"]),
        )
        for server in document["loads_in"]
    ]
    render.table("", ("server", "loads", "why not", "fix"), rows)
