"""The console entry point: handles interrupts before any heavy import, loads commands, turns errors into messages."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until interrupts are handled: a shell shows 130, and no traceback

import atexit
import gc
import logging
import os
import sys
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from registry.cli.console.interrupt import INTERRUPTED, interrupts

if TYPE_CHECKING:
    import typer

MODULES = {
    "composition": ("compose", "conflicts", "local", "recipe_file"),
    "evaluation": ("evaluation", "guards", "quality"),
    "operations": (
        *("access", "audit", "backup", "changes", "doctor", "jobs", "maintenance", "operations", "profiles"),
        *("publisher", "webhook"),
    ),
    "releases": (
        *("base", "canary", "diff", "evidence", "follow", "hub", "inspection", "policy", "promotion", "release"),
        *("rollout", "search", "transfer", "withdrawal"),
    ),
    "serving": ("mirror", "routing"),
}  # fmt: skip
"""Each adds its commands to `root` of `console/groups.py` when it is imported."""

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

OBJECTS_TO_COLLECT = 400_000
"""New objects before the garbage collector runs (700 by default). Importing makes lasting objects, 170,000 by torch and
210,000 by the command line: scanning them repeatedly took 0.2 s of torch's 1.4, and scanning once 0.05 of a `list`."""


def main() -> None:
    """Runs the command line. Interrupted, it prints one line without a traceback and exits with 130."""
    gc.set_threshold(OBJECTS_TO_COLLECT)
    atexit.register(gc.freeze)  # process exit frees everything; collecting cycles took 0.4 s
    interrupts.install()
    _refuse_other_composer()
    load_commands()
    try:
        try:
            interrupts.raising = True
            run()
        finally:
            interrupts.raising = False
    except BaseException as error:
        if not interrupts.happened and not isinstance(error, KeyboardInterrupt):
            raise
        interrupts.say()  # any error follows from the interrupt: a half-imported module, a closed socket
        sys.exit(INTERRUPTED)


def run() -> None:
    """Runs the command line in this process.

    Exit codes: 0 ok, 1 refused, 2 usage, 3 not found, 4 conflict, 5 not allowed, 6 invalid input, 7 unavailable.
    """
    from composer.errors import ComposerError
    from registry.cli.console import render
    from registry.errors import RegistryError, Unavailable

    for name, value in (THREADS | QUIET).items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns that a base is streamed, which is intended
    logging.getLogger("huggingface_hub").propagate = False  # it prints what a hub warns of by a handler of its own
    try:
        load_commands()(_global_options_first(sys.argv[1:]), prog_name="adaptory")
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


@cache
def load_commands() -> "typer.Typer":
    """Imports the modules of all commands: each adds its own to `adaptory`."""
    from registry.cli.console.examples import add_examples
    from registry.cli.console.groups import root

    for folder, modules in MODULES.items():
        for module in modules:
            import_module(f"registry.cli.{folder}.{module}")
    add_examples(root)
    return root


def _refuse_other_composer() -> None:
    """Ends with one sentence if another package has the name that everything below imports from."""
    from registry.environment.composer_name import refuse_other_composer
    from registry.errors import Unavailable

    try:
        refuse_other_composer()
    except Unavailable as error:
        print(f"error: {error.detail}\nnext: {error.next_step}", file=sys.stderr)
        sys.exit(error.exit_code)


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
