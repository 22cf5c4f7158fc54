"""Suites and their scores: suite add and list, score delete and import."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from registry import wire
from registry.cli.console import complete, render
from registry.cli.console.connect import connected, resolved
from registry.cli.console.groups import group
from registry.cli.console.render import JsonFlag
from registry.cli.console.scores import score_table
from registry.errors import NotFound, Usage
from registry.sdk.connection import Connection
from registry.sdk.suites import refuse_bad_suite_name

if TYPE_CHECKING:
    from composer.evaluation.evaluate import SuiteScore

suite_app = group("suite", "Evaluation sets, versioned by content.")
score_app = group("score", "Recorded scores.")


@dataclass(frozen=True, slots=True)
class MeasuredScore:
    """A score, what measured it if that is not this program, and the phrase that was before each prompt."""

    score: "SuiteScore"
    source: str | None = None
    phrase: str = ""

    def to_json(self) -> dict[str, object]:
        others = {"source": self.source, "phrase": self.phrase}
        return {**self.score.to_json(), **{name: value for name, value in others.items() if value}}


@dataclass(frozen=True, slots=True)
class EvaluationTarget:
    """A release or a base that suites are run on; `release` is None for a base."""

    name: str
    release: "wire.search.ResolvedRelease | None"
    base: "wire.catalog.BaseOut"

    @property
    def is_model(self) -> bool:
        return self.release is not None and self.release.kind == "model"

    @property
    def is_set(self) -> bool:
        return self.release is not None and self.release.kind == "set"

    @property
    def weights(self) -> str:
        """Names what must be in memory: the base, or a merged model of its own."""
        return self.identity if self.is_model else self.base.digest

    @property
    def identity(self) -> str:
        """Names the bytes that are measured."""
        release = self.release
        return f"{self.base.digest}+{release.repository}#{release.commit}" if release else self.base.digest

    @property
    def scores_path(self) -> str:
        return f"{self.release.path if self.release else f'/v1/bases/{self.base.digest}'}/scores"

    def phrase_for(self, connection: Connection, suite: str) -> str:
        """The phrase before the suite's prompts, which the release states; empty without one."""
        if self.release is None:
            return ""
        return connection.api.get(self.release.path, wire.catalog.ReleaseOut).provenance.phrases.get(suite, "")

    def record(
        self, connection: Connection, scores: Sequence[MeasuredScore], results: Sequence[Mapping[str, object]]
    ) -> None:
        """Records scores, and the results of each example behind them."""
        rows = [
            {key: value for key, value in row.to_json().items() if key not in ("suite", "task", "phrase")}
            for row in scores
        ]
        connection.api.post(self.scores_path, {"scores": rows, "results": results})


@suite_app.command()
def add(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="The suites' YAML.")], json: JsonFlag = False
) -> None:
    """Register suites; new content under a known name becomes its current version.

    A suite named NAMESPACE/NAME is private like the namespace, until it is shared. A name alone is for all members.
    The directions that a file declares (metrics: {rouge_l: higher}) hold for all versions. The suite's author corrects
    them by adding the file again.
    """
    from composer.formats.recipes.suite import parse_suite

    contents = [parse_suite(file) for file in files]
    with connected() as connection:
        suites = [connection.api.post("/v1/suites", content.to_json(), wire.quality.SuiteOut) for content in contents]
    render.document(
        suites[0] if len(suites) == 1 else {"items": suites, "next": None}, json, lambda: _show_suites(suites)
    )


@suite_app.command("list")
def list_suites(json: JsonFlag = False) -> None:
    """List the current suites."""
    with connected() as connection:
        suites = list(connection.api.pages("/v1/suites", wire.quality.SuiteOut))
    render.document({"items": suites, "next": None}, json, lambda: _show_suites(suites))


@suite_app.command()
def share(
    suite: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME", help="A suite.")],
    stop: Annotated[bool, typer.Option("--stop", help="Only those who may read the namespace read it again.")] = False,
    json: JsonFlag = False,
) -> None:
    """Let every member of the registry read a namespace's suite, with its examples."""
    refuse_bad_suite_name(suite)
    with connected() as connection:
        path = f"/v1/suites/{quote(suite, safe='')}/shared"
        shared = connection.api.put(path, {"shared": not stop}, wire.quality.SuiteOut)
    render.document(shared, json, lambda: _show_suites([shared]))


def _show_suites(suites: "list[wire.quality.SuiteOut]") -> None:
    rows = [
        (
            f"{suite.name}@{suite.version}" if suite.version else suite.name,
            suite.kind if suite.task == "teacher_forced" else f"{suite.kind}, {suite.task}",
            suite.examples,
            suite.digest[:12],
            "all" if suite.shared else suite.namespace,
            [f"{metric}: {better}" for metric, better in suite.metrics.items()],
        )
        for suite in suites
    ]
    render.table("", ("suite", "kind", "examples", "digest", "read by", "better"), rows)


@score_app.command()
def delete(
    what: Annotated[str, typer.Argument(metavar="REF|BASE", help="A release, or a base by name.")],
    score: Annotated[
        str, typer.Argument(metavar="SUITE.METRIC", help="For older content, the suite's digest instead of its name.")
    ],
    json: JsonFlag = False,
) -> None:
    """Delete a score that you recorded; admins may delete any. The audit log keeps the value."""
    suite, _, metric = score.rpartition(".")
    if "/" in score or not suite or not metric:
        next_step = "Write SUITE.METRIC, as in sql-exact.accuracy."
        raise Usage("bad_score_name", f"{score} does not name a score.", subject=score, next_step=next_step)
    with connected() as connection:
        path = EvaluationTarget(what, *release_or_base(connection, what)).scores_path
        deleted = connection.api.delete(
            f"{path}/{quote(suite, safe='')}/{quote(metric, safe='')}", wire.quality.ScoreOut
        )
    render.document(deleted, json, lambda: render.out(f"deleted {score} = {render.cell(deleted.value)} of {what}"))


@score_app.command("import")
def import_scores(
    ref: Annotated[str, typer.Argument(help="A release.", autocompletion=complete.references)], json: JsonFlag = False
) -> None:
    """Record the scores that a release's README.md and .eval_results report, as `push` does.

    They are shown as reported. They never replace measured scores, and a policy with `measured: true` ignores them.
    """
    with connected() as connection:
        release = resolved(connection, ref)
        imported = connection.api.post(f"{release.path}/scores/import", None, wire.quality.ScoresImported)
    for finding in imported.warnings:
        render.say(f"{finding['severity']}: {finding['message']}")

    def show() -> None:
        if imported.scores:
            score_table(release.name, imported.scores)
        else:
            render.out(f"{release.name} reports no scores that can be recorded.")

    render.document(imported, json, show)


def release_or_base(
    connection: Connection, what: str
) -> "tuple[wire.search.ResolvedRelease | None, wire.catalog.BaseOut]":
    """A release and its base, or a base alone. A base's alias may look like a repository."""
    try:
        release = resolved(connection, what)
    except (Usage, NotFound) as error:
        try:
            return None, connection.api.base(what)
        except NotFound as unknown:
            raise (error if "/" in what else unknown) from None
    return release, connection.api.base(release.base.digest)
