"""adaptory suite guard: a guard suite of a base's own answers."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from composer.formats.recipes.instructions import INSTRUCTIONS
from composer.formats.untrusted import read_text
from registry.cli.console import complete, render
from registry.cli.console.connect import base_checkpoint, connected
from registry.cli.console.options import BaseDir, Device
from registry.cli.console.render import JsonFlag
from registry.cli.evaluation.quality import suite_app
from registry.errors import Conflict, Usage

if TYPE_CHECKING:
    from composer.evaluation.guard import GuardSuite

NAME = "guard-instructions"
EXAMPLES, TOKENS = 32, 32


@suite_app.command()
def guard(  # noqa: PLR0913
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="A registered base or a checkpoint directory.", autocompletion=complete.bases
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="A new file; NAME.yaml by default.")
    ] = None,
    name: Annotated[str, typer.Option(help="The suite's name.")] = NAME,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Own instructions, one per line, instead of ours.")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            min=8, help=f"The number of instructions: the first of ours, {EXAMPLES} by default; all of yours."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="The most tokens of an answer.")] = TOKENS,
    device: Device = "auto",
    base_dir: BaseDir = None,
    json: JsonFlag = False,
) -> None:
    """Write a guard suite: general instructions with the base's own answers.

    A release that costs no general ability answers them as the base does. A fit with this guard leaves the base as it
    is there, and gates measure what a release costs.
    """
    from composer.evaluation.guard import answer_guard
    from composer.evaluation.model import load_model

    asked = _asked(prompts, examples)
    path = output or Path(f"{name}.yaml")
    if path.exists():
        raise Conflict("output_exists", f"{path} exists.", subject=str(path))
    with ExitStack() as stack:
        directory = Path(base)
        if not directory.is_dir():
            registered = stack.enter_context(connected()).api.base(base)
            directory = base_checkpoint(registered, base_dir).path
        loaded = load_model(directory, device)
    description = f"General instructions with the answers of {Path(base).name}"
    with render.progress(f"answer as {Path(base).name}", len(asked), "instructions") as done:
        made = answer_guard(loaded, asked, name, description, tokens, done)
    path.write_text(yaml.safe_dump(made.suite.to_json(), sort_keys=False, allow_unicode=True, width=120))
    document = {
        "file": str(path),
        "suite": made.suite.name,
        "digest": made.suite.digest,
        "examples": made.suite.count,
        "cut": made.cut,
        "unanswered": list(made.unanswered),
    }
    render.document(document, json, lambda: _show(made, path, tokens))


def _asked(prompts: Path | None, examples: int | None) -> Sequence[str]:
    """The instructions. Raises Usage for more than there are."""
    from composer.conflicts.examine import parse_prompts
    from composer.formats.recipes.suite import MAX_FILE_BYTES

    known = parse_prompts(read_text(prompts, MAX_FILE_BYTES), str(prompts)) if prompts else INSTRUCTIONS
    count = examples or (len(known) if prompts else EXAMPLES)
    if count > len(known):
        where = str(prompts) if prompts else "our list"
        message = f"--examples {count}: {where} has {len(known)} instructions."
        raise Usage("bad_setting", message, subject="--examples", next_step="Name a smaller number, or --prompts FILE.")
    return known[:count]


def _show(made: "GuardSuite", path: Path, tokens: int) -> None:
    suite = made.suite
    cut = f", {made.cut} of them cut after {tokens} tokens" if made.cut else ""
    render.out(f"wrote {path}: {suite.count} instructions with the base's answers{cut}")
    if made.unanswered:
        render.out(f"left out, since the base answers nothing: {', '.join(made.unanswered)}")
    render.out("Use it on this machine, or publish it for releases and recipes:")
    render.out(f"  adaptory combine … --method regmean --guard {path}")
    render.out(f"  adaptory suite add {path}")
    render.out(f"  adaptory tame REF --as RELEASE --guard {suite.name}")
    render.out(f"In a recipe, name it under `evaluate`: [{suite.name}].")
