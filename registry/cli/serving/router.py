"""The router of a set, for gateways of one's own."""

from pathlib import Path
from typing import Annotated

import typer

from registry.cli.console import render
from registry.cli.console.connect import connected, release_directory, resolved
from registry.cli.console.groups import root
from registry.cli.releases.release import Ref
from registry.errors import Usage

Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")]


@root.command()
def router(ref: Ref, output: Output = None) -> None:
    """Print the router of a set as a Python program that needs no other package.

    Its function `choose` returns the name of the adapter that should answer a prompt, as `adaptory mirror` names it.
    `adaptory route` needs no such file.
    """
    from composer.formats.sets.adapter_set import SET_FILE, read_set
    from composer.formats.sets.python_router import to_python

    with connected() as connection:
        release = resolved(connection, ref)
        if release.kind != "set":
            raise Usage("not_a_set", f"{release.name} is not a set.", subject=release.name)
        made = read_set(release_directory(connection, release) / SET_FILE)
    if output is None:
        render.out(to_python(made))
    else:
        output.write_text(to_python(made, output.name), encoding="utf-8")
        render.say(f"{output}: chooses among {', '.join(sorted(made.members))}")
