"""`adaptory`: builds the commands; turns errors into messages and exit codes."""

import logging
import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from composer.errors import ComposerError
from registry.cli.console import render
from registry.cli.console.examples import add_examples
from registry.cli.console.groups import root
from registry.cli.console.interrupt import INTERRUPTED, interrupts
from registry.errors import RegistryError, Unavailable

MODULES = {
    "composition": ("compose", "conflicts", "local"),
    "evaluation": ("evaluation", "quality"),
    "operations": (
        "access", "backup", "doctor", "jobs", "maintenance", "operations", "profiles", "publisher", "webhook",
    ),
    "releases": (
        *("base", "canary", "diff", "evidence", "follow", "hub", "inspection", "promotion", "release", "rollout"),
        "search",
        "transfer",
    ),
    "serving": ("mirror", "route", "router"),
}  # fmt: skip
"""Each adds its commands to `root` when it is imported."""

EXTRAS = {
    "torch": "composer", "transformers": "models", "boto3": "s3", "botocore": "s3", "psycopg": "postgres",
    "cryptography": "sign", "joserfc": "oidc", "lm_eval": "eval", "opentelemetry": "otel", "datasets": "eval",
}  # fmt: skip
"""The extra that installs each lazily imported package."""

THREADS = {"OPENBLAS_NUM_THREADS": "1"}
"""Read when numpy is imported. Its products here are small: on busy cores, waiting for a second thread made comparing
two adapters of a 7B model take 31 s instead of 3 s."""

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error", "DISABLE_MULTIPROC": "1",
}  # fmt: skip
"""Read when transformers and the evaluation harness are imported: stderr is for our own progress and messages, and the
harness starts no processes for its standard errors."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"adaptory {version('adaptory')}")
        raise typer.Exit


@root.callback()
def options(
    profile: Annotated[
        str | None, typer.Option(help="Use the registry of this profile; local is the embedded one.")
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Show full tables, however wide.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """The release registry and composer for LoRA adapters."""
    render.wide = wide
    if profile is not None:
        os.environ["ADAPTORY_PROFILE"] = profile


for folder, modules in MODULES.items():
    for module in modules:
        import_module(f"registry.cli.{folder}.{module}")
add_examples(root)


def main() -> None:
    """Exit codes: 0 ok, 1 refused, 2 usage, 3 not found, 4 conflict, 5 not allowed, 6 invalid input, 7 unavailable."""
    for name, value in (THREADS | QUIET).items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns that a base is streamed, which is intended
    logging.getLogger("huggingface_hub").propagate = False  # it prints what a hub warns of by a handler of its own
    try:
        root(_global_options_first(sys.argv[1:]), prog_name="adaptory")
    except (RegistryError, ComposerError, OSError) as error:
        sys.exit(render.fail(error, "--json" in sys.argv))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        failure = Unavailable(
            "extra_missing", f"This needs {error.name}.", next_step=f"Install adaptory with its extra `{extra}`."
        )
        sys.exit(render.fail(failure, "--json" in sys.argv))
    except SystemExit as end:
        if end.code == INTERRUPTED:
            interrupts.say(": ".join(_notes_of_interrupt(end)))
        raise


def _global_options_first(words: list[str]) -> list[str]:
    """Moves global options to the front: `adaptory list --profile work` becomes `adaptory --profile work list`."""
    for index, word in enumerate(words):
        if word == "--":
            break
        if word == "--wide" or word.startswith("--profile="):
            return [word, *_global_options_first([*words[:index], *words[index + 1 :]])]
        if word == "--profile" and index + 1 < len(words):
            return [word, words[index + 1], *_global_options_first([*words[:index], *words[index + 2 :]])]
    return words


def _notes_of_interrupt(end: BaseException) -> list[str]:
    """The notes that the interrupted command attached."""
    cause: BaseException | None = end
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return list(getattr(cause, "__notes__", ()))


if __name__ == "__main__":
    main()
