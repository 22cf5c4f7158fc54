"""The front, which turns names of channels into versions, and the router of a set as a program for other gateways."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from registry.cli.console import render
from registry.cli.console.connect import connected, release_directory, resolved
from registry.cli.console.groups import root
from registry.cli.releases.release import Ref
from registry.errors import Usage


def address(text: str) -> tuple[str, int]:
    """The host and port of HOST:PORT; loopback for a port alone. Raises Usage for anything else."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise Usage("bad_address", f"{text} has no port.", subject=text)
    return host.strip("[]") or "127.0.0.1", int(port)


def http_url(text: str) -> str:
    """The address of a server, without a slash at its end. Raises Usage for anything but http://HOST[:PORT]."""
    try:
        parts = urlsplit(text)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or not text.isprintable() or " " in text:
        raise Usage(
            "bad_address", f"{text} is not a URL of a server.", subject=text, next_step="Write http://HOST:PORT."
        )
    return text.rstrip("/")


Target = Annotated[Path, typer.Argument(metavar="DIR", help="The directory of `adaptory mirror` on this host.")]
Upstream = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="A server for models that no route names, such as the base. May be repeated."),
]


@root.command()
def route(
    directory: Target,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:8000",
    upstream: Upstream = None,
) -> None:
    """Pass requests of the OpenAI API to servers, with the name of a channel turned into a version.

    Reads DIR/routes.json, which a mirror keeps. Answers say in x-served-model which version gave them. /metrics counts
    requests, seconds, tokens and finish reasons by version.
    """
    import uvicorn

    from registry.agent.directory import MirrorDirectory
    from registry.agent.front import Front

    host, port = address(listen)
    app = Front(MirrorDirectory(directory), list(map(http_url, upstream or ()))).app()
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)


PYTHON = "python"
_STEP = "Such as --prompts sql=sql.txt, with one prompt per line."
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")]
Form = Annotated[
    str, typer.Option("--to", metavar="FORM", help="python (the default), vllm-semantic-router or litellm.")
]
Examples = Annotated[
    list[str] | None,
    typer.Option("--prompts", metavar="MEMBER=FILE", help="Example prompts of a member, or of `base`, one per line."),
]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", metavar="NAME", help="The base's name on the servers; by default its own.")
]


@root.command()
def router(
    ref: Ref, to: Form = PYTHON, prompts: Examples = None, base_model: BaseModel = None, output: Output = None
) -> None:
    """Write the router of a set for another gateway: a Python program that needs no other package.

    Its function `choose` returns the name of the adapter that should answer a prompt, as `adaptory mirror` names it.
    With --to, writes a part of the configuration of vLLM's semantic router or of LiteLLM instead: these compare example
    prompts, which you give, by embeddings. `adaptory route` needs no such file.
    """
    from composer.formats.sets.adapter_set import SET_FILE, read_set
    from composer.formats.sets.python_router import to_python
    from composer.formats.sets.semantic_routers import FORMS

    if to not in (PYTHON, *FORMS):
        step = f"Choose one of {', '.join((PYTHON, *FORMS))}."
        raise Usage("bad_setting", f"--to: {to!r} is not a known form.", subject="--to", next_step=step)
    if to == PYTHON and prompts:
        step = "Leave it out, or choose another form with --to."
        raise Usage(
            "bad_setting", "--prompts: the program has the set's own router.", subject="--prompts", next_step=step
        )
    examples = dict(map(_examples, prompts or ()))
    with connected() as connection:
        release = resolved(connection, ref)
        if release.kind != "set":
            raise Usage("not_a_set", f"{release.name} is not a set.", subject=release.name)
        made = read_set(release_directory(connection, release) / SET_FILE)
    if to == PYTHON:
        text = to_python(made, output.name) if output else to_python(made)
    else:
        text = FORMS[to](made, release.name.replace(":", "@"), examples, base_model or release.base.name)
    if output is None:
        render.as_it_is(text)
    else:
        output.write_text(text, encoding="utf-8")
        render.say(f"{output}: chooses among {', '.join(sorted(made.members))}")


def _examples(given: str) -> tuple[str, list[str]]:
    """The member and the prompts of `MEMBER=FILE`."""
    from composer.formats.recipes.suite import MAX_FILE_BYTES
    from composer.formats.untrusted import read_text

    member, equals, file = given.partition("=")
    if not equals or not member or not file:
        raise Usage("bad_setting", f"--prompts: {given!r} is not MEMBER=FILE.", subject="--prompts", next_step=_STEP)
    return member, [line for line in read_text(Path(file), MAX_FILE_BYTES).splitlines() if line.strip()]
