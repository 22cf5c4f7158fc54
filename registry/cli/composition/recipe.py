"""Recipes from other tools: recipe import."""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from composer.formats.untrusted import read_text
from registry.cli.console import render
from registry.cli.console.groups import group
from registry.errors import Conflict

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
