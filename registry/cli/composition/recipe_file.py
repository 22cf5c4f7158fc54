"""A recipe run on this machine: its inputs are directories, or releases whose files are fetched. And recipe import."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import yaml

from composer.formats.checkpoints.checkpoint import read_json
from composer.formats.checkpoints.staging import NOTE_FILE
from composer.formats.recipes.phrases import fit_without_phrase
from composer.formats.untrusted import read_text
from registry.cli.composition import optimize as optimizing
from registry.cli.composition.calibration import digest_of_base
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import group
from registry.errors import Conflict, Usage
from registry.sdk.conflicts import AdapterGroup, calibration_set
from registry.wire.catalog import ReleaseOut

if TYPE_CHECKING:
    from composer.evaluation.calibration import Calibration
    from composer.evaluation.model import LoadedModel
    from composer.formats.recipes.recipe import Recipe
    from composer.formats.recipes.rounding import Rounding
    from composer.formats.recipes.suite import CalibrationSet, Suite
    from composer.formats.recipes.weights import Weight
    from composer.merge.proof import ProofPrompt
    from composer.optimize.report import OptimizeDocument

RecipeFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="A recipe in YAML, the same that `adaptory compose` runs. It states adapters, weights, suites and method; "
        "--adapter and --suite name the directories and files of those that are not released.",
    ),
]
Optimized = Annotated[
    bool, typer.Option("--optimize", help="With a recipe: find method, settings and weights first, and use them.")
]


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """The options of `merge` and `combine` that add to a recipe. `as_adapter`: the result is an adapter. `prove`: the
    merged model is compared with its base and adapters."""

    base: Path | None
    adapters: Sequence[str]
    suites: Sequence[Path]
    device: str
    optimize: bool
    json: bool
    as_adapter: bool = False
    prove: bool = False


@dataclass(frozen=True, slots=True)
class LocalCombination:
    """The inputs and the method of a combination or a merge, as a recipe or options state them. `calibration` has the
    examples of a fitted method; `proof` are prompts to compare a merged model on. `searched` is the report of the
    search that chose the method."""

    base: Path | None
    adapters: "list[tuple[Path, Weight]]"
    method: str
    settings: dict[str, object]
    calibration: "Calibration | None"
    rounding: "Rounding"
    dtype: str | None = None
    proof: "Sequence[ProofPrompt]" = ()
    strict: bool = False
    note: Mapping[str, Any] = field(default_factory=dict[str, Any])
    searched: "OptimizeDocument | None" = None

    @property
    def search_row(self) -> dict[str, object]:
        """The report of the search in the result's document; empty without a search."""
        return {"optimized": self.searched} if self.searched else {}


def combination_of(path: Path, options: RecipeOptions) -> LocalCombination:
    """Reads the recipe, finds its inputs and suites, and searches if the recipe or an option requests it. Prints the
    reason and exits 1 if nothing fits. Raises InvalidFile for a bad recipe, Usage for one that publishes only a set,
    and what the registry raises for a release or a suite that is not on this machine."""
    from composer.formats.recipes.recipe import MAX_FILE_BYTES, Optimize, load_recipe

    recipe = load_recipe(read_text(path, MAX_FILE_BYTES), str(path))
    if recipe.makes_only_a_set:
        message, next_step = f"{path} publishes a set, which combines nothing.", f"Run `adaptory compose {path}`."
        raise Usage("only_a_set", message, subject=str(path), next_step=next_step)
    if options.optimize and recipe.optimize is None:
        recipe = recipe.model_copy(update={"optimize": Optimize.model_validate({})})
    if recipe.gates or recipe.evaluate:
        render.say("evaluations and gates of the recipe are for `adaptory compose`: nothing is evaluated here")
    with ExitStack() as stack:
        names, beside = _names(recipe, path, options.adapters), path.parent / (recipe.base or "")
        known = str(options.base) if options.base else str(beside) if recipe.base and beside.is_dir() else recipe.base
        group = AdapterGroup(lambda: stack.enter_context(connected()), names, known, None, render, least=1)
        if group.base is None and group.base_directory is None:
            message, step = f"{path} names no base, and its inputs are directories.", "Name its directory with --base."
            raise Usage("base_missing", message, subject=str(path), next_step=step)
        return _Local(recipe, group, _files(path, options.suites), options).combination()


def _names(recipe: "Recipe", path: Path, given: Sequence[str]) -> list[str]:
    """The directories that --adapter names, in the order of the inputs; else those that the recipe names, relative to
    its file; else its references."""
    if given and len(given) != len(recipe.inputs):
        message = f"--adapter names {len(given)} directories for the {len(recipe.inputs)} inputs of {path}."
        raise Usage("inputs_uneven", message, subject="--adapter")
    for name in given:
        if not Path(name).is_dir():
            message, step = (
                f"{name} in --adapter is not a directory.",
                "Name a directory; the recipe states the weight.",
            )
            raise Usage("no_adapter", message, subject=name, next_step=step)
    beside = [path.parent / source.adapter for source in recipe.inputs]
    stated = [
        str(directory) if directory.is_dir() else source.adapter
        for directory, source in zip(beside, recipe.inputs, strict=True)
    ]
    return list(given) or stated


def _files(path: Path, suites: Sequence[Path]) -> dict[str, str]:
    """The files of suites by name: those beside the recipe, and those that --suite names."""
    from composer.formats.recipes.suite import parse_suite

    beside = {file.stem: str(file.absolute()) for file in path.parent.glob("*.yaml") if file != path}
    return beside | {parse_suite(file).name: str(file.absolute()) for file in suites}


@dataclass(frozen=True, slots=True)
class _Local:
    """A recipe whose inputs are known. `files` are those of suites, by name; others are the registry's."""

    recipe: "Recipe"
    group: AdapterGroup
    files: Mapping[str, str]
    options: RecipeOptions

    def combination(self) -> LocalCombination:
        from composer.formats.recipes.methods import parse_settings
        from composer.formats.recipes.weights import Weight
        from composer.merge.proof import proof_prompts

        suites = self._member_suites()
        evaluated = [self._suite(name) for name in self.recipe.evaluate] if self._needs_suites else []
        guards = [suite for suite in evaluated if suite.kind == "guard"]
        weights = [Weight(source.weight, source.rules) for source in self.recipe.inputs]
        phrases = [source.phrase or "" for source in self.recipe.inputs]
        method, settings, count, searched = self.recipe.method, dict(self.recipe.settings), 0, None
        if self.recipe.optimize:
            searched = self._searched(suites, guards, weights)
            choice: Any = searched["choice"]
            method, settings = choice["method"], choice["settings"]
            weights = [weight.times(factor) for weight, factor in zip(weights, choice["factors"], strict=True)]
            phrases = choice.get("phrases", [""] * len(weights))
            count = len(searched["searched"][0]["examples"])
        parsed = parse_settings(method, settings)
        sets = self._sets(suites, phrases, count or getattr(parsed, "examples", 0)) if parsed.pipeline.fitted else []
        named = {suite.name: phrase for suite, phrase in zip(suites, phrases, strict=True) if suite and phrase}
        return LocalCombination(
            base=self.group.directory,
            adapters=list(zip(self.group.directories, weights, strict=True)),
            method=method,
            settings=settings,
            calibration=self._calibration(parsed, sets, guards, searched) if sets else None,
            rounding=self.recipe.rounding,
            dtype=self.recipe.dtype,
            proof=proof_prompts([*filter(None, suites), *evaluated], named),
            strict=bool(self.recipe.policy.get("strict")),
            note={
                "recipe": self.recipe.to_json(),
                **({"phrases": named} if named else {}),
                **({"accepted": searched["accepted"]} if searched and "accepted" in searched else {}),
            },
            searched=searched,
        )

    def _suite(self, name: str) -> "Suite":
        return self.group.suite(self.files.get(name, name))

    @property
    def _is_fitted(self) -> bool:
        from composer.formats.recipes.methods import parse_settings

        return parse_settings(self.recipe.method, self.recipe.settings).pipeline.fitted or bool(self.recipe.optimize)

    @property
    def _needs_suites(self) -> bool:
        """Whether suites change the result: other combinations need none, and so no registry that has them."""
        has_phrases = any(source.phrase for source in self.recipe.inputs)
        return self._is_fitted or self.options.prove or has_phrases

    def _member_suites(self) -> "list[Suite | None]":
        """The suite of each input: the one that the recipe names, or the target suite of its release; none if none is
        needed. Raises Usage for an input that is fitted and answers its suite only after a phrase."""
        if not self._needs_suites:
            return [None] * len(self.recipe.inputs)
        named = [
            source.suite or (release and not source.prompts and self.group.own_suite(release)) or None
            for source, release in zip(self.recipe.inputs, self.group.releases, strict=True)
        ]
        suites = [self._suite(name) if name else None for name in named]
        if self._is_fitted:
            for index, (source, suite) in enumerate(zip(self.recipe.inputs, suites, strict=True)):
                if suite and not source.prompts and (phrase := self._phrases(index).get(suite.name)):
                    name = self.group.names[index]
                    raise Usage("phrased_input", fit_without_phrase(name, suite.name, phrase), subject=name)
        return suites

    def _phrases(self, index: int) -> Mapping[str, str]:
        """The phrases before a suite's prompts that an input states: its release, or the note in its directory."""
        if release := self.group.releases[index]:
            return self.group.connection.api.get(release.path, ReleaseOut).provenance.phrases
        note = self.group.directories[index] / NOTE_FILE
        stated: Any = read_json(note, "missing_note", "Combine them again.").get("phrases") if note.is_file() else None
        return cast("Mapping[str, str]", stated) if isinstance(stated, dict) else {}

    def _load(self) -> "LoadedModel":
        from composer.evaluation.model import load_model

        return load_model(self.group.directory, self.options.device)

    def _searched(
        self, suites: "Sequence[Suite | None]", guards: "Sequence[Suite]", weights: "Sequence[Weight]"
    ) -> "OptimizeDocument":
        """Searches, and shows the report. Exits 1 if nothing fits."""
        from composer.formats.recipes.methods import parse_settings
        from composer.formats.recipes.policy import read_policy
        from composer.optimize.problem import SearchEffort, SearchMember

        if lacking := [name for name, suite in zip(self.group.names, suites, strict=True) if suite is None]:
            message = f"A search needs a suite for each adapter; none is known for {', '.join(lacking)}."
            raise Usage("suite_missing", message, subject=lacking[0])
        members = [
            SearchMember(adapter=adapter, suite=suite, weight=weight, phrase=source.phrase or "")
            for adapter, suite, weight, source in zip(
                self.group.load(), suites, weights, self.recipe.inputs, strict=True
            )
            if suite
        ]
        asked: Any = self.recipe.optimize
        report = optimizing.search(
            cache(self._load),
            members,
            guards,
            parse_settings(self.recipe.method, self.recipe.settings),
            read_policy(self.recipe.policy),
            content=f"{self.group.content()} {self.options.device}",
            effort=SearchEffort.of(asked),
            as_adapter=self.options.as_adapter,
        )
        if report["choice"] is None or not self.options.json:
            optimizing.present(report, self.options.json, explain=False)
        return report

    def _sets(self, suites: "Sequence[Suite | None]", phrases: Sequence[str], count: int) -> "list[CalibrationSet]":
        from composer.formats.recipes.suite import CalibrationSet

        sets: list[CalibrationSet] = []
        for source, suite, phrase, name in zip(self.recipe.inputs, suites, phrases, self.group.names, strict=True):
            if source.prompts:
                sets.append(CalibrationSet(prompts=source.prompts))
            elif suite:
                sets.append(calibration_set(suite, count, phrase))
            else:
                message = f"{self.recipe.method} is fitted on examples, and no suite of {name} is known."
                raise Usage("suite_missing", message, subject=name)
        return sets

    def _calibration(
        self,
        settings: Any,
        sets: "Sequence[CalibrationSet]",
        guards: "Sequence[Suite]",
        searched: "OptimizeDocument | None",
    ) -> "Calibration":
        """The examples to fit on: after a search, the same examples of the guards as the combination that it
        confirmed."""
        from composer.evaluation.calibration import Calibration
        from composer.formats.recipes.suite import guard_sets

        digest = self.group.base.digest if self.group.base else digest_of_base(self.group.directory)
        counts = None
        if searched:
            own = {examples.suite.digest for examples in sets if examples.suite}
            rows = [row for row in searched["searched"] if row["suite_digest"] not in own]
            counts = {row["suite_digest"]: len(row["examples"]) for row in rows}
        return Calibration(
            cache(self._load),
            sets,
            settings,
            base=digest,
            guards=guard_sets(guards, counts, self.recipe.guard_examples),
        )


# Recipes from other tools.
recipe_app = group("recipe", "Recipes from other tools.")


@recipe_app.command("import")
def import_recipe(
    config: Annotated[Path, typer.Argument(metavar="FILE", help="mergekit's YAML, of models BASE+ADAPTER.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new file; by default, the recipe is printed.")
    ] = None,
) -> None:
    """Turn a configuration of mergekit into a recipe, and name what has no counterpart."""
    from composer.formats.recipes.mergekit import recipe_of_mergekit
    from composer.formats.recipes.recipe import MAX_FILE_BYTES

    imported = recipe_of_mergekit(read_text(config, MAX_FILE_BYTES), str(config))
    for remark in imported.remarks:
        render.say(remark)
    text = yaml.safe_dump(imported.recipe, sort_keys=False, allow_unicode=True)
    if output is None:
        render.as_it_is(text)
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise Conflict("output_exists", f"{output} exists.", subject=str(output)) from error
    render.say(f"wrote {output}")
