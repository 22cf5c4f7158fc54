"""adaptory inspect"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from composer.findings import Severity
from registry.cli.console import complete, render
from registry.cli.console.connect import connected, release_directory, resolved
from registry.cli.console.groups import root
from registry.cli.console.options import StrictFlag
from registry.cli.console.render import JsonFlag
from registry.cli.releases.release import used_ranks

if TYPE_CHECKING:
    from composer.findings import Finding
    from composer.formats.adapters.facts import AdapterFacts
    from composer.formats.adapters.serving import Loading
    from composer.formats.adapters.spectrum import Spectrum
    from composer.formats.checkpoints.checkpoint import Architecture

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
    seen = look(directory, (architecture, names), server or PROFILES)
    document = {**seen.to_json(), "layout": layout}
    render.document(document, json, lambda: seen.show(what, layout))
    severities = {finding.severity for finding in seen.findings}
    if Severity.ERROR in severities or (strict and Severity.WARNING in severities):
        raise typer.Exit(6)


@dataclass(frozen=True, slots=True)
class _Seen:
    """An inspected adapter: its facts, the summary of its spectrum if that could be read, and the servers."""

    facts: "AdapterFacts"
    findings: "Sequence[Finding]"
    loads_in: "Sequence[Loading]"
    spectrum: "Spectrum | None" = None

    def to_json(self) -> dict[str, object]:
        return {
            "adapter": self.facts.to_json() | {"spectrum": self.spectrum.summary() if self.spectrum else None},
            "findings": [finding.to_json() for finding in self.findings],
            "loads_in": [server.to_json() for server in self.loads_in],
        }

    def show(self, what: str, layout: str) -> None:
        facts, used = self.facts.to_json(), self.spectrum
        named = facts | {"rank": self.facts.rank_max, "base": self.facts.base_model_name_or_path}
        names = (
            "type", "variant", "rank", "alpha", "targets", "modules", "parameters", "dtype", "modules_to_save", "base",
        )  # fmt: skip
        own = render.fields({name: named[name] for name in names}, *(() if self.facts.rank_max else ("rank", "alpha")))
        size = ("size", render.size(self.facts.size_bytes))
        energy = used_ranks(used.rank_95, used.rank_99) if used else None
        render.lines(f"adapter {what}", [("layout", layout), *own, size, ("energy", energy)])
        for finding in self.findings:
            render.out(f"  {render.finding_line(finding.to_json())}")
        rows = [
            (server.profile, "yes" if server.loads else "no", "; ".join(server.reasons), "; ".join(server.way_out))
            for server in self.loads_in
        ]
        render.table("", ("server", "loads", "why not", "fix"), rows)


def _look(directory: Path, base: "tuple[Architecture | None, list[str]]", servers: Sequence[str]) -> _Seen:
    from composer.checks.check import check_one
    from composer.formats.adapters.inspection import inspect as look
    from composer.formats.adapters.spectrum import spectrum

    architecture, names = base
    seen = look(directory, architecture)
    findings = check_one(seen, names)
    used = None if any(finding.severity == "error" for finding in findings) else spectrum(seen.adapter, seen.placed)
    findings = [*findings, *(used.hints(seen.findings) if used else [])]
    return _Seen(seen.facts, findings, [seen.loads_in(profile) for profile in servers], used)


def _look_at_another(path: Path, base: "tuple[Architecture | None, list[str]]", servers: Sequence[str]) -> _Seen:
    """Inspects an adapter that is not in PEFT's layout, the only one that servers are known to load."""
    from composer.formats.adapters.inspection import inspect_foreign
    from composer.formats.adapters.serving import Loading, parse_profile

    facts, findings = inspect_foreign(path, base[0])
    way_out = (f"adaptory convert {path} --base BASE -o OUT",)
    loading = [Loading(str(parse_profile(name)), False, ("not PEFT's layout",), way_out) for name in servers]
    return _Seen(facts, findings, loading)
