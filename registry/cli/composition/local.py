"""The composer on this machine: merge, combine, convert, extract. Only a release needs a registry."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.composition.calibration import (
    ExampleFiles,
    Guards,
    Prompts,
    Suites,
    contradictions,
    fit_lines,
    fitted_adapter,
    fitting,
    local_calibration,
    prompts_of_proof,
    refuse_uneven,
)
from registry.cli.composition.compose import Rules, Settings, settings_of, with_rules
from registry.cli.composition.recipe_file import LocalCombination, Optimized, RecipeFile, RecipeOptions, combination_of
from registry.cli.console import complete, render
from registry.cli.console.connect import connected, release_directory, resolved
from registry.cli.console.groups import refuse_idle, root
from registry.cli.console.options import Device, StrictFlag
from registry.cli.console.render import JsonFlag
from registry.errors import Usage

if TYPE_CHECKING:
    from composer.formats.checkpoints.checkpoint import Checkpoint
    from composer.formats.recipes.rounding import Rounding
    from composer.merge.run import MergeReport
    from composer.methods.retention import Retention
    from composer.methods.spectral import Compression

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR[=WEIGHT]",
        help="May be repeated. With a recipe, the directory of each input, in order, without a weight.",
    ),
]
OwnMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="stack, the default, linear, svd, ties, dare_ties, knots_ties, core_tsv, …",
        autocompletion=complete.methods,
    ),
]
Sequential = Annotated[
    bool,
    typer.Option(
        "--sequential",
        help="Apply each adapter to the result of the previous ones, as two DoRA adapters of one weight need.",
    ),
]
Prove = Annotated[
    bool,
    typer.Option(
        "--prove",
        help="Load the result as users do, and compare its answers to --suite or --prompts with those of the base with "
        "the adapters in memory. If they differ, nothing is written.",
    ),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="A new directory.")]

_RANKS = 5
"""Up to this many ranks are listed; beyond it, only the range."""
_SHOWN_APART = ("out_dir", "findings", "survival", "retention", "compressions", "proof", "optimized")


@root.command()
def merge(  # noqa: PLR0913
    output: Output,
    recipe: RecipeFile = None,
    base: Annotated[Path | None, typer.Option(help="The base's checkpoint directory.")] = None,
    adapter: Adapters = None,
    method: OwnMethod = None,
    set_: Settings = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default, the base's own.")] = None,
    device: Device = "auto",
    rounding: Annotated[str | None, typer.Option(help="nearest, the default, or stochastic.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of stochastic rounding; 0 by default.")] = None,
    sequential: Sequential = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Dequantize an fp8 or 4-bit base before merging.")
    ] = False,
    rule: Rules = None,
    suite: Suites = None,
    prompts: Prompts = None,
    guard: Guards = None,
    optimize: Optimized = False,
    prove: Prove = False,
    strict: StrictFlag = False,
    json: JsonFlag = False,
) -> None:
    """Merge adapters into a checkpoint on this machine, from directories or by a recipe; nothing is published.

    Repeat the same command to resume an interrupted merge.
    """
    from composer.formats.checkpoints.checkpoint import open_checkpoint

    ways = {"--method": method, "--dtype": dtype, "--rounding": rounding, "--seed": seed, "--sequential": sequential}
    if recipe:
        _refuse_stated(ways | {"--set": set_, "--rule": rule, "--prompts": prompts, "--guard": guard})
        asked = RecipeOptions(base, adapter or [], suite or [], device, optimize, prove=prove, json=json)
        how = combination_of(recipe, asked)
    else:
        _refuse_no_recipe(adapter, optimize=optimize, base=base, needs_base=True)
        files = ExampleFiles(suite, prompts, guard, for_proof=prove)
        how = _given(adapter, rule, method, settings_of(set_, sequential=sequential), base, files, device)
        how = replace(how, dtype=dtype, rounding=_rounding(rounding, seed))
    strict = strict or how.strict
    _merge(how, open_checkpoint(how.base or Path(), dequantize), output, device, strict=strict, json=json)


def _merge(
    how: LocalCombination, checkpoint: "Checkpoint", output: Path, device: str, *, strict: bool, json: bool
) -> None:
    from composer.formats.recipes.weights import Weight
    from composer.merge.plan import plan_merge
    from composer.merge.run import run_merge

    adapters, method, settings = how.adapters, how.method, how.settings
    if how.calibration is not None:
        render.warn_of(contradictions(how.calibration, [path.name for path, _ in adapters]), strict=strict)
        fit = (method, settings)
        fitted = fitted_adapter(checkpoint.path, adapters, output, fit, how.calibration, device, strict=strict)
        adapters, method, settings = [(fitted, Weight())], "stack", {}
    merging = plan_merge(checkpoint, adapters, method, settings, how.dtype, how.rounding, device, strict=strict)
    render.warn_of(merging.findings)
    with render.progress(f"merge {output.name}", merging.size_bytes) as done:
        report = run_merge(merging, output, device, done, how.note, how.proof)
    render.warn_of(report.findings)
    document: dict[str, Any] = {**report.to_json(), **how.search_row}
    document["findings"] = [finding.to_json() for finding in (*merging.findings, *report.findings)]
    rows = _rows_of(report, document)
    render.document(document, json, lambda: _show_cut(f"merged into {output}", rows, report.compressions))


def _rounding(mode: str | None, seed: int | None) -> "Rounding":
    from composer.formats.recipes.rounding import Mode, parse_rounding

    if seed is not None and mode != Mode.STOCHASTIC:
        message = "--seed has no effect without --rounding stochastic."
        raise Usage("idle_option", message, subject="--seed", next_step="Leave it out, or add --rounding stochastic.")
    return parse_rounding(mode or Mode.NEAREST, seed or 0)


def _refuse_stated(options: Mapping[str, object]) -> None:
    refuse_idle(options, "with a recipe, which states it", "Write it into the recipe.")


def _refuse_no_recipe(adapter: list[str] | None, *, optimize: bool, base: Path | None, needs_base: bool) -> None:
    """Raises Usage for options that lack a recipe, or what a recipe states."""
    refuse_idle({"--optimize": optimize}, "without a recipe", "Name a recipe, or use `adaptory conflicts --optimize`.")
    if not adapter:
        raise Usage("no_adapter", "Neither a recipe nor --adapter is given.", subject="--adapter")
    if needs_base and base is None:
        message, step = "The base to merge into is not given.", "Name its directory with --base."
        raise Usage("base_missing", message, subject="--base", next_step=step)


def _given(  # noqa: PLR0913
    adapter: list[str] | None,
    rule: list[str] | None,
    method: str | None,
    settings: dict[str, object],
    base: Path | None,
    files: ExampleFiles,
    device: str,
) -> LocalCombination:
    """The combination that options state."""
    given, method = _adapters(adapter or []), method or "stack"
    weights = with_rules([weight for _, weight in given], rule)
    adapters = [(path, weight) for (path, _), weight in zip(given, weights, strict=True)]
    proof = prompts_of_proof(files, base) if base else []
    calibration = local_calibration(method, settings, base, files, device)
    refuse_uneven(calibration, adapters)
    rounding = _rounding(None, None)
    return LocalCombination(base, adapters, method, settings, calibration, rounding, proof=proof)


def _rows_of(report: "MergeReport", document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The printed report of a merge."""
    left_out = (*_SHOWN_APART, *(() if report.compressions else ("lost",)))
    rows = render.fields(document, *left_out) + _kept(report.retention)
    rounding = render.fields(document["survival"], "sampled_rows", "relative_size")
    rows += [(f"rounding: {name}", value) for name, value in rounding]
    return rows + ([("proof", report.proof.words)] if report.proof else [])


@root.command()
def combine(  # noqa: PLR0913
    output: Output,
    recipe: RecipeFile = None,
    adapter: Adapters = None,
    method: OwnMethod = None,
    set_: Settings = None,
    base: Annotated[Path | None, typer.Option(help="Check that the adapters fit this checkpoint directory.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Truncate every module to this rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Truncate each module to the lowest rank that keeps this share of its energy.")
    ] = None,
    rule: Rules = None,
    suite: Suites = None,
    prompts: Prompts = None,
    guard: Guards = None,
    optimize: Optimized = False,
    device: Device = "auto",
    strict: StrictFlag = False,
    json: JsonFlag = False,
) -> None:
    """Combine adapters into one PEFT adapter on this machine, from directories or by a recipe; nothing is published.

    Reports what truncation to a rank lost.
    """
    budget = {name: value for name, value in (("rank", rank), ("energy", energy)) if value is not None}
    settings = settings_of(set_)
    if twice := sorted(budget.keys() & settings.keys()):
        message = f"--{twice[0]} and --set {twice[0]} set the same value twice."
        raise Usage("two_settings", message, subject=f"--{twice[0]}")
    if recipe:
        ways = {"--method": method, "--set": set_, "--rank": rank, "--energy": energy, "--rule": rule}
        _refuse_stated(ways | {"--prompts": prompts, "--guard": guard})
        asked = RecipeOptions(base, adapter or [], suite or [], device, optimize, as_adapter=True, json=json)
        how = combination_of(recipe, asked)
    else:
        _refuse_no_recipe(adapter, optimize=optimize, base=base, needs_base=False)
        how = _given(adapter, rule, method, settings | budget, base, ExampleFiles(suite, prompts, guard), device)
    _combine(how, output, device, strict=strict or how.strict, json=json)


def _combine(how: LocalCombination, output: Path, device: str, *, strict: bool, json: bool) -> None:
    from composer.checks.bases import names_of
    from composer.export.combine import combine as combine_adapters
    from composer.formats.checkpoints.checkpoint import open_checkpoint

    checkpoint, names = open_checkpoint(how.base) if how.base else None, [path.name for path, _ in how.adapters]
    render.warn_of(contradictions(how.calibration, names), strict=strict)
    with fitting(how.calibration) as counted:
        report = combine_adapters(
            how.adapters,
            output,
            checkpoint.architecture if checkpoint else None,
            how.method,
            how.settings,
            how.note,
            calibration=counted,
            device=device,
            base_names=names_of(checkpoint.path, checkpoint.config) if checkpoint else [],
            strict=strict,
        )
    render.warn_of(report.findings)
    document: dict[str, Any] = {**report.to_json(), **how.search_row}
    readable = {**document, "ranks": _ranks(report.ranks)}
    left_out = ("out_dir", "findings", "retention", "compressions", "fit", "optimized")
    shown = render.fields(readable, *left_out) + _kept(report.retention)
    shown += fit_lines(report.fit, names)
    render.document(document, json, lambda: _show_cut(f"combined into {output}", shown, report.compressions))


@root.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="REF|DIR|FILE",
            help="An adapter of kohya, diffusers or MLX; with --to gguf a release, or a PEFT directory.",
            autocompletion=complete.references,
        ),
    ],
    base: Annotated[
        Path,
        typer.Option(
            help="The base's checkpoint directory, whose tensor names decide what each key means; with --to gguf also "
            "the GGUF file of the base."
        ),
    ],
    output: Output,
    residual_base: Annotated[
        bool,
        typer.Option("--residual-base", help="The base is the residual that a PiSSA, OLoRA, … adapter left."),
    ] = False,
    to: Annotated[str, typer.Option(help="peft, or gguf for llama.cpp.")] = "peft",
    json: JsonFlag = False,
) -> None:
    """Convert an adapter of another layout to an equivalent PEFT adapter, or a PEFT adapter to a GGUF file."""
    from composer.export.convert import convert as convert_adapter
    from composer.export.convert import convert_rebased
    from composer.formats.checkpoints.checkpoint import open_checkpoint

    if to not in ("peft", "gguf"):
        raise Usage("bad_setting", f"--to is {to!r}.", subject="--to", next_step="Write --to peft or --to gguf.")
    if to == "gguf" and residual_base:
        message = "--residual-base writes a PEFT adapter, so it has no effect with --to gguf."
        raise Usage("idle_option", message, subject="--residual-base", next_step="Convert to PEFT first, then to GGUF.")
    if to == "gguf":
        from composer.export.gguf import convert_to_gguf
        from composer.formats.gguf import open_gguf_base

        opened = open_gguf_base(base)
        document = convert_to_gguf(_adapter_directory(source), output, opened).to_json()
    else:
        write = convert_rebased if residual_base else convert_adapter
        document = write(Path(source), output, open_checkpoint(base).architecture).to_json()
    render.document(document, json, lambda: render.lines(f"converted to {output}", render.fields(document, "out_dir")))


def _adapter_directory(source: str) -> Path:
    """The directory itself, or that of a release's verified files."""
    if Path(source).exists():
        return Path(source)
    with connected() as connection:
        return release_directory(connection, resolved(connection, source))


@root.command()
def extract(  # noqa: PLR0913
    base: Annotated[Path, typer.Option(help="The base's checkpoint directory.")],
    finetuned: Annotated[Path, typer.Option(help="The directory of a checkpoint fine-tuned from it.")],
    output: Output,
    rank: Annotated[int | None, typer.Option(min=1, help="The maximum rank of each matrix; 32 by default.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Keep this share of the squared change of each matrix, at the lowest rank."),
    ] = None,
    device: Device = "auto",
    json: JsonFlag = False,
) -> None:
    """Extract an adapter from a fine-tuned checkpoint, and report what the cut to a rank lost."""
    from composer.export.extract import extract as extract_adapter
    from composer.formats.checkpoints.checkpoint import open_checkpoint

    if energy == 0:
        raise Usage(
            "bad_setting", "--energy is 0.", subject="--energy", next_step="Give a share above 0, such as 0.99."
        )
    checkpoint = open_checkpoint(base)
    size_bytes = sum(spec.size_bytes for spec in checkpoint.architecture.tensors.values())
    with render.progress(f"extract {output.name}", size_bytes) as done:
        report = extract_adapter(
            checkpoint, open_checkpoint(finetuned), output, rank=rank, energy=energy, device=device, progress=done
        )
    document = report.to_json()
    render.warn_of(report.findings)
    readable = {**document, "ranks": _ranks(report.ranks)}
    shown = render.fields(readable, "out_dir", "compressions", "saved", "findings")
    if saved := report.saved:
        shown.append(("saved in full", f"{len(saved)}: {', '.join(saved[:3])}{', …' if len(saved) > 3 else ''}"))
    render.document(document, json, lambda: _show_cut(f"extracted to {output}", shown, report.compressions))


def _kept(retention: "Retention") -> list[tuple[str, Any]]:
    """`retention  keeps 43 % of the sum; sql 61 %, terraform 22 %`"""
    return [("retention", retention.words)] if retention.words else []


def _show_cut(title: str, shown: list[tuple[str, Any]], compressions: "Sequence[Compression]") -> None:
    render.lines(title, shown)
    worst = sorted(compressions, key=lambda cut: -cut.relative)[:5]
    if worst:
        rows = [(cut.module, cut.rank, cut.full_rank, f"{cut.relative:.1%}") for cut in worst]
        render.table("modules that lost most", ("module", "rank", "of", "error"), rows)


def _ranks(modules: Mapping[int, int]) -> str | None:
    """`rank 48 in 60 modules, 32 in 8`: truncation by energy may leave a different rank in every module."""
    if len(modules) > _RANKS:
        often = max(modules, key=lambda rank: (modules[rank], rank))
        spread = f"{min(modules)} to {max(modules)} in {sum(modules.values())} modules"
        return f"{spread}, {often} most often (in {modules[often]})"
    if not modules:
        return None
    (rank, count), *others = sorted(modules.items(), key=lambda one: (-one[1], -one[0]))
    first = f"rank {rank} in {render.counted(count, 'module')}"
    return ", ".join([first, *(f"{rank} in {count}" for rank, count in others)])


def _adapters(texts: list[str]) -> list[tuple[Path, float]]:
    from composer.formats.recipes.weights import factor

    adapters: list[tuple[Path, float]] = []
    for text in texts:
        # A directory's name may contain "=": only what follows the last one can be a weight.
        path, equals, number = text.rpartition("=")
        if not (path if equals else text).strip():
            raise Usage(
                "no_adapter", "--adapter does not name a directory.", subject="--adapter", next_step="Write DIR=0.7"
            )
        if not equals or Path(text).is_dir():
            adapters.append((Path(text), 1.0))
            continue
        try:
            weight = factor(number)
        except ValueError as error:
            raise Usage(
                "bad_weight", f"{number!r} in --adapter {text} is not {error}.", subject=text, next_step="Write DIR=0.7"
            ) from error
        adapters.append((Path(path), weight))
    return adapters
