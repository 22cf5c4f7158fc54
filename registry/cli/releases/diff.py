"""Differences between two releases or directories: facts, factors, scores, files, provenance."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composer.formats.untrusted import cut
from registry import wire
from registry.cli.console import complete, render
from registry.cli.console.connect import connected, release_directory
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.cli.evaluation.quality import release_or_base
from registry.errors import NotFound, Usage
from registry.errors.translation import refuse_errors
from registry.sdk.connection import Connection

if TYPE_CHECKING:
    from composer.formats.adapters.compare import AdapterComparison
    from composer.formats.adapters.inspection import Inspection
    from registry.client.diff import ChangedExample, ComparedFacts, Differences, ScoreDifference
    from registry.formats.lineage import Changed, Lineage

TOP_MODULES = 20
EXAMPLE_CHARS = 300


@dataclass(frozen=True, slots=True)
class DiffSide:
    """One side, of the kind adapter, model or base: its directory if its modules can be compared, its lineage if it is
    a composition, and its results by suite digest, example by example. A directory has no `path` in the API."""

    name: str
    kind: str
    compared: "ComparedFacts"
    directory: Path | None = None
    made: "Lineage | None" = None
    path: str = ""
    results: "dict[str, wire.quality.SuiteResultsOut]" = field(
        default_factory=dict[str, "wire.quality.SuiteResultsOut"]
    )


@root.command()
def diff(
    old: Annotated[
        str,
        typer.Argument(metavar="REF|DIR|BASE", help="The old release, or a base.", autocompletion=complete.references),
    ],
    new: Annotated[
        str,
        typer.Argument(metavar="REF|DIR|BASE", help="The new release, or a base.", autocompletion=complete.references),
    ],
    everything: Annotated[bool, typer.Option("--all", help="Show every module, not only the most changed.")] = False,
    examples: Annotated[
        bool, typer.Option("--examples", help="List the examples of suites whose answer got better or worse.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Compare two releases or directories: facts, module deltas, scores with errors, files, provenance.

    Scores that were recorded with the result of each example are compared example by example: better, worse, or how
    many examples would tell. A release and a base are compared by their scores alone.
    """
    from registry.client.diff import changed_examples, differences, differences_in_scores
    from registry.formats.lineage import side_by_side

    before, after, suites = _subjects(old, new, with_suites=examples)
    with_base = "base" in (before.kind, after.kind)
    if with_base:
        _warn_of_base(before, after)
    elif before.kind != after.kind:
        raise Usage("kinds_differ", f"{old} is of the kind {before.kind}, {new} of the kind {after.kind}.")
    deltas = None if with_base else _compare(before.directory, after.directory)
    compare = differences_in_scores if with_base else differences
    shown = _Shown(
        before.name,
        after.name,
        compare(before.compared, after.compared, before.results, after.results),
        side_by_side(before.made, after.made),
        deltas,
    )
    if examples:
        shown.examples = [
            row
            for suite in suites
            for row in changed_examples(suite, before.results[suite.digest], after.results[suite.digest])
        ]
    render.document(shown.to_json(), json, lambda: _show(shown, everything=everything))


@dataclass(slots=True)
class _Shown:
    """The report. `deltas` is None without modules to compare, `examples` if they are not wanted."""

    old: str
    new: str
    differences: "Differences"
    composition: "list[Changed]"
    deltas: "AdapterComparison | None"
    examples: "list[ChangedExample] | None" = None

    def to_json(self) -> dict[str, object]:
        deltas = self.deltas.to_json() if self.deltas else None
        document = {"old": self.old, "new": self.new, **self.differences, "composition": self.composition}
        return document | {"deltas": deltas} | ({} if self.examples is None else {"examples": self.examples})


def _subjects(old: str, new: str, *, with_suites: bool) -> "tuple[DiffSide, DiffSide, list[wire.quality.SuiteOut]]":
    """The two sides, and the suites that both have results on, if wanted; two directories need no registry."""
    if Path(old).is_dir() and Path(new).is_dir():
        return _directory(Path(old)), _directory(Path(new)), []
    with connected() as connection:
        before, after = (
            _directory(Path(text)) if Path(text).is_dir() else _registered(connection, text) for text in (old, new)
        )
        common = _digests(before) & _digests(after)
        before, after = (replace(side, results=_results(connection, side, common)) for side in (before, after))
        compared = sorted(before.results.keys() & after.results.keys()) if with_suites else []
        return before, after, [connection.api.get(f"/v1/suites/{digest}", wire.quality.SuiteOut) for digest in compared]


def _digests(subject: DiffSide) -> set[str]:
    return {score.suite_digest for score in subject.compared.scores}


def _warn_of_base(before: DiffSide, after: DiffSide) -> None:
    """Raises Usage for a directory, which has no scores. Says so if the release is for another base, and which
    command records what is missing."""
    for side, other in ((before, after), (after, before)):
        if not side.path:
            raise Usage(
                "kinds_differ", f"{other.name} is a base, {side.name} a directory.", next_step="Name a release."
            )
        if side.kind == "base" != other.kind and other.compared.base_digest != side.compared.base_digest:
            render.say(f"warning: {other.name} is for the base {other.compared.base_name}, not for {side.name}")
    if not _digests(before) & _digests(after):
        render.say(f"no suite has scores of both: adaptory eval {before.name} {after.name} --suite NAME records them")


def _results(connection: Connection, subject: DiffSide, digests: set[str]) -> "dict[str, wire.quality.SuiteResultsOut]":
    """The results by suite digest, of those suites for which they were recorded."""
    results: dict[str, wire.quality.SuiteResultsOut] = {}
    for digest in sorted(digests):
        with suppress(NotFound):
            results[digest] = connection.api.get(
                f"{subject.path}/scores/{digest}/results", wire.quality.SuiteResultsOut
            )
    return results


def _registered(connection: Connection, text: str) -> DiffSide:
    """A release or a base."""
    from registry.client.diff import ComparedFacts
    from registry.client.lineage import fetch_note, of_release
    from registry.formats.lineage import of_note

    named, base = release_or_base(connection, text)
    if named is None:
        scores = ComparedFacts(base_digest=base.digest, base_name=base.name, scores=base.scores)
        return DiffSide(text, "base", scores, path=f"/v1/bases/{base.digest}")
    release = connection.api.get(named.path, wire.catalog.ReleaseOut)
    directory = release_directory(connection, release) if release.kind == "adapter" else None
    note = _note(directory) if directory else fetch_note(connection.api, release)
    made = of_release(release, note) or of_note(note)
    return DiffSide(release.name, release.kind, ComparedFacts.of(release), directory, made, release.path)


def _note(directory: Path) -> bytes:
    from registry.formats.lineage import NOTE_BYTES, NOTE_FILE

    if not (directory / NOTE_FILE).is_file():
        return b""
    with (directory / NOTE_FILE).open("rb") as file:
        return file.read(NOTE_BYTES)


def _directory(directory: Path) -> DiffSide:
    """Describes a directory as its release would be described, as far as its files allow."""
    from composer.formats.adapters.serving import SERVERS, judge
    from composer.formats.adapters.spectrum import spectrum
    from composer.formats.checkpoints.card import CARD_FILE, card_provenance
    from registry.client.diff import ComparedFacts
    from registry.client.push import collect
    from registry.client.selection import select_files
    from registry.formats.lineage import of_note

    seen = _inspected(directory)
    servers, _ = judge(seen.adapter.config, seen.facts, seen.placed)
    used = spectrum(seen.adapter, seen.placed)
    card = directory / CARD_FILE
    compared = ComparedFacts(
        base_name=seen.facts.base_model_name_or_path,
        facts=seen.facts.to_json() | {"spectrum": used.summary() if used else None},
        servers=[server for bit, server in enumerate(SERVERS) if servers >> bit & 1],
        provenance=card_provenance(card.read_bytes())[0] if card.is_file() else {},
        files=[file.manifest for file in collect(select_files(directory))],
    )
    return DiffSide(str(directory), "adapter", compared, directory, of_note(_note(directory)))


def _inspected(directory: Path) -> "Inspection":
    from composer.formats.adapters.inspection import inspect

    seen = inspect(directory, None)
    refuse_errors(seen.findings, str(directory))
    return seen


def _compare(old: Path | None, new: Path | None) -> "AdapterComparison | None":
    from composer.formats.adapters.compare import compare

    if old is None or new is None:
        return None
    before, after = _inspected(old), _inspected(new)
    return compare(before.adapter, after.adapter, before.placed, after.placed)


def _show(shown: _Shown, *, everything: bool) -> None:
    differences = shown.differences
    render.heading(f"{shown.old} -> {shown.new}: {_verdict(differences)}")
    for finding in differences["breaking"]:
        render.out(f"  breaking: {finding['message']}")
    changed = {"composition": shown.composition, "facts": differences["facts"], "provenance": differences["provenance"]}
    for what, rows in changed.items():
        _table(what, ("", "old", "new"), [(row["name"], row["old"], row["new"]) for row in rows])
    if shown.deltas:
        _show_deltas(shown.deltas, everything=everything)
    scores = [_score_row(row) for row in differences["scores"]]
    _table("scores", ("suite", "metric", "old", "new", "difference", ""), scores)
    for row in shown.examples or ():
        render.lines(f"{row['suite']}, example {row['example']}: {_change(row)}", _example_lines(row))
    files = differences["files"]
    paths = [("added", files["added"]), ("removed", files["removed"]), ("changed", files["changed"])]
    _table("files", ("", "path"), [(how, path) for how, changed_paths in paths for path in changed_paths])


def _verdict(differences: "Differences") -> str:
    if differences["change"] is None:
        return "scores"
    return {
        "breaking": "a breaking change",
        "weights": "other weights",
        "files": "the same weights, other files",
        "none": "the same files",
    }[differences["change"]]


def _show_deltas(deltas: "AdapterComparison", *, everything: bool) -> None:
    from composer.formats.adapters.compare import EnergyChange

    modules = [module for module in deltas.modules if everything or module.status != "same"]
    shown = modules if everything else modules[:TOP_MODULES]
    nothing = dict.fromkeys(EnergyChange().to_json())
    rows: list[tuple[Any, ...]] = []
    for module in shown:
        energies = module.change.to_json() if module.change else nothing
        ranks = _ranks(module.rank_old, module.rank_new)
        remark = "" if module.status == "changed" else module.status
        rows.append((module.module, remark, ranks, *energies.values()))
    overall = ("all deltas", "", "", *deltas.overall.to_json().values())
    _table("modules", ("module", "", "rank", "|D|", "|D'|", "cosine", "|D'-D|", "gained", "lost"), [overall, *rows])
    if len(modules) > len(shown):
        render.say(f"{len(modules) - len(shown)} more modules changed: --all shows them")
    for name in deltas.left_out:
        render.say(f"warning: {name} could not be compared")


def _ranks(old: int | None, new: int | None) -> str:
    return render.cell(new) if old == new else f"{render.cell(old)} -> {render.cell(new)}"


def _change(row: "ChangedExample") -> str:
    old, new = row["old"]["score"], row["new"]["score"]
    return f"{'better' if new > old else 'worse'}, {render.cell(old)} -> {render.cell(new)}"


def _example_lines(row: "ChangedExample") -> list[tuple[str, Any]]:
    texts = {"prompt": row["prompt"], "wanted": row["completion"]}
    texts |= {"old": row["old"].get("answer"), "new": row["new"].get("answer")}
    return [(name, cut(text, EXAMPLE_CHARS)) for name, text in texts.items() if text is not None]


def _score_row(row: "ScoreDifference") -> tuple[Any, ...]:
    if row["difference"] is None:
        note = "on other examples" if row["old"] is not None and row["new"] is not None else ""
        difference = None
    else:
        better = "better" if row["better"] else "worse" if row["difference"] else "the same"
        note = {True: better, False: f"{better}, within its error", None: better}[row["beyond"]]
        difference = render.with_error(row["difference"], row["stderr"])
        if paired := row["paired"]:
            difference, note = f"{row['difference']:+.3f}", paired["in_words"]
            if paired["low"] is not None:
                difference += f" ({paired['low']:+.3f} to {paired['high']:+.3f})"
    old = _side(row["old"], row["old_stderr"], row["old_n"], reported=row["old_reported"])
    new = _side(row["new"], row["new_stderr"], row["new_n"], reported=row["new_reported"])
    return (row["suite"], row["metric"], old, new, difference, note)


def _side(value: float | None, stderr: float | None, n: int | None, *, reported: bool) -> str | None:
    return None if value is None else render.with_error(value, stderr, n or 0) + " reported" * reported


def _table(title: str, columns: tuple[str, ...], rows: list[Any]) -> None:
    if rows:
        render.table(title, columns, rows)
