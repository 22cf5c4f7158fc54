"""The console's entry point: ready for an interrupt before anything heavy is imported, and quick to start and end."""

import atexit
import gc
import sys

from registry.cli.interrupt import INTERRUPTED, interrupts

OBJECTS_TO_COLLECT = 200_000
"""New objects after which cycles are looked for (700 in a plain interpreter). Importing torch makes 170,000 that stay:
looking through them time and again took 0.2 s of its 1.4."""


def main() -> None:
    """Runs the command line; its exit code is 130, after one line and no traceback, when it was interrupted."""
    gc.set_threshold(OBJECTS_TO_COLLECT)
    atexit.register(gc.freeze)  # what lives to the end is freed by the end: to look for cycles in it took 0.4 s
    interrupts.install()
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
        interrupts.say()  # whatever was raised is what came of the interrupt: a half-imported module, a closed socket
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
