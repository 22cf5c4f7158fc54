"""Evidence: suite add, eval, conflicts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from registry.cli import render
from registry.cli.connect import Connection, base_checkpoint, connected, release_directory
from registry.cli.render import JsonFlag
from registry.errors import NotFound, Usage
from registry.names import parse_reference

if TYPE_CHECKING:
    from composer.evaluate import LoadedModel
    from composer.probe import ProbeResult
    from composer.suite import Suite
    from composer.variants import LoadedAdapter

suite_app = typer.Typer(help="Evaluation sets, versioned by content.", no_args_is_help=True, rich_markup_mode=None)
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
BaseDir = Annotated[Path | None, typer.Option("--base-dir", help="Where the base's weights are on this machine.")]
Json = dict[str, Any]


def register(root: typer.Typer) -> None:
    root.add_typer(suite_app, name="suite")
    root.command("eval")(evaluate)
    root.command()(conflicts)


@suite_app.command()
def add(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="The suites' YAML.")], json: JsonFlag = False
) -> None:
    """Register suites; other content under a known name becomes its current version."""
    from composer.suite import parse_suite

    contents = [parse_suite(file) for file in files]
    with connected() as connection:
        found = [connection.api.post("/v1/suites", content.to_json()) for content in contents]
    render.document(found[0] if len(found) == 1 else {"items": found, "next": None}, json, lambda: _show_suites(found))


@suite_app.command("list")
def list_suites(json: JsonFlag = False) -> None:
    """The current suites."""
    with connected() as connection:
        found = list(connection.api.pages("/v1/suites"))
    render.document({"items": found, "next": None}, json, lambda: _show_suites(found))


def _show_suites(found: list[Json]) -> None:
    rows = [(suite["name"], suite["kind"], suite["examples"], suite["digest"][:12]) for suite in found]
    render.table("", ("suite", "kind", "examples", "digest"), rows)


def evaluate(
    what: Annotated[str, typer.Argument(metavar="REF|BASE")],
    suite: Annotated[list[str], typer.Option("--suite", help="May be repeated: the model is loaded once.")],
    device: Device = "auto",
    base_dir: BaseDir = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many examples; such scores are not recorded.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run suites on a release or a base, and record the scores."""
    from composer.evaluate import evaluate as evaluate_suite
    from composer.evaluate import load_model
    from composer.variants import load_deltas
    from registry.client.api import release_path

    with connected() as connection:
        suites = [fetch_suite(connection, name) for name in suite]
        release, base = _release_or_base(connection, what)
        if release and release["kind"] == "model":
            model, deltas = load_model(release_directory(connection, release), device), ()
        else:
            model, deltas = load_model(base_checkpoint(base, base_dir).path, device), ()
            if release:
                deltas = load_deltas(release_directory(connection, release), model.architecture).deltas
        scores: list[Json] = []
        total = sum(min(limit or len(one.examples), len(one.examples)) for one in suites)
        with render.progress(f"eval {what}", total, counts=True) as done:
            for one in suites:
                scores += [score.to_json() for score in evaluate_suite(model, one, deltas, limit, done)]
        if limit is None:
            provenance = {"device": str(model.device), "dtype": str(model.model.dtype).removeprefix("torch.")}
            rows = [{k: v for k, v in score.items() if k != "suite"} | {"provenance": provenance} for score in scores]
            path = release_path(release) if release else f"/v1/bases/{base['digest']}"
            connection.api.post(f"{path}/scores", {"scores": rows})
    rows = [(s["suite"], s["metric"], render.with_error(s["value"], s["stderr"]), s["n"]) for s in scores]
    render.document(
        {"subject": what, "recorded": limit is None, "scores": scores},
        json,
        lambda: render.table(what, ("suite", "metric", "value", "n"), rows),
    )


def conflicts(  # noqa: PLR0913
    adapters: Annotated[list[str], typer.Argument(metavar="REF|DIR...", help="Two adapters or more.")],
    base: Annotated[
        str | None, typer.Option(help="A registered base or a checkpoint directory; the releases' own otherwise.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="1,0.5,... in the order of the adapters.")] = None,
    tied: Annotated[str | None, typer.Option(help="shared or untie: what a merge would do with a tied weight.")] = None,
    probe: Annotated[int, typer.Option(min=0, help="Measure on so many examples of each member's suite.")] = 0,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", help="Suite of each adapter, in order, for directories.")
    ] = None,
    guard: Annotated[list[str] | None, typer.Option("--guard", help="Guard suites to probe as well.")] = None,
    modules: Annotated[int, typer.Option(min=0, help="Show so many modules of each pair.")] = 2,
    device: Device = "auto",
    base_dir: BaseDir = None,
    json: JsonFlag = False,
) -> None:
    """What adapters would do to each other: measured with --probe, explained from their factors."""
    from composer.conflicts import conflicts as compare
    from composer.findings import Verdict

    if len(adapters) < 2:
        raise Usage("too_few", "Conflicts are between two adapters or more.", next_step="Name at least two.")
    shares = _weights(weights, len(adapters))
    with connected() as connection:
        group = _Group(connection, adapters, base, base_dir)
        loaded = group.load()
        result = group.probe(loaded, shares, suite or [], guard or [], probe, device) if probe else None
        report = compare(loaded, shares, settings={"tied": tied} if tied else {}, probe=result)
    render.document(report.to_json(), json, lambda: show_report(report, modules))
    if report.verdict is Verdict.REFUSE:
        raise typer.Exit(1)


def show_report(report: Any, modules: int) -> None:
    """The headline of each pair first, then the tables, then what else was found."""
    from composer.report import headlines, remarks, tables

    for line in headlines(report):
        render.heading(line)
    for one in tables(report, worst_modules=modules):
        render.table(one.title, one.columns, one.rows)
        if one.note:
            print(one.note)
    for line in remarks(report.findings):
        print(line)


def fetch_suite(connection: Connection, name: str) -> "Suite":
    from composer.suite import Suite

    return Suite.from_json(connection.api.get(f"/v1/suites/{quote(name, safe='')}")["content"], name)


class _Group:
    """Adapters to be compared, wherever they lie, and the base that they share."""

    def __init__(self, connection: Connection, names: list[str], base: str | None, base_dir: Path | None) -> None:
        self.connection, self.names, self.base_dir = connection, names, base_dir
        self.releases: list[Json | None] = [
            None if Path(name).is_dir() else connection.api.resolve(parse_reference(name))["release"] for name in names
        ]
        digests = {release["base"]["digest"] for release in self.releases if release}
        if len(digests) > 1:
            raise Usage(
                "bases_differ",
                "These adapters were made for different bases.",
                next_step="Compare adapters of one base.",
            )
        self.base: Json | None = None
        if base and Path(base).is_dir():
            self.base_dir = Path(base)
        elif base or digests:
            self.base = connection.api.base(base or next(iter(digests)))

    def load(self) -> "list[LoadedAdapter]":
        from dataclasses import replace

        from composer.formats.checkpoint import open_checkpoint
        from composer.variants import load_deltas

        architecture = None
        if self.base:
            architecture = self.connection.api.architecture(self.base["digest"])
        elif self.base_dir:
            architecture = open_checkpoint(self.base_dir).architecture
        places = [
            release_directory(self.connection, release) if release else Path(name)
            for name, release in zip(self.names, self.releases, strict=True)
        ]
        return [
            replace(load_deltas(place, architecture), name=name) for place, name in zip(places, self.names, strict=True)
        ]

    def probe(
        self,
        loaded: "list[LoadedAdapter]",
        weights: list[float],
        own: list[str],
        guards: list[str],
        k: int,
        device: str,
    ) -> "ProbeResult":
        from composer.probe import Member, probe

        names = own or [release and self._own_suite(release) for release in self.releases]
        if len(names) != len(self.names) or not all(names):
            lacking = [name for name, suite in zip(self.names, names, strict=False) if not suite]
            raise Usage(
                "suite_missing",
                f"A probe needs a suite for each adapter; none is known for {', '.join(lacking) or 'some'}.",
                next_step="Run `adaptory eval REF --suite S`, or name one --suite per adapter.",
            )
        members = [
            Member(one.name, one.deltas, weight, fetch_suite(self.connection, str(name)))
            for one, weight, name in zip(loaded, weights, names, strict=True)
        ]
        return probe(self._model(device), members, [fetch_suite(self.connection, name) for name in guards], k)

    def _own_suite(self, release: Json) -> str | None:
        from registry.client.api import release_path

        return self.connection.api.get(f"{release_path(release)}/target-suite")["target_suite"]

    def _model(self, device: str) -> "LoadedModel":
        from composer.evaluate import load_model

        if self.base is None and self.base_dir is None:
            raise Usage("base_missing", "A probe needs the base's weights.", next_step="Name it with --base.")
        directory = base_checkpoint(self.base, self.base_dir).path if self.base else self.base_dir
        return load_model(directory or Path(), device)


def _release_or_base(connection: Connection, what: str) -> tuple[Json | None, Json]:
    """A release and its base, or a base alone. A base's alias may look like a repository."""
    try:
        release = connection.api.resolve(parse_reference(what))["release"]
    except (Usage, NotFound) as error:
        try:
            return None, connection.api.base(what)
        except NotFound:
            raise error from None
    return release, connection.api.base(release["base"]["digest"])


def _weights(text: str | None, count: int) -> list[float]:
    try:
        weights = [float(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count:
        raise Usage(
            "bad_weights",
            f"--weights {text} is not {count} numbers.",
            next_step="Write one number per adapter: 1,0.5,1",
        )
    return weights
