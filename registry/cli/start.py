"""The console entry point: handles interrupts before any heavy import, and starts and exits fast."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until interrupts are handled: a shell shows 130, and no traceback

import atexit
import gc
import sys

from registry.cli.console.interrupt import INTERRUPTED, interrupts

OBJECTS_TO_COLLECT = 400_000
"""New objects before the garbage collector runs (700 by default). Importing makes lasting objects, 170,000 by torch and
210,000 by the command line: scanning them repeatedly took 0.2 s of torch's 1.4, and scanning once 0.05 of a `list`."""


def main() -> None:
    """Runs the command line. Interrupted, it prints one line without a traceback and exits with 130."""
    gc.set_threshold(OBJECTS_TO_COLLECT)
    atexit.register(gc.freeze)  # process exit frees everything; collecting cycles took 0.4 s
    interrupts.install()
    _refuse_other_composer()
    from registry.cli.main import main as run

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


def _refuse_other_composer() -> None:
    """Ends with one sentence if another package has the name that everything below imports from."""
    from registry.environment.composer_name import refuse_other_composer
    from registry.errors import Unavailable

    try:
        refuse_other_composer()
    except Unavailable as error:
        print(f"error: {error.detail}\nnext: {error.next_step}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
