"""Conflicts between adapters, judged on the strongest evidence available."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composer.formats.untrusted import read_text
from registry.cli import complete, render
from registry.cli import optimize as optimizing
from registry.cli.calibration import calibration_of
from registry.cli.compose import Method, Require, Rules, Settings, required, settings_of, with_rules
from registry.cli.connect import base_checkpoint, connected, release_directory, resolved
from registry.cli.idle import refuse_idle
from registry.cli.quality import BaseDir, Device, fetch_suite
from registry.cli.render import JsonFlag
from registry.errors import Usage
from registry.sdk.connection import Connection

if TYPE_CHECKING:
    from composer.conflicts.examine import Evidence
    from composer.conflicts.report import ConflictReport
    from composer.deltas.variants.load import LoadedAdapter
    from composer.findings import Verdict
    from composer.formats.checkpoints.checkpoint import Checkpoint
    from composer.formats.recipes.methods import AnySettings
    from composer.formats.recipes.policy import Policy
    from composer.formats.recipes.suite import Suite
    from composer.formats.recipes.weights import Weight

Json = dict[str, Any]
Probe = Annotated[
    int, typer.Option(min=0, help="Measure on this many examples of each adapter's suite; `ok` needs 8 or more.")
]
ProbeMax = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Maximum number of examples when fewer are inconclusive: 24 by default, or --probe if that is below 8.",
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


def register(root: typer.Typer) -> None:
    root.command()(conflicts)


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
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Find the method, settings and weights that keep most of each adapter.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show the measurements behind the verdict.")] = False,
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

    if len(adapters) < 2:
        raise Usage("too_few", "Conflicts need two or more adapters.", next_step="Name at least two.")
    given, rules = with_rules(_weights(weights, len(adapters)), rule), _policy(policy, require)
    with ExitStack() as stack:
        group = _Group(lambda: stack.enter_context(connected()), adapters, base, base_dir)
        settings = parse_settings(method, settings_of(set_))
        if optimize:
            from composer.formats.recipes.recipe import SEARCH

            idle = {"--probe": probe, "--prompts": prompts, "--html": html, "--require": require, "--explain": explain}
            refuse_idle(idle, "with --optimize, which measures on examples of its own", "Leave one of the two out.")
            evidence = group.evidence(suite or [], guard or [], (SEARCH, None), None, device)
            content = f"{group.content()} {device}"
            weighted = list(zip(group.load(), given, strict=True))
            optimizing.run(evidence, weighted, settings, rules, content=content, json=json)
            return
        evidence = group.evidence(suite or [], guard or [], (probe, probe_max), prompts, device)
        report = _examined(group, given, settings, evidence, rules)
    if html:
        _write_page(html, report)
    rendered = document(report)
    render.document(rendered, json, lambda: _explain(report, modules) if explain else _show(rendered))
    _require(rules, report.verdict)


def _policy(path: Path | None, require: str | None) -> "Policy":
    from composer.formats.recipes.policy import MAX_POLICY_CHARS, Policy, parse_policy

    rules = parse_policy(read_text(path, MAX_POLICY_CHARS), str(path)) if path else Policy()
    return replace(rules, require=required(require) or rules.require)


def _examined(
    group: "_Group", weights: "Sequence[Weight]", settings: "AnySettings", evidence: "Evidence", rules: "Policy"
) -> "ConflictReport":
    from composer.conflicts.examine import examine

    calibration = calibration_of(settings, evidence.load, evidence.suites)
    checkpoint = group.checkpoint(measured=bool(evidence.k or evidence.prompts))
    with render.progress("probe", None, "examples") as bar:
        evidence = replace(evidence, calibration=calibration, progress=bar)
        return examine(group.load(), weights, settings, evidence=evidence, base=checkpoint, policy=rules)


def _require(rules: "Policy", verdict: "Verdict") -> None:
    if rules.accepts(verdict):
        return
    if rules.require:
        render.say(f"error: the verdict is {verdict}, and {rules.require} is required")
    raise typer.Exit(1)


def _show(document: Json) -> None:
    """Shows the summary, which fits a screen."""
    render.summary("Verdict", document["summary"])
    render.say("--explain shows the measurements and numbers behind this; --html F writes a page.")


def _explain(report: "ConflictReport", modules: int) -> None:
    """Shows each pair's headline and its reasons, then the tables, other findings, and advice."""
    from composer.conflicts.render.text import advice, explanations, headlines, remarks, tables

    for line in headlines(report):
        render.heading(line)
    for line in explanations(report):
        render.out(line)
    for one in tables(report, worst_modules=modules):
        render.table(one.title, one.columns, one.rows)
        if one.note:
            render.out(one.note)
    for line in (*remarks(report.findings), *(f"try: {line}" for line in advice(report))):
        render.out(line)


def _write_page(path: Path, report: "ConflictReport") -> None:
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


class _Group:
    """The adapters to compare, local or registered, and the base that they share."""

    def __init__(
        self, connect: Callable[[], Connection], names: list[str], base: str | None, base_dir: Path | None
    ) -> None:
        self._connect, self.names, self.base_dir = connect, names, base_dir
        self.releases: list[Json | None] = [
            None if Path(name).is_dir() else resolved(self.connection, name) for name in names
        ]
        digests = {release["base"]["digest"] for release in self.releases if release}
        if len(digests) > 1:
            raise Usage(
                "bases_differ",
                "These adapters were made for different bases.",
                next_step="Compare adapters of the same base.",
            )
        self.base: Json | None = None
        if base and Path(base).is_dir():
            self.base_dir = Path(base)
        elif base or digests:
            self.base = self.connection.api.base(base or next(iter(digests)))

    @cached_property
    def connection(self) -> Connection:
        """Opened on first use: directories need no registry."""
        return self._connect()

    def load(self) -> "list[LoadedAdapter]":
        from composer.deltas.variants.load import load_deltas
        from composer.formats.checkpoints.checkpoint import open_checkpoint

        architecture = None
        if self.base:
            architecture = self.connection.api.architecture(self.base["digest"])
        elif self.base_dir:
            architecture = open_checkpoint(self.base_dir).architecture
        directories = [
            release_directory(self.connection, release) if release else Path(name)
            for name, release in zip(self.names, self.releases, strict=True)
        ]
        return [
            replace(load_deltas(directory, architecture), name=name)
            for directory, name in zip(directories, self.names, strict=True)
        ]

    def content(self) -> str:
        """Names the contents of the base and the adapters by their digests."""
        from composer.formats.adapters.layouts import CONFIG_FILE, WEIGHTS_FILE
        from composer.formats.checkpoints.checkpoint import open_checkpoint
        from composer.formats.checkpoints.hashing import hash_checkpoint, hash_file

        adapters = [
            release["commit"] if release else [hash_file(Path(name) / file) for file in (CONFIG_FILE, WEIGHTS_FILE)]
            for name, release in zip(self.names, self.releases, strict=True)
        ]
        base = self.base["digest"] if self.base else hash_checkpoint(open_checkpoint(self._directory)).weights_digest
        return f"{base} {adapters}"

    def evidence(
        self, own: list[str], guards: list[str], effort: tuple[int, int | None], prompts: Path | None, device: str
    ) -> "Evidence":
        """What may be measured, and the known suites, whose prompts are always compared."""
        from composer.conflicts.evidence.probe import usual_most
        from composer.conflicts.examine import Evidence, parse_prompts
        from composer.evaluation.model import load_model
        from composer.formats.recipes.suite import MAX_FILE_BYTES

        k, most = effort
        if not k and (own or guards):
            raise Usage(
                "idle_suite",
                "--suite and --guard have no effect without --probe.",
                next_step="Add --probe 8, or leave them out.",
            )
        if (k or prompts) and self.base is None and self.base_dir is None:
            raise Usage("base_missing", "This needs the base's weights.", next_step="Name it with --base.")
        return Evidence(
            load=cache(lambda: load_model(self._directory, device)),
            suites=self._suites(own, required=bool(k) and prompts is None),
            guards=[self._suite(name) for name in guards] if k else [],
            k=k,
            most=usual_most(k) if most is None else most,
            prompts=parse_prompts(read_text(prompts, MAX_FILE_BYTES), str(prompts)) if prompts else [],
        )

    def checkpoint(self, *, measured: bool) -> "Checkpoint | None":
        """The base's weights, if a directory was named or a measurement needs them anyway."""
        from composer.formats.checkpoints.checkpoint import open_checkpoint

        if not measured and self.base_dir is None:
            return None
        return open_checkpoint(self._directory)

    @cached_property
    def _directory(self) -> Path:
        """The base's directory, verified once if the base is registered."""
        return base_checkpoint(self.base, self.base_dir).path if self.base else (self.base_dir or Path())

    def _suites(self, own: list[str], *, required: bool) -> "list[Suite | None]":
        names = own or [release and self._own_suite(release) for release in self.releases]
        if required and (len(names) != len(self.names) or not all(names)):
            lacking = [name for name, suite in zip(self.names, names, strict=False) if not suite]
            known = f"none is known for {', '.join(lacking)}" if lacking else f"--suite was given {len(names)} times"
            raise Usage(
                "suite_missing",
                f"A probe needs a suite for each of the {len(self.names)} adapters; {known}.",
                next_step="Run `adaptory eval REF --suite S`, name one --suite per adapter, or give --prompts F alone.",
            )
        return [self._suite(str(name)) if name else None for name in names]

    def _suite(self, name: str) -> "Suite":
        """A registered suite by its name, or a file, which needs no registry, if the text cannot be a name."""
        from composer.formats.recipes.suite import NAME, parse_suite

        return fetch_suite(self.connection, name) if NAME.fullmatch(name) else parse_suite(name)

    def _own_suite(self, release: Json) -> str | None:
        from registry.client.api import release_path

        return self.connection.api.get(f"{release_path(release)}/target-suite")["target_suite"]


def _weights(text: str | None, count: int) -> list[float]:
    from composer.formats.recipes.weights import LARGEST, factor

    try:
        weights = [factor(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count:
        raise Usage(
            "bad_weights",
            f"--weights {text} is not {count} numbers of magnitude {LARGEST:g} at most.",
            next_step="Write one number per adapter: 1,0.5,1",
        )
    return weights
